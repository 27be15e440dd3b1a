# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Products with the mean Hessian of a step's draws, the control variate that they make, and what stands in for them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from numpyro_natgrad.estimators.derivatives import finite


def whitened_products(
    hessian_product: Callable[[jax.Array, jax.Array], jax.Array],
    factor: jax.Array,
    shifts: jax.Array,
    offset: jax.Array | None,
    particles: float,
) -> tuple[jax.Array, jax.Array]:
    """KᵀH of each shift, ``(d, k)``, and what takes the noise of the draws' mean out of the slope Kᵀ∇f, ``(d,)``.

    A single particle has no others (:func:`left_out`): it is given the current S (sticking the landing).

    :param push: what a shift of the mean ``(d,)`` and a stretch of the draws away from it change in the gradient.
    :param factor: K, ``(d, d)``.
    :param shifts: of the mean, ``(d, k)``.
    :param offset: of the draws' mean from m, ``(d,)``; ``None`` where nothing is drawn.
    """
    n, still = particles, jnp.zeros(shifts.shape[1], shifts.dtype)
    products = lambda *columns: factor.T @ jax.vmap(hessian_product, in_axes=(1, 0), out_axes=1)(*columns)
    if offset is None:
        return products(shifts, still), jnp.zeros(len(factor), factor.dtype)
    if n == 1:
        return products(shifts, still), -solve_triangular(factor, offset, lower=True)
    shift, stretch = left_out(offset, n)
    both = products(jnp.concatenate([shifts, shift[:, None]], axis=1), jnp.append(still, stretch))
    return both[:, :-1], both[:, -1]


def left_out(offset: jax.Array, particles: float) -> tuple[jax.Array, float]:
    """The shift of the mean and the stretch of the draws that change the gradient ∇f by its control variate.

    Leave-one-out: g = ∇f − (1/S) Σ_s H₋ₛ (z_s − m) with H₋ₛ the mean Hessian of the other particles, unbiased, and
    without noise where f is quadratic. Σ_s H_s (z_s − m)/S is the derivative of E[∇f] as the draws are stretched, so
    that it costs one more product.

    :param offset: of the draws' mean from m.
    """
    return -particles / (particles - 1) * offset, 1 / (particles - 1)


def usable(
    stuck: jax.Array | bool, plain: jax.Array, slope: jax.Array, image: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Slope and M V, whitened; where they are no numbers for the second time, what gets away from there.

    A Poisson rate of e^-50 has a gradient, but its Hessian is 0/0 in single precision. The gradient alone is followed,
    with the covariance as it is (M = 0), as far as the KL radius and the judge allow.

    :param stuck: the step before was skipped.
    :param plain: the slope without the control variate.
    :param image: M of the probes V.
    """
    lost = jnp.asarray(stuck) & ~finite((slope, image))
    return jnp.where(lost, plain, slope), jnp.where(lost, 0.0, image)
