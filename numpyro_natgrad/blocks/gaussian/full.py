# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""One full Gaussian site with too many latents for a dense Hessian: k random probes of it, or first order.

Second order: k orthonormal probes V of the whitened Hessian (:func:`sweep`) give M̂ of rank 2k
(:func:`.sketch`), without noise at the solution.
First order: M = tril(Kᵀ ∂L/∂K) made symmetric (Tan 2021, section 3), from the gradient alone; its noise grows with d
over the number of draws.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_natgrad.blocks.base import Memory, NoiseTolerance, Randomness, Scope, SquaredNorms, default_noise_tolerance
from numpyro_natgrad.distributions import gaussian
from numpyro_natgrad.distributions.gaussian import GaussianTangent
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.estimators.hessian_products import fall_back_to_gradient, whitened_hessian_products
from numpyro_natgrad.guide.gaussian_sites import GaussianSite, Params
from numpyro_natgrad.guide.handlers import DensityMode

#: Hessian products a step of a wide Gaussian; 16 were as good as 32 on targets of 50–500 dimensions.
PROBES = 16


class Frame(NamedTuple):
    """A natural gradient with the frame (m, K) that it is whitened in."""

    tangent: GaussianTangent
    loc: jax.Array
    factor: jax.Array


class FullGaussian(NamedTuple):
    """One site N(m, KKᵀ), K lower triangular; ``second_order`` needs a site without batch axes."""

    site: GaussianSite
    second_order: bool
    mode: DensityMode | None
    margin: float

    @property
    def params(self) -> tuple[str, ...]:
        return (self.site.loc, self.site.scale)

    @property
    def exact_on_conjugate(self) -> bool:
        return True

    @property
    def density_modes(self) -> dict[str, DensityMode]:
        return {self.site.name: self.mode} if self.mode else {}

    @property
    def hessian_params(self) -> tuple[str, ...]:
        return (self.site.loc,) if self.second_order else ()

    def noise_tolerance(self, scope: Scope) -> NoiseTolerance:
        return default_noise_tolerance(scope)

    def report_rows(self) -> list[tuple[str, str, str, str, str]]:
        how = f"{PROBES} products with the Hessian of the loss" if self.second_order else "draws ⊗ gradients"
        return self.site.report_rows(f"closed form, {how}")

    def natural_gradient(self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness) -> Frame:
        loc, factor = self.site.read(params)
        slope = _whiten(factor, loss_info.gradient[self.site.loc].reshape(self.site.shape))
        if not self.second_order:
            curvature = self._first_order(loss_info.gradient[self.site.scale], factor)
            return Frame(gaussian.tangent(slope, jnp.nan_to_num(curvature)), loc, factor)
        return Frame(self._sketch(loss_info, params, slope, factor, randomness), loc, factor)

    def squared_norm(self, v: Frame) -> jax.Array:
        return gaussian.squared_norm(v.tangent)

    def forward_kl(self, v: Frame, rho: jax.Array) -> jax.Array:
        return gaussian.forward_kl(v.tangent, rho, self.margin)

    def reverse_kl(self, v: Frame, rho: jax.Array) -> jax.Array:
        return gaussian.reverse_kl(v.tangent, rho, self.margin)

    def compare(self, memory: Memory, v: Frame) -> SquaredNorms:
        """The mean part only: successive sketches see different parts of M and would pass for noise."""
        running_mean = self._running_mean(memory)
        slope = v.tangent.slope
        return SquaredNorms(jnp.sum(running_mean**2), jnp.sum((slope - running_mean) ** 2), jnp.sum(slope**2))

    def own_step_size(self, v: Frame) -> jax.Array | None:
        return None

    def update_memory(self, memory: Memory, v: Frame, weight: jax.Array) -> Memory:
        running_mean = self._running_mean(memory)
        return self._with_running_mean(memory, running_mean + weight * (v.tangent.slope - running_mean))

    def retract(self, params: Params, memory: Memory, v: Frame, rho: jax.Array) -> tuple[Params, Memory]:
        shift = gaussian.mean_shift(v.tangent, rho, self.margin)
        contraction = gaussian.relative_factor(v.tangent, rho, self.margin)
        loc = v.loc + jnp.einsum("...ij,...j->...i", v.factor, shift)
        left = _whiten(contraction, self._running_mean(memory) - rho * v.tangent.slope)
        return self.site.write(params, loc, v.factor @ contraction), self._with_running_mean(memory, left)

    def _running_mean(self, memory: Memory) -> jax.Array:
        return memory.running_mean[self.site.loc].reshape(self.site.shape)

    def _with_running_mean(self, memory: Memory, slope: jax.Array) -> Memory:
        old = memory.running_mean
        return memory._replace(running_mean={**old, self.site.loc: slope.reshape(old[self.site.loc].shape)})

    def _first_order(self, gradient: jax.Array, factor: jax.Array) -> jax.Array:
        _, pull = jax.vjp(lambda k: self.site.unconstrain(jnp.tril(k)).reshape(gradient.shape), factor)
        lower = jnp.tril(jnp.swapaxes(factor, -1, -2) @ pull(gradient)[0])
        return lower + jnp.swapaxes(jnp.tril(lower, -1), -1, -2)

    def _sketch(
        self, loss_info: LossInfo, params: Params, slope: jax.Array, factor: jax.Array, randomness: Randomness
    ) -> GaussianTangent:
        probes = sweep(self.site.size, min(PROBES, self.site.size), randomness.step).astype(factor.dtype)
        hessian_product, offset = partial(self._hessian_product, loss_info, params), self._offset(loss_info, params)
        image, correction = whitened_hessian_products(
            hessian_product, factor, factor @ probes, offset, loss_info.particles
        )
        slope, image = fall_back_to_gradient(loss_info.previous_step_skipped, slope, slope + correction, image - probes)
        ok = jnp.all(jnp.isfinite(image))
        sketched = gaussian.sketched_tangent(slope, probes, jnp.where(ok, image, 0.0))
        return sketched._replace(values=jnp.where(ok, sketched.values, jnp.nan))

    def _offset(self, loss_info: LossInfo, params: Params) -> jax.Array | None:
        return (
            None if self.site.analytic else loss_info.perturbation_gradients[self.site.name] - self.site.read(params)[0]
        )

    def _hessian_product(self, loss_info: LossInfo, params: Params, shift: jax.Array, stretch: jax.Array) -> jax.Array:
        tangents = {self.site.loc: shift.reshape(params[self.site.loc].shape)}
        return loss_info.hessian_product(tangents, {self.site.name: stretch})[self.site.loc].reshape(self.site.shape)


def sweep(d: int, k: int, step: jax.Array) -> jax.Array:
    """k orthonormal probes of d dimensions, ``(d, k)``: the next k of a cosine basis with random signs.

    V_ij = ±√(2/d) cos(π (i + ½) j / d), the columns j in random order: every direction is seen once in d/k steps,
    and neither random numbers nor an orthogonalisation are computed.
    """
    draw = np.random.default_rng(d)
    signs, order = draw.choice([-1.0, 1.0], d), draw.permutation(d)
    j = jnp.asarray(order)[(step * k + jnp.arange(k)) % d]
    scale = jnp.where(j == 0, np.sqrt(1 / d), np.sqrt(2 / d))
    return jnp.asarray(signs)[:, None] * scale * jnp.cos(np.pi / d * (jnp.arange(d)[:, None] + 0.5) * j)


def _whiten(factor: jax.Array, gradient: jax.Array) -> jax.Array:
    return jnp.einsum("...ij,...i->...j", factor, gradient)
