# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""The verdict on a fitted guide: whether it is close enough to the posterior, and what to do if it is not.

    w(z) = log p(x, z) − log q(z),  z ~ q:      k-hat of the tail of exp w,   ELBO = E[w],   log p(x) = log E[exp w]

``print(verdict(svi, result, rng_key, *args))`` shows a table that ends with a recommendation. The weights exp w correct
the moments of the guide (:mod:`.importance`), and the Hessian of the ELBO corrects the covariance of a Gaussian guide
(:mod:`.linear_response`).
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import random
from numpyro.infer import SVI

from numpyro_natgrad.compilation.data import traceable
from numpyro_natgrad.compilation.devices import fetch
from numpyro_natgrad.compilation.disk_cache import disk_cache
from numpyro_natgrad.compilation.kept import jit_for
from numpyro_natgrad.compilation.threads import one_blas_thread
from numpyro_natgrad.diagnostics import importance, linear_response, mixture, recommendation, short_chains
from numpyro_natgrad.diagnostics.importance import Draws, Fitted, FittedGuide, ImportanceWeights, Inspection, Moments
from numpyro_natgrad.diagnostics.mixture import Mixture
from numpyro_natgrad.diagnostics.short_chains import ShortChains
from numpyro_natgrad.infer.arguments import check_key
from numpyro_natgrad.infer.convergence import Judgement
from numpyro_natgrad.infer.fisher import Estimate
from numpyro_natgrad.infer.judge import judge_of
from numpyro_natgrad.options import CONSTANTS, StructureError

#: Rows of the printed table: about one screen.
TABLE_ROWS = 30
#: Draws that the Hessian of the linear response is a mean over: its standard deviations are then off by a few per cent.
HESSIAN_DRAWS = 256
#: Short chains that start from the draws: a mean over them has a standard error of at most 0.07 standard deviations.
NUM_CHAINS = 200
#: Entries of data and latents above which no chain runs by default: 200 chains take 72,000 gradients of the log
#: density or more, which is a minute for 10⁵ entries at a few nanoseconds each.
CHAIN_ENTRIES = 100_000
#: Draws below which :func:`verdict` refuses: the fitted tail would have fewer than 20 weights.
MIN_DRAWS = 100

_MINIBATCH = (
    "the plates {} see a minibatch: each draw has the importance weight of another minibatch. Pass all of the data "
    "(`subsample_size=None`) for a verdict on the whole posterior, to a guide that makes its plates anew in each call "
    "(`AutoNormal(model, create_plates=…)`): an autoguide else goes on to draw as many rows as it was set up with."
)


class Source(NamedTuple):
    """Model and guide at the fitted parameters, and all draws of a verdict: of the guide, the mixture, short chains."""

    fitted: FittedGuide
    drawn: Draws
    mixture: Mixture | None = None
    chains: ShortChains | None = None


