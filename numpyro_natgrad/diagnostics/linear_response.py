# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""Linear response: the covariance of a Gaussian guide, corrected by how its means respond to a tilt of the posterior.

    Cov_LR = ∂m*/∂t = [ (∇²L)⁻¹ ]_mm,     L(m, b) = E[f(m + (1 + b) ∘ Kε)] − Σ log(1 + bᵢ),     f = −log p(x, z)

The posterior is tilted by exp(tᵀz). The derivative of its exact mean with respect to t is its covariance, and that of
the guide's optimal mean m* is Cov_LR (Giordano, Broderick & Jordan 2018, *Covariances, robustness, and variational
Bayes*, JMLR 19:51, equation 11). b is the relative change of the standard deviations, and ∇²L is taken at b = 0.
"""

# (m, b) are all parameters of a mean-field guide; the correlations of other Gaussian guides are held fixed. For a
# Gaussian posterior ∂²L/∂m∂b = 0 and ∂²L/∂m² is its precision: Cov_LR is exact for any guide, and for finitely many
# draws too, because they come in pairs ±ε. L is written in units of the guide's standard deviations, m = m₀ + σ ∘ a, in
# which its Hessian is of order 1 whatever the units of the latents.

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.scipy.sparse.linalg import cg
from numpyro import distributions as dist
from numpyro.handlers import replay, seed
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density
from numpyro.primitives import Messenger

from numpyro_natgrad.compilation.devices import fetch
from numpyro_natgrad.compilation.disk_cache import disk_cache
from numpyro_natgrad.compilation.initial import without_validation
from numpyro_natgrad.compilation.kept import Static, jit_for
from numpyro_natgrad.compilation.threads import one_blas_thread
from numpyro_natgrad.diagnostics.importance import Fitted, FittedGuide, Sites, fitted_guide, map_in_batches
from numpyro_natgrad.distributions.wrappers import map_base
from numpyro_natgrad.guide.gaussian_sites import GaussianSite, Params, read_gaussian_site
from numpyro_natgrad.guide.handlers import mark_guide_site
from numpyro_natgrad.guide.low_rank_sites import LowRankSite, read_low_rank_site
from numpyro_natgrad.guide.trace import LossTrace, trace_loss
from numpyro_natgrad.infer.arguments import check_count, check_key, initialised
from numpyro_natgrad.options import StructureError

#: Entries of (m, b) up to which ∇²L is formed and decomposed: 512 × 512 entries take tenths of a second. Not tuned.
DENSE_HESSIAN_LIMIT = 512
#: Above that, conjugate gradients stop at this relative residual: the Monte-Carlo error of ∇²L is a few per cent.
HESSIAN_CG_TOLERANCE = 1e-5
#: The largest number of products with ∇²L for a column, where conjugate gradients do not converge.
HESSIAN_CG_STEPS = 1000
#: Columns of ∇²L, or of its inverse, that are computed together, which bounds the memory.
COLUMNS_PER_BATCH = 32


class LinearResponse(NamedTuple):
    """What :func:`linear_response` returns, for the d unconstrained latents of a guide.

    :ivar tuple names: the d names of the latents, ``site`` or ``site[i,j]``.
    :ivar jax.Array loc: means of the guide, ``(d,)``.
    :ivar jax.Array scale: standard deviations of the guide, ``(d,)``.
    :ivar jax.Array covariance: the corrected covariance, ``(d, d)``.
    """

    names: tuple[str, ...]
    loc: jax.Array
    scale: jax.Array
    covariance: jax.Array

    @property
    def sd(self) -> jax.Array:
        """Corrected standard deviations, ``(d,)``."""
        return jnp.sqrt(jnp.diagonal(self.covariance))


class NoMinimumError(StructureError):
    """The Hessian of the loss is not positive definite at the fitted parameters."""


class GaussianLatents(NamedTuple):
    """The Gaussian sites of a guide as one flat vector of d unconstrained latents; ``spread`` is ε ↦ Kε.

    ``names``, ``loc`` and ``scale`` are those of :class:`LinearResponse`, and ``shapes`` the sites with their shapes.
    """

    guide: FittedGuide
    names: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    loc: jax.Array
    scale: jax.Array
    spread: Callable[[jax.Array], jax.Array]

    def split(self, z: jax.Array) -> Params:
        """Values of the sites, from z of shape ``(d,)``."""
        ends = np.cumsum([math.prod(shape) for _, shape in self.shapes])[:-1]
        return {n: x.reshape(s) for (n, s), x in zip(self.shapes, jnp.split(z, ends), strict=True)}


@one_blas_thread()
def linear_response(
    svi: SVI,
    result: Fitted,
    rng_key: jax.Array,
    *args: Any,
    num_particles: int = 256,
    cache: Any = None,
    **kwargs: Any,
) -> LinearResponse:
    """Correct the covariance of a Gaussian guide at the optimum of its ELBO (Giordano et al. 2018, equation 11).

    The guide is ``AutoNormal``, ``AutoDiagonalNormal``, ``AutoMultivariateNormal``, ``AutoLowRankMultivariateNormal``,
    or your own of independent Gaussian sites. Other parameters of the fit are held fixed. The result is exact if the
    posterior is Gaussian.

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_natgrad import NaturalGradient, fit, linear_response
        >>> def model():
        ...     numpyro.sample("z", dist.MultivariateNormal(jnp.zeros(2), jnp.array([[1.0, 1.8], [1.8, 4.0]])))
        >>> svi = SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO(num_particles=8))
        >>> result = fit(svi, random.key(0), progress_bar=False)
        >>> found = linear_response(svi, result, random.key(1))
        >>> [round(float(x), 1) for x in found.scale], [round(float(x), 1) for x in found.sd]
        ([0.4, 0.9], [1.0, 2.0])

    :param SVI svi: the ``SVI`` that was fitted, after ``svi.init`` or ``svi.run``, with any optimizer.
    :param result: what ``svi.run`` or :func:`.fit` returned, an ``SVIState``, or the dict of ``svi.get_params(state)``.
    :param jax.Array rng_key: key of the draws.
    :param args: positional arguments of model and guide.
    :param int num_particles: draws that the Hessian of the loss is a mean over, in pairs.
    :param cache: where compiled programs are kept for the next process, as for :func:`.fit`.
    :param kwargs: keyword arguments of model and guide.
    :return: the corrected covariance.
    :raises StructureError: if a site of the guide is not Gaussian, or the loss has no minimum at these parameters.
    :raises TypeError: if ``result`` is not the result of a fit.
    :raises ValueError: if ``svi.init`` has not been called.
    """
    check_key(rng_key)
    check_count("num_particles", num_particles, "256")
    guide = fitted_guide(svi, result, args, kwargs)
    with disk_cache(cache):
        return respond(gaussian_latents(guide, rng_key), rng_key, num_particles)


def respond(latents: GaussianLatents, key: jax.Array, num_particles: int) -> LinearResponse:
    """Compute ∇²L by Hessian-vector products at common draws, and the block of its inverse for the means.

    :raises NoMinimumError: if ∇²L is not positive definite.
    """
    covariance, least = jit_for(latents.guide.svi, _corrected, latents, key, int(num_particles))()
    known, least = fetch((covariance, least))
    if not (least > 0 and np.isfinite(known).all() and (np.diagonal(known) > 0).all()):
        raise NoMinimumError(
            f"the ELBO has no maximum at these parameters: the smallest curvature found is {float(least):.2g}, in "
            "units of the guide's standard deviations; expected one above 0. Take more steps, or more `num_particles`."
        )
    return LinearResponse(
        names=latents.names,
        loc=latents.loc,
        scale=latents.scale,
        covariance=covariance,
    )


def _corrected(latents: GaussianLatents, key: jax.Array, num_particles: int) -> tuple[jax.Array, jax.Array]:
    """Cov_LR, and the least curvature of the loss that was found."""
    d, dtype = latents.loc.size, latents.loc.dtype
    noise = random.normal(key, (max(num_particles // 2, 1), d), dtype)
    gradient = jax.grad(partial(_loss, latents, offsets=jax.vmap(latents.spread)(noise)))
    _, product = jax.linearize(gradient, jnp.zeros(2 * d, dtype))
    solve = _dense_solver if 2 * d <= DENSE_HESSIAN_LIMIT else _iterative_solver
    columns, least = solve(product, jnp.eye(d, 2 * d, dtype=dtype))
    block = columns[:, :d] * latents.scale[:, None] * latents.scale
    return (block + block.T) / 2, least


def _loss(latents: GaussianLatents, at: jax.Array, offsets: jax.Array) -> jax.Array:
    """L at (a, b), a mean over pairs of draws m ± Kε."""
    shift, growth = jnp.split(at, 2)

    def pair(offset: jax.Array) -> jax.Array:
        centre, away = latents.loc + latents.scale * shift, (1 + growth) * offset
        return (potential(latents, centre + away) + potential(latents, centre - away)) / 2

    # ``linearize`` keeps the intermediate values of all draws, so that a loop over batches would save no memory.
    each = jax.vmap(pair) if latents.guide.vectorized else partial(lax.map, pair)
    return jnp.mean(each(offsets)) - jnp.sum(jnp.log1p(growth))


Product = Callable[[jax.Array], jax.Array]


def _dense_solver(product: Product, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Apply H⁻¹ to the rows of ``right``; also the smallest eigenvalue of H."""
    hessian = map_in_batches(product, jnp.eye(right.shape[1], dtype=right.dtype), COLUMNS_PER_BATCH)
    hessian = (hessian + hessian.T) / 2
    ok = jnp.all(jnp.isfinite(hessian))  # an eigensolver may not return from a NaN
    values, vectors = jnp.linalg.eigh(jnp.where(ok, hessian, jnp.eye(right.shape[1], dtype=right.dtype)))
    return (right @ vectors / values) @ vectors.T, jnp.where(ok, values[0], jnp.nan)


