# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Importance sampling with the guide as proposal: draws, their log weights, and weighted moments.

    w(z) = log p(x, z) − log q(z),  z ~ q      ELBO = E[w],    log p(x) = log E[exp w],    E_p[h] = E[h exp w]/E[exp w]

The log weight of a draw is the negative loss of one particle of NumPyro's ``Trace_ELBO``. Statistics are computed in
NumPy and in float64, whatever the precision of the fit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro.distributions import biject_to
from numpyro.handlers import replay, seed
from numpyro.infer import SVI
from numpyro.infer.svi import SVIRunResult, SVIState
from numpyro.infer.util import log_density
from tqdm.auto import tqdm

from numpyro_natgrad.compilation.data import Data, split
from numpyro_natgrad.compilation.devices import fetch
from numpyro_natgrad.compilation.initial import without_validation
from numpyro_natgrad.compilation.kept import Static, jit_for
from numpyro_natgrad.distributions.wrappers import base_distribution
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.infer.arguments import (
    check_parameters_of,
    check_state,
    expected_parameters,
    initialised,
    parameter_values,
)
from numpyro_natgrad.infer.fisher import Estimate
from numpyro_natgrad.infer.fitting.outcome import FitResult
from numpyro_natgrad.options import StructureError

#: Draws of one call of the compiled program, between two updates of the progress bar: a matter of display.
DRAWS_PER_CALL = 500
#: Draws that are evaluated together, which bounds the memory at little cost in time.
DRAWS_PER_BATCH = 50
#: Seconds after which a progress bar appears; most verdicts are shorter.
PROGRESS_BAR_DELAY = 2.0
#: Finite log weights below which no tail is fitted: the tail is at most a fifth of the weights (Vehtari et al. 2024,
#: JMLR 25:72), and ArviZ fits no tail of fewer than 5.
MIN_WEIGHTS_FOR_TAIL = 25
#: Log weights within so many roundings, eps · max |w|, count as equal. Sums of log densities lose a digit or two, and a
#: Pareto fit to rounding errors would report a heavy tail. Not tuned.
EQUAL_WITHIN_ROUNDINGS = 64

#: What fits return: :func:`fitted_guide` reads the parameters from any of these.
Fitted: TypeAlias = "SVIRunResult | FitResult | SVIState | Mapping[str, Any]"
#: What ``numpyro.handlers.trace`` records, by the name of the site.
Sites = Mapping[str, dict[str, Any]]


class FittedGuide(NamedTuple):
    """Model and guide in ``svi`` at the fitted constrained ``params``, which include mutable state.

    ``data`` are their arguments, with those of the ``SVI``, and ``names`` those keyword arguments that the call has.
    ``unconstrained`` are the parameters in the state of the optimizer, if the fit returned one.
    """

    svi: SVI
    params: Params
    data: Data
    names: tuple[str, ...] = ()
    mutable_state: Mapping[str, Any] = {}
    unconstrained: Params | None = None

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments."""
        return self.data.arguments()[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments, with those of the ``SVI``."""
        return self.data.arguments()[1]

    @property
    def given(self) -> dict[str, Any]:
        """Keyword arguments of the call."""
        return {name: x for name, x in self.kwargs.items() if name in self.names}

    @property
    def vectorized(self) -> bool:
        """Whether draws may be evaluated in batches, as the loss evaluates its particles."""
        return bool(getattr(self.svi.loss, "vectorize_particles", True))


class Inspection(NamedTuple):
    """Plates with a minibatch, latent sites of the model, and the sites whose moments were requested."""

    subsampled: tuple[str, ...]
    latent: tuple[str, ...]
    tabulated: tuple[str, ...]


class Draws(NamedTuple):
    """``S`` independent draws of the guide.

    :ivar log_weights: ``(S,)``, nats, converted to float64 from ``dtype``, the precision of their computation.
    :ivar values: constrained values of latent and tabulated sites, ``(S, *shape)``.
    :ivar log_scales: mean log scale of the distribution of each latent site in the model, ``(S,)``.
    :ivar unconstrained: values of latent sites in the unconstrained space of NUTS, ``(S, *shape)``, if requested.
    :ivar log_p: log p(x, z) of each draw, ``(S,)``, nats; log q(z) is ``log_p - log_weights``.
    """

    log_weights: np.ndarray
    values: dict[str, np.ndarray]
    sites: Inspection
    dtype: np.dtype
    log_scales: dict[str, np.ndarray] = {}  # noqa: RUF012
    unconstrained: dict[str, np.ndarray] = {}  # noqa: RUF012
    log_p: np.ndarray = np.empty(0)

    @property
    def points(self) -> tuple[str, ...]:
        """Latent sites to which the guide gives a single value."""
        latent = {name: self.values[name] for name in self.sites.latent}
        return tuple(n for n, z in latent.items() if np.issubdtype(z.dtype, np.floating) and np.all(z == z[0]))


