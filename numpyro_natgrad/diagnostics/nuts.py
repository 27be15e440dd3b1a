# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""A warm start of NUTS: initial points by importance resampling, and a mass matrix, from a fitted guide.

    z_c ~ Σ w̄_s δ(z − z_s),  z_s ~ q        M⁻¹ = Cov(z)        z: the unconstrained latents that NUTS samples

With this inverse mass matrix the posterior has about unit scale in every direction (Neal 2011, *MCMC using Hamiltonian
dynamics*, section 4.1), so that the warm-up has only a step size to adapt.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro.infer import NUTS, SVI, init_to_value

from numpyro_natgrad.compilation.disk_cache import disk_cache
from numpyro_natgrad.compilation.kept import jit_for
from numpyro_natgrad.compilation.threads import one_blas_thread
from numpyro_natgrad.diagnostics import importance
from numpyro_natgrad.diagnostics.importance import Draws, Fitted, FittedGuide, unconstrained_value
from numpyro_natgrad.diagnostics.linear_response import (
    GaussianLatents,
    NoMinimumError,
    gaussian_latents,
    respond,
    substitute_latents,
)
from numpyro_natgrad.diagnostics.recommendation import GOOD_K_HAT
from numpyro_natgrad.diagnostics.target import DENSE_LIMIT, discrete_latents, fixed_model, model_sites, usable
from numpyro_natgrad.infer.arguments import check_count, check_key
from numpyro_natgrad.options import StructureError


class StartConstants(NamedTuple):
    """Every number of a start of NUTS; those of the warm-up are measured by ``benchmarks.nuts``."""

    #: Target of the acceptance probability; the larger one, and so smaller steps, where k-hat is not good
    #: (:mod:`.recommendation`), because the tails of the posterior are heavier than those of the guide.
    accept: float = 0.8
    accept_heavy: float = 0.9
    #: Draws of the guide, at least, and for each chain, among which the initial points are resampled.
    draws: int = 500
    draws_per_chain: int = 25
    #: Steps of warm-up, which adapt the step size alone.
    warmup: int = 50
    #: The initial step size, in units of the posterior's standard deviations; the warm-up begins at ten times this.
    step_size: float = 1.0
    #: Draws of each latent, at least, for a dense covariance that is estimated from draws.
    draws_per_latent: int = 10
    #: Draws that the Hessian of the linear response is a mean over, and the most latents that it is computed for.
    response_draws: int = 16
    response_latents: int = 256
    #: Correlations are shrunk by this, and as often by ten times more, until the matrix has a Cholesky factor.
    shrinkage: float = 1e-6


START = StartConstants()


class NUTSStart(NamedTuple):
    """What :func:`to_nuts` returns, for d unconstrained latents in the order of the sorted names of the sites.

    :ivar NUTS kernel: for ``MCMC``, with the mass matrix; its warm-up adapts the step size alone.
    :ivar dict init_params: initial unconstrained values of each site, ``(num_chains, *shape)``, or ``shape`` for one
        chain.
    :ivar int num_warmup: steps of warm-up that are enough for the step size.
    :ivar int num_chains: the number of chains that ``init_params`` are for.
    :ivar model: the model with the fitted values of its parameters, for a kernel of your own.
    :ivar jax.Array inverse_mass_matrix: covariance of the latents, ``(d, d)``, or their variances, ``(d,)``.
    :ivar float step_size: the initial step size.
    :ivar float k_hat: Pareto shape of the importance weights (:class:`.Verdict`).
    """

    kernel: NUTS
    init_params: dict[str, jax.Array]
    num_warmup: int
    num_chains: int
    model: Callable[..., Any]
    inverse_mass_matrix: jax.Array
    step_size: float
    k_hat: float


