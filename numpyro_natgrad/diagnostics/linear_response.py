# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""Linear response: covariances of a Gaussian guide, corrected by how its means answer to a tilt of the posterior.

Tilt the target by tᵀz. The guide's optimum moves, and the mean of an exact posterior would move by its covariance:

    Cov_LR = ∂m*/∂t = [ (∇²L)⁻¹ ]_mm,     L(m, b) = E[f(m + (1 + b) ∘ Kε)] − Σ log(1 + bᵢ),     f = −log p(x, z)

(Giordano, Broderick & Jordan 2018, JMLR 19:51, equation 11.) b is a relative change of the standard deviations, at 0.
For mean-field guides (m, b) are all of the guide's parameters, and this is the classical formula; of other Gaussians
the correlations are held fixed. For a Gaussian target ∂²L/∂m∂b = 0 and ∂²L/∂m² is its precision: Cov_LR is exact,
whatever the guide. Draws come in pairs ±ε, so that this holds for the finite sum too. L is taken in the guide's own
standard deviations, m = m₀ + σ ∘ a, where its Hessian is of order 1 in any units.
"""

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

from numpyro_natgrad.diagnostics.importance import Fit, fitted
from numpyro_natgrad.distributions.wrappers import map_base
from numpyro_natgrad.guide.gaussian_sites import GaussianSite, Params, read_gaussian_site
from numpyro_natgrad.guide.handlers import mark_guide_site
from numpyro_natgrad.guide.low_rank_sites import LowRankSite, read_low_rank_site
from numpyro_natgrad.guide.trace import LossTrace, trace_loss
from numpyro_natgrad.infer.fisher import _initialised
from numpyro_natgrad.options import StructureError

#: Numbers (m, b) up to which the Hessian is formed; beyond, conjugate gradients, to this relative residual.
DENSE_LIMIT, CG_TOLERANCE, CG_STEPS = 512, 1e-5, 1000
#: Columns of the Hessian, or of its inverse, that are computed at a time.
COLUMNS = 32


class LinearResponse(NamedTuple):
    """Covariance of the d unconstrained latents of a guide, corrected by linear response.

    :ivar names: of the latents: ``site`` or ``site[i,j]``, d of them.
    :ivar loc: the guide's means, ``(d,)``.
    :ivar scale: the guide's standard deviations, ``(d,)``.
    :ivar covariance: ``(d, d)``.
    :ivar decrement: nats that a Newton step in (m, b) would gain, ½ gᵀ(∇²L)⁻¹g: unbiased, so that it may be a little
        below zero.
    """

    names: tuple[str, ...]
    loc: jax.Array
    scale: jax.Array
    covariance: jax.Array
    newton_decrement: jax.Array

    @property
    def sd(self) -> jax.Array:
        """Corrected standard deviations, ``(d,)``."""
        return jnp.sqrt(jnp.diagonal(self.covariance))


class NoMinimumError(StructureError):
    """The loss does not curve upwards at the parameters."""


class _Latents(NamedTuple):
    """The Gaussian sites of a guide: their means and spreads, flat, and where the draws of each belong."""

    fit: Fit
    names: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    loc: jax.Array
    scale: jax.Array
    spread: Callable[[jax.Array], jax.Array]

    def split(self, z: jax.Array) -> Params:
        """Values of the sites from d numbers."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()])[:-1]
        return {n: x.reshape(s) for (n, s), x in zip(self.shapes.items(), jnp.split(z, ends), strict=True)}


def linear_response(
    svi: SVI, result: Any, rng_key: jax.Array, *args: Any, num_particles: int = 256, **kwargs: Any
) -> LinearResponse:
    """Correct the covariance of a Gaussian guide at the optimum of its ELBO.

    For ``AutoNormal``, ``AutoDiagonalNormal``, ``AutoMultivariateNormal``, ``AutoLowRankMultivariateNormal`` and
    guides written by hand of independent Gaussian sites. Other parameters of the fit are held fixed.

    :param svi: after ``svi.init`` or ``svi.run``, with any optimizer.
    :param result: what ``svi.run`` returned, a state, or the dict of ``svi.get_params(state)``.
    :param rng_key: of the draws.
    :param args: of the model and the guide. :param kwargs: likewise.
    :param num_particles: draws that the Hessian of the loss is a mean over, in pairs; a multiple of 4.
    :raises StructureError: if the guide is not made of Gaussians, or the loss has no minimum at these parameters.
    """
    fit = fitted(svi, result, args, kwargs)
    return respond(gaussian_latents(fit, rng_key), rng_key, num_particles)


