# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""The certificate: how many nats are still to gain, beside what noise hides.

Near the optimum the loss is ½‖a‖² nats above its minimum, with a = η − η* in the Fisher metric, where η is the
*average* that ``get_params`` returns. Let x be the iterate, n ~ (0, v) the noise of one natural gradient x + n, and m
the running mean of natural gradients, from which the families subtract what has been travelled. One step is linear:

    x ← (1−ρ) x − ρ n        m ← (1−w) m + (w−ρ)(x + n)        a ← (1−α) a + α x

so that z = m − x ← (1−w) z + w n holds noise alone, whatever the optimum. The noise in (x, z, a) has a covariance
v C, with C ← A C Aᵀ + b bᵀ known since ρ, w and α are; what is left of the start is seen in ‖m‖² beyond its noise:

    E‖m‖² = ‖E x‖² + v (C_xx + 2 C_xz + C_zz),        ‖E a‖² ≤ Σ α-weighted ‖E x‖²  (Jensen)
    decrement = ½ (max(0, Σ α-weighted (‖m‖² − its noise)) + v C_aa)

‖m‖ alone would not do: ρ = w makes it vanish, since then the iterate *is* the mean of what the natural gradients
estimated, and C_aa → 1/t is all that says how far that mean is off.

v is the noise of now, also of the steps before: nats are those of the guide as it is, and what a natural gradient
missed far away, by fifteen orders of magnitude more, would hide for a hundred steps that the iterate still travels.

Where a family moves more than the guide shows (the whole precision of a lifted Gaussian), only what it shows costs
nats, and only that counts here, of ‖m‖² and of v.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_natgrad.step.state import DecrementState, State
from numpyro_natgrad.step.step_size import SquaredNorms, noise_seen

#: Nats beyond which all distances are alike: their squares are numbers in single precision.
FARTHEST = 1e15
#: Standard deviation of a normal variable, in mean absolute deviations: √(π/2).
NORMAL = 1.2533


class Weights(NamedTuple):
    """Per family: ρ and w of a natural gradient in iterate and running mean, α of the iterate in the average."""

    rho: jax.Array
    mean: jax.Array
    average: jax.Array


def observe(certificate: DecrementState, seen: SquaredNorms, noise: jax.Array, weights: Weights) -> DecrementState:
    """After one step with these weights.

    :param seen: as the natural gradient was compared with the running mean before it.
    :param noise: v, nats.
    """
    k = noise.size
    covariance = _propagated(certificate.covariance[..., :k], weights)
    squares = seen.visible_squares()
    share = jnp.minimum(squares[1] / jnp.maximum(seen.innovation2, jnp.finfo(noise.dtype).tiny), 1.0)
    visible = certificate.visible[:k] + weights.mean * (share - certificate.visible[:k])
    excess = jnp.clip(_mean2(squares, weights) - visible * noise * _share(covariance), -FARTHEST, FARTHEST)
    mean, deviation = certificate.excess[:, :k]
    mean = mean + weights.average * (excess - mean)
    deviation = deviation + weights.average * (jnp.abs(excess - mean) - deviation)
    return DecrementState(
        certificate.covariance.at[..., :k].set(covariance),
        certificate.excess.at[:, :k].set(jnp.stack([mean, deviation])),
        certificate.visible.at[:k].set(visible),
    )


def remaining(certificate: DecrementState, noise: jax.Array, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nats still to gain, of all families, and the standard error.

    v is the mean of about ``memory`` squares, of relative variance 2 at least where one direction is noisy (χ²), and
    the excess scatters as it was seen to; its terms follow each other closely, and none of that scatter averages out.
    (Absolute deviations, as the average itself, forget the start where it is left behind; for the root of a mean of
    squares its nats would count for twice as many steps.) Where no parameter has a Fisher nothing is known.
    """
    k = memory.size
    if not k:
        return jnp.array(jnp.nan), jnp.array(jnp.nan)
    mean, deviation = certificate.excess[:, :k]
    left = jnp.minimum(visible_noise(certificate, noise) * certificate.covariance[2, 2, :k], FARTHEST)
    error2 = (NORMAL * deviation) ** 2 + 2 / memory * left**2
    return 0.5 * jnp.sum(jnp.maximum(mean, 0.0) + left), 0.5 * jnp.sqrt(jnp.sum(error2))


def noise_left(state: State) -> tuple[float, float]:
    """The part of the decrement that is noise, nats, and the steps that the running means behind it look back over."""
    noise = np.asarray(
        visible_noise(state.certificate, noise_seen(state.statistics)) * state.certificate.covariance[2, 2]
    )
    memory = np.asarray(state.statistics.memory)
    return 0.5 * float(noise.sum()), float(noise @ memory / max(noise.sum(), np.finfo(noise.dtype).tiny))


def _propagated(covariance: jax.Array, weights: Weights) -> jax.Array:
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
    drawn = jnp.stack([-rho, mean, -average * rho])
    return jnp.einsum("ijk,jlk,mlk->imk", step, covariance, step) + drawn[:, None] * drawn


def _mean2(squares: jax.Array, weights: Weights) -> jax.Array:
    """‖m‖² after the step: m₊ = (1−w) m + (w−ρ) v, from the squares of m, v − m and v."""
    kept, added = 1 - weights.mean, weights.mean - weights.rho
    running_mean2, innovation2, gradient2 = squares
    product = (gradient2 + running_mean2 - innovation2) / 2
    return jnp.maximum(kept**2 * running_mean2 + 2 * kept * added * product + added**2 * gradient2, 0.0)


def visible_noise(certificate: DecrementState, noise: jax.Array) -> jax.Array:
    """What the guide shows of the noise, nats, for each family."""
    return noise * certificate.visible[: noise.size]


def foreseen(certificate: DecrementState, noise: jax.Array) -> jax.Array:
    """‖m‖² that noise alone would show before the next step, nats, for each family."""
    return noise * _share(certificate.covariance[..., : noise.size])


def _share(covariance: jax.Array) -> jax.Array:
    """E‖m‖² of unit noise alone, m = x + z."""
    (xx, xz, _), (_, zz, _), _ = covariance
    return xx + 2 * xz + zz
