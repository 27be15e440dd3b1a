# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""The Newton decrement ½ aᵀFa of the averaged iterate: the expected remaining gain, in nats, with its standard error.

Near the optimum the loss is ½‖a‖² nats above its minimum, where a is the error, in the Fisher metric, of the *average*
that ``get_params`` returns. Let x be the error of the iterate, x + n a natural gradient with noise n of variance v, and
m the running mean of natural gradients, from which blocks subtract the steps taken. One step is linear:

    x ← (1−ρ) x − ρ n        m ← (1−w) m + (w−ρ)(x + n)        a ← (1−α) a + α x

so that z = m − x ← (1−w) z + w n is noise alone. The noise in (x, z, a) has the covariance v C with
C ← A C Aᵀ + b bᵀ, determined by ρ, w and α. The bias that remains of the start is the excess of ‖m‖² over its noise:

    E‖m‖² = ‖E x‖² + v (C_xx + 2 C_xz + C_zz),        ‖E a‖² ≤ Σ α-weighted ‖E x‖²  (Jensen)
    decrement = ½ (max(0, Σ α-weighted (‖m‖² − its noise)) + v C_aa)

‖m‖ alone is not enough: with ρ = w it vanishes, and the error of the iterate is noise, of which only C_aa tells. Past
noise is expressed in units of the *current* noise v: that of early, distant steps can be 1e15 times larger and would
hide the remaining bias for a hundred steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_natgrad.blocks.base import SquaredNorms
from numpyro_natgrad.options import RuleConstants
from numpyro_natgrad.step.state import DecrementState, NaturalGradientState
from numpyro_natgrad.step.step_size import current_noise

#: Distances are truncated at this many nats, so that their squares can be added in single precision.
MAX_EXCESS = 1e15
#: Standard deviation of a normal variable over its mean absolute deviation: √(π/2).
NORMAL_DEVIATION = 1.2533


class StepWeights(NamedTuple):
    """Per block: ρ and w of a natural gradient in iterate and running mean, α of the iterate in the average."""

    rho: jax.Array
    mean: jax.Array
    average: jax.Array


def observe(state: DecrementState, norms: SquaredNorms, noise: jax.Array, weights: StepWeights) -> DecrementState:
    """Update after one step; ``norms`` compare v with the earlier running mean, ``noise`` is its variance, nats."""
    covariance = _propagated(state.covariance, weights)
    squares, tiny = norms.visible_norms(), jnp.finfo(noise.dtype).tiny
    fraction = jnp.minimum(squares[1] / jnp.maximum(norms.innovation, tiny), 1.0)
    visible = state.visible + weights.mean * (fraction - state.visible)
    excess = _updated_mean(squares, weights) - visible * noise * _noise_in_mean(covariance)
    excess = jnp.clip(excess, -MAX_EXCESS, MAX_EXCESS)
    mean, deviation = state.excess
    mean = mean + weights.average * (excess - mean)
    deviation = deviation + weights.average * (jnp.abs(excess - mean) - deviation)
    return DecrementState(covariance, jnp.stack([mean, deviation]), visible)


def newton_decrement(state: DecrementState, noise: jax.Array, window: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The decrement of all blocks together, nats, and its standard error; NaN where no parameter has a Fisher matrix.

    The error adds the variance of v, a mean of about ``window`` squares with a relative variance of at most 2 each (χ²
    of one direction), and the observed scatter of the excess, whose terms are correlated, so that averaging does not
    reduce it. A mean absolute deviation forgets the start twice as fast as a root mean square.
    """
    if not window.size:
        return jnp.array(jnp.nan), jnp.array(jnp.nan)
    mean, deviation = state.excess
    left = jnp.minimum(visible_noise(state, noise) * state.covariance[2, 2], MAX_EXCESS)
    variance = (NORMAL_DEVIATION * deviation) ** 2 + 2 / window * left**2
    return 0.5 * jnp.sum(jnp.maximum(mean, 0.0) + left), 0.5 * jnp.sqrt(jnp.sum(variance))


def noise_part(state: NaturalGradientState, constants: RuleConstants) -> tuple[float, float]:
    """The part of the decrement that is noise, nats, and the effective number of steps in the statistics behind it."""
    visible = visible_noise(state.decrement, current_noise(state.statistics, constants))
    noise, window = np.asarray(visible * state.decrement.covariance[2, 2]), np.asarray(state.statistics.window)
    return 0.5 * float(noise.sum()), float(noise @ window / max(noise.sum(), np.finfo(noise.dtype).tiny))


def visible_noise(state: DecrementState, noise: jax.Array) -> jax.Array:
    """The noise in the guide, nats, for each block; the rest is in a full-covariance proxy, and does not cost nats."""
    return noise * state.visible


def predicted_mean(state: DecrementState, noise: jax.Array) -> jax.Array:
    """‖m‖² before the next step expected of noise alone, nats, for each block."""
    return noise * _noise_in_mean(state.covariance)


def _propagated(covariance: jax.Array, weights: StepWeights) -> jax.Array:
    """A C Aᵀ + b bᵀ."""
    rho, mean, average = weights
    zero = jnp.zeros_like(rho)
    step = jnp.stack(
        [
            jnp.stack([1 - rho, zero, zero]),
            jnp.stack([zero, 1 - mean, zero]),
            jnp.stack([average * (1 - rho), zero, 1 - average]),
        ]
    )
    noise = jnp.stack([-rho, mean, -average * rho])
    return jnp.einsum("ijk,jlk,mlk->imk", step, covariance, step) + noise[:, None] * noise


def _updated_mean(squares: jax.Array, weights: StepWeights) -> jax.Array:
    """‖m‖² after the step: m₊ = (1−w) m + (w−ρ) v, from the squares of m, v − m and v."""
    kept, added = 1 - weights.mean, weights.mean - weights.rho
    mean2, innovation2, gradient2 = squares
    product = (gradient2 + mean2 - innovation2) / 2
    return jnp.maximum(kept**2 * mean2 + 2 * kept * added * product + added**2 * gradient2, 0.0)


def _noise_in_mean(covariance: jax.Array) -> jax.Array:
    """E‖m‖² of unit noise alone, m = x + z."""
    (xx, xz, _), (_, zz, _), _ = covariance
    return xx + 2 * xz + zz