class ImportanceWeights(NamedTuple):
    """Pareto-smoothed importance weights of ``S`` draws, log p(x) in nats, and the Pareto shape of the largest weights.

    :ivar normalised: ``(S,)``, with sum 1; zero where the log weight was not finite.
    """

    normalised: np.ndarray
    k_hat: float
    log_evidence: Estimate

    @property
    def ess(self) -> float:
        """The effective number of draws, 1/Σw² (Kong 1992); 0 if no weight is finite."""
        square = float(np.sum(self.normalised**2))
        return 1 / square if square else 0.0


class Moments(NamedTuple):
    """Mean, standard deviation and standard error of the mean of every entry of a site; arrays of its shape."""

    mean: np.ndarray
    sd: np.ndarray
    standard_error: np.ndarray

    def entry(self, at: tuple[int, ...]) -> tuple[float, float]:
        """Mean and standard deviation of one entry."""
        return float(self.mean[at]), float(self.sd[at])


def fitted_guide(svi: SVI, result: Fitted, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> FittedGuide:
    """Read the parameters of what a fit returned. Raise TypeError for anything else, ValueError before ``svi.init``."""
    if isinstance(result, SVIRunResult | FitResult):
        check_state(svi, result.state, "result.state")
        params, state = result.params, result.state
    elif isinstance(result, SVIState):
        check_state(svi, result, "result")
        params, state = initialised(svi).get_params(result), result
    elif isinstance(result, Mapping):
        params, state = _given(svi, result, args, kwargs), None
    else:
        raise TypeError(
            f"`result` is of type `{type(result).__name__}`: expected what `svi.run` or `fit` returns, a state of "
            "`svi.update`, or the dict of `svi.get_params(state)`."
        )
    static: Mapping[str, Any] = getattr(svi, "static_kwargs", {})
    mutable = (state and state.mutable_state) or {}
    return FittedGuide(
        svi=svi,
        params={**params, **mutable},
        data=split(svi, args, {**static, **kwargs}),
        names=tuple(kwargs),
        mutable_state=mutable,
        unconstrained=None if state is None else svi.optim.get_params(state.optim_state),
    )


def _given(svi: SVI, result: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Values of the parameters, which have to be those of the guide for these data, if it is set up."""
    values = parameter_values(result, "result")
    if svi.constrain_fn is not None:
        check_parameters_of(values, expected_parameters(svi, args, kwargs), "result")
    return values


def draw(
    guide: FittedGuide,
    key: jax.Array,
    num_draws: int,
    sites: Sequence[str] | str | None = None,
    *,
    unconstrain: bool = False,
    progress_bar: bool = False,
) -> Draws:
    """Draw from the guide and compute the log weight of every draw, with a progress bar if that takes long.

    :param sites: names of latent or deterministic sites to tabulate; all latent sites by default.
    :param unconstrain: whether to return unconstrained values of the latent sites as well.
    :raises StructureError: if the model has latent sites that the guide does not draw, or no site of a given name.
    """
    chosen = sites if sites is None or isinstance(sites, str) else tuple(sites)
    bar = tqdm(
        range(0, num_draws, DRAWS_PER_CALL),
        desc="draws",
        unit=f"×{DRAWS_PER_CALL}",
        delay=PROGRESS_BAR_DELAY,
        leave=False,
        disable=not progress_bar or jax.process_index() > 0,
    )
    each = lambda start: jit_for(guide.svi, _draws, guide, key, np.int32(start), int(num_draws), chosen, unconstrain)
    parts = [fetch(each(start)()) for start in bar]
    log_weights, log_p, values, log_scales, free, found = jax.tree.map(
        lambda *chunks: np.concatenate(chunks)[:num_draws], *parts
    )
    return Draws(
        log_weights=np.asarray(log_weights, np.float64),
        values=values,
        sites=found.value,
        dtype=log_weights.dtype,
        log_scales=log_scales,
        unconstrained=free,
        log_p=np.asarray(log_p, np.float64),
    )


def _draws(
    guide: FittedGuide,
    key: jax.Array,
    start: jax.Array,
    num_draws: int,
    sites: tuple[str, ...] | str | None,
    unconstrain: bool,
) -> tuple[jax.Array, jax.Array, Params, Params, Params, Static]:
    """Draws from number ``start`` on, the last ones repeated so that all calls have one size; and the sites."""
    found: list[Inspection] = []

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array, Params, Params, Params]:
        log_p, log_q, guide_sites, trace = _traces(guide, key)
        found.append(_inspection(guide_sites, trace, sites))
        latent = found[-1].latent
        log_scales = {name: _log_scale(trace[name]) for name in latent}
        free = {name: unconstrained_value(trace[name]) for name in latent} if unconstrain else {}
        values = {name: trace[name]["value"] for name in latent + found[-1].tabulated}
        return log_p - log_q, log_p, values, log_scales, free

    numbers = np.arange(min(DRAWS_PER_CALL, num_draws))
    keys = random.split(key, num_draws)[jnp.minimum(start + numbers, num_draws - 1)]
    return *map_in_batches(one, keys, DRAWS_PER_BATCH if guide.vectorized else None), Static(found[-1])


def map_in_batches(function: Callable[..., Any], inputs: Any, most: int | None) -> Any:
    """``lax.map``, with at most so many inputs evaluated together; ``None`` for one after the other.

    Batches are of one size, and the last input is repeated to fill them: ``lax.map`` would compile ``function`` again
    for what remains.
    """
    count = len(jax.tree.leaves(inputs)[0])
    if most is None or count <= most:
        return lax.map(function, inputs, batch_size=most)
    size = math.ceil(count / math.ceil(count / most))
    numbers = np.minimum(np.arange(math.ceil(count / size) * size), count - 1)
    full = inputs if numbers.size == count else jax.tree.map(lambda x: x[numbers], inputs)
    return jax.tree.map(lambda y: y[:count], lax.map(function, full, batch_size=size))


def _log_scale(site: dict[str, Any]) -> jax.Array:
    """The mean log scale of a site's distribution, 0 if it has none: it varies where it depends on other latents."""
    scale = getattr(base_distribution(site["fn"]), "scale", None)
    return jnp.zeros(()) if scale is None else jnp.mean(jnp.log(scale))


def unconstrained_value(site: dict[str, Any]) -> jax.Array:
    """The value of a site of the model in the unconstrained space that NUTS samples."""
    return biject_to(site["fn"].support).inv(site["value"])


def _traces(guide: FittedGuide, key: jax.Array) -> tuple[jax.Array, jax.Array, Sites, Sites]:
    """log p(x, z) and log q(z) of one draw, and the traces of guide and model."""
    svi, args, kwargs, params = guide.svi, guide.args, guide.kwargs, guide.params
    model_key, guide_key = random.split(key)  # the order of ``Trace_ELBO``, so that the draws of a key are the same
    log_q, guide_sites = log_density(seed(without_validation(svi.guide), guide_key), args, kwargs, params)
    log_p, model_sites = log_density(replay(seed(svi.model, model_key), guide_sites), args, kwargs, params)
    return log_p, log_q, guide_sites, model_sites


def _inspection(guide_sites: Sites, model_sites: Sites, sites: tuple[str, ...] | str | None) -> Inspection:
    # A guide that was set up with a minibatch goes on to draw one, which the model then sees, whatever its arguments.
    plates = {
        name: (site["args"][0], np.size(site["value"])) for name, site in model_sites.items() if site["type"] == "plate"
    }
    subsampled = tuple(name for name, (size, rows) in plates.items() if rows < size)
    latent = _latent_sites(guide_sites, model_sites)
    return Inspection(subsampled=subsampled, latent=latent, tabulated=_tabulated_sites(latent, model_sites, sites))


def _latent_sites(guide_sites: Sites, model_sites: Sites) -> tuple[str, ...]:
    latent = tuple(n for n, site in model_sites.items() if site["type"] == "sample" and not site["is_observed"])
    if undrawn := [name for name in latent if name not in guide_sites]:
        raise StructureError(
            f"the guide does not draw {undrawn} of the model: expected a value for every latent site. A latent site "
            "that `TraceEnum_ELBO` sums over has no importance weight here: sum over it in the model "
            "(`dist.MixtureSameFamily`, `numpyro.factor`), or draw it in the guide."
        )
    return latent


def _tabulated_sites(latent: tuple[str, ...], model_sites: Sites, sites: Sequence[str] | str | None) -> tuple[str, ...]:
    known = {name for name, site in model_sites.items() if site["type"] == "deterministic"} | set(latent)
    chosen = latent if sites is None else (sites,) if isinstance(sites, str) else tuple(sites)
    if unknown := [name for name in chosen if name not in known]:
        typed = list(sites) if isinstance(sites, tuple) else sites
        raise StructureError(f"`sites={typed!r}`: the model has no {unknown}; expected some of {sorted(known)}.")
    return chosen


def elbo(log_weights: np.ndarray) -> Estimate:
    """The mean of the log weights, nats; −∞ or NaN if the log weight of a draw is."""
    with np.errstate(invalid="ignore"):
        return _estimate(np.mean(log_weights), np.std(log_weights, ddof=1) / math.sqrt(log_weights.size))


def smooth(log_weights: np.ndarray, dtype: np.dtype | type[np.floating]) -> ImportanceWeights:
    """Smooth the largest weights by a generalised Pareto distribution; non-finite log weights count as zero weights.

    The standard error of log p(x) is √(Σw̄² − 1/S), by the delta method, which is too small if k-hat is above 0.7.
    k-hat is 0 if the log weights are equal up to the rounding of ``dtype``, the precision of their computation, and
    infinite if there are too few of them for a fit.
    """
    finite = np.isfinite(log_weights)
    known, count = log_weights[finite], log_weights.size
    if known.size == 0:
        nothing = _estimate(-math.inf, math.nan)
        return ImportanceWeights(normalised=np.zeros(count), k_hat=math.inf, log_evidence=nothing)
    if known.size < MIN_WEIGHTS_FOR_TAIL:
        smoothed, k_hat = known - np.logaddexp.reduce(known), math.inf
    elif _are_equal(known, dtype):
        smoothed, k_hat = np.full(known.size, -math.log(known.size)), 0.0
    else:
        smoothed, k_hat = psis(known)
    normalised = np.zeros(count)
    normalised[finite] = np.exp(smoothed)
    # Smoothing changes the largest weights only: the smallest one shows the sum that all of them were divided by.
    smallest = int(np.argmin(known))
    log_mean = known[smallest] - smoothed[smallest] - math.log(count)
    error = math.sqrt(max(float(np.sum(normalised**2)) - 1 / count, 0.0))
    return ImportanceWeights(normalised=normalised, k_hat=k_hat, log_evidence=_estimate(log_mean, error))


def psis(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Pareto-smoothed importance sampling (Vehtari, Simpson, Gelman, Yao & Gabry 2024, JMLR 25:72), by ArviZ.

    :param log_weights: finite log p − log q of independent draws, ``(S,)``, nats.
    :return: log weights, smoothed and normalised to a sum of 1, ``(S,)``, and k-hat, the Pareto shape of their tail.
    """
    try:
        from arviz_stats.base import array_stats
    except ImportError:
        import arviz

        smoothed, k_hat = arviz.psislw(log_weights)
    else:
        # ArviZ 1.x expects log likelihoods, the negatives of log weights.
        smoothed, k_hat = array_stats.psislw(-log_weights)
    return np.asarray(smoothed), float(k_hat)


def gap(log_weights: np.ndarray, weights: ImportanceWeights) -> Estimate:
    """KL(q ‖ p) = log evidence − ELBO, nats, with its standard error by the delta method.

    Both means are over the same draws, so that their errors nearly cancel where weights are nearly equal: the gap
    changes with draw s by S w̄_s − w_s. It is infinite or NaN if a log weight is.
    """
    if not np.all(np.isfinite(log_weights)):
        return _estimate(math.inf, math.nan)
    count = log_weights.size
    error = np.std(count * weights.normalised - log_weights, ddof=1) / math.sqrt(count)
    return _estimate(weights.log_evidence.value - np.mean(log_weights), error)


def _are_equal(known: np.ndarray, dtype: np.dtype | type[np.floating]) -> bool:
    """Whether log weights differ by no more than the rounding of ``dtype``."""
    rounding = EQUAL_WITHIN_ROUNDINGS * float(np.finfo(dtype).eps) * max(1.0, float(np.abs(known).max()))
    return bool(np.ptp(known) <= rounding)


def tail_of_terms(log_weights: np.ndarray, dtype: np.dtype | type[np.floating]) -> float:
    """The Pareto shape of the lowest log weights, the terms of the ELBO, which has a finite variance below ½."""
    known = log_weights[np.isfinite(log_weights)]
    if known.size < MIN_WEIGHTS_FOR_TAIL or _are_equal(known, dtype):
        return 0.0
    depth = known.max() - known
    return psis(np.log(np.maximum(depth, np.finfo(float).tiny)))[1]


def moments(values: np.ndarray, weights: np.ndarray | None = None) -> Moments:
    """Moments of draws, ``(S, *shape)``, weighted by w̄ if weights are given (self-normalised: Owen 2013, chapter 9).

    The standard error of the mean is √(Σ w̄²(z − mean)²). All moments are NaN if no draw has a weight.
    """
    z = np.asarray(values, np.float64)
    w = np.full(len(z), 1 / len(z)) if weights is None else weights
    z, w = z[w > 0], w[w > 0]  # a draw of weight zero may be NaN
    if not w.size:
        unknown = np.full(z.shape[1:], math.nan)
        return Moments(mean=unknown, sd=unknown, standard_error=unknown)
    mean = np.tensordot(w, z, 1)
    square = (z - mean) ** 2
    error = np.sqrt(np.tensordot(w**2, square, 1))
    return Moments(mean=mean, sd=np.sqrt(np.tensordot(w, square, 1)), standard_error=error)


def _estimate(value: float | np.floating, error: float | np.floating) -> Estimate:
    return Estimate(np.float64(value), np.float64(error))  # type: ignore[arg-type]
