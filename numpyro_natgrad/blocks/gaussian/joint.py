# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""All Gaussian sites of a guide in one dense step: lift and project.

The step is taken by a *full* joint Gaussian N(m, S⁻¹) over all latents, S ← (1−ρ)S + ρ E_q[∇²f], whatever the guide's
family; the guide is its projection (:func:`.project`), and the draws come from the guide. Its fixed points are
the guide's own optima: there S = E_q[∇²f], E_q[∇f] = 0, and the projection makes S − Σ⁻¹ orthogonal to the family's
tangent space, which is ∇_Σ L = ½(E_q[∇²f] − Σ⁻¹) = 0 along it (Price). Mean-field guides lose their weakness on
correlated posteriors: the means take Newton steps with the full precision.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import block_diag

from numpyro_natgrad.blocks.base import (
    JointMemory,
    Memory,
    NoiseTolerance,
    Randomness,
    Scope,
    SquaredNorms,
    default_noise_tolerance,
)
from numpyro_natgrad.distributions import gaussian
from numpyro_natgrad.distributions.gaussian import GaussianTangent
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.estimators.hessian_products import fall_back_to_gradient, whitened_hessian_products
from numpyro_natgrad.guide.gaussian_sites import GaussianParameterization, Params, project, projected_square
from numpyro_natgrad.guide.handlers import DensityMode


class Frame(NamedTuple):
    """A natural gradient with the frame (m, K) that it is whitened in, and what the guide's sites spread by."""

    tangent: GaussianTangent
    curvature: jax.Array
    loc: jax.Array
    factor: jax.Array
    spreads: list[Any]