def respond(latents: _Latents, key: jax.Array, num_particles: int) -> LinearResponse:
    """∇²L by Hessian products at common draws, and its inverse's block of the means."""
    d, dtype = latents.loc.size, latents.loc.dtype
    # Two halves of the draws are independent: the product of their slopes is unbiased, without their noise.
    noise = random.normal(key, (2, max(num_particles // 4, 1), d), dtype)
    solve = _dense_solver if 2 * d <= DENSE_LIMIT else _iterative_solver

    @jax.jit
    def run() -> tuple[jax.Array, jax.Array, jax.Array]:
        offsets = jax.vmap(jax.vmap(latents.spread))(noise)
        halves = lambda at: jax.vmap(jax.grad(partial(_loss, latents)), (None, 0))(at, offsets)
        slopes, hessian_product = jax.linearize(halves, jnp.zeros(2 * d, dtype))
        right = jnp.concatenate([jnp.eye(d, 2 * d, dtype=dtype), slopes[1][None]])
        columns, least = solve(lambda v: jnp.mean(hessian_product(v), axis=0), right)
        block = columns[:d, :d] * latents.scale[:, None] * latents.scale
        return (block + block.T) / 2, 0.5 * slopes[0] @ columns[d], least

    covariance, newton_decrement, least = run()
    usable = bool(jnp.all(jnp.isfinite(covariance))) and bool(jnp.all(jnp.diagonal(covariance) > 0))
    if not (least > 0 and usable):
        raise NoMinimumError(
            f"the ELBO has no maximum at these parameters: the smallest curvature found is {float(least):.2g}, in "
            "units of the guide's standard deviations; expected one above 0. Take more steps, or more `num_particles`."
        )
    return LinearResponse(latents.names, latents.loc, latents.scale, covariance, newton_decrement)


def _loss(latents: _Latents, at: jax.Array, offsets: jax.Array) -> jax.Array:
    """L at (a, b), over pairs of draws."""
    shift, growth = jnp.split(at, 2)

    def pair(offset: jax.Array) -> jax.Array:
        centre, away = latents.loc + latents.scale * shift, (1 + growth) * offset
        return (potential(latents, centre + away) + potential(latents, centre - away)) / 2

    # What is linearised keeps the intermediate values of all draws: taking them by and by would save no memory.
    each = jax.vmap(pair) if latents.fit.vectorized else partial(lax.map, pair)
    return jnp.mean(each(offsets)) - jnp.sum(jnp.log1p(growth))


def _dense_solver(product: Callable, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """H⁻¹ applied to rows, and the smallest eigenvalue of H."""
    hessian = lax.map(product, jnp.eye(right.shape[1], dtype=right.dtype), batch_size=COLUMNS)
    hessian = (hessian + hessian.T) / 2
    ok = jnp.all(jnp.isfinite(hessian))  # an eigensolver never returns from a NaN
    values, vectors = jnp.linalg.eigh(jnp.where(ok, hessian, jnp.eye(right.shape[1], dtype=right.dtype)))
    return (right @ vectors / values) @ vectors.T, jnp.where(ok, values[0], jnp.nan)


def _iterative_solver(product: Callable, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same by conjugate gradients; of the curvature, the least along the solutions, xᵀHx/xᵀx."""
    solve = lambda b: cg(product, b, tol=CG_TOLERANCE, maxiter=CG_STEPS)[0]
    columns = lax.map(solve, right, batch_size=COLUMNS)
    met = jnp.sum(columns * right, axis=1) / jnp.sum(columns**2, axis=1)
    return columns, jnp.min(met[:-1])


def potential(latents: _Latents, z: jax.Array) -> jax.Array:
    """f(z) = −log p(x, z) at d unconstrained latents, with the Jacobian of the guide's transforms."""
    return place(latents, z)[0]


def place(latents: _Latents, z: jax.Array) -> tuple[jax.Array, Any]:
    """The same, with the model's trace at z."""
    fit, key = latents.fit, random.key(0)
    with Placed(latents.split(z)):
        log_jacobian, guided = log_density(seed(fit.svi.guide, key), fit.args, fit.kwargs, fit.params)
    model = replay(seed(fit.svi.model, key), guided)
    log_p, model_sites = log_density(model, fit.args, fit.kwargs, fit.params)
    return log_jacobian - log_p, model_sites


class Placed(Messenger):
    """Let the guide draw given numbers, under its wrappers, with density 1: of log q the transforms' part is left."""

    def __init__(self, draws: Params) -> None:
        super().__init__()
        self.draws = draws

    def process_message(self, msg: Any) -> None:
        """Replace the distribution of a site that has a given draw."""
        if mark_guide_site(msg) and msg["name"] in self.draws:
            msg["fn"] = map_base(msg["fn"], lambda base: _Given(base, self.draws[msg["name"]]))


class _Given(dist.Distribution):
    """A distribution that draws what it is given."""

    has_rsample = True

    def __init__(self, base: Any, value: jax.Array) -> None:
        self.base, self.value = base, value
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.base.support

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        return self.value.reshape(*sample_shape, *self.shape())

    def log_prob(self, value: jax.Array) -> jax.Array:
        return jnp.zeros(jnp.shape(value)[: jnp.ndim(value) - self.event_dim], jnp.result_type(value))


def gaussian_latents(fit: Fit, key: jax.Array) -> _Latents:
    """Read means and spreads of all sites of a guide.

    :raises StructureError: if one is no Gaussian whose arguments are its own parameters.
    """
    svi = _initialised(fit.svi)
    params = svi.constrain_fn(fit.params, invert=True)

    def loss(values: Params) -> tuple[jax.Array, None]:
        made = svi.constrain_fn(values)
        return Trace_ELBO().loss(key, made, svi.model, svi.guide, *fit.args, **fit.kwargs), None

    trace = trace_loss(loss, params)
    sites = _sites(trace)
    shapes = {s.name: trace.sites[s.name].shape for s in sites}
    loc = jnp.concatenate([params[s.loc].ravel() for s in sites])
    factors = [_factor(s, params) for s in sites]
    scale = jnp.concatenate([jnp.sqrt(jnp.sum(k**2, -1)).ravel() if k.ndim > 1 else k for k in factors])
    return _Latents(fit, _labels(svi.guide, shapes), shapes, loc, scale, partial(_spread, factors))


def _sites(trace: LossTrace) -> list[GaussianSite | LowRankSite]:
    read = {name: read_gaussian_site(name, trace) or read_low_rank_site(name, trace) for name in trace.sites}
    sites = [site for site in read.values() if site is not None]
    owned = [p for site in sites for p in site.params]
    if other := [name for name, site in read.items() if site is None] + sorted(trace.scanned):
        raise StructureError(
            f"linear response needs Gaussian sites with parameters of their own; {other} are not. Fit a Gaussian guide "
            "(`AutoNormal`, `AutoMultivariateNormal`) for it."
        )
    if not sites or len(set(owned)) < len(owned):
        raise StructureError("linear response needs Gaussian sites with parameters of their own; the guide has none.")
    return sites


def _factor(site: GaussianSite | LowRankSite, params: Params) -> jax.Array:
    """Standard deviations ``(d,)`` or K, ``(batch, d, d)``."""
    if isinstance(site, GaussianSite) and site.form.diagonal:
        return site.covariance_factor(params).ravel()
    return site.cholesky(params)


def _spread(factors: list[jax.Array], noise: jax.Array) -> jax.Array:
    """Kε, flat."""
    ends = np.cumsum([k.size if k.ndim == 1 else k.shape[0] * k.shape[1] for k in factors])[:-1]
    parts = zip(factors, jnp.split(noise, ends), strict=True)
    return jnp.concatenate([_times(k, e) for k, e in parts])


def _times(factor: jax.Array, noise: jax.Array) -> jax.Array:
    if factor.ndim == 1:
        return factor * noise
    return jnp.einsum("bij,bj->bi", factor, noise.reshape(factor.shape[:2])).ravel()


def _labels(guide: Any, shapes: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Names of the latents; the flat latent of an ``AutoContinuous`` guide is taken apart."""
    unpack = getattr(guide, "_unpack_latent", None)
    if unpack is not None and len(shapes) == 1:
        (size,) = next(iter(shapes.values()))
        index = {name: np.asarray(x) for name, x in unpack(jnp.arange(size)).items()}
        flat = {int(x): label(name, at) for name, i in index.items() for at, x in np.ndenumerate(i)}
        return tuple(flat[i] for i in range(size))
    return tuple(label(name, at) for name, shape in shapes.items() for at in np.ndindex(*shape))


def label(name: str, at: tuple[int, ...]) -> str:
    """``site`` or ``site[i,j]``."""
    return f"{name}[{','.join(map(str, at))}]" if at else name
