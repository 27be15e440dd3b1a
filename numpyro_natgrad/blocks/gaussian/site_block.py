# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The base class of the blocks of Gaussian sites with too many latents for a joint step."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp

from numpyro_natgrad.blocks.base import Block, NoiseTolerance, ReportRow, Scope, Tangent, default_noise_tolerance
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.gaussian_sites import GaussianSite
from numpyro_natgrad.guide.handlers import DensityMode
from numpyro_natgrad.guide.low_rank_sites import LowRankSite
from numpyro_natgrad.guide.mean_field_sites import MeanFieldSites, gathered, scattered
from numpyro_natgrad.options import RuleConstants

Site = TypeVar("Site", bound=GaussianSite | MeanFieldSites | LowRankSite)


@dataclass(frozen=True)
class SiteBlock(Block[Tangent], Generic[Site, Tangent]):
    """One Gaussian site, or several that are joined.

    :ivar density_mode: how its density is differentiated; ``None`` for NumPyro's way.
    :ivar second_order: whether the curvature comes from products with the Hessian of the loss, or from the gradient.
    :ivar margin: see :func:`.positive_ratio`.
    """

    site: Site
    density_mode: DensityMode | None
    second_order: bool
    margin: float
    constants: RuleConstants

    @property
    @abstractmethod
    def products(self) -> int:
        """Hessian-vector products of a step in second order."""

    @property
    def params(self) -> tuple[str, ...]:
        return self.site.params

    @property
    def site_names(self) -> tuple[str, ...]:
        return self.site.names

    @property
    def density_modes(self) -> dict[str, DensityMode]:
        return dict.fromkeys(self.site.names, self.density_mode) if self.density_mode else {}

    @property
    def hessian_params(self) -> tuple[str, ...]:
        return self.site.locs if self.second_order else ()

    def noise_tolerance(self, scope: Scope) -> NoiseTolerance:
        c = scope.constants
        floor = c.floor_noise if scope.full_data else c.floor_noise_minibatch
        tolerance = default_noise_tolerance(scope, antithetic=self._in_pairs)
        return tolerance._replace(floor_noise=floor * self.site.size)

    def report_rows(self) -> list[ReportRow]:
        how = f"{self.products} Hessian-vector products" if self.second_order else "draws ⊗ gradients"
        return self.site.report_rows(f"closed form, {how}")

    @property
    def _in_pairs(self) -> bool:
        return self.density_mode is not None and self.density_mode.in_pairs

    def _mean_offset(self, loss_info: LossInfo, loc: jax.Array) -> jax.Array | None:
        """The mean of a detached site's draws, minus m; ``None`` where nothing is drawn, or in pairs around m."""
        if self.site.analytic or self._in_pairs:
            return None
        return gathered(loss_info.perturbation_gradients, self.site.names).reshape(loc.shape) - loc

    def _hessian_product(self, loss_info: LossInfo, shift: jax.Array, stretch: jax.Array | float = 0.0) -> jax.Array:
        """The change of ∂L/∂m by a shift of m and a stretch of the draws away from m; in the shape of the shift."""
        tangents = scattered(shift.ravel(), loss_info.gradient, self.site.locs)
        stretches = dict.fromkeys(self.site.names, jnp.asarray(stretch))
        return gathered(loss_info.hessian_product(tangents, stretches), self.site.locs).reshape(shift.shape)
