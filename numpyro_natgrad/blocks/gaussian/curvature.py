# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Estimators of the slope g = Kᵀ E[∇f] and the curvature M = Kᵀ E[∇²f] K − I of a joint Gaussian block, f = −log p.

HessianProducts      D products with the Hessian of the loss
ProfileProducts      the same, for latents that local rows follow
AntitheticProducts   D/G products with the Hessian of every draw, G groups of antithetic pairs
SteinRegression      no products: gradients are regressed on draws, which are remembered from step to step
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from numpyro_natgrad.blocks.gaussian.joint_latents import JointLatents
from numpyro_natgrad.blocks.gaussian.local_rows import RowResponse
from numpyro_natgrad.distributions.gaussian import inverse_lower
from numpyro_natgrad.estimators import stein_regression
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.estimators.hessian_products import fall_back_to_gradient, whitened_hessian_products
from numpyro_natgrad.estimators.stein_regression import RegressionSums
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import DensityMode
from numpyro_natgrad.guide.mean_field_sites import scattered
from numpyro_natgrad.options import RuleConstants


class CurvatureEstimate(NamedTuple):
    """Slope g, ``(D,)``, and curvature M, symmetric, ``(D, D)``; of a regression also its sums and step size ρ.

    :ivar coupling: C, what the curvature of the loss has beyond that of its minimum over the local rows, not whitened.
    :ivar responses: of the rows of each local block.
    """

    slope: jax.Array
    curvature: jax.Array
    sums: RegressionSums | None = None
    step_size: jax.Array | None = None
    coupling: jax.Array | None = None
    responses: tuple[RowResponse, ...] = ()


class CurvatureEstimator(Protocol):
    """How a joint Gaussian block estimates slope and curvature."""

    @property
    def density_mode(self) -> DensityMode:
        """How the sites' densities are differentiated."""

    def description(self, size: int) -> str:
        """What a step over ``size`` latents evaluates, for the report."""

    def estimate(
        self, latents: JointLatents, loss_info: LossInfo, params: Params, factor: jax.Array, sums: RegressionSums
    ) -> CurvatureEstimate:
        """Slope and curvature, whitened by ``factor`` K, from this step's draws and from the sums of earlier ones."""


@dataclass(frozen=True)
class HessianProducts:
    """D products with the mean Hessian of the draws, and its leave-one-out control variate of the slope."""

    density_mode = DensityMode.DETACHED

    def description(self, size: int) -> str:
        return f"{size} Hessian-vector products"

    def estimate(
        self, latents: JointLatents, loss_info: LossInfo, params: Params, factor: jax.Array, sums: RegressionSums
    ) -> CurvatureEstimate:
        offset = latents.mean_offset(loss_info, latents.means(params))
        product = partial(latents.hessian_product, loss_info)
        hessian, correction = whitened_hessian_products(product, factor, factor, offset, loss_info.particles)
        return _from_products(latents, loss_info, factor, hessian, correction)


@dataclass(frozen=True)
class ProfileProducts:
    """Products with the Hessian of min L over local rows (m, σ), which follow the D latents z (Schur complement).

        P = H − C,      C = Σ aᵀH_row a + 2bᵀb,      a = dm/dz = −H_row⁻¹ ∂²L/∂m∂z,      b = dlog σ/dz = −½ dlog h/dz

    with h = 1/σ² the diagonal of H_row. H is the curvature with the rows held fixed, that of a step of the EM
    algorithm, which is slow where rows have little data: in the neck of a centred hierarchy C is all of H but a
    hundredth. The sum is over the rows of the minibatch, each as often as the loss counts it.
    """

    density_mode = DensityMode.DETACHED

    def description(self, size: int) -> str:
        return f"{2 * size} Hessian-vector products, local rows follow"

    def estimate(
        self, latents: JointLatents, loss_info: LossInfo, params: Params, factor: jax.Array, sums: RegressionSums
    ) -> CurvatureEstimate:
        plain = HessianProducts().estimate(latents, loss_info, params, factor, sums)
        place = lambda means: scattered(means, params, latents.locs)
        at = latents.means(params)
        found = [block.response(loss_info, params, place, at) for block in latents.rows]
        coupling = sum((c for _, c in found), jnp.zeros_like(factor))
        return plain._replace(
            curvature=plain.curvature - factor.T @ coupling @ factor,
            coupling=coupling,
            responses=tuple(response for response, _ in found),
        )


