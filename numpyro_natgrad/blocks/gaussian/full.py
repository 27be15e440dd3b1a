# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""One full Gaussian site with too many latents for a dense Hessian: k random probes of it, or first order.

*Second order.* The whitened Hessian is probed along k orthonormal directions V (:func:`cosine_probes`), which determine
a part of M of rank 2k (:func:`.sketched_tangent`), without noise at the solution.

*First order.* M = tril(Kᵀ ∂L/∂K), made symmetric (Tan 2021), whose noise grows with d over the number of draws.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_natgrad.blocks.base import Memory, Randomness, SquaredNorms, conjugate_kl
from numpyro_natgrad.blocks.gaussian.site_block import SiteBlock
from numpyro_natgrad.distributions import gaussian
from numpyro_natgrad.distributions.gaussian import GaussianTangent, StepKL
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.estimators.hessian_products import fall_back_to_gradient, whitened_hessian_products
from numpyro_natgrad.guide.gaussian_sites import GaussianSite, Params


class FullTangent(NamedTuple):
    """A natural gradient with the mean m and factor K that it is whitened by."""

    tangent: GaussianTangent
    loc: jax.Array
    factor: jax.Array


@dataclass(frozen=True)
class FullGaussian(SiteBlock[GaussianSite, FullTangent]):
    """One site N(m, KKᵀ), K lower triangular; ``second_order`` needs a site without batch axes."""

    @property
    def products(self) -> int:
        return self.constants.full_probes

    def natural_gradient(
        self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness
    ) -> FullTangent:
        loc, factor = self.site.read(params)
        slope = _whiten(factor, loss_info.gradient[self.site.loc].reshape(self.site.shape))
        if self.second_order:
            return FullTangent(self._sketch(loss_info, slope, loc, factor, randomness), loc, factor)
        curvature = self._first_order_curvature(loss_info.gradient[self.site.scale], factor)
        return FullTangent(gaussian.tangent(slope, jnp.nan_to_num(curvature)), loc, factor)

    def squared_norm(self, v: FullTangent) -> jax.Array:
        return gaussian.squared_norm(v.tangent)

    def kl(self, v: FullTangent, rho: jax.Array) -> StepKL:
        kl = gaussian.kl(v.tangent, rho, self.margin)
        return conjugate_kl(kl.forward, kl.reverse, rho)

    def compare(self, memory: Memory, v: FullTangent) -> SquaredNorms:
        """The mean part only: successive sketches contain different parts of M, which would count as noise."""
        mean, slope = self._running_mean(memory), v.tangent.slope
        return SquaredNorms(*(jnp.sum(x**2) for x in (mean, slope - mean, slope)))

    def update_memory(self, memory: Memory, v: FullTangent, weight: jax.Array) -> Memory:
        mean = self._running_mean(memory)
        return memory.with_running_means({self.site.loc: mean + weight * (v.tangent.slope - mean)})

    def retract(self, params: Params, memory: Memory, v: FullTangent, rho: jax.Array) -> tuple[Params, Memory]:
        shift = gaussian.mean_shift(v.tangent, rho, self.margin)
        ratio = gaussian.relative_factor(v.tangent, rho, self.margin)
        loc = v.loc + jnp.einsum("...ij,...j->...i", v.factor, shift)
        mean = _whiten(ratio, self._running_mean(memory) - rho * v.tangent.slope)
        return self.site.write(params, loc, v.factor @ ratio), memory.with_running_means({self.site.loc: mean})

    def _running_mean(self, memory: Memory) -> jax.Array:
        return memory.running_mean[self.site.loc].reshape(self.site.shape)

    def _first_order_curvature(self, gradient: jax.Array, factor: jax.Array) -> jax.Array:
        _, pullback = jax.vjp(lambda k: self.site.unconstrain(jnp.tril(k)).reshape(gradient.shape), factor)
        lower = jnp.tril(jnp.swapaxes(factor, -1, -2) @ pullback(gradient)[0])
        return lower + jnp.swapaxes(jnp.tril(lower, -1), -1, -2)

    def _sketch(
        self, loss_info: LossInfo, slope: jax.Array, loc: jax.Array, factor: jax.Array, randomness: Randomness
    ) -> GaussianTangent:
        d = self.site.size
        probes = cosine_probes(d, min(self.products, d), randomness, factor.dtype)
        product, offset = partial(self._hessian_product, loss_info), self._mean_offset(loss_info, loc)
        image, correction = whitened_hessian_products(product, factor, factor @ probes, offset, loss_info.particles)
        slope, image = fall_back_to_gradient(loss_info.previous_step_skipped, slope, slope + correction, image - probes)
        ok = jnp.all(jnp.isfinite(image))
        sketched = gaussian.sketched_tangent(slope, probes, jnp.where(ok, image, 0.0))
        return sketched._replace(values=jnp.where(ok, sketched.values, jnp.nan))


def cosine_probes(d: int, k: int, randomness: Randomness, dtype: jnp.dtype) -> jax.Array:
    """k orthonormal probes of d dimensions, ``(d, k)``: the next k vectors of a cosine (DCT-II) basis of random signs.

    V_ij = ±√(2/d) cos(π (i + ½) j / d), in a random, fixed order of j: d/k steps probe each direction once.
    """
    sign_key, order_key = jax.random.split(randomness.run_key)
    signs = jax.random.rademacher(sign_key, (d, 1), dtype)
    j = jax.random.permutation(order_key, d)[(randomness.step * k + jnp.arange(k)) % d].astype(dtype)
    scale = jnp.where(j == 0, np.sqrt(1 / d), np.sqrt(2 / d)).astype(dtype)
    return signs * scale * jnp.cos(np.pi / d * (jnp.arange(d, dtype=dtype)[:, None] + 0.5) * j)


def _whiten(factor: jax.Array, gradient: jax.Array) -> jax.Array:
    return jnp.einsum("...ij,...i->...j", factor, gradient)
