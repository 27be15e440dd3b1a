# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The guide as an importance proposal: draws, log weights, and what the weights make of the draws.

    w(z) = log p(x, z) − log q(z),  z ~ q      ELBO = E[w],    log p(x) = log E[exp w],    E_p[h] = E[h exp w]/E[exp w]

One draw is one particle of NumPyro's ``Trace_ELBO``, whose negative loss is w. Statistics are taken on the host, in
float64 whatever the fit's precision is.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax, random
from numpyro.handlers import replay, seed
from numpyro.infer import SVI
from numpyro.infer.svi import SVIRunResult, SVIState
from numpyro.infer.util import log_density
from tqdm.auto import tqdm

from numpyro_natgrad.diagnostics import arviz_compat
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.infer.fisher import Estimate
from numpyro_natgrad.infer.fit import FitResult
from numpyro_natgrad.options import StructureError

#: Draws between two ticks of the progress bar, and those that are drawn in one batch.
CHUNK, BATCH = 500, 50
#: Seconds after which a progress bar appears.
PATIENCE = 2.0
#: Finite log weights below which there is no tail to fit: a fifth of them has to be five (Vehtari et al. 2024).
TAIL = 25
#: Log weights that differ by less than so many roundings are equal.
ROUNDINGS = 64


class Fit(NamedTuple):
    """What is judged: an ``SVI`` with the (constrained) parameters, and the arguments of model and guide."""

    svi: SVI
    params: Params
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def vectorized(self) -> bool:
        """Whether draws may be taken in a batch: as the loss takes its particles."""
        return bool(getattr(self.svi.loss, "vectorize_particles", True))


class Draws(NamedTuple):
    """Independent draws of the guide; ``S`` of them.

    :ivar log_weights: ``(S,)``, nats.  :ivar values: of each site, constrained, ``(S, *shape)``.
    :ivar latent: the sites among them that the guide draws.  :ivar asked: those that were asked for.
    :ivar subsampled: plates that saw a minibatch only.  :ivar dtype: that the log weights were computed in.
    """

    log_weights: np.ndarray
    values: dict[str, np.ndarray]
    latent: tuple[str, ...]
    asked: tuple[str, ...]
    subsampled: tuple[str, ...]
    dtype: Any


class Weights(NamedTuple):
    """Pareto-smoothed weights.

    :ivar normalised: ``(S,)``, with sum 1; zero where the log weight was not finite.
    :ivar k_hat: shape of their tail.  :ivar log_evidence: log p(x), nats.
    """

    normalised: np.ndarray
    k_hat: float
    log_evidence: Estimate

    @property
    def ess(self) -> float:
        """1/Σw²: as many draws of the posterior would say as much of a mean (Kong 1992)."""
        return 1 / float(np.sum(self.normalised**2))


class Moments(NamedTuple):
    """Mean and standard deviation of a site's entries, and the standard error of the mean; ``shape`` of the site."""

    mean: np.ndarray
    sd: np.ndarray
    standard_error: np.ndarray


def fitted(svi: SVI, result: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Fit:
    """Read the parameters out of what a fit returned."""
    merged = {**getattr(svi, "static_kwargs", {}), **kwargs}
    if isinstance(result, SVIRunResult | FitResult):
        return Fit(svi, {**result.params, **(result.state.mutable_state or {})}, args, merged)
    if isinstance(result, SVIState):
        return Fit(svi, {**svi.get_params(result), **(result.mutable_state or {})}, args, merged)
    if isinstance(result, Mapping):
        return Fit(svi, dict(result), args, merged)
    raise TypeError(
        f"`{type(result).__name__}` is no fit: expected what `svi.run` or `fit` returns, a state of `svi.update`, or "
        "the dict of `svi.get_params(state)`."
    )


def draw(fit: Fit, key: jax.Array, num_draws: int, sites: Any = None) -> Draws:
    """Draw from the guide and weigh every draw; a progress bar appears where that takes long.

    :param sites: names of sites of the model, latent or deterministic, asked for beside all latents (default: these).
    :raises StructureError: if the model has latents that the guide does not draw, or no site of a name.
    """
    subsampled, latent, asked = _look(fit, key, sites)
    one = lambda k: _weigh(fit, k, tuple(dict.fromkeys(latent + asked)))
    each = jax.jit(lambda keys: lax.map(one, keys, batch_size=BATCH if fit.vectorized else None))
    keys = random.split(key, num_draws)
    starts = tqdm(range(0, num_draws, CHUNK), desc="draws", unit=f"×{CHUNK}", delay=PATIENCE, leave=False)
    chunks = [jax.device_get(each(keys[start : start + CHUNK])) for start in starts]
    log_weights, values = jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)
    return Draws(np.asarray(log_weights, np.float64), values, latent, asked, subsampled, log_weights.dtype)


