# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""A verdict on the answer, not on the optimizer: how near q is to the posterior, and what to do if it is not near.

    w(z) = log p(x, z) − log q(z),  z ~ q:      k-hat of the tail of exp w,   ELBO = E[w],   log p(x) = log E[exp w]

``print(verdict(svi, result, key, *args))`` is a table that ends with advice. The same weights correct the guide's
moments (:mod:`.importance`), and the curvature of the ELBO corrects its covariance (:mod:`.linear_response`).
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro.infer import SVI

from numpyro_natgrad.diagnostics import arviz_compat, importance, linear_response, recommendation
from numpyro_natgrad.diagnostics.importance import BATCH, Draws, Fit, Moments, Weights
from numpyro_natgrad.infer.fisher import Estimate
from numpyro_natgrad.options import StructureError

#: Rows of the table; of more entries, those that are most off are shown.
ROWS = 30
#: Draws that the Hessian of the linear response is a mean over.
PARTICLES = 256

_MINIBATCH = (
    "the plates {} see a minibatch: importance weights are those of the minibatch, and every draw has another one. "
    "Pass all of the data (`subsample_size=None`) for a verdict on the answer."
)


class Verdict(NamedTuple):
    """What :func:`verdict` found; ``print`` shows it as a table. ``S`` draws; all nats and moments in float64.

    :ivar k_hat: Pareto shape of the largest weights: below ``threshold`` they can be trusted. NaN for a point.
    :ivar threshold: min(1 − 1/log₁₀ S, 0.7).
    :ivar elbo: E[w], with its standard error, nats.
    :ivar log_evidence: log p(x) from smoothed weights, with its standard error, nats.
    :ivar ess: effective number of draws, 1/Σw̄².
    :ivar decrement: nats that a Newton step in means and standard deviations would gain; NaN if unknown.
    :ivar guide: moments of each site under the guide.  :ivar weighted: importance-weighted ones.
    :ivar linear: standard deviations by linear response, for each site, or ``{}``; ``missing`` says why.
    :ivar draws: of each site, ``(S, *shape)``.
    :ivar log_weights: as drawn, ``(S,)``, nats.  :ivar weights: smoothed, with sum 1, ``(S,)``.
    :ivar advice: what to do.
    """

    k_hat: float
    threshold: float
    elbo: Estimate
    log_evidence: Estimate
    ess: float
    newton_decrement: float
    guide: dict[str, Moments]
    weighted: dict[str, Moments]
    linear: dict[str, np.ndarray]
    missing: str
    draws: dict[str, np.ndarray]
    log_weights: np.ndarray
    weights: np.ndarray
    advice: str

    def __str__(self) -> str:
        return "\n".join([*_head(self), "", *_body(self), "", self.advice])

    def __repr__(self) -> str:
        """The table: all draws of all sites are nothing to read in a notebook."""
        return str(self)


