# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The trust region: the largest step within a KL radius δ, whether to accept it, and the next radius.

    ρ = max{ρ ≤ ρ_max : KL(q ‖ q₊) ≤ δ}        ratio = actual reduction / predicted reduction

The radius is in nats, and so independent of the parameterization. Only this module changes it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_natgrad.distributions.gaussian import StepKL
from numpyro_natgrad.options import Options, RuleConstants


class Acceptance(NamedTuple):
    """Whether a step is accepted, whether the radius grows after it, and its actual reduction, nats."""

    accepted: jax.Array
    grows: jax.Array
    reduction: jax.Array


def initial_radius(options: Options, latents: int) -> float:
    """Nats of the first step: one per latent dimension, or the user's limit."""
    if options.max_kl is None:
        return float("inf")
    return float(latents) if options.max_kl == "adaptive" else float(options.max_kl)


def longest(kl: Callable[[jax.Array], StepKL], largest: jax.Array, radius: jax.Array) -> tuple[jax.Array, StepKL]:
    """The longest ρ ≤ ``largest`` with Σ KL(q ‖ q₊) ≤ ``radius``, by bisection of log ρ to 1 %, and its KL.

    KL is of order ρ² near 0: at 1e-24 of the largest step any finite natural gradient costs nothing.
    """

    def is_wide(bounds: tuple[jax.Array, jax.Array, jax.Array, StepKL]) -> jax.Array:
        return bounds[1] > 1.01 * bounds[0]

    def halve(bounds: tuple[jax.Array, jax.Array, jax.Array, StepKL]) -> Any:
        low, high, middle, kl_low = bounds
        kl_middle = kl(middle)
        fits = jnp.sum(kl_middle.forward) <= radius
        low, high = jnp.where(fits, middle, low), jnp.where(fits, high, middle)
        # The product of both would underflow in single precision, and the bisection would never end.
        middle = jnp.sqrt(low) * jnp.sqrt(high)
        return low, high, middle, jax.tree.map(partial(jnp.where, fits), kl_middle, kl_low)

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(kl, largest))
    # The first "middle" is the upper end, so that KL is compiled once.
    low, _, _, kl_low = lax.while_loop(is_wide, halve, (largest * 1e-24, largest, largest, nothing))
    return low, kl_low


def comparison_floor(latents: int, constants: RuleConstants) -> jax.Array:
    """Nats of KL below which a step is not compared on its own draws, since noise would decide."""
    return jnp.maximum(constants.comparison_kl, constants.comparison_kl_per_latent * latents)


def accept(
    actual: jax.Array,
    predicted: jax.Array,
    *,
    large: jax.Array,
    limited: jax.Array,
    floor: jax.Array,
    constants: RuleConstants,
) -> Acceptance:
    """Compare the actual reduction of the loss with the predicted one, both in nats.

    :param large: the step is large enough for a comparison. Others are accepted if they lose at most ``floor`` nats.
    :param limited: the radius shortened the step.
    """
    accepted = actual >= jnp.where(large, constants.low_cutoff * predicted, -floor)
    return Acceptance(accepted, limited & (actual > constants.high_cutoff * predicted), actual)


def resize(
    radius: jax.Array,
    result: Acceptance,
    *,
    kl: jax.Array,
    limited: jax.Array,
    floor: jax.Array,
    constants: RuleConstants,
) -> jax.Array:
    """The radius after a step of ``kl`` nats.

    It shrinks after a rejected step, and grows if ``result.grows``. If it did not limit the step, it falls towards
    a multiple of ``kl``. Rejections below ``floor`` may have been noise, so that every accepted step there undoes one.
    """
    factor = constants.radius_factor
    grown = jnp.minimum(factor * radius, constants.radius_max)
    recovered = jnp.maximum(radius, jnp.minimum(factor * radius, floor))
    kept = jnp.where(limited, recovered, jnp.maximum(jnp.minimum(radius, factor * kl), floor))
    shrunk = jnp.maximum(radius / factor, constants.radius_min * floor)
    return jnp.where(result.accepted, jnp.where(result.grows, grown, kept), shrunk).astype(radius.dtype)