class Verdict(NamedTuple):
    """What :func:`verdict` returns for ``S`` draws, in float64; ``print`` shows it as a table.

    :ivar float k_hat: Pareto shape of the guide's largest weights, to be trusted below ``threshold``; NaN for a point.
    :ivar float threshold: min(1 − 1/log₁₀ S, 0.7).
    :ivar Estimate elbo: E[w] with its standard error, nats.
    :ivar Estimate log_evidence: log p(x) by the smoothed weights, with its standard error, nats.
    :ivar float ess: effective number of draws, 1/Σw̄², behind ``importance_weighted``.
    :ivar float newton_decrement: expected remaining gain within the family, nats, by the judge of :func:`.fit`
        (:mod:`.judge`); unbiased, and so slightly negative at times; NaN if unknown.
    :ivar float newton_decrement_error: its standard error, nats.
    :ivar dict guide: :class:`.Moments` of each site under the guide.
    :ivar dict importance_weighted: importance-weighted :class:`.Moments` of each site, from draws of a mixture of the
        guide with wider distributions (:mod:`.mixture`) if their weights can be trusted and the guide is not nearly
        exact, else from those of the guide.
    :ivar dict linear_response: standard deviations of each site by linear response, or ``{}``.
    :ivar str linear_response_note: why ``linear_response`` is empty, or ``""``.
    :ivar dict draws: draws of each site, ``(S, *shape)``.
    :ivar numpy.ndarray log_weights: unsmoothed log weights, ``(S,)``, nats.
    :ivar numpy.ndarray weights: smoothed weights w̄ with sum 1, ``(S,)``.
    :ivar str recommendation: what to do, in a sentence or two.
    :ivar str answer: the field whose moments the recommendation is to use: ``"guide"``, ``"importance_weighted"``,
        ``"short_chains"``, or ``""`` if none of them can be used.
    :ivar dict short_chains: :class:`.Moments` of each site by short Markov chains from the weighted draws
        (:mod:`.short_chains`), or ``{}``; ``short_chains_note``: why there are none.
    :ivar Source source: model, guide and all of the draws, for :func:`.to_arviz`.
    :ivar float weighted_k_hat: Pareto shape of the mixture's largest weights; NaN without a mixture.
    """

    k_hat: float
    threshold: float
    elbo: Estimate
    log_evidence: Estimate
    ess: float
    newton_decrement: float
    newton_decrement_error: float
    guide: dict[str, Moments]
    importance_weighted: dict[str, Moments]
    linear_response: dict[str, np.ndarray]
    linear_response_note: str
    draws: dict[str, np.ndarray]
    log_weights: np.ndarray
    weights: np.ndarray
    recommendation: str
    source: Source | None = None
    weighted_k_hat: float = math.nan
    answer: str = ""
    short_chains: dict[str, Moments] = {}  # noqa: RUF012
    short_chains_note: str = ""

    def __str__(self) -> str:
        return "\n".join([*_summary_lines(self), "", *_moment_lines(self), "", self.recommendation])

    def __repr__(self) -> str:
        """The table, so that a notebook does not show all draws of all sites."""
        return str(self)


class _Response(NamedTuple):
    """Standard deviations of the tabulated sites by linear response; ``note`` says why there are none.

    ``widening`` is the largest of them, relative to the guide's, over all unconstrained latents.
    """

    sd: dict[str, np.ndarray]
    widening: float
    note: str
    no_maximum: bool
    mixture: Mixture | None = None