def _iterative_solver(product: Product, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Apply H⁻¹ to the rows of ``right`` by conjugate gradients; also the least curvature xᵀHx/xᵀx of the solutions."""
    solve = lambda b: cg(product, b, tol=HESSIAN_CG_TOLERANCE, maxiter=HESSIAN_CG_STEPS)[0]
    columns = map_in_batches(solve, right, COLUMNS_PER_BATCH)
    curvatures = jnp.sum(columns * right, axis=1) / jnp.sum(columns**2, axis=1)
    return columns, jnp.min(curvatures)


def potential(latents: GaussianLatents, z: jax.Array) -> jax.Array:
    """f(z) = −log p(x, z) at d unconstrained latents, with the log Jacobian of the guide's transforms; nats."""
    log_p, log_jacobian, _ = substitute_latents(latents, z)
    return log_jacobian - log_p


def substitute_latents(latents: GaussianLatents, z: jax.Array) -> tuple[jax.Array, jax.Array, Sites]:
    """log p(x, z), the log Jacobian of the guide's transforms as part of log q(z), and the trace of the model at z."""
    guide, key = latents.guide, random.key(0)  # of plates that subsample: the same minibatch at every z
    with SubstituteBaseDraws(latents.split(z)):
        log_jacobian, guide_sites = log_density(
            seed(without_validation(guide.svi.guide), key), guide.args, guide.kwargs, guide.params
        )
    model = replay(seed(guide.svi.model, key), guide_sites)
    log_p, model_sites = log_density(model, guide.args, guide.kwargs, guide.params)
    return log_p, log_jacobian, model_sites


class SubstituteBaseDraws(Messenger):
    """Let base distributions draw given values with density 1: log q is then the log Jacobian of the transforms."""

    def __init__(self, draws: Params) -> None:
        super().__init__()
        self.draws = draws

    def process_message(self, msg: dict[str, Any]) -> None:
        """Replace the base distribution of a site that has a given draw."""
        if mark_guide_site(msg) and msg["name"] in self.draws:
            msg["fn"] = map_base(msg["fn"], lambda base: _Fixed(base, self.draws[msg["name"]]))


class _Fixed(dist.Distribution):
    """A distribution with the shape and support of another one, which draws a given value with density 1."""

    has_rsample = True

    def __init__(self, base: dist.Distribution, value: jax.Array) -> None:
        self.base, self.value = base, value
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> dist.constraints.Constraint:
        return self.base.support

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        return self.value.reshape(*sample_shape, *self.shape())

    def log_prob(self, value: jax.Array) -> jax.Array:
        return jnp.zeros(jnp.shape(value)[: jnp.ndim(value) - self.event_dim], jnp.result_type(value))


def gaussian_latents(guide: FittedGuide, key: jax.Array) -> GaussianLatents:
    """Read means and covariance factors of all sites of a guide.

    :raises StructureError: if a site is not a Gaussian with parameters of its own as arguments.
    """
    initialised(guide.svi)
    loc, scale, factors, index, shapes = jit_for(guide.svi, _read, guide, key)()
    return GaussianLatents(
        guide=guide,
        names=_names(fetch(index)),
        shapes=shapes.value,
        loc=loc,
        scale=scale,
        spread=jax.tree_util.Partial(_spread, factors),
    )


def _read(
    guide: FittedGuide, key: jax.Array
) -> tuple[jax.Array, jax.Array, list[jax.Array], dict[str, jax.Array], Static]:
    """Means, standard deviations and factors of all sites, the places of their latents, and the shapes of the sites."""
    svi = guide.svi
    params = svi.constrain_fn(guide.params, invert=True)

    def loss(values: Params) -> tuple[jax.Array, None]:
        constrained = svi.constrain_fn(values)
        draws = without_validation(svi.guide)
        return Trace_ELBO().loss(key, constrained, svi.model, draws, *guide.args, **guide.kwargs), None

    trace = trace_loss(loss, params)
    sites = _sites(trace)
    shapes = tuple((s.name, trace.sites[s.name].shape) for s in sites)
    factors = [_factor(s, params) for s in sites]
    loc = jnp.concatenate([params[s.loc].ravel() for s in sites])
    scale = jnp.concatenate([jnp.sqrt(jnp.sum(k**2, -1)).ravel() if k.ndim > 1 else k for k in factors])
    return loc, scale, factors, _index(svi.guide, dict(shapes)), Static(shapes)


def _sites(trace: LossTrace) -> list[GaussianSite | LowRankSite]:
    read = {name: read_gaussian_site(name, trace) or read_low_rank_site(name, trace) for name in trace.sites}
    sites = [site for site in read.values() if site is not None]
    owned = [p for site in sites for p in site.params]
    if other := [name for name, site in read.items() if site is None] + sorted(trace.scanned):
        raise StructureError(
            f"linear response needs Gaussian sites with parameters of their own; {other} are not. Fit a Gaussian "
            "guide, such as `AutoNormal` or `AutoMultivariateNormal`."
        )
    if not sites or len(set(owned)) < len(owned):
        raise StructureError(
            "linear response needs Gaussian sites with parameters of their own; the guide has none. Fit a Gaussian "
            "guide, such as `AutoNormal` or `AutoMultivariateNormal`."
        )
    return sites


def _factor(site: GaussianSite | LowRankSite, params: Params) -> jax.Array:
    """Standard deviations of shape ``(d,)``, or K of shape ``(batch, d, d)``."""
    if isinstance(site, GaussianSite) and site.form.diagonal:
        return site.covariance_factor(params).ravel()
    return site.cholesky(params)


def _spread(factors: list[jax.Array], noise: jax.Array) -> jax.Array:
    """Kε of all sites, concatenated."""
    ends = np.cumsum([k.size if k.ndim == 1 else k.shape[0] * k.shape[1] for k in factors])[:-1]
    parts = zip(factors, jnp.split(noise, ends), strict=True)
    return jnp.concatenate([_multiply(k, e) for k, e in parts])


def _multiply(factor: jax.Array, noise: jax.Array) -> jax.Array:
    if factor.ndim == 1:
        return factor * noise
    return jnp.einsum("bij,bj->bi", factor, noise.reshape(factor.shape[:2])).ravel()


def _index(guide: Callable[..., Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """The places of the entries of each site; the sites of an ``AutoContinuous`` guide are parts of its flat latent."""
    unpack, count = getattr(guide, "_unpack_latent", None), sum(math.prod(shape) for shape in shapes.values())
    if unpack is not None and len(shapes) == 1:
        return unpack(jnp.arange(count))
    parts = np.split(np.arange(count), np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1])
    return {name: jnp.asarray(x.reshape(shape)) for (name, shape), x in zip(shapes.items(), parts, strict=True)}


def _names(index: dict[str, np.ndarray]) -> tuple[str, ...]:
    """The name of each latent, by its place."""
    flat = {int(x): label(name, at) for name, places in index.items() for at, x in np.ndenumerate(places)}
    return tuple(flat[i] for i in range(len(flat)))


def label(name: str, at: tuple[int, ...]) -> str:
    """The name of an entry of a site, such as ``z[0,1]``."""
    return f"{name}[{','.join(map(str, at))}]" if at else name