@dataclass(frozen=True)
class AntitheticProducts:
    """Products with the Hessians of antithetic draws m ± Kε, each direction with some of the pairs only.

    *Pairs.* Terms that are odd in ε cancel from slope and curvature, so that no control variate is needed, and a
    Gaussian posterior leaves no noise. The last of an odd number of draws has no partner: its contribution to the slope
    is corrected by the Hessians of the others.

    *Groups.* E[H_p u] = E[H]u for the mean Hessian H_p of any pair p. G groups of pairs therefore share the D columns
    of K: D/G products a draw instead of D, for G times the variance of the curvature. Near the optimum, where that
    noise matters, small steps and averaging remove it.

    :ivar particles: draws a step, at least 2.
    """

    particles: int
    constants: RuleConstants
    density_mode = DensityMode.ANTITHETIC

    def description(self, size: int) -> str:
        products = math.ceil(size / group_count(size, self.particles, self.constants))
        return f"{products} Hessian-vector products of every draw"

    def estimate(
        self, latents: JointLatents, loss_info: LossInfo, params: Params, factor: jax.Array, sums: RegressionSums
    ) -> CurvatureEstimate:
        products = self.whitened_hessian(latents, loss_info, latents.means(params), factor)
        return _from_products(latents, loss_info, factor, *products)

    def whitened_hessian(
        self, latents: JointLatents, loss_info: LossInfo, loc: jax.Array, factor: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """KᵀHK, each row from the draws of one group, ``(D, D)``, and the correction of the slope, ``(D,)``."""
        n, d = self.particles, latents.size
        groups = group_count(d, n, self.constants)
        k = math.ceil(d / groups)
        group = np.arange(n) % (n // 2) % groups
        # Group g has the columns g, g + G, g + 2G, …; columns beyond the last are zero.
        columns = jnp.pad(factor.T, [(0, k * groups - d), (0, 0)]).reshape(k, groups, d)[:, group]
        shifts = jnp.concatenate([columns, unpaired_draw_shift(latents.draws(loss_info)[0], loc)])
        images = jax.vmap(lambda u: latents.hessian_product_per_draw(loss_info, u))(shifts) @ factor
        # Draws without a Hessian are left out: that of a Poisson rate of e^-50 is 0/0 in single precision.
        known = jnp.all(jnp.isfinite(images), axis=(0, 2))
        images = jnp.where(known[:, None], images, 0.0)
        mine = np.equal.outer(np.arange(groups), group) * known.astype(factor.dtype)
        means = n * mine / jnp.maximum(jnp.sum(mine, axis=1, keepdims=True), 1)
        hessian = jnp.einsum("gs,ksd->kgd", means, images[:k])
        return hessian.reshape(k * groups, d)[:d], jnp.sum(images[k:], axis=(0, 1))


def group_count(d: int, particles: int, constants: RuleConstants) -> int:
    """G: so many groups that each has ``full_probes`` directions, but no more groups than pairs."""
    return max(1, min(particles // 2, round(d / constants.full_probes)))


def unpaired_draw_shift(draws: jax.Array, loc: jax.Array) -> jax.Array:
    """Shifts u_s with (1/S) Σ H_s u_s = −H̄ (z_S − m)/S, the slope's correction for an unpaired last draw.

    H̄ is the mean Hessian of the draws before it. Shape ``(1, S, D)``; ``(0, S, D)`` for an even number of draws.
    """
    n = len(draws)
    others = jnp.arange(n)[:, None] < n - 1
    return jnp.where(others, (loc - draws[-1]) / (n - 1), 0.0)[None][: n % 2]


def _from_products(
    latents: JointLatents, loss_info: LossInfo, factor: jax.Array, hessian: jax.Array, correction: jax.Array
) -> CurvatureEstimate:
    plain = factor.T @ latents.means(loss_info.gradient)
    curvature = (hessian + hessian.T) / 2 - jnp.eye(len(factor), dtype=hessian.dtype)
    return CurvatureEstimate(
        *fall_back_to_gradient(loss_info.previous_step_skipped, plain, plain + correction, curvature)
    )


@dataclass(frozen=True)
class SteinRegression:
    """Regression of gradients on draws (:mod:`.stein_regression`), at the cost of one gradient a particle.

    Draws are remembered, so that a step goes all of the way to their fit. Of n draws S are new, and move the fit by S/n
    of the way to their own fit. The natural gradient is therefore stated as n/S times the way to the fit, with the step
    size S/n, so that its noise is that of the new draws.
    """

    constants: RuleConstants
    density_mode = DensityMode.PER_PARTICLE

    def description(self, size: int) -> str:
        return "regression of gradients"

    def estimate(
        self, latents: JointLatents, loss_info: LossInfo, params: Params, factor: jax.Array, sums: RegressionSums
    ) -> CurvatureEstimate:
        loc, own = latents.means(params), latents.cholesky(params)
        # K⁻¹C, from the frame K of the proxy to the frame C of the guide, from which the draws come.
        ratio = solve_triangular(factor, own, lower=True) if latents.has_proxy else None
        precision = None if ratio is None else ratio.T @ ratio
        draws, gradients = latents.draws(loss_info)
        sums = stein_regression.change_frame(sums, loc, own, self.constants)
        x = solve_triangular(own, (draws - loc).T, lower=True).T
        sums = stein_regression.add_draws(sums, x, gradients @ own, precision, self.constants)
        slope, curvature = stein_regression.fit(sums, precision, self.constants)
        if ratio is not None:
            back = inverse_lower(ratio)
            slope, curvature = back.T @ slope, back.T @ curvature @ back
        n = jnp.maximum(sums.weight / loss_info.particles, 1.0)  # winsorized draws count less than one
        step_size = jnp.minimum(loss_info.particles / sums.weight, 1.0)
        return CurvatureEstimate(n * slope, n * curvature, sums, step_size)
