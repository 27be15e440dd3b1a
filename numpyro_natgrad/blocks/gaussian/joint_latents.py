# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The latents of several Gaussian sites, and parameters of the model, as one vector z of D entries."""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import block_diag

from numpyro_natgrad.blocks.gaussian.local_rows import LocalGaussian, RowResponse
from numpyro_natgrad.distributions.gaussian import diagonal, inverse_lower
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.gaussian_sites import GaussianParameterization, Params, project, projected_square
from numpyro_natgrad.guide.low_rank_sites import LowRankFactor
from numpyro_natgrad.guide.mean_field_sites import gathered, scattered

#: The covariance factor of every site, in the coordinates of its family.
GuideFactors = list[jax.Array | LowRankFactor]


@dataclass(frozen=True)
class ModelParameters:
    """Parameters of the model as a site that has a mean and no variance: a :class:`.GaussianParameterization`.

    In the proxy they are latents like all others, so that their steps take into account that the guide will follow.
    The Fisher matrix of the complete data does not: it is larger than the curvature of the marginal likelihood by the
    share of missing information, the slow rate of the EM algorithm (Dempster, Laird & Rubin 1977, section 4).

    :ivar shapes: of the parameters.
    :ivar curved: which of them a bijection other than the identity constrains.
    :ivar scale: the standard deviation in the proxy before the first step.
    """

    locs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    curved: tuple[bool, ...]
    scale: float

    @property
    def names(self) -> tuple[str, ...]:
        return ()

    @property
    def analytic(self) -> bool:
        return False

    @property
    def block_size(self) -> int:
        return 1

    @property
    def full_covariance(self) -> bool:
        return False

    @property
    def params(self) -> tuple[str, ...]:
        return self.locs

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def curved_entries(self) -> np.ndarray:
        return np.repeat(self.curved, [math.prod(shape) for shape in self.shapes])

    def report_rows(self, how: str) -> list[tuple[str, str, str, str, str]]:
        each = zip(self.locs, self.shapes, strict=True)
        return [(p, "–", "–", "Hessian of the loss, full-covariance proxy", _shape_text(shape)) for p, shape in each]

    def read(self, params: Params) -> tuple[jax.Array, jax.Array]:
        return gathered(params, self.locs), self.covariance_factor(params)

    def covariance_factor(self, params: Params) -> jax.Array:
        return jnp.full(self.size, self.scale, jnp.result_type(*(params[p] for p in self.locs)))

    def write(self, params: Params, loc: jax.Array, factor: jax.Array) -> Params:
        return {**params, **scattered(loc, params, self.locs)}

    def cholesky(self, params: Params) -> jax.Array:
        return jnp.diag(self.covariance_factor(params))[None]

    def project(self, columns: jax.Array, start: jax.Array) -> jax.Array:
        return 1 / jnp.sqrt(jnp.sum(columns**2, axis=0))

    def kl(self, before: jax.Array, after: jax.Array, shift: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum((shift / after) ** 2)


def _shape_text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "1"


@dataclass(frozen=True)
class JointLatents:
    """Conversions between arrays of the sites and arrays over all D latents; parameters of the model come last.

    :ivar rows: local rows that follow the D latents (:class:`.ProfileProducts`).
    """

    sites: tuple[GaussianParameterization[Any], ...]
    rows: tuple[LocalGaussian, ...] = ()

    @property
    def size(self) -> int:
        """D."""
        return sum(s.size for s in self.sites)

    @property
    def names(self) -> tuple[str, ...]:
        """The sites of the guide, of which one entry of ``sites`` may join several."""
        return tuple(name for s in self.sites for name in s.names)

    @property
    def locs(self) -> tuple[str, ...]:
        """Their mean parameters."""
        return tuple(loc for s in self.sites for loc in s.locs)

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(p for s in self.sites for p in s.params)

    @property
    def has_proxy(self) -> bool:
        """Whether a full Gaussian over all latents is kept beside the guide, whose family is smaller."""
        return bool(self.rows) or len(self.sites) > 1 or not self.sites[0].full_covariance

    @property
    def has_model_parameters(self) -> bool:
        return not all(s.names for s in self.sites)

    @property
    def curved(self) -> np.ndarray:
        """The entries, ``(D,)``, that are model parameters behind a bijection other than the identity."""
        entries = [s.curved_entries if isinstance(s, ModelParameters) else np.zeros(s.size, bool) for s in self.sites]
        return np.concatenate(entries)

    def means(self, values: Params) -> jax.Array:
        """The entries of the mean parameters, ``(D,)``: m from parameters, ∂L/∂m from a gradient."""
        return gathered(values, self.locs)

    def cholesky(self, params: Params) -> jax.Array:
        """K of the guide, ``(D, D)``, lower triangular and block diagonal."""
        return block_diag(*[k for s in self.sites for k in s.cholesky(params)])

    def mean_offset(self, loss_info: LossInfo, loc: jax.Array) -> jax.Array | None:
        """The mean of the draws of detached sites, minus m, ``(D,)``; ``None`` where nothing is drawn."""
        if not self.names or any(s.analytic for s in self.sites):
            return None
        drawn = gathered(loss_info.perturbation_gradients, self.names)
        return jnp.zeros_like(loc).at[: drawn.size].set(drawn - loc[: drawn.size])

    def draws(self, loss_info: LossInfo) -> jax.Array:
        """Draws of per-particle or antithetic sites, and the gradients of −log p there, ``(2, S, D)``."""
        n, both = int(loss_info.particles), loss_info.perturbation_gradients
        return n * jnp.concatenate([both[name].reshape(2, n, -1) for name in self.names], axis=2)

    def hessian_product(self, loss_info: LossInfo, shift: jax.Array, stretch: jax.Array) -> jax.Array:
        """The change of ∂L/∂m by a shift of m, ``(D,)``, and a stretch of the draws away from m."""
        tangents = scattered(shift, loss_info.gradient, self.locs)
        return self.means(loss_info.hessian_product(tangents, dict.fromkeys(self.names, stretch)))

    def hessian_product_per_draw(self, loss_info: LossInfo, shifts: jax.Array) -> jax.Array:
        """H_s u_s/S for every draw s and its shift u_s, ``(S, D)``."""
        like = {name: loss_info.perturbation_gradients[name][1, 0] for name in self.names}
        images = loss_info.hessian_product_per_draw(jax.vmap(lambda x: scattered(x, like, self.names))(shifts))
        return jax.vmap(lambda x: gathered(x, self.names))(images)

    def write(
        self, params: Params, loc: jax.Array, factor: jax.Array, starts: GuideFactors, coupling: jax.Array
    ) -> Params:
        """The parameters of the guide closest to N(m, (S + C)⁻¹), S⁻¹ = KKᵀ.

        :param starts: where an iterative projection begins.
        :param coupling: C, if there are local rows. A step of the D latents lets these follow, but in the guide they
            are independent of each other.
        """
        root = inverse_lower(factor) if self.has_proxy else factor
        if self.rows:
            precision = root.T @ root + coupling
            scale = jnp.sqrt(diagonal(precision))
            root = jnp.linalg.cholesky(precision / (scale[:, None] * scale)).T * scale
        factors = project(root, self.sites, starts) if self.has_proxy else [factor]
        for site, mean, own in zip(self.sites, self.split(loc), factors, strict=True):
            params = site.write(params, mean, own)
        return params

    def follow(self, params: Params, responses: tuple[RowResponse, ...], shift: jax.Array) -> Params:
        """The parameters after the local rows have followed a shift of the D latents."""
        for block, response in zip(self.rows, responses, strict=True):
            params = block.follow(params, response, shift)
        return params

    def projected_kl(self, factor: jax.Array, new: jax.Array, shift: jax.Array, starts: GuideFactors) -> jax.Array:
        """KL(q ‖ q₊) of the projections of N(m, KKᵀ) and N(m + shift, K₊K₊ᵀ), nats."""
        before, after = (project(inverse_lower(k), self.sites, starts) for k in (factor, new))
        each = zip(self.sites, before, after, self.split(shift), strict=True)
        return sum((s.kl(a, b, x.reshape(s.shape)) for s, a, b, x in each), jnp.zeros(()))

    def projected_square(self, factor: jax.Array, curvature: jax.Array) -> jax.Array:
        """‖M‖² of the guide's part of a whitened curvature M."""
        columns = zip(self.sites, self.split(inverse_lower(factor), axis=1), strict=True)
        return sum((projected_square(x, curvature, s.block_size) for s, x in columns if s.names), jnp.zeros(()))

    def split(self, x: jax.Array, axis: int = 0) -> list[jax.Array]:
        """The entries of every site along an axis of length D."""
        return jnp.split(x, list(accumulate(s.size for s in self.sites))[:-1], axis=axis)
