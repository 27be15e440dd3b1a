# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The joint Gaussian step where every direction is asked of some of the draws only.

H₁…H_S are the Hessians at S independent draws, so that E[H_s u] = E[H]u whichever draw is asked about the direction u.
G groups of draws share the d columns of K: d/G products a draw instead of d, for G times the variance of the estimated
curvature, which is unbiased, and without noise where the posterior is Gaussian. Far from the optimum it is not that
noise which makes a step good or bad, near it the length rule and the average take it out.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ..charts import Params
from ..evidence import Evidence
from .full import PROBES
from .joint import JointGaussian, particles


class DividedGaussian(JointGaussian):
    """The dense joint step over ``sites`` by Hessian products that the draws share among them."""

    @property
    def modes(self) -> dict[str, str]:
        return {s.name: "split" for s in self.sites}

    @property
    def curved(self) -> tuple[str, ...]:
        return ()

    @property
    def products(self) -> int:
        return math.ceil(self.size / parts(self.size, self.particles))

    def _learned(
        self, evidence: Evidence, params: Params, loc: jax.Array, factor: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        n, d, k = int(evidence.particles), self.size, self.products
        groups = parts(d, n)
        group = np.arange(n) % groups
        draws = particles(evidence, self.sites)[0]
        # Group g is asked about the columns g, g + G, g + 2G, …; columns beyond the last are zero.
        columns = jnp.pad(factor.T, [(0, k * groups - d), (0, 0)]).reshape(k, groups, d)[:, group]
        shifts = jnp.concatenate([columns, leave_one_out(draws, loc)[None]])
        images = jax.vmap(lambda u: self._push_draws(evidence, u))(shifts) @ factor
        means = np.equal.outer(np.arange(groups), group) * n / np.bincount(group)[:, None]
        curvature = jnp.einsum("gs,ksd->kgd", jnp.asarray(means, factor.dtype), images[:-1])
        return curvature.reshape(k * groups, d)[:d], jnp.sum(images[-1], axis=0)

    def _push_draws(self, evidence: Evidence, shifts: jax.Array) -> jax.Array:
        """H_s u_s/S of a shift for every draw, ``(S, d)``."""
        split = zip(self.sites, jnp.split(shifts, self._ends(), axis=1), strict=True)
        images = evidence.push_draws({s.name: x.reshape(evidence.means[s.name][1].shape) for s, x in split})
        return jnp.concatenate([images[s.name].reshape(len(shifts), -1) for s in self.sites], axis=1)


def parts(d: int, particles: float) -> int:
    """G: the groups that draws fall into, of two at least, so that each is asked about 16 directions or more.

    (A wide Gaussian asks for 16 altogether.)
    """
    return 1 if math.isinf(particles) else max(1, min(int(particles) // 2, round(d / PROBES)))


def leave_one_out(draws: jax.Array, loc: jax.Array) -> jax.Array:
    """The shifts u_s with (1/S) Σ H_s u_s = −(1/S) Σ_s H₋ₛ (z_s − m): see :func:`.products.whitened_products`."""
    n = len(draws)
    return (draws - loc - n * (jnp.mean(draws, axis=0) - loc)) / (n - 1)