@one_blas_thread()
def verdict(
    svi: SVI,
    result: Fitted,
    rng_key: jax.Array,
    *args: Any,
    num_draws: int = 2000,
    num_chains: int | None = None,
    sites: Sequence[str] | str | None = None,
    progress_bar: bool = True,
    cache: Any = None,
    **kwargs: Any,
) -> Verdict:
    """Judge a fitted guide by importance sampling (Yao et al. 2018; Vehtari et al. 2024: :mod:`.recommendation`).

    Short Markov chains that start from the draws confirm its answer, or replace it (Wang et al. 2023:
    :mod:`.short_chains`). It works with any guide whose draws have a density, and after any optimizer. Linear response
    is computed for Gaussian guides of at most 256 latents.

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_natgrad import NaturalGradient, fit, verdict
        >>> def model(y):
        ...     z = numpyro.sample("z", dist.Normal(0, 10))
        ...     numpyro.sample("y", dist.Normal(z, 1), obs=y)
        >>> svi, y = SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO(num_particles=4)), jnp.array(2.0)
        >>> found = verdict(svi, fit(svi, random.key(0), y, progress_bar=False), random.key(1), y, num_draws=1000)
        >>> print(found)
        k-hat...good; trustworthy below 0.67
        ELBO...-3.25 ± 0.00  nats
        log evidence...-3.25 ± 0.00  nats, Pareto-smoothed
        ...
        The guide is good: k-hat ... Use it as it is.

    :param SVI svi: model and guide; linear response needs an earlier call of ``svi.init`` or ``svi.run``.
    :param result: what ``svi.run`` or :func:`.fit` returned, an ``SVIState``, or the dict of ``svi.get_params(state)``.
    :param jax.Array rng_key: key of the draws.
    :param args: positional arguments of model and guide, with all of the data.
    :param int num_draws: number S of draws, at least 100.
    :param int num_chains: number of short chains; 0 for none, else at least 25. By default 200, or none if data and
        latents have more than 100,000 entries: the chains take 360 to 840 gradients of the log density each.
    :param sites: names of latent or deterministic sites of the model to tabulate; all latent sites by default. (Pass a
        model's own argument named ``sites``, ``num_draws`` or ``num_chains`` by position.)
    :param bool progress_bar: show progress if draws or chains take longer than two seconds; nothing remains on the
        screen.
    :param cache: where compiled programs are kept for the next process, as for :func:`.fit`.
    :param kwargs: keyword arguments of model and guide.
    :return: estimates, moments and a recommendation.
    :raises StructureError: if the guide does not draw all latent sites of the model, or a name in ``sites`` is unknown.
    :raises TypeError: if ``num_draws`` or ``num_chains`` is not an integer, or ``result`` not the result of a fit.
    :raises ValueError: if ``num_draws`` is below 100, or ``num_chains`` below 25 and not 0.
    """
    _check_number("num_draws", num_draws, MIN_DRAWS, usual=2000)
    if num_chains is not None and num_chains != 0:
        _check_number("num_chains", num_chains, short_chains.MIN_STARTS, usual=NUM_CHAINS)
    check_key(rng_key)
    fitted = importance.fitted_guide(svi, result, args, kwargs)
    with disk_cache(cache):
        keys = jit_for(svi, _keys, rng_key)()
        drawn = importance.draw(fitted, keys[0], num_draws, sites, unconstrain=True, progress_bar=progress_bar)
        if drawn.sites.subsampled:
            warnings.warn(_MINIBATCH.format(list(drawn.sites.subsampled)), stacklevel=2)
        judgement = _judgement(fitted, keys[2], num_draws)
        response = _response(fitted, keys[1], num_draws, drawn.sites)
        guide_weights = _weights(drawn)
        mixed = _usable(response.mixture, importance.gap(drawn.log_weights, guide_weights))
        best, weights = (drawn, guide_weights) if mixed is None else (mixed.drawn, mixed.weights)
        chains: ShortChains | str = _no_chains(fitted, drawn, num_chains) or short_chains.run(
            fitted, best, weights.normalised, keys[3], num_chains or NUM_CHAINS, progress_bar=progress_bar
        )
    return _verdict(Source(fitted, drawn, mixed), guide_weights, judgement, response, chains)


def _keys(key: jax.Array) -> tuple[jax.Array, ...]:
    return *random.split(key, 3), random.fold_in(key, 3)


def _check_number(name: str, given: Any, least: int, usual: int) -> None:
    if isinstance(given, bool) or not isinstance(given, int | np.integer):
        raise TypeError(f"`{name}={given!r}`: expected an integer, such as {usual}.")
    if given < least:
        raise ValueError(f"`{name}={given}`: expected {least} or more, such as {usual}.")


def _no_chains(fitted: FittedGuide, drawn: Draws, num_chains: int | None) -> str:
    """Why no chain is to run, or ``""``."""
    entries = sum(map(np.size, jax.tree.leaves((fitted.args, dict(fitted.kwargs)))))
    entries += sum(drawn.values[name][0].size for name in drawn.sites.latent)
    if num_chains is None and entries > CHAIN_ENTRIES:
        return f"data and latents have {entries:,} entries; `num_chains={NUM_CHAINS}` runs them"
    return "`num_chains=0`" if num_chains == 0 else ""


def _judgement(fitted: FittedGuide, key: jax.Array, num_draws: int) -> Judgement:
    """What the judge of :func:`.fit` found at these parameters, or else finds by as many draws as the verdict has."""
    svi, params = fitted.svi, fitted.unconstrained
    try:
        if params is None:
            own = {name: x for name, x in fitted.params.items() if name not in fitted.mutable_state}
            params = svi.constrain_fn(own, invert=True)
        make = lambda data: judge_of(svi, fitted.mutable_state or None, params, data)
        _, judge = traceable(svi, fitted.args, dict(fitted.given), make)
        return judge.last(params) or judge(params, key, 0.0, draws=num_draws)
    except (StructureError, ValueError, TypeError, NotImplementedError) as error:
        return Judgement(gain=math.nan, error=math.nan, saddle=False, draws=0, nonfinite=0, cause=str(error))


