# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The joint Gaussian step by Hessian products of mirrored draws, each direction asked of some of the pairs only.

*Mirrors.* Of draws m ± Kε the noise that is linear in ε, in slope as in curvature, and all that is odd, is none in the
mean: no control variate is needed, and where the posterior is Gaussian there is no noise at all. (A last draw without
a partner has its linear noise taken out with the Hessians of the others.)

*Shares.* With H_p the mean Hessian of a pair E[H_p u] = E[H]u, whichever pair is asked about the direction u. G groups
of pairs share the d columns of K: d/G products a draw instead of d, for G times the variance of the estimated
curvature. Far from the optimum it is not that noise which makes a step good or bad; near it the length rule and the
average take it out.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_natgrad.blocks.gaussian.full import PROBES
from numpyro_natgrad.blocks.gaussian.joint import JointGaussian, particles
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import DensityMode


class DividedGaussian(JointGaussian):
    """The dense joint step over ``sites`` by Hessian products that the draws share among them."""

    mode = DensityMode.ANTITHETIC

    @property
    def products(self) -> int:
        return math.ceil(self.size / parts(self.size, int(self.particles)))

    def _learned(
        self, loss_info: LossInfo, params: Params, loc: jax.Array, factor: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        n, d, k = int(loss_info.particles), self.size, self.products
        groups = parts(d, n)
        group = np.arange(n) % (n // 2) % groups
        # Group g is asked about the columns g, g + G, g + 2G, …; columns beyond the last are zero.
        columns = jnp.pad(factor.T, [(0, k * groups - d), (0, 0)]).reshape(k, groups, d)[:, group]
        shifts = jnp.concatenate([columns, unpaired(particles(loss_info, self.sites)[0], loc)])
        images = jax.vmap(lambda u: self._hessian_product_per_draw(loss_info, u))(shifts) @ factor
        means = np.equal.outer(np.arange(groups), group) * n / np.bincount(group)[:, None]
        curvature = jnp.einsum("gs,ksd->kgd", jnp.asarray(means, factor.dtype), images[:k])
        return curvature.reshape(k * groups, d)[:d], jnp.sum(images[k:], axis=(0, 1))

    def _hessian_product_per_draw(self, loss_info: LossInfo, shifts: jax.Array) -> jax.Array:
        """H_s u_s/S of a shift for every draw, ``(S, d)``."""
        split = zip(self.sites, jnp.split(shifts, self._ends(), axis=1), strict=True)
        images = loss_info.hessian_product_per_draw(
            {s.name: x.reshape(loss_info.perturbation_gradients[s.name][1].shape) for s, x in split}
        )
        return jnp.concatenate([images[s.name].reshape(len(shifts), -1) for s in self.sites], axis=1)


def parts(d: int, particles: int) -> int:
    """G: the groups that pairs of draws fall into, so that each is asked about 16 directions, or more of few pairs.

    (A wide Gaussian asks for 16 altogether.)
    """
    return max(1, min(particles // 2, round(d / PROBES)))


def unpaired(draws: jax.Array, loc: jax.Array) -> jax.Array:
    """The shifts u_s with (1/S) Σ H_s u_s = −H̄ (z_S − m)/S, H̄ the mean Hessian of the draws before the last.

    What the last of an odd number of draws is to be corrected by: ``(1, S, d)``; nothing, ``(0, S, d)``, of pairs.
    """
    n = len(draws)
    others = jnp.arange(n)[:, None] < n - 1
    return jnp.where(others, (loc - draws[-1]) / (n - 1), 0.0)[None][: n % 2]
