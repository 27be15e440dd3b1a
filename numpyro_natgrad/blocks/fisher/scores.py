# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Guides without a closed-form KL (flows, mixtures): F from the scores of fresh draws, solved in the space of draws.

    u_s = ∇_φ log q_φ(z_s),  z_s ~ q            F̂ = UUᵀ,   U = (u_1 … u_S)/√S, P × S
    (λI + UUᵀ)⁻¹ g = [g − U (λI + UᵀU)⁻¹ Uᵀ g] / λ                  (Woodbury; "minSR", Chen & Heyl 2024)

so that P parameters cost S²P. F̂ is positive semi-definite whatever the draws, and S is independent of the particles of
the loss (:mod:`.score_samples`). The Fisher of a neural network is massively rank-deficient, so λ is not small: a share
of tr F̂, the mean of ‖u‖².
"""

import math

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import cho_factor, cho_solve

from numpyro_natgrad.blocks.base import Memory, NoiseTolerance, Randomness, Scope, default_noise_tolerance
from numpyro_natgrad.blocks.fisher.kl_hessian import Direction, KLCurvature
from numpyro_natgrad.estimators import score_samples
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.gaussian_sites import Params

#: Draws for the Fisher matrix.
DRAWS = 64
#: λ relative to tr F̂.
DAMPING = 1e-2
#: Nats. A natural gradient that is longer says where to go, not how far: so far away KL is not its quadratic model.
CLIP = 4.0


class ScoreFisher(KLCurvature):
    """One connected component of parameters and sites; moves as :class:`.curvature.KLCurvature` does."""

    def noise_tolerance(self, scope: Scope) -> NoiseTolerance:
        threshold = scope.constants.noise_threshold_scores / scope.blocks
        return default_noise_tolerance(scope)._replace(threshold=threshold)

    def report_rows(self) -> list[tuple[str, str, str, str, str]]:
        names = ", ".join(name for name, _, _ in self.sites)
        classes = ", ".join(dict.fromkeys(cls for _, cls, _ in self.sites))
        return [(p, names, classes, f"Monte Carlo, scores of {DRAWS} draws", str(self.sizes[p])) for p in self.params]

    def natural_gradient(
        self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness
    ) -> Direction:
        slope, _ = self._mine(loss_info.gradient)
        scores = self.scores(loss_info, params)
        ok = jnp.all(jnp.isfinite(slope)) & jnp.all(jnp.isfinite(scores))
        scores, clean = jnp.where(ok, scores, 0.0), jnp.where(ok, slope, 0.0)
        damping = DAMPING * jnp.sum(scores**2)
        damping = jnp.where(damping > 0, damping, 1.0)
        v = jnp.where(ok, solve(scores, damping, clean), jnp.nan)
        square = jnp.maximum(slope @ v, 0.0)
        share = jnp.minimum(1.0, jnp.sqrt(CLIP / jnp.maximum(square, jnp.finfo(square.dtype).tiny)))
        running_mean, _ = self._mine(memory.running_mean)
        image = scores @ (running_mean @ scores) + damping * running_mean
        return Direction(-share * v, share**2 * square, -share * slope, image)

    def scores(self, loss_info: LossInfo, params: Params) -> jax.Array:
        """U, ``(P, S)`` with S ≥ ``DRAWS``: UUᵀ is unbiased for the Fisher."""
        mine = {p: params[p] for p in self.params}
        n = int(loss_info.particles) if math.isfinite(loss_info.particles) else 1
        names, calls = frozenset(name for name, _, _ in self.sites), -(-DRAWS // n)

        def drawn(number: jax.Array) -> jax.Array:
            each = score_samples.sample_scores(loss_info.fn, params, mine, names, n, number)
            return jax.vmap(lambda tree: ravel_pytree(tree)[0])(each)

        u = jax.vmap(drawn)(jnp.arange(calls))
        return u.reshape(calls * n, -1).T * jnp.sqrt(n / calls)


def solve(scores: jax.Array, damping: jax.Array, slope: jax.Array) -> jax.Array:
    """(λI + UUᵀ)⁻¹ g for U of shape ``(P, S)``, in the smaller of the two spaces."""
    p, s = scores.shape
    if p <= s:
        return cho_solve(cho_factor(scores @ scores.T + damping * jnp.eye(p, dtype=scores.dtype)), slope)
    gram = scores.T @ scores + damping * jnp.eye(s, dtype=scores.dtype)
    return (slope - scores @ cho_solve(cho_factor(gram), slope @ scores)) / damping