def verdict(
    svi: SVI,
    result: Any,
    rng_key: jax.Array,
    *args: Any,
    num_draws: int = 4000,
    sites: Sequence[str] | str | None = None,
    **kwargs: Any,
) -> Verdict:
    """Judge a fit by importance sampling from its guide.

    Any guide whose draws have a density will do, and any optimizer. Linear response needs a Gaussian guide of at most
    256 latents, and an ``svi`` after ``svi.init`` or ``svi.run``.

    :param svi: model and guide; its loss and its optimizer do not matter.
    :param result: what ``svi.run`` returned, a state of ``svi.update``, or the dict of ``svi.get_params(state)``.
    :param rng_key: of the draws.
    :param args: of the model and the guide, with all of the data. :param kwargs: likewise.
    :param num_draws: S, 100 at least.
    :param sites: latent or deterministic sites of the model to tabulate; all latents by default. (A model's own
        argument of this name, or of ``num_draws``, is given by position.)
    :raises StructureError: if the guide does not draw all latents of the model, or there is no site of a name.
    :raises TypeError: if ``num_draws`` is no integer.
    :raises ValueError: with fewer than 100 draws.
    """
    if isinstance(num_draws, bool) or not isinstance(num_draws, int | np.integer):
        raise TypeError(f"`num_draws={num_draws!r}`: expected an integer, such as 4000.")
    if num_draws < 100:
        raise ValueError(f"`num_draws={num_draws}`: expected 100 or more; a tail cannot be read off fewer.")
    fit = importance.fitted(svi, result, args, kwargs)
    keys = random.split(rng_key)
    drawn = importance.draw(fit, keys[0], num_draws, sites)
    if drawn.subsampled:
        warnings.warn(_MINIBATCH.format(list(drawn.subsampled)), stacklevel=2)
    points = tuple(name for name in drawn.latent if _is_point(drawn.values[name]))
    whole = bool(points) and len(points) == len(drawn.latent)
    linear, newton_decrement, missing, flat = _linear(fit, keys[1], num_draws, drawn.asked)
    judged = _judged(drawn, whole)
    elbo = importance.elbo(drawn.log_weights)
    guide = {name: importance.moments(z) for name, z in drawn.values.items()}
    weighted = {name: importance.moments(z, judged.normalised) for name, z in drawn.values.items()}
    asked = lambda x: {name: x[name] for name in drawn.asked}
    case = recommendation.Case(
        recommendation.ancestors(svi.guide),
        sum(guide[name].mean.size for name in drawn.latent),
        num_draws,
        int(np.sum(~np.isfinite(drawn.log_weights))),
        judged.k_hat,
        judged.ess,
        float(judged.log_evidence.value - elbo.value),
        _rounding(drawn),
        newton_decrement,
        flat,
        points,
        whole,
        drawn.subsampled,
        _worst(guide, weighted),
    )
    return Verdict(
        judged.k_hat,
        recommendation.threshold(num_draws),
        elbo,
        judged.log_evidence,
        judged.ess,
        newton_decrement,
        asked(guide),
        asked(weighted),
        linear,
        missing,
        asked(drawn.values),
        drawn.log_weights,
        judged.normalised,
        recommendation.advise(case),
    )


def to_arviz(judged: Verdict, rng_key: jax.Array | None = None, **labels: Any) -> Any:
    """The draws for ArviZ: ``InferenceData`` in ArviZ 0.x, ``DataTree`` in 1.x, with one chain.

    Draws are of the guide; ``sample_stats`` has the ``log_weight`` (smoothed, normalised) and ``lp_minus_lq`` of each.

    :param judged: of :func:`verdict`.
    :param rng_key: if given, draws are resampled by their weights, so that all of ArviZ takes them as posterior draws;
        there are no weights then.
    :param labels: ``dims`` and ``coords``, as ArviZ takes them.
    """
    count = judged.weights.size
    if rng_key is not None:
        chosen = np.asarray(random.choice(rng_key, count, (count,), p=jnp.asarray(judged.weights)))
        drawn = {name: z[chosen] for name, z in judged.draws.items()}
        return arviz_compat.inference_data(drawn, {"lp_minus_lq": judged.log_weights[chosen]}, **labels)
    with np.errstate(divide="ignore"):
        statistics = {"log_weight": np.log(judged.weights), "lp_minus_lq": judged.log_weights}
    return arviz_compat.inference_data(judged.draws, statistics, **labels)


def _is_point(values: np.ndarray) -> bool:
    return bool(np.issubdtype(values.dtype, np.floating) and np.all(values == values[0]))


def _rounding(drawn: Draws) -> float:
    """Of a log weight, nats."""
    known = drawn.log_weights[np.isfinite(drawn.log_weights)]
    return float(np.abs(known).mean() * np.finfo(drawn.dtype).eps) if known.size else 0.0


def _judged(drawn: Draws, whole: bool) -> Weights:
    if whole:  # a point has no density, and no weights
        unknown = Estimate(np.float64(math.nan), np.float64(math.nan))  # type: ignore[arg-type]
        count = drawn.log_weights.size
        return Weights(np.full(count, 1 / count), math.nan, unknown)
    return importance.smooth(drawn.log_weights, drawn.dtype)