def _verdict(
    source: Source, weights: ImportanceWeights, judgement: Judgement, response: _Response, chains: ShortChains | str
) -> Verdict:
    fitted, drawn, mixed = source.fitted, source.drawn, source.mixture
    latent, tabulated = drawn.sites.latent, drawn.sites.tabulated
    elbo, gap = importance.elbo(drawn.log_weights), importance.gap(drawn.log_weights, weights)
    guide = {name: importance.moments(z) for name, z in drawn.values.items()}
    values, best = (drawn.values, weights) if mixed is None else (mixed.drawn.values, mixed.weights)
    weighted = {name: importance.moments(z, best.normalised) for name, z in values.items()}
    ran = None if isinstance(chains, str) else chains
    case = recommendation.Case(
        guide=recommendation.class_names(fitted.svi.guide),
        latents=sum(guide[name].mean.size for name in latent),
        draws=drawn.log_weights.size,
        nonfinite=int(np.sum(~np.isfinite(drawn.log_weights))),
        k_hat=weights.k_hat,
        weighted_k_hat=best.k_hat,
        ess=best.ess,
        gap=float(gap.value),
        gap_error=float(gap.standard_error),
        rounding=_rounding(drawn),
        newton_decrement=judgement.gain,
        newton_decrement_error=judgement.error,
        no_maximum=response.no_maximum or judgement.saddle,
        cause=judgement.cause,
        abstains=judgement.abstains,
        term_tail=importance.tail_of_terms(drawn.log_weights, drawn.dtype),
        particles=_particles(fitted.svi, sum(guide[name].mean.size for name in latent)),
        funnel=_funnel(drawn),
        correlated=not response.widening <= 1 + recommendation.SD_TOLERANCE,
        points=drawn.points,
        only_points=_only_points(drawn),
        subsampled=drawn.sites.subsampled,
        worst=_worst(guide, weighted),
        farthest=_farthest(guide, weighted),
        chain_states=ran.states if ran else 0,
        chains_mixed=bool(ran and ran.have_mixed()),
        guide_moves=ran.largest_move(guide) if ran else None,
        weighted_moves=ran.largest_move(weighted) if ran else None,
    )
    recommended = recommendation.recommend(case)
    return Verdict(
        k_hat=weights.k_hat,
        threshold=recommendation.threshold(case.draws),
        elbo=elbo,
        log_evidence=best.log_evidence,
        ess=best.ess,
        newton_decrement=judgement.gain,
        newton_decrement_error=judgement.error,
        guide={name: guide[name] for name in tabulated},
        importance_weighted={name: weighted[name] for name in tabulated},
        linear_response=response.sd,
        linear_response_note=response.note,
        draws={name: drawn.values[name] for name in tabulated},
        log_weights=drawn.log_weights,
        weights=weights.normalised,
        recommendation=recommended.text,
        source=source._replace(chains=ran),
        weighted_k_hat=math.nan if mixed is None else mixed.weights.k_hat,
        answer=recommended.answer,
        short_chains={name: ran.moments(name)[0] for name in tabulated} if ran else {},
        short_chains_note=chains if isinstance(chains, str) else "",
    )


def _usable(mixture: Mixture | None, gap: Estimate) -> Mixture | None:
    """The mixture, if its weights can be trusted, and the guide is not nearly exact."""
    if mixture is None or recommendation.is_small(float(gap.value), float(gap.standard_error)):
        return None
    weights = mixture.weights
    return mixture if recommendation.can_be_weighted(weights.k_hat, weights.ess, weights.normalised.size) else None


def _only_points(drawn: Draws) -> bool:
    return bool(drawn.sites.latent) and len(drawn.points) == len(drawn.sites.latent)


def _particles(svi: SVI, latents: int) -> int:
    """Draws of a step: a joint block has at least ``independent_draws``, however few particles the loss has."""
    particles = int(getattr(svi.loss, "num_particles", 0))
    return max(particles, CONSTANTS.independent_draws) if latents <= CONSTANTS.joint_limit else particles


