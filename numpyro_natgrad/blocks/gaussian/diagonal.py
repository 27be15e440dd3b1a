# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""One mean-field Gaussian site with too many latents for a joint step: everything is elementwise.

With the whitened slope g = σ ∂L/∂m and curvature λ = σ ∂L/∂σ a step multiplies the precision by 1 + ρλ and moves the
mean by −ρσg/(1 + ρλ) (Khan & Rue 2023). In first order λ comes from the gradient with respect to σ; in second
order from k Rademacher probes v of the Hessian of the loss (Bekas, Kokiopoulou & Saad 2007),

    λ = E[v ⊙ σHσv] − 1,      whose noise comes from the Hessian's off-diagonal entries and not from the draws.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from numpyro_natgrad.blocks.base import Memory, Randomness, SquaredNorms
from numpyro_natgrad.blocks.gaussian.site_block import SiteBlock
from numpyro_natgrad.distributions import gaussian
from numpyro_natgrad.distributions.gaussian import GaussianTangent
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.gaussian_sites import GaussianSite, Params
from numpyro_natgrad.guide.handlers import DensityMode


@dataclass(frozen=True)
class DiagonalGaussian(SiteBlock[GaussianSite, GaussianTangent]):
    """One site of independent Normals."""

    @property
    def products(self) -> int:
        return self.constants.diagonal_probes

    def natural_gradient(
        self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness
    ) -> GaussianTangent:
        scale = self.site.covariance_factor(params)
        slope = scale * loss_info.gradient[self.site.loc].reshape(self.site.shape)
        if self.second_order:
            return GaussianTangent(slope, self._probed_curvature(loss_info, scale, randomness), None)
        gradient = loss_info.gradient[self.site.scale]
        # dx/dσ of the parameter x along each coordinate: its bijection is elementwise.
        rate = jax.jvp(self.site.unconstrain, (scale,), (jnp.ones_like(scale),))[1].reshape(gradient.shape)
        return GaussianTangent(slope, scale * (gradient * rate).reshape(self.site.shape), None)

    def squared_norm(self, v: GaussianTangent) -> jax.Array:
        return gaussian.squared_norm(v)

    def forward_kl(self, v: GaussianTangent, rho: jax.Array) -> jax.Array:
        return gaussian.forward_kl(v, rho, self.margin)

    def reverse_kl(self, v: GaussianTangent, rho: jax.Array) -> jax.Array:
        return gaussian.reverse_kl(v, rho, self.margin)

    def compare(self, memory: Memory, v: GaussianTangent) -> SquaredNorms:
        mean = self._running_mean(memory)
        return SquaredNorms(*map(gaussian.squared_norm, (mean, jax.tree.map(jnp.subtract, v, mean), v)))

    def update_memory(self, memory: Memory, v: GaussianTangent, weight: jax.Array) -> Memory:
        mean = jax.tree.map(lambda m, x: m + weight * (x - m), self._running_mean(memory), v)
        return self._remembered(memory, mean)

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
        slope, values = (memory.running_mean[p].reshape(self.site.shape) for p in self.params)
        return GaussianTangent(slope, values, None)

    def _remembered(self, memory: Memory, mean: GaussianTangent) -> Memory:
        return memory.with_running_means({self.site.loc: mean.slope, self.site.scale: mean.values})

    def _probed_curvature(self, loss_info: LossInfo, scale: jax.Array, randomness: Randomness) -> jax.Array:
        product = lambda v: v * scale * self._hessian_product(loss_info, scale * v)
        probes = jax.random.rademacher(randomness.key, (self.products, *self.site.shape), scale.dtype)
        curvature = jnp.mean(jax.vmap(product)(probes), axis=0)
        # With path gradients the products contain the Hessian −S of log q already.
        return curvature if self.density_mode == DensityMode.PATH and not self.site.analytic else curvature - 1
