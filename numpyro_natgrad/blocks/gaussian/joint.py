# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""All Gaussian sites of a guide in one dense step of their full-covariance proxy, which is projected onto the guide.

The proxy N(m, S⁻¹) over all latents takes the step S ← (1−ρ)S + ρ E_q[∇²f], whatever the guide's family. The guide,
from which the draws come, is its projection (:func:`.gaussian_sites.project`). The fixed points are the guide's optima:
there E_q[∇f] = 0, S = E_q[∇²f], and ∇_Σ L = ½(S − Σ⁻¹) (Price) is orthogonal to the family's tangent space, as at every
projection. The means of mean-field guides take Newton steps with the full precision, so that correlated posteriors do
not slow them down.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_natgrad.blocks.base import (
    Block,
    JointMemory,
    Memory,
    NoiseTolerance,
    Randomness,
    ReportRow,
    Scope,
    SquaredNorms,
    default_noise_tolerance,
)
from numpyro_natgrad.blocks.gaussian.curvature import CurvatureEstimate, CurvatureEstimator
from numpyro_natgrad.blocks.gaussian.joint_latents import GuideFactors, JointLatents
from numpyro_natgrad.distributions import gaussian
from numpyro_natgrad.distributions.gaussian import GaussianTangent, StepKL
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import DensityMode


class JointTangent(NamedTuple):
    """A natural gradient of D latents, whitened by (m, K).

    :ivar tangent: slope and eigendecomposition of the curvature of ``estimate``.
    :ivar loc: m, ``(D,)``.
    :ivar factor: K, ``(D, D)``: that of the proxy if there is one.
    """

    tangent: GaussianTangent
    estimate: CurvatureEstimate
    loc: jax.Array
    factor: jax.Array
    guide_factors: GuideFactors