def _weigh(fit: Fit, key: jax.Array, names: tuple[str, ...]) -> tuple[jax.Array, Params]:
    log_weight, _, trace = _traces(fit, key)
    return log_weight, {name: trace[name]["value"] for name in names}


def _traces(fit: Fit, key: jax.Array) -> tuple[jax.Array, Any, Any]:
    model_key, guide_key = random.split(key)  # as in ``Trace_ELBO``
    log_q, guided = log_density(seed(fit.svi.guide, guide_key), fit.args, fit.kwargs, fit.params)
    model = replay(seed(fit.svi.model, model_key), guided)
    log_p, model_sites = log_density(model, fit.args, fit.kwargs, fit.params)
    return log_p - log_q, guided, model_sites


def _look(fit: Fit, key: jax.Array, sites: Any) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The plates that subsample, the latents, and the names of the sites asked for; traced, not run."""
    found: list[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = []

    def look(key: jax.Array) -> None:
        _, guided, model_sites = _traces(fit, key)
        plates = [(n, s["args"]) for n, s in model_sites.items() if s["type"] == "plate"]
        subsampled = tuple(n for n, (size, seen) in plates if seen is not None and seen < size)
        found.append((subsampled, *_names(guided, model_sites, sites)))

    jax.eval_shape(look, key)
    return found[0]


def _names(guided: Any, model_sites: Any, sites: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    latent = [n for n, s in model_sites.items() if s["type"] == "sample" and not s["is_observed"]]
    if undrawn := [n for n in latent if n not in guided]:
        raise StructureError(
            f"the guide does not draw {undrawn} of the model: expected a value for every latent. A latent that "
            "`TraceEnum_ELBO` sums over has no importance weight here: sum over it in the model "
            "(`dist.MixtureSameFamily`, `numpyro.factor`), or draw it in the guide."
        )
    known = {n for n, s in model_sites.items() if s["type"] == "deterministic"} | set(latent)
    asked = latent if sites is None else [sites] if isinstance(sites, str) else list(sites)
    if unknown := [n for n in asked if n not in known]:
        raise StructureError(f"`sites={sites!r}`: the model has no {unknown}; expected some of {sorted(known)}.")
    return tuple(latent), tuple(asked)


def elbo(log_weights: np.ndarray) -> Estimate:
    """Mean of the log weights, nats: −∞ or NaN if a draw says so."""
    with np.errstate(invalid="ignore"):
        return _estimate(np.mean(log_weights), np.std(log_weights, ddof=1) / math.sqrt(log_weights.size))


def smooth(log_weights: np.ndarray, dtype: Any) -> Weights:
    """Smooth the largest weights; draws whose log weight is not finite get none.

    The standard error is that of log Ẑ by the delta method: √(Σw̄² − 1/S). With k-hat above 0.7 it is too small.

    :param dtype: that the log weights were computed in. Where they differ by rounding alone k-hat is 0; infinite where
        there are too few for a tail.
    """
    finite = np.isfinite(log_weights)
    known, count = log_weights[finite], log_weights.size
    if known.size == 0:
        return Weights(np.zeros(count), math.inf, _estimate(-math.inf, math.nan))
    rounding = ROUNDINGS * float(np.finfo(dtype).eps) * max(1.0, float(np.abs(known).max()))
    if known.size < TAIL:
        smoothed, k_hat = known - np.logaddexp.reduce(known), math.inf
    elif np.ptp(known) <= rounding:
        smoothed, k_hat = np.full(known.size, -math.log(known.size)), 0.0
    else:
        smoothed, k_hat = arviz_compat.psis(known)
    normalised = np.zeros(count)
    normalised[finite] = np.exp(smoothed)
    # Smoothing leaves the smallest weights alone: what they were divided by is the sum of all of them.
    least = int(np.argmin(known))
    log_sum = known[least] - smoothed[least]
    error = math.sqrt(max(float(np.sum(normalised**2)) - 1 / count, 0.0))
    return Weights(normalised, k_hat, _estimate(log_sum - math.log(count), error))


def moments(values: np.ndarray, weights: np.ndarray | None = None) -> Moments:
    """Moments of draws, ``(S, *shape)``, self-normalised where there are weights (Owen 2013, chapter 9).

    The mean's standard error is √(Σ w̄²(z − mean)²).
    """
    z = np.asarray(values, np.float64)
    w = np.full(len(z), 1 / len(z)) if weights is None else weights
    z, w = z[w > 0], w[w > 0]  # what counts nothing may be no number
    mean = np.tensordot(w, z, 1)
    square = (z - mean) ** 2
    return Moments(mean, np.sqrt(np.tensordot(w, square, 1)), np.sqrt(np.tensordot(w**2, square, 1)))


def _estimate(value: Any, error: Any) -> Estimate:
    return Estimate(np.float64(value), np.float64(error))  # type: ignore[arg-type]
