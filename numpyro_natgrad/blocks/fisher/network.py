# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Networks in the guide or in the model: thousands of parameters behind few sites, seen through minibatches.

    v ← μ v + (F + λ)⁻¹ (g − (F + λ) μ v)         by k steps of conjugate gradients that start at μ v

F = E_z Σ JᵀF_site J is the sites' Fisher pulled back through the network, over the batch, never formed. What the batch
says much about is solved for; what it says little about, k steps do not reach, and stays as earlier batches left it
(Martens & Sutskever 2012; "SPRING", Goldshlager, Abrahamsen & Lin 2024, is the same in the space of samples).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_natgrad.blocks.base import (
    Memory,
    NoiseTolerance,
    Randomness,
    Scope,
    SquaredNorms,
    default_noise_tolerance,
    statistical_threshold,
)
from numpyro_natgrad.blocks.fisher.kl_hessian import Direction, KLCurvature
from numpyro_natgrad.blocks.fisher.likelihood import LikelihoodFisher
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.gaussian_sites import Params

#: k, μ, and λ relative to F's own curvature along the steps before, vᵀFv/vᵀv, which it follows. Three to ten steps and
#: 0.9 to 0.99 were as good, and so was any λ from a hundredth of the mean of F's diagonal to all of it. λ that follows
#: what steps deliver on their own batch (Levenberg & Marquardt) goes to zero, and the steps to what suits one batch.
CG_STEPS, MOMENTUM, DAMPING = 3, 0.97, 0.01


@dataclass(frozen=True)
class NetworkCurvature(KLCurvature):
    """A network of the guide. The memory's trend is the last step, its momentum."""

    def noise_tolerance(self, scope: Scope) -> NoiseTolerance:
        tolerance = default_noise_tolerance(scope)
        if self.size <= scope.constants.dense_limit:
            return tolerance
        return tolerance._replace(threshold=statistical_threshold(self.size, self.numbers))

    def natural_gradient(
        self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness
    ) -> Direction:
        slope, _ = self._mine(loss_info.gradient)
        old, _ = self._mine(memory.running_mean)
        ok = jnp.all(jnp.isfinite(slope))
        v, kept = pursued(self._product(loss_info, params, randomness), jnp.where(ok, slope, 0.0), -MOMENTUM * old)
        return Direction(jnp.where(ok, -v, jnp.nan), jnp.maximum(slope @ v, 0.0), -slope, -kept)

    def compare(self, memory: Memory, v: Direction) -> SquaredNorms:
        # What two batches agree on: the slope of this one along what is left of the steps before.
        agreed = jnp.clip(v.running_mean_image @ v.image, 0.0, v.square)
        return SquaredNorms(agreed, v.square - agreed, v.square)

    def update_memory(self, memory: Memory, v: Direction, weight: jax.Array) -> Memory:
        _, unravel = self._mine(memory.running_mean)
        return memory._replace(running_mean={**memory.running_mean, **unravel(v.step)})

    def retract(self, params: Params, memory: Memory, v: Direction, rho: jax.Array) -> tuple[Params, Memory]:
        mine, unravel = self._mine(params)
        return {**params, **unravel(mine + rho * v.step)}, memory


def pursued(product: Any, slope: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(F + λ)⁻¹ g as far as conjugate gradients come from ``start``; and the part of ``start`` in it."""
    moving, tiny = jnp.any(start != 0), jnp.finfo(slope.dtype).tiny
    along = jnp.where(moving, start, slope)
    image = product(along)
    damping = DAMPING * jnp.maximum(along @ image, tiny) / jnp.maximum(along @ along, tiny)
    left = slope - jnp.where(moving, image + damping * along, 0.0)
    found, residual = conjugate(lambda v: product(v) + damping * v, left)
    v = start + found
    # Along v this batch's model goes gᵀv / vᵀ(F + λ)v: where F has grown, the momentum of a flatter past is too long.
    share = jnp.clip(slope @ v / jnp.maximum((slope - residual) @ v, tiny), 0.0, 1.0)
    return share * v, share * start


def conjugate(product: Any, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    """F⁻¹g as far as ``CG_STEPS`` products go, and what is left of g. Unrolled: two networks work side by side."""
    tiny = jnp.finfo(slope.dtype).tiny
    v, residual, direction, left = jnp.zeros_like(slope), slope, slope, slope @ slope
    for _ in range(CG_STEPS):
        image = product(direction)
        share = left / jnp.maximum(direction @ image, tiny)
        v, residual = v + share * direction, residual - share * image
        before, left = left, residual @ residual
        direction = residual + left / jnp.maximum(before, tiny) * direction
    return v, residual


@dataclass(frozen=True)
class NetworkLikelihood(NetworkCurvature, LikelihoodFisher):
    """A network of the model."""