@dataclass(frozen=True)
class JointGaussian(Block[JointTangent]):
    """The dense joint step.

    :ivar margin: see :func:`.positive_ratio`.
    :ivar widening_limit: see :func:`.gaussian.wait`; infinity if the covariance never waits.
    :ivar kl_of_guide: whether the forward KL is that of the guide, for a limit in nats, at the price of a projection
        for every trial step size. Otherwise it is that of the proxy.
    """

    latents: JointLatents
    curvature: CurvatureEstimator
    margin: float
    widening_limit: float
    kl_of_guide: bool

    @property
    def params(self) -> tuple[str, ...]:
        return self.latents.params

    @property
    def density_modes(self) -> dict[str, DensityMode]:
        return dict.fromkeys(self.latents.names, self.curvature.density_mode)

    @property
    def hessian_params(self) -> tuple[str, ...]:
        return () if self.curvature.density_mode.per_particle else self.latents.locs

    def noise_tolerance(self, scope: Scope) -> NoiseTolerance:
        c = scope.constants
        antithetic = self.curvature.density_mode == DensityMode.ANTITHETIC
        tolerance = default_noise_tolerance(scope, antithetic=antithetic)
        # The threshold need not grow with the number of latents: the floor keeps steps long beyond it.
        threshold = min(tolerance.threshold, c.noise_threshold / scope.blocks)
        floor = c.floor_noise if scope.full_data else c.floor_noise_minibatch
        return tolerance._replace(threshold=threshold, floor_noise=floor * self.latents.size)

    def report_rows(self) -> list[ReportRow]:
        how = f"closed form, {self.curvature.description(self.latents.size)}"
        how += ", full-covariance proxy" * self.latents.has_proxy
        return [row for s in self.latents.sites for row in s.report_rows(how)]

    def natural_gradient(
        self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness
    ) -> JointTangent:
        factor = self._factor(params, memory.joint)
        estimate = self.curvature.estimate(self.latents, loss_info, params, factor, memory.joint.sums)
        estimate = self._damped(estimate, factor, memory.joint)
        # A NaN would keep the eigensolver busy; it is put back so that the step is skipped.
        ok = jnp.all(jnp.isfinite(estimate.curvature))
        tangent = gaussian.tangent(estimate.slope, jnp.where(ok, estimate.curvature, 0.0))
        tangent = tangent._replace(values=jnp.where(ok, tangent.values, jnp.nan))
        guide_factors = [s.covariance_factor(params) for s in self.latents.sites]
        return JointTangent(tangent, estimate, self.latents.means(params), factor, guide_factors)

    def squared_norm(self, v: JointTangent) -> jax.Array:
        return gaussian.squared_norm(v.tangent)

    def kl(self, v: JointTangent, rho: jax.Array) -> StepKL:
        kl = gaussian.kl(v.tangent, rho, self.margin)
        if not (self.kl_of_guide and self.latents.has_proxy):
            return kl
        shift = v.factor @ gaussian.mean_shift(v.tangent, rho, self.margin)
        factor = v.factor @ gaussian.relative_factor(v.tangent, rho, self.margin)
        return kl._replace(forward=self.latents.projected_kl(v.factor, factor, shift, v.guide_factors))

    def compare(self, memory: Memory, v: JointTangent) -> SquaredNorms:
        """Squared norms in the proxy; ``visible`` are those of the means and of the guide's part of the curvature."""
        joint, (slope, curvature, *_) = memory.joint, v.estimate
        slopes = jnp.stack([joint.slope, slope - joint.slope, slope])
        curvatures = jnp.stack([joint.curvature, curvature - joint.curvature, curvature])
        norms = lambda square: jnp.sum(slopes**2, axis=1) + 0.5 * square
        visible = None
        if self.latents.has_proxy:
            visible = norms(jax.vmap(lambda m: self.latents.projected_square(v.factor, m))(curvatures))
        running_mean, innovation, gradient = norms(jnp.sum(curvatures**2, axis=(1, 2)))
        return SquaredNorms(running_mean, innovation, gradient, visible)

    def restrained(self, v: JointTangent, rho: jax.Array) -> JointTangent:
        if math.isinf(self.widening_limit):  # of a step size of the user's; the limit would have a NaN derivative at 0
            return v
        return v._replace(tangent=gaussian.wait(v.tangent, rho, self.widening_limit, self.margin))

    def own_step_size(self, v: JointTangent) -> jax.Array | None:
        return v.estimate.step_size

    def update_memory(self, memory: Memory, v: JointTangent, weight: jax.Array) -> Memory:
        joint, new = memory.joint, v.estimate
        slope = joint.slope + weight * (new.slope - joint.slope)
        curvature = joint.curvature + weight * (new.curvature - joint.curvature)
        sums = joint.sums if new.sums is None else new.sums
        return memory._replace(joint=joint._replace(slope=slope, curvature=curvature, sums=sums))

    def retract(self, params: Params, memory: Memory, v: JointTangent, rho: jax.Array) -> tuple[Params, Memory]:
        shift = gaussian.mean_shift(v.tangent, rho, self.margin)
        ratio = gaussian.relative_factor(v.tangent, rho, self.margin)
        loc, factor = v.loc + v.factor @ shift, v.factor @ ratio
        joint = self._transported(memory.joint, v.tangent, rho, shift, ratio)
        joint = joint._replace(factor=factor) if self.latents.has_proxy else joint
        coupling = joint.coupling
        if v.estimate.coupling is not None:
            coupling = coupling + rho * (v.estimate.coupling - coupling)
            params = self.latents.follow(params, v.estimate.responses, v.factor @ shift)
        params = self.latents.write(params, loc, factor, v.guide_factors, coupling)
        return params, memory._replace(joint=joint._replace(coupling=coupling))

    def _damped(self, estimate: CurvatureEstimate, factor: jax.Array, joint: JointMemory) -> CurvatureEstimate:
        """Add ½c‖Δθ‖² to the local model, for parameters of the model θ that a bijection constrains.

        A bijection onto an interval has plateaus, which a long step from a guide that has not settled would reach and
        not leave. c = ‖m‖²/D, nats per latent, vanishes with the running mean m of natural gradients, so that
        convergence is as fast as without it (Fan & Yuan 2005, "On the quadratic convergence of the
        Levenberg-Marquardt method").
        """
        curved = np.flatnonzero(self.latents.curved)
        if not curved.size:
            return estimate
        slope = jnp.where(joint.factor[0, 0] > 0, joint.slope, estimate.slope)
        rows = factor[curved]
        damping = jnp.sum(slope**2) / slope.size * rows.T @ rows
        return estimate._replace(curvature=estimate.curvature + damping)

    def _factor(self, params: Params, joint: JointMemory) -> jax.Array:
        """K of the guide, or of the proxy, which starts as the guide."""
        own = self.latents.cholesky(params)
        return jnp.where(joint.factor[0, 0] > 0, joint.factor, own) if self.latents.has_proxy else own

    def _transported(
        self, joint: JointMemory, v: GaussianTangent, rho: jax.Array, shift: jax.Array, ratio: jax.Array
    ) -> JointMemory:
        """The running mean of natural gradients at the new point, whitened by its own factor K₊ = KT.

        A natural gradient estimates an optimum, which does not change as the guide moves. Its precision I + M and its
        slope g, which is that of a quadratic function, are those at m₊: g' = Tᵀ(g + (I + M) K⁻¹(m₊ − m)), and
        M' = Tᵀ(I + M)T − I.
        """
        slope = joint.slope + shift + joint.curvature @ shift
        curvature = joint.curvature - gaussian.precision_change(v, rho, self.margin)
        return joint._replace(slope=ratio.T @ slope, curvature=ratio.T @ curvature @ ratio)
