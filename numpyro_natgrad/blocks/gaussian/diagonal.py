# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""One mean-field Gaussian site with too many latents for a joint step: everything elementwise.

With g = σ ∂L/∂m and λ = σ ∂L/∂σ (Khan & Rue 2023; both whitened), the precision is multiplied by 1 + ρλ and the mean
moves by −ρσg/(1 + ρλ). First order takes λ from the gradient of σ; second order from k Rademacher probes v of the
Hessian of the loss, λ = E[v ⊙ σHσv] − 1, whose noise is the Hessian's off-diagonal part instead of the draws'.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_natgrad.blocks.base import Memory, NoiseTolerance, Randomness, Scope, SquaredNorms, default_noise_tolerance
from numpyro_natgrad.distributions import gaussian
from numpyro_natgrad.distributions.gaussian import GaussianTangent
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.gaussian_sites import GaussianSite, Params
from numpyro_natgrad.guide.handlers import DensityMode

#: Rademacher probes a step in second order.
PROBES = 8


class DiagonalGaussian(NamedTuple):
    """One site of independent Normals."""

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

    def natural_gradient(
        self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness
    ) -> GaussianTangent:
        scale = self.site.covariance_factor(params)
        slope = scale * loss_info.gradient[self.site.loc].reshape(self.site.shape)
        if not self.second_order:
            gradient = loss_info.gradient[self.site.scale]
            # dx/dσ along each coordinate: the parameter's bijection is elementwise.
            rate = jax.jvp(self.site.unconstrain, (scale,), (jnp.ones_like(scale),))[1].reshape(gradient.shape)
            return GaussianTangent(slope, scale * (gradient * rate).reshape(self.site.shape), None)
        return GaussianTangent(slope, self._probed(loss_info, params, scale, randomness), None)

    def squared_norm(self, v: GaussianTangent) -> jax.Array:
        return gaussian.squared_norm(v)

    def forward_kl(self, v: GaussianTangent, rho: jax.Array) -> jax.Array:
        return gaussian.forward_kl(v, rho, self.margin)

    def reverse_kl(self, v: GaussianTangent, rho: jax.Array) -> jax.Array:
        return gaussian.reverse_kl(v, rho, self.margin)

    def compare(self, memory: Memory, v: GaussianTangent) -> SquaredNorms:
        old = self._running_mean(memory)
        news = GaussianTangent(v.slope - old.slope, v.values - old.values, None)
        return SquaredNorms(gaussian.squared_norm(old), gaussian.squared_norm(news), gaussian.squared_norm(v))

    def own_step_size(self, v: GaussianTangent) -> jax.Array | None:
        return None

    def update_memory(self, memory: Memory, v: GaussianTangent, weight: jax.Array) -> Memory:
        old = self._running_mean(memory)
        slope, values = old.slope + weight * (v.slope - old.slope), old.values + weight * (v.values - old.values)
        return self._with_running_mean(memory, GaussianTangent(slope, values, None))

    def retract(self, params: Params, memory: Memory, v: GaussianTangent, rho: jax.Array) -> tuple[Params, Memory]:
        loc, scale = self.site.read(params)
        shift = gaussian.mean_shift(v, rho, self.margin)
        root = gaussian.relative_factor(v, rho, self.margin)
        # The remembered part, seen from the new point: as in JointGaussian._carry, elementwise.
        old = self._running_mean(memory)
        values = old.values - (root**-2 - 1)
        slope = root * (old.slope - rho * v.slope + values * shift)
        memory = self._with_running_mean(memory, GaussianTangent(slope, root**2 * values, None))
        return self.site.write(params, loc + scale * shift, scale * root), memory

    def _running_mean(self, memory: Memory) -> GaussianTangent:
        slope, values = memory.running_mean[self.site.loc], memory.running_mean[self.site.scale]
        return GaussianTangent(slope.reshape(self.site.shape), values.reshape(self.site.shape), None)

    def _with_running_mean(self, memory: Memory, mean: GaussianTangent) -> Memory:
        shapes = {name: memory.running_mean[name].shape for name in self.params}
        new = {self.site.loc: mean.slope, self.site.scale: mean.values}
        return memory._replace(
            running_mean={**memory.running_mean, **{n: x.reshape(shapes[n]) for n, x in new.items()}}
        )

    def _probed(self, loss_info: LossInfo, params: Params, scale: jax.Array, randomness: Randomness) -> jax.Array:
        def product(probe: jax.Array) -> jax.Array:
            shift = (scale * probe).reshape(params[self.site.loc].shape)
            image = loss_info.hessian_product({self.site.loc: shift})[self.site.loc]
            return probe * scale * image.reshape(self.site.shape)

        probes = jax.random.rademacher(randomness.key, (PROBES, *self.site.shape), scale.dtype)
        curvature = jnp.mean(jax.vmap(product)(probes), axis=0)
        # In the path's view log q stays in the loss along the draws, and its Hessian −S is in the product already.
        return curvature if self.mode == DensityMode.PATH and not self.site.analytic else curvature - 1