def _linear(fit: Fit, key: jax.Array, num_draws: int, names: tuple[str, ...]) -> tuple[Any, float, str, bool]:
    """Standard deviations of each site by linear response, the decrement, why there are none, and whether L is flat.

    The corrected Gaussian over the unconstrained latents is drawn from, and its draws go the way of the guide's own.
    """
    try:
        latents = linear_response.gaussian_latents(fit, key)
        if 2 * latents.loc.size > linear_response.DENSE_LIMIT:
            return {}, math.nan, f"{latents.loc.size} latents are many: call `linear_response` for them", False
        corrected = linear_response.respond(latents, key, PARTICLES)
    except (StructureError, ValueError) as error:
        return {}, math.nan, str(error), isinstance(error, linear_response.NoMinimumError)
    factor = jnp.linalg.cholesky(corrected.covariance)

    def one(key: jax.Array) -> Any:
        z = latents.loc + factor @ random.normal(key, latents.loc.shape, latents.loc.dtype)
        trace = linear_response.place(latents, z)[1]
        return {name: trace[name]["value"] for name in names}

    many = lambda keys: lax.map(one, keys, batch_size=BATCH if fit.vectorized else None)
    values = jax.device_get(jax.jit(many)(random.split(key, num_draws)))
    return {n: importance.moments(values[n]).sd for n in names}, float(corrected.newton_decrement), "", False


def _worst(guide: dict[str, Moments], weighted: dict[str, Moments]) -> tuple[str, float]:
    """The entry whose standard deviation is most off, with the ratio of the guide's to the importance-weighted one."""
    sure = lambda mean, sd: sd > np.finfo(np.float32).eps * abs(mean)  # a constant's is its rounding
    rows = [(label, a[1] / b[1]) for label, a, b in _entries(guide, weighted) if sure(*a) and sure(*b)]
    return max(rows, key=lambda row: abs(math.log(row[1])), default=("", 1.0))


def _entries(guide: dict[str, Moments], weighted: dict[str, Moments]) -> list[tuple[str, Any, Any]]:
    """Label, (mean, sd) of the guide, and of the weighted draws, of every entry of every site."""
    pairs = [(name, at, guide[name], weighted[name]) for name in guide for at in np.ndindex(guide[name].mean.shape)]
    return [(linear_response.label(n, at), (a.mean[at], a.sd[at]), (b.mean[at], b.sd[at])) for n, at, a, b in pairs]


def _head(v: Verdict) -> list[str]:
    count = v.weights.size
    k_hat, limit = recommendation.apart(v.k_hat, v.threshold)
    rows = [
        ("k-hat", k_hat, f"{recommendation.grade(v.k_hat, count)}; trustworthy below {limit}"),
        ("ELBO", _shown(v.elbo), "nats"),
        ("log evidence", _shown(v.log_evidence), "nats, Pareto-smoothed"),
        ("effective draws", f"{v.ess:.0f}", f"of {count}"),
    ]
    if not math.isnan(v.newton_decrement):
        rows.append(("decrement", f"{v.newton_decrement:.2f}", "nats that a Newton step would gain"))
    width = max(len(value) for _, value, _ in rows)
    return [f"{name:<16}{value:>{width}}  {remark}" for name, value, remark in rows]


def _shown(estimate: Estimate) -> str:
    return f"{float(estimate.value):.2f} ± {float(estimate.standard_error):.2f}"


def _body(v: Verdict) -> list[str]:
    """Moments of every entry; of many, the ones that are most off, in their order."""
    linear = [sd for x in v.linear.values() for sd in np.ravel(x)]
    entries = _entries(v.guide, v.weighted)
    off = [abs(a[0] - b[0]) / (b[1] or 1.0) + abs(a[1] - b[1]) / (b[1] or 1.0) for _, a, b in entries]
    chosen = sorted(np.argsort(off)[::-1][:ROWS])
    width = max([len("site"), *(len(entries[i][0]) for i in chosen)])
    blank = " " * width
    head = [
        f"{blank}  {'guide':>21}  {'importance-weighted':>21}",
        f"{'site':<{width}}" + f"  {'mean':>10} {'sd':>10}" * 2,
    ]
    if linear:
        head = [f"{head[0]}  {'linear':>10}", f"{head[1]}  {'response':>10}"]
    lines = [_line(entries[i], width, linear[i] if linear else None) for i in chosen]
    rest = [f"… and {len(entries) - len(chosen)} more, which are less off"] if len(entries) > len(chosen) else []
    note = [f"linear response: {v.missing}"] if v.missing else []
    return [*head, *lines, *rest, *note]


def _line(entry: tuple[str, Any, Any], width: int, linear: float | None) -> str:
    label, guide, weighted = entry
    numbers = "".join(f"  {mean:>10.4g} {sd:>10.4g}" for mean, sd in (guide, weighted))
    return f"{label:<{width}}{numbers}" + (f"  {linear:>10.4g}" if linear is not None else "")