@one_blas_thread()
def to_nuts(
    svi: SVI,
    result: Fitted,
    rng_key: jax.Array,
    *args: Any,
    num_chains: int = 4,
    cache: Any = None,
    **kwargs: Any,
) -> NUTSStart:
    """Start NUTS from a fit: initial points, an inverse mass matrix and a short warm-up.

    The initial points are draws of the guide, resampled without replacement by their smoothed importance weights. The
    mass matrix is the guide's covariance; that of a mean-field guide of at most 256 latents is corrected by linear
    response (:func:`.linear_response`). It is dense for at most 512 latents if the guide has correlations.

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import MCMC, SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoMultivariateNormal
        >>> from numpyro_natgrad import NaturalGradient, to_nuts
        >>> def model():
        ...     numpyro.sample("z", dist.MultivariateNormal(jnp.zeros(2), jnp.array([[1.0, 1.8], [1.8, 4.0]])))
        >>> svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(num_particles=8))
        >>> result = svi.run(random.key(0), 50, progress_bar=False)
        >>> start = to_nuts(svi, result, random.key(1), num_chains=1)
        >>> bool(abs(start.inverse_mass_matrix - jnp.array([[1.0, 1.8], [1.8, 4.0]])).max() < 0.1)
        True
        >>> mcmc = MCMC(start.kernel, num_warmup=start.num_warmup, num_samples=500, progress_bar=False)
        >>> mcmc.run(random.key(2), init_params=start.init_params)
        >>> bool(abs(mcmc.get_samples()["z"].std(0) - jnp.array([1.0, 2.0])).max() < 0.5)
        True

    :param SVI svi: model and guide, after ``svi.init``, ``svi.run`` or :func:`.fit`, with any optimizer.
    :param result: what ``svi.run`` or :func:`.fit` returned, an ``SVIState``, or the dict of ``svi.get_params(state)``.
    :param jax.Array rng_key: key of the draws.
    :param args: positional arguments of model and guide, with all of the data.
    :param int num_chains: number of initial points, for ``MCMC(..., num_chains=num_chains)``.
    :param cache: where compiled programs are kept for the next process, as for :func:`.fit`; not those of NUTS.
    :param kwargs: keyword arguments of model and guide.
    :return: a kernel, initial points, and the number of warm-up steps.
    :raises StructureError: if the model has discrete latents or minibatches, or the guide does not draw all latent
        sites of the model, or has no spread.
    :raises TypeError: if ``num_chains`` is not an integer, or ``result`` not the result of a fit.
    :raises ValueError: if ``num_chains`` is not positive, or too few draws have a positive importance weight.
    """
    check_count("num_chains", num_chains, "4")
    check_key(rng_key)
    fitted = importance.fitted_guide(svi, result, args, kwargs)
    keys = random.split(rng_key, 3)
    sites = model_sites(fitted)
    _check_continuous(sites)
    count = max(START.draws, START.draws_per_chain * num_chains)
    with disk_cache(cache):
        drawn = importance.draw(fitted, keys[0], count, unconstrain=True)
        _check_minibatch(drawn)
        weights = importance.smooth(drawn.log_weights, drawn.dtype)
        chosen = _resampled(keys[1], usable(drawn, weights.normalised), num_chains)
        points = {name: jnp.asarray(z[chosen]) for name, z in drawn.unconstrained.items()}
        matrix = _inverse_mass_matrix(fitted, drawn, keys[2])
    model = fixed_model(fitted, sites)
    kernel = NUTS(
        model,
        step_size=START.step_size,
        inverse_mass_matrix=matrix,
        dense_mass=matrix.ndim == 2,
        adapt_mass_matrix=False,
        target_accept_prob=START.accept if weights.k_hat < GOOD_K_HAT else START.accept_heavy,
        init_strategy=init_to_value(values={name: drawn.values[name][chosen[0]] for name in points}),
    )
    return NUTSStart(
        kernel=kernel,
        init_params=points if num_chains > 1 else {name: x[0] for name, x in points.items()},
        num_warmup=START.warmup,
        num_chains=num_chains,
        model=model,
        inverse_mass_matrix=matrix,
        step_size=START.step_size,
        k_hat=weights.k_hat,
    )


def _check_continuous(sites: dict[str, dict[str, Any]]) -> None:
    if discrete := discrete_latents(sites):
        raise StructureError(
            f"the latent sites {discrete} are discrete: expected continuous latents, which NUTS can move. Sum over the "
            "discrete ones in the model (`dist.MixtureSameFamily`, `numpyro.factor`), for the fit and for NUTS."
        )


def _check_minibatch(drawn: Draws) -> None:
    if drawn.sites.subsampled:
        raise StructureError(
            f"the plates {list(drawn.sites.subsampled)} see a minibatch: expected all of the data, since NUTS would "
            "sample the posterior of one minibatch. Pass all of the data (`subsample_size=None`)."
        )