class JointGaussian(NamedTuple):
    """The dense joint step over ``sites``; ``lifted`` unless the guide is one full Gaussian itself.

    ``strict``: KL is the guide's own, which a limit given in nats is about, at the price of a projection for every
    length tried; else it is that of the lifted Gaussian.
    """

    sites: tuple[GaussianParameterization[Any], ...]
    margin: float
    strict: bool
    particles: float

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(p for s in self.sites for p in s.params)

    @property
    def exact_on_conjugate(self) -> bool:
        return True

    @property
    def mode(self) -> DensityMode:
        """How all of its sites are seen."""
        return DensityMode.DETACHED

    @property
    def density_modes(self) -> dict[str, DensityMode]:
        return {s.name: self.mode for s in self.sites}

    @property
    def hessian_params(self) -> tuple[str, ...]:
        """The means; none where particles are told apart, each by its own gradient."""
        return () if self.mode.per_particle else tuple(s.loc for s in self.sites)

    @property
    def lifted(self) -> bool:
        return len(self.sites) > 1 or not self.sites[0].full_covariance

    @property
    def size(self) -> int:
        return sum(s.size for s in self.sites)

    @property
    def products(self) -> int:
        """Products with the Hessian of the loss that a particle is asked for in a step."""
        return self.size

    def noise_tolerance(self, scope: Scope) -> NoiseTolerance:
        c = scope.constants
        tolerance = default_noise_tolerance(scope, antithetic=DensityMode.ANTITHETIC in self.density_modes.values())
        # Beyond τ the floor keeps steps long, so that the threshold need not grow with the number of latents.
        threshold = min(tolerance.threshold, c.noise_threshold / scope.blocks)
        floor = c.floor_noise if scope.full_data else c.floor_noise_minibatch
        return tolerance._replace(threshold=threshold, floor_noise=floor * self.size)

    def report_rows(self) -> list[tuple[str, str, str, str, str]]:
        how = f"closed form, {self.products} products with the Hessian of the loss"
        return [row for s in self.sites for row in s.report_rows(how + ", lifted" * self.lifted)]

    def natural_gradient(self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness) -> Any:
        loc = jnp.concatenate([params[s.loc].ravel() for s in self.sites])
        factor = self._factor(params, memory.joint)
        plain = factor.T @ self._flat({s.loc: loss_info.gradient[s.loc] for s in self.sites})
        curvature, correction = self._learned(loss_info, params, loc, factor)
        curvature = (curvature + curvature.T) / 2 - jnp.eye(self.size, dtype=curvature.dtype)
        whitened, curvature = fall_back_to_gradient(
            loss_info.previous_step_skipped, plain, plain + correction, curvature
        )
        return Frame(tangent(whitened, curvature), curvature, loc, factor, self._spreads(params))

    def _learned(
        self, loss_info: LossInfo, params: Params, loc: jax.Array, factor: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """KᵀHK, to be made symmetric, and what takes the noise of the draws' mean out of the slope; whitened."""
        hessian_product, offset = partial(self._hessian_product, loss_info, params), self._offset(loss_info, loc)
        return whitened_hessian_products(hessian_product, factor, factor, offset, loss_info.particles)

    def squared_norm(self, v: Frame) -> jax.Array:
        return gaussian.squared_norm(v.tangent)

    def forward_kl(self, v: Frame, rho: jax.Array) -> jax.Array:
        if not (self.strict and self.lifted):
            return gaussian.forward_kl(v.tangent, rho, self.margin)
        shift = v.factor @ gaussian.mean_shift(v.tangent, rho, self.margin)
        roots = v.factor, v.factor @ gaussian.relative_factor(v.tangent, rho, self.margin)
        before, after = (project(gaussian.inverse_lower(k), self.sites, v.spreads) for k in roots)
        parts = zip(self.sites, before, after, self._split(shift), strict=True)
        return sum((s.kl(a, b, x.reshape(s.shape)) for s, a, b, x in parts), jnp.zeros(()))

    def reverse_kl(self, v: Frame, rho: jax.Array) -> jax.Array:
        return gaussian.reverse_kl(v.tangent, rho, self.margin)

    def compare(self, memory: Memory, v: Frame) -> SquaredNorms:
        slopes, curvatures = self._compared(memory, v)
        square = lambda curvature: jnp.sum(slopes**2, axis=1) + 0.5 * curvature
        running_mean2, innovation2, gradient2 = square(jnp.sum(curvatures**2, axis=(1, 2)))
        visible = square(self._visible(v.factor, curvatures)) if self.lifted else None
        return SquaredNorms(running_mean2, innovation2, gradient2, visible=visible)

    def _compared(self, memory: Memory, v: Any) -> tuple[jax.Array, jax.Array]:
        """Slopes ``(3, d)`` and curvatures of the running mean, of what differs from it, and of both."""
        slope, curvature = self._running_mean(memory.joint)
        slopes = jnp.stack([slope, v.tangent.slope - slope, v.tangent.slope])
        return slopes, jnp.stack([curvature, v.curvature - curvature, v.curvature])

    def _visible(self, factor: jax.Array, curvatures: jax.Array) -> jax.Array:
        """Squares of what the guide shows of curvatures; along the means it is the joint Gaussian that counts."""
        columns = jnp.split(gaussian.inverse_lower(factor), self._ends(), axis=1)
        parts = list(zip(self.sites, columns, strict=True))
        return jax.vmap(lambda m: sum((projected_square(x, m, s.block_size) for s, x in parts), jnp.zeros(())))(
            curvatures
        )

    def own_step_size(self, v: Any) -> jax.Array | None:
        return None

    def update_memory(self, memory: Memory, v: Frame, weight: jax.Array) -> Memory:
        slope, curvature = self._running_mean(memory.joint)
        slope, curvature = slope + weight * (v.tangent.slope - slope), curvature + weight * (v.curvature - curvature)
        return memory._replace(joint=self._with_running_mean(memory.joint, slope, curvature))

    def retract(self, params: Params, memory: Memory, v: Frame, rho: jax.Array) -> tuple[Params, Memory]:
        shift = gaussian.mean_shift(v.tangent, rho, self.margin)
        contraction = gaussian.relative_factor(v.tangent, rho, self.margin)
        loc, factor = v.loc + v.factor @ shift, v.factor @ contraction
        joint = self._carry(memory.joint, v.tangent, rho, shift, contraction)
        joint = joint._replace(factor=factor) if self.lifted else joint
        return self._write(params, v.spreads, loc, factor), memory._replace(joint=joint)

    def _spreads(self, params: Params) -> list[Any]:
        return [s.covariance_factor(params) for s in self.sites]

    def _factor(self, params: Params, joint: JointMemory) -> jax.Array:
        """K: the guide's own, or the lifted one, which starts as the guide's."""
        blocks = [k for s in self.sites for k in s.cholesky(params)]
        if not self.lifted:
            return blocks[0]
        return jnp.where(
            joint.factor[0, 0] > 0, joint.factor, block_diag(*blocks)
        )  # zero until the first step is taken

    def _carry(
        self, joint: JointMemory, taken: GaussianTangent, rho: jax.Array, shift: jax.Array, contraction: jax.Array
    ) -> JointMemory:
        """What the remembered natural gradients say at the new point, in its frame.

        Each estimated where the optimum lies in natural parameters, η − v; that estimate stays while η moves by −ρv,
        so the step is subtracted. The frame follows exactly, natural parameters being affine coordinates:
        M' = TᵀMT and g' = Tᵀ(g + M K⁻¹(m₊ − m)).
        """
        slope, curvature = self._running_mean(joint)
        slope, curvature = slope - rho * taken.slope, curvature - gaussian.precision_change(taken, rho, self.margin)
        moved = contraction.T @ (slope + curvature @ shift), contraction.T @ curvature @ contraction
        return self._with_running_mean(joint, *moved)

    def _running_mean(self, joint: JointMemory) -> tuple[jax.Array, jax.Array]:
        return joint.slope, joint.curvature

    def _with_running_mean(self, joint: JointMemory, slope: jax.Array, curvature: jax.Array) -> JointMemory:
        return joint._replace(slope=slope, curvature=curvature)

    def _write(self, params: Params, spreads: list[Any], loc: jax.Array, factor: jax.Array) -> Params:
        own = project(gaussian.inverse_lower(factor), self.sites, spreads) if self.lifted else [factor]
        for site, mean, k in zip(self.sites, self._split(loc), own, strict=True):
            params = site.write(params, mean, k)
        return params

    def _offset(self, loss_info: LossInfo, loc: jax.Array) -> jax.Array | None:
        """Of the draws' mean from m; ``None`` where nothing is drawn."""
        if any(s.analytic for s in self.sites):
            return None
        return jnp.concatenate([loss_info.perturbation_gradients[s.name].ravel() for s in self.sites]) - loc

    def _hessian_product(self, loss_info: LossInfo, params: Params, shift: jax.Array, stretch: jax.Array) -> jax.Array:
        return self._flat(loss_info.hessian_product(self._shift(params, shift), {s.name: stretch for s in self.sites}))

    def _shift(self, params: Params, direction: jax.Array) -> Params:
        """A tangent that moves the means only."""
        means = zip(self.sites, self._split(direction), strict=True)
        return {s.loc: x.reshape(params[s.loc].shape) for s, x in means}

    def _flat(self, values: Params) -> jax.Array:
        return jnp.concatenate([values[s.loc].ravel() for s in self.sites])

    def _split(self, flat: jax.Array) -> list[jax.Array]:
        return jnp.split(flat, self._ends())

    def _ends(self) -> list[int]:
        return list(accumulate(s.size for s in self.sites))[:-1]


def tangent(slope: jax.Array, curvature: jax.Array) -> GaussianTangent:
    # A NaN would keep the eigensolver busy; the step that follows it is skipped because the slope shows it.
    ok = jnp.all(jnp.isfinite(curvature))
    spectrum = gaussian.tangent(slope, jnp.where(ok, curvature, 0.0))
    return spectrum._replace(values=jnp.where(ok, spectrum.values, jnp.nan))


def particles(loss_info: LossInfo, sites: Sequence[GaussianParameterization[Any]]) -> jax.Array:
    """Draws of sites whose particles are told apart, and gradients of −log p there, ``(2, S, d)``."""
    n = int(loss_info.particles)
    return jnp.concatenate([n * loss_info.perturbation_gradients[s.name].reshape(2, n, -1) for s in sites], axis=2)
