# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Natural gradient of the likelihood, for what no distribution of the guide owns: Amari's (1998) own algorithm.

    F(φ) = E_z Σ_i E_{y ~ p_φ}[∇ log p_φ(y_i | z) ∇ log p_φ(y_i | z)ᵀ] = E_z Σ_i JᵀF_obs(φ) J      (Fisher scoring)

Without latents z this is the article's case, and IRLS for a GLM. Beside a guide that draws z, F is the complete data's,
the prior's included: steps are those of online EM with F in the place of a closed-form M-step (Titterington 1984; Sato
2000). F_obs in closed form where the observations' family is registered, else from data drawn from the model. The
*empirical* Fisher puts the observed y_i in the place of E: cheap, and no Fisher away from a well-specified optimum
(Kunstner, Balles & Hennig 2019). Points of the guide (``AutoDelta``) are parameters like others, with a prior: its
curvature is added, so that steps go to the mode.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import random
from jax.scipy.linalg import cho_factor, cho_solve

from numpyro_natgrad.blocks.base import Memory, Randomness, SquaredNorms
from numpyro_natgrad.blocks.fisher.kl_hessian import Direction, KLCurvature
from numpyro_natgrad.distributions.surrogate import FisherEstimate, likelihood_surrogate, prior_surrogate
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import Frozen


@dataclass(frozen=True)
class LikelihoodFisher(KLCurvature):
    """One connected component of parameters and sites of the model.

    :ivar points: the sites whose value is a point of the guide, not data.
    :ivar whole: every step sees the whole data set.
    :ivar drawn: the guide draws: the likelihood is the complete data's, at these draws.
    """

    points: frozenset[str]
    whole: bool
    drawn: bool

    @property
    def exact_on_conjugate(self) -> bool:
        return not self.drawn

    @property
    def source(self) -> str:
        return "Fisher of the likelihood"

    def compare(self, memory: Memory, v: Direction) -> SquaredNorms:
        if self.whole and not self.drawn:  # no noise
            return SquaredNorms(v.square, jnp.zeros_like(v.square), v.square)
        return super().compare(memory, v)

    def _solved(self, product: Any, slope: jax.Array, unravel: Any) -> jax.Array:
        # Known in closed form, F has the rank that the data gives it, and steps converge like Newton's: no damping.
        closed = all(how == FisherEstimate.CLOSED_FORM for _, _, how in self.sites)
        return (
            scaled_solve(product, slope)
            if closed and not self.drawn and not self.iterative
            else super()._solved(product, slope, unravel)
        )

    def _length(self, loss_info: LossInfo, params: Params, randomness: Randomness, mine: Params) -> jax.Array:
        key = randomness.key
        densities = {
            name: (prior_surrogate if name in self.points else likelihood_surrogate)(how, random.fold_in(key, k))
            for k, (name, _, how) in enumerate(self.sites)
        }
        with Frozen({}, densities):
            return loss_info.fn({**params, **mine})[0]


def scaled_solve(product: Any, slope: jax.Array) -> jax.Array:
    """F⁻¹g with F scaled to a unit diagonal first: columns of a design matrix may differ by any order of magnitude."""
    fisher = jax.vmap(product)(jnp.eye(slope.size, dtype=slope.dtype))
    diagonal, eps = jnp.diagonal(fisher), jnp.finfo(slope.dtype).eps
    root = jnp.sqrt(jnp.where(diagonal > 0, diagonal, jnp.maximum(jnp.max(diagonal), 1.0)))
    scaled = (fisher + fisher.T) / (2 * root[:, None] * root)
    return (
        cho_solve(cho_factor(scaled + slope.size * eps * jnp.eye(slope.size, dtype=slope.dtype)), slope / root) / root
    )
