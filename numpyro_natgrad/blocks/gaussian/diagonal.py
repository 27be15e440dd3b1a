# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Mean-field Gaussian sites with too many latents for a joint step: everything is elementwise.

With the whitened slope g = σ ∂L/∂m and curvature λ = σ ∂L/∂σ a step multiplies the precision by 1 + ρλ and moves the
mean by −ρσg/(1 + ρλ) (Khan & Rue 2023). In second order λ comes from k Rademacher probes v of the Hessian of the loss
(Bekas, Kokiopoulou & Saad 2007),

    λ = max(E[v ⊙ σHσv], 0) − 1,    averaged over steps, each with the signal fraction of its k estimates as weight.

In first order λ comes from the gradient with respect to σ. Its noise is that of σ ∇f ⊙ ε, which grows with the distance
from the optimum; since 1 + ρλ must stay positive, such noise widens more than it narrows.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from numpyro_natgrad.blocks.base import Memory, Randomness, SquaredNorms, conjugate_kl
from numpyro_natgrad.blocks.gaussian.site_block import SiteBlock
from numpyro_natgrad.distributions import gaussian
from numpyro_natgrad.distributions.gaussian import GaussianTangent, StepKL
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.estimators.hessian_products import fall_back_to_gradient, random_signs
from numpyro_natgrad.guide.gaussian_sites import GaussianSite, Params
from numpyro_natgrad.guide.mean_field_sites import MeanFieldSites, gathered, scattered


@dataclass(frozen=True)
class DiagonalGaussian(SiteBlock[GaussianSite | MeanFieldSites, GaussianTangent]):
    """One site of independent Normals, or several."""

    @property
    def products(self) -> int:
        return self.constants.diagonal_probes

    def natural_gradient(
        self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness
    ) -> GaussianTangent:
        loc, scale = self.site.read(params)
        plain = scale * gathered(loss_info.gradient, self.site.locs).reshape(self.site.shape)
        if not self.second_order:
            return GaussianTangent(plain, self._first_order_curvature(loss_info, scale), None)
        mean = self._running_mean(memory).values
        slope = plain + self._control_variate(loss_info, loc, scale, mean)
        innovations = self._probed_curvature(loss_info, scale, randomness) - mean
        update = signal_fraction(innovations, self.constants.diagonal_weight_min) * jnp.mean(innovations, axis=0)
        # The mean of H is 1/σ² at an optimum. Negative, it is noise, or of a distant guide, and one bad draw of a
        # network would widen σ beyond the prior's: draws of wide weights then have such Hessians again.
        values = jnp.maximum(mean + update, -1.0)
        usable = fall_back_to_gradient(loss_info.previous_step_skipped, plain, slope, values)
        return GaussianTangent(*usable, None)

    def squared_norm(self, v: GaussianTangent) -> jax.Array:
        return gaussian.squared_norm(v)

    def kl(self, v: GaussianTangent, rho: jax.Array) -> StepKL:
        kl = gaussian.kl(v, rho, self.margin)
        return conjugate_kl(kl.forward, kl.reverse, rho)

    def compare(self, memory: Memory, v: GaussianTangent) -> SquaredNorms:
        mean = self._running_mean(memory)
        return SquaredNorms(*map(gaussian.squared_norm, (mean, jax.tree.map(jnp.subtract, v, mean), v)))

    def update_memory(self, memory: Memory, v: GaussianTangent, weight: jax.Array) -> Memory:
        mean = jax.tree.map(lambda m, x: m + weight * (x - m), self._running_mean(memory), v)
        return self._remembered(memory, mean._replace(values=v.values) if self.second_order else mean)

    def retract(self, params: Params, memory: Memory, v: GaussianTangent, rho: jax.Array) -> tuple[Params, Memory]:
        loc, scale = self.site.read(params)
        shift = gaussian.mean_shift(v, rho, self.margin)
        ratio = gaussian.relative_factor(v, rho, self.margin)
        # As in the joint block: the step is subtracted from the running mean, which is then whitened by the new σ.
        mean = self._running_mean(memory)
        values = mean.values - (ratio**-2 - 1)
        slope = ratio * (mean.slope - rho * v.slope + values * shift)
        memory = self._remembered(memory, GaussianTangent(slope, ratio**2 * values, None))
        return self.site.write(params, loc + scale * shift, scale * ratio), memory

    def _running_mean(self, memory: Memory) -> GaussianTangent:
        both = (gathered(memory.running_mean, names) for names in (self.site.locs, self.site.scales))
        slope, values = (x.reshape(self.site.shape) for x in both)
        return GaussianTangent(slope, values, None)

    def _remembered(self, memory: Memory, mean: GaussianTangent) -> Memory:
        slopes = scattered(mean.slope.ravel(), memory.running_mean, self.site.locs)
        values = scattered(mean.values.ravel(), memory.running_mean, self.site.scales)
        return memory.with_running_means({**slopes, **values})

    def _first_order_curvature(self, loss_info: LossInfo, scale: jax.Array) -> jax.Array:
        gradient = gathered(loss_info.gradient, self.site.scales)
        # dx/dσ of the parameter x along each coordinate: its bijection is elementwise.
        rate = jax.jvp(self.site.unconstrain, (scale,), (jnp.ones_like(scale),))[1]
        return scale * (gradient * rate.ravel()).reshape(self.site.shape)

    def _control_variate(
        self, loss_info: LossInfo, loc: jax.Array, scale: jax.Array, curvature: jax.Array
    ) -> jax.Array:
        """−(1 + λ)ε̄ with the λ of earlier steps, which does not depend on these draws: E[ε̄] = 0.

        It removes the noise of a slope whose Hessian is diagonal. That of the other elements would cost a product, and
        reaches no more in as many steps (docs/benchmarks/wide.md).
        """
        offset = self._mean_offset(loss_info, loc)
        return jnp.zeros_like(loc) if offset is None else -(1 + curvature) * offset / scale

    def _probed_curvature(self, loss_info: LossInfo, scale: jax.Array, randomness: Randomness) -> jax.Array:
        """λ by each of k Rademacher probes, ``(k, *shape)``."""
        product = lambda v: v * scale * self._hessian_product(loss_info, scale * v)
        probes = random_signs(randomness.key, (self.products, *self.site.shape), scale.dtype)
        return jax.vmap(product)(probes) - 1


def signal_fraction(samples: jax.Array, least: float) -> jax.Array:
    """1 − (variance of the mean) / ‖mean‖² of k estimates, ``(k, ...)``, in the Euclidean norm, at least ``least``."""
    mean = jnp.mean(samples, axis=0)
    variance = jnp.sum((samples - mean) ** 2) / (samples.shape[0] * (samples.shape[0] - 1))
    return jnp.maximum(1 - variance / jnp.maximum(jnp.sum(mean**2), jnp.finfo(mean.dtype).tiny), least)
