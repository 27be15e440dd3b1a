# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Products with the mean Hessian of a step's draws, and the leave-one-out control variate of the slope.

With H₋ₛ the mean Hessian of the particles other than s,

    g = ∇f − (1/S) Σ_s H₋ₛ (z_s − m)        is an unbiased slope, and free of noise where f is quadratic.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from numpyro_natgrad.estimators.derivatives import finite


def whitened_hessian_products(
    hessian_product: Callable[[jax.Array, jax.Array], jax.Array],
    factor: jax.Array,
    shifts: jax.Array,
    offset: jax.Array | None,
    particles: float,
) -> tuple[jax.Array, jax.Array]:
    """KᵀH times each shift, ``(d, k)``, and the control variate to be added to the slope Kᵀ∇f, ``(d,)``.

    A single particle has no others: the Gaussian's own precision takes the place of H₋ₛ, which gives the path gradient.

    :param hessian_product: the change of the gradient by a shift of the mean ``(d,)`` and a stretch of the draws.
    :param factor: K, ``(d, d)``.
    :param shifts: of the mean, ``(d, k)``.
    :param offset: of the draws' mean from m, ``(d,)``; ``None`` where nothing is drawn.
    """
    no_stretch = jnp.zeros(shifts.shape[1], shifts.dtype)
    products = lambda *columns: factor.T @ jax.vmap(hessian_product, in_axes=(1, 0), out_axes=1)(*columns)
    if offset is None:
        return products(shifts, no_stretch), jnp.zeros(len(factor), factor.dtype)
    if particles == 1:
        return products(shifts, no_stretch), -solve_triangular(factor, offset, lower=True)
    shift, stretch = leave_one_out_tangent(offset, particles)
    both = products(jnp.concatenate([shifts, shift[:, None]], axis=1), jnp.append(no_stretch, stretch))
    return both[:, :-1], both[:, -1]


def leave_one_out_tangent(offset: jax.Array, particles: float) -> tuple[jax.Array, float]:
    """The shift of the mean and the stretch of the draws along which the gradient changes by its control variate.

    The mean of H₋ₛ (z_s − m) consists of Σ_s H_s (z_s − m)/S, the derivative of E[∇f] along a stretch of the draws
    away from m, and of H̄ times the ``offset`` of their mean from m. Both together cost one product.
    """
    return -particles / (particles - 1) * offset, 1 / (particles - 1)


def fall_back_to_gradient(
    previous_step_skipped: jax.Array | bool, plain: jax.Array, slope: jax.Array, image: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whitened slope and M V; the plain slope and M = 0 if they are non-finite in two consecutive steps.

    A Poisson rate of e^-50 has a gradient, but its Hessian is 0/0 in single precision. The step then follows the
    gradient (``plain``, without the control variate) at an unchanged covariance.
    """
    lost = jnp.asarray(previous_step_skipped) & ~finite((slope, image))
    return jnp.where(lost, plain, slope), jnp.where(lost, 0.0, image)


def random_signs(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Independent ±1 with equal probability, one from each random bit.

    ``jax.random.rademacher`` takes 32 bits a sign: a third of the step of a mean-field guide of a million latents.
    """
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 32),), jnp.uint32)
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return 1 - 2 * bits.reshape(-1)[:size].reshape(shape).astype(dtype)