def _resampled(key: jax.Array, weights: np.ndarray, count: int) -> np.ndarray:
    """Numbers of ``count`` different draws, one after the other with probability ∝ weight, by the Gumbel-max trick."""
    if (known := int(np.count_nonzero(weights))) < count:
        raise ValueError(
            f"{known} of {weights.size} draws of the guide have a positive importance weight: expected {count}, one "
            "for each chain. `print(verdict(svi, result, rng_key, *args))` says what is wrong with this fit."
        )
    with np.errstate(divide="ignore"):
        scores = np.log(weights) + np.asarray(random.gumbel(key, weights.shape), np.float64)
    return np.argsort(-scores)[:count]


def _inverse_mass_matrix(fitted: FittedGuide, drawn: Draws, key: jax.Array) -> jax.Array:
    """Covariance of the latents, ``(d, d)``, or their variances, ``(d,)``."""
    names = sorted(drawn.unconstrained)
    draws = np.concatenate([drawn.unconstrained[n].reshape(len(drawn.log_weights), -1) for n in names], axis=1)
    draws = draws[np.isfinite(draws).all(1)].astype(np.float64)
    _check_spread(drawn)
    covariance = None
    if draws.shape[1] <= DENSE_LIMIT:
        try:
            covariance = _gaussian_covariance(gaussian_latents(fitted, key), names, key)
        except (StructureError, ValueError):
            enough = len(draws) >= START.draws_per_latent * draws.shape[1]
            covariance = np.cov(draws, rowvar=False).reshape((draws.shape[1],) * 2) if enough else None
    dtype = jnp.result_type(*(z.dtype for z in drawn.unconstrained.values()))
    if covariance is None:
        return jnp.asarray(draws.var(0), dtype)
    return jnp.asarray(_positive(covariance.astype(dtype)))


def _check_spread(drawn: Draws) -> None:
    points = [n for n, z in drawn.unconstrained.items() if np.any((z == z[0]).all(0))]
    if points:
        raise StructureError(
            f"all draws of {points} are the same: expected a guide with a spread, which NUTS takes its mass matrix "
            "from. Fit `AutoNormal` or `AutoMultivariateNormal`; to start from a point, use `init_to_value`."
        )


def _gaussian_covariance(latents: GaussianLatents, names: list[str], key: jax.Array) -> np.ndarray | None:
    """J Σ Jᵀ, with Σ the covariance of a Gaussian guide, by linear response if it has no correlations.

    J is the derivative of NUTS's unconstrained latents with respect to the guide's, at its mean; for autoguides it is a
    permutation. Nothing is returned for too many latents without correlations.
    """
    svi, size = latents.guide.svi, latents.loc.size
    sigma, entries = jit_for(svi, _covariance, latents)()
    if entries == size:
        if size > START.response_latents:
            return None
        try:
            sigma = respond(latents, key, START.response_draws).covariance
        except NoMinimumError:
            return None
    return np.asarray(jit_for(svi, _unconstrained_covariance, latents, sigma, tuple(names))())


def _covariance(latents: GaussianLatents) -> tuple[jax.Array, jax.Array]:
    """Σ, and its number of entries that are not zero."""
    factor = jax.vmap(latents.spread)(jnp.eye(latents.loc.size, dtype=latents.loc.dtype))
    sigma = factor.T @ factor
    return sigma, jnp.count_nonzero(sigma)


def _unconstrained_covariance(latents: GaussianLatents, sigma: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """J Σ Jᵀ."""

    def flat(z: jax.Array) -> jax.Array:
        sites = substitute_latents(latents, z)[2]
        return jnp.concatenate([unconstrained_value(sites[name]).ravel() for name in names])

    jacobian = jax.jacfwd(flat)(latents.loc)
    return jacobian @ sigma @ jacobian.T


def _positive(covariance: np.ndarray) -> np.ndarray:
    """The covariance with correlations shrunk as little as a Cholesky factor in its precision needs."""
    covariance = (covariance + covariance.T) / 2
    diagonal = np.diag(np.diag(covariance))
    for shrinkage in (0.0, *np.geomspace(START.shrinkage, 1.0, 7)):
        shrunk = ((1 - shrinkage) * covariance + shrinkage * diagonal).astype(covariance.dtype)
        try:
            if np.isfinite(np.linalg.cholesky(shrunk)).all():
                return shrunk
        except np.linalg.LinAlgError:
            continue
    return diagonal
