# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The joint Gaussian step by gradients alone: slope and curvature come from the regression of gradients on draws.

A step costs one gradient a particle, where Hessian products cost two for every latent more. The regression remembers
draws (:mod:`.stein_regression`), so that a step goes all of the way to its fit: of n remembered draws, S of them new,
the fit follows the new ones by S/n. What the length rule compares is what the new draws alone say, n/S times that way.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import block_diag, solve_triangular

from numpyro_natgrad.blocks.base import (
    Memory,
    Randomness,
)
from numpyro_natgrad.blocks.gaussian.joint import JointGaussian, particles, tangent
from numpyro_natgrad.distributions.gaussian import GaussianTangent
from numpyro_natgrad.estimators import stein_regression
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.estimators.stein_regression import RegressionSums
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import DensityMode


class Fit(NamedTuple):
    """As :class:`.joint.Frame`, with the sums that the fit was made of."""

    tangent: GaussianTangent
    curvature: jax.Array
    loc: jax.Array
    factor: jax.Array
    spreads: list[Any]
    sums: RegressionSums


class RegressedGaussian(JointGaussian):
    """The dense joint step over ``sites`` by regression."""

    mode = DensityMode.PER_PARTICLE

    def report_rows(self) -> list[tuple[str, str, str, str, str]]:
        how = "closed form, regression of gradients" + (", lifted" if self.lifted else "")
        return [row for s in self.sites for row in s.report_rows(how)]

    def natural_gradient(self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness) -> Fit:
        loc = jnp.concatenate([params[s.loc].ravel() for s in self.sites])
        factor = self._factor(params, memory.joint)
        spread = block_diag(*[k for s in self.sites for k in s.cholesky(params)])
        inner = solve_triangular(factor, spread, lower=True) if self.lifted else jnp.eye(self.size, dtype=loc.dtype)
        draws, gradients = particles(loss_info, self.sites)
        sums = stein_regression.change_frame(memory.joint.sums, loc, spread)
        x = solve_triangular(spread, (draws - loc).T, lower=True).T
        sums = stein_regression.add_draws(sums, x, gradients @ spread, inner.T @ inner)
        slope, curvature = stein_regression.fit(sums, inner.T @ inner)
        if self.lifted:
            back = solve_triangular(inner, jnp.eye(self.size, dtype=loc.dtype), lower=True)
            slope, curvature = back.T @ slope, back.T @ curvature @ back
        new = jnp.maximum(sums.weight / loss_info.particles, 1.0)  # draws that were pulled in count less than one
        return Fit(tangent(new * slope, new * curvature), new * curvature, loc, factor, self._spreads(params), sums)

    def own_step_size(self, v: Any) -> jax.Array:
        return jnp.minimum(self.particles / v.sums.weight, 1.0)

    def update_memory(self, memory: Memory, v: Any, weight: jax.Array) -> Memory:
        memory = super().update_memory(memory, v, weight)
        return memory._replace(joint=memory.joint._replace(sums=v.sums))