def _rounding(drawn: Draws) -> float:
    """The rounding error of a log weight, nats."""
    known = drawn.log_weights[np.isfinite(drawn.log_weights)]
    return float(np.abs(known).mean() * np.finfo(drawn.dtype).eps) if known.size else 0.0


def _weights(drawn: Draws) -> ImportanceWeights:
    if not _only_points(drawn):
        return importance.smooth(drawn.log_weights, drawn.dtype)
    # A point has no density, and so no weights.
    count = drawn.log_weights.size
    unknown = Estimate(np.float64(math.nan), np.float64(math.nan))  # type: ignore[arg-type]
    return ImportanceWeights(normalised=np.full(count, 1 / count), k_hat=math.nan, log_evidence=unknown)


def _response(fitted: FittedGuide, key: jax.Array, num_draws: int, sites: Inspection) -> _Response:
    """The linear response of a Gaussian guide, and weighted draws of its mixture with the guide."""
    try:
        latents = linear_response.gaussian_latents(fitted, key)
        if 2 * latents.loc.size > linear_response.DENSE_HESSIAN_LIMIT:
            limit = linear_response.DENSE_HESSIAN_LIMIT // 2
            note = f"{latents.loc.size} latents are more than {limit}: call `linear_response` for them"
            return _Response(sd={}, widening=math.nan, note=note, no_maximum=False)
        corrected = linear_response.respond(latents, key, HESSIAN_DRAWS)
    except (StructureError, ValueError) as error:
        no_maximum = isinstance(error, linear_response.NoMinimumError)
        return _Response(sd={}, widening=math.nan, note=str(error), no_maximum=no_maximum)
    found = mixture.draw(latents, corrected.covariance, key, num_draws, sites)
    sd = {name: importance.moments(found.drawn.values[name][found.response]).sd for name in sites.tabulated}
    covariance, scale = fetch((corrected.covariance, corrected.scale))  # each operation in JAX would be a program
    widening = float(np.max(np.sqrt(np.diagonal(covariance)) / scale))
    return _Response(sd=sd, widening=widening, note="", no_maximum=False, mixture=found)


def _funnel(drawn: Draws) -> str:
    """The latent site whose scale varies most with the other latents; ``""`` if none does by half a log unit."""
    weights = {name: float(np.std(x)) for name, x in drawn.log_scales.items() if np.isfinite(x).all()}
    name = max(weights, key=lambda name: weights[name], default="")
    return name if weights.get(name, 0.0) > recommendation.FUNNEL_SD else ""


class _Entry(NamedTuple):
    """One entry of a site: mean and standard deviation under the guide, and importance-weighted."""

    label: str
    guide: tuple[float, float]
    weighted: tuple[float, float]

    @property
    def distance(self) -> float:
        """How far the guide is off in mean and standard deviation, in importance-weighted standard deviations."""
        (mean, sd), (weighted_mean, weighted_sd) = self.guide, self.weighted
        unit = weighted_sd or 1.0
        return abs(mean - weighted_mean) / unit + abs(sd - weighted_sd) / unit


def _entries(guide: dict[str, Moments], weighted: dict[str, Moments]) -> list[_Entry]:
    pairs = [(name, at, guide[name], weighted[name]) for name in guide for at in np.ndindex(guide[name].mean.shape)]
    return [
        _Entry(label=linear_response.label(name, at), guide=a.entry(at), weighted=b.entry(at))
        for name, at, a, b in pairs
    ]


def _worst(guide: dict[str, Moments], weighted: dict[str, Moments]) -> tuple[str, float]:
    """The ``worst`` entry of a :class:`.recommendation.Case`."""
    # The standard deviation of a constant is the rounding error of its mean.
    varies = lambda mean, sd: sd > np.finfo(np.float32).eps * abs(mean)
    entries = [x for x in _entries(guide, weighted) if varies(*x.guide) and varies(*x.weighted)]
    ratios = [(x.label, x.guide[1] / x.weighted[1]) for x in entries]
    return max(ratios, key=lambda ratio: abs(math.log(ratio[1])), default=("", 1.0))


