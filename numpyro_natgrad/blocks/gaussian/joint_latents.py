# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The latents of several Gaussian sites as one vector z of D entries, in the order of the sites."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import block_diag

from numpyro_natgrad.distributions.gaussian import inverse_lower
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.gaussian_sites import GaussianParameterization, Params, project, projected_square
from numpyro_natgrad.guide.low_rank_sites import LowRankFactor
from numpyro_natgrad.guide.mean_field_sites import gathered, scattered

#: The covariance factor of every site, in the coordinates of its family.
GuideFactors = list[jax.Array | LowRankFactor]


@dataclass(frozen=True)
class JointLatents:
    """Conversions between arrays of the sites and arrays over all D latents."""

    sites: tuple[GaussianParameterization[Any], ...]

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
        return len(self.sites) > 1 or not self.sites[0].full_covariance

    def means(self, values: Params) -> jax.Array:
        """The entries of the mean parameters, ``(D,)``: m from parameters, ∂L/∂m from a gradient."""
        return gathered(values, self.locs)

    def cholesky(self, params: Params) -> jax.Array:
        """K of the guide, ``(D, D)``, lower triangular and block diagonal."""
        return block_diag(*[k for s in self.sites for k in s.cholesky(params)])

    def mean_offset(self, loss_info: LossInfo, loc: jax.Array) -> jax.Array | None:
        """The mean of the draws of detached sites, minus m, ``(D,)``; ``None`` where nothing is drawn."""
        if any(s.analytic for s in self.sites):
            return None
        return gathered(loss_info.perturbation_gradients, self.names) - loc

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

    def write(self, params: Params, loc: jax.Array, factor: jax.Array, starts: GuideFactors) -> Params:
        """The parameters of the guide closest to N(m, KKᵀ); an iterative projection begins at ``starts``."""
        factors = project(inverse_lower(factor), self.sites, starts) if self.has_proxy else [factor]
        for site, mean, own in zip(self.sites, self.split(loc), factors, strict=True):
            params = site.write(params, mean, own)
        return params

    def projected_kl(self, factor: jax.Array, new: jax.Array, shift: jax.Array, starts: GuideFactors) -> jax.Array:
        """KL(q ‖ q₊) of the projections of N(m, KKᵀ) and N(m + shift, K₊K₊ᵀ), nats."""
        before, after = (project(inverse_lower(k), self.sites, starts) for k in (factor, new))
        each = zip(self.sites, before, after, self.split(shift), strict=True)
        return sum((s.kl(a, b, x.reshape(s.shape)) for s, a, b, x in each), jnp.zeros(()))

    def projected_square(self, factor: jax.Array, curvature: jax.Array) -> jax.Array:
        """‖M‖² of the guide's part of a whitened curvature M."""
        columns = zip(self.sites, self.split(inverse_lower(factor), axis=1), strict=True)
        return sum((projected_square(x, curvature, s.block_size) for s, x in columns), jnp.zeros(()))

    def split(self, x: jax.Array, axis: int = 0) -> list[jax.Array]:
        """The entries of every site along an axis of length D."""
        return jnp.split(x, list(accumulate(s.size for s in self.sites))[:-1], axis=axis)