def _farthest(guide: dict[str, Moments], weighted: dict[str, Moments]) -> tuple[str, float]:
    """The ``farthest`` entry of a :class:`.recommendation.Case`."""
    entries = [x for x in _entries(guide, weighted) if x.weighted[1] > np.finfo(np.float32).eps * abs(x.weighted[0])]
    shifts = [(x.label, abs(x.guide[0] - x.weighted[0]) / x.weighted[1]) for x in entries]
    return max(shifts, key=lambda shift: shift[1], default=("", 0.0))


def _summary_lines(v: Verdict) -> list[str]:
    count = v.weights.size
    k_hat, limit = recommendation.distinguishable(v.k_hat, v.threshold)
    rows = [
        ("k-hat", k_hat, f"{recommendation.grade(v.k_hat, count)}; trustworthy below {limit}"),
        ("ELBO", _format(v.elbo), "nats"),
        ("log evidence", _format(v.log_evidence), "nats, Pareto-smoothed"),
        *_weights_line(v),
        ("effective draws", f"{v.ess:.0f}", f"of {count}"),
    ]
    if not math.isnan(v.newton_decrement):
        rows.append(
            ("Newton decrement", _gain(v.newton_decrement, v.newton_decrement_error), "nats to gain in this family")
        )
    width = max(len(value) for _, value, _ in rows)
    return [f"{name:<16}{value:>{width + 1}}  {remark}" for name, value, remark in rows]


def _weights_line(v: Verdict) -> list[tuple[str, str, str]]:
    """The k-hat of the mixture, if there is one."""
    if math.isnan(v.weighted_k_hat):
        return []
    remark = f"{recommendation.grade(v.weighted_k_hat, v.weights.size)}; of the importance-weighted moments"
    return [("k-hat, weighted", recommendation.distinguishable(v.weighted_k_hat, v.threshold)[0], remark)]


def _format(estimate: Estimate) -> str:
    return f"{float(estimate.value):.2f} ± {float(estimate.standard_error):.2f}"


def _gain(value: float, error: float) -> str:
    return f"0 within {error:.1g}" if value < error else f"{value:.2f} ± {error:.2f}"


def _moment_lines(v: Verdict) -> list[str]:
    """A line for each entry, or for the :data:`TABLE_ROWS` entries that are most off, in their order."""
    entries = _entries(v.guide, v.importance_weighted)
    chosen = sorted(np.argsort([entry.distance for entry in entries])[::-1][:TABLE_ROWS])
    width = max([len("site"), *(len(entries[i].label) for i in chosen)])
    columns: list[tuple[str, tuple[str, ...], list[Any]]] = [
        ("guide", ("mean", "sd"), [entry.guide for entry in entries])
    ]
    columns += [("importance-weighted", ("mean", "sd"), [entry.weighted for entry in entries])]
    if v.short_chains:
        columns += [("short chains", ("mean", "sd"), list(_flat(v.short_chains)))]
    if v.linear_response:
        response = [(float(sd),) for x in v.linear_response.values() for sd in np.ravel(x)]
        columns += [("linear", ("response",), response)]
    line = lambda first, cells: "  ".join([f"{first:<{width}}", *cells])
    lines = [
        line("", [f"{title:>{11 * len(names) - 1}}" for title, names, _ in columns]),
        line("site", [" ".join(f"{name:>10}" for name in names) for _, names, _ in columns]),
    ]
    for i in chosen:
        cells = [" ".join(f"{number:>10.4g}" for number in numbers[i]) for *_, numbers in columns]
        lines.append(line(entries[i].label, cells))
    if len(entries) > len(chosen):
        lines.append(f"… and {len(entries) - len(chosen)} more, which are less off")
    notes = (("linear response", v.linear_response_note), ("short chains", v.short_chains_note))
    return lines + [f"{name}: {note}" for name, note in notes if note]


def _flat(sites: Mapping[str, Moments]) -> Iterator[tuple[float, float]]:
    """Mean and standard deviation of every entry of every site."""
    for moments in sites.values():
        yield from (moments.entry(at) for at in np.ndindex(moments.mean.shape))
