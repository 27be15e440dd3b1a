# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""Stein regression: estimates of E[∇f] and E[∇²f] from gradients alone, by regressing gradients on draws.

With x ~ N(0, I) and g(x) = Cᵀ∇f(m + Cx) Stein's identity says

    E[g xᵀ] = E[Cᵀ∇²f C],        so that  g(x) ≈ E[g] + E[Cᵀ∇²f C] x  is the regression of g on x.

Least squares over draws (x_s, g_s) is exact for a quadratic f as soon as the draws span the space; the mean of g xᵀ
is not. Sums over draws are remembered from step to step, so that few draws a step suffice. They are sums over
u = (1, x), and the frame of the next Gaussian is a linear map of u, so that :func:`change_frame` is exact.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from numpyro_natgrad.distributions.gaussian import diagonal
from numpyro_natgrad.options import CONSTANTS, RuleConstants


class RegressionSums(NamedTuple):
    """Weighted sums over draws u = (1, x) of n dimensions.

    :ivar loc: m, the origin of the frame of the draws, ``(n,)``.
    :ivar factor: C, the axes of that frame, ``(n, n)``.
    :ivar influence: running mean of the winsorized ‖e‖²(1 + ‖x‖²); scalar.
    :ivar gram: Σ w u uᵀ, ``(n + 1, n + 1)``.
    :ivar cross: Σ w g uᵀ, ``(n, n + 1)``.
    """

    loc: jax.Array
    factor: jax.Array
    influence: jax.Array
    gram: jax.Array
    cross: jax.Array

    @property
    def weight(self) -> jax.Array:
        """Σ w: the effective number of draws."""
        return self.gram[0, 0]


def empty_sums(n: int, dtype: jnp.dtype) -> RegressionSums:
    shapes = (n,), (n, n), (), (n + 1, n + 1), (n, n + 1)
    return RegressionSums(*(jnp.zeros(shape, dtype) for shape in shapes))


def change_frame(
    sums: RegressionSums, loc: jax.Array, factor: jax.Array, constants: RuleConstants = CONSTANTS
) -> RegressionSums:
    """The sums in the frame x' = C'⁻¹(z − m') = R (x − δ), g' = R⁻ᵀg, with R = C'⁻¹C and δ = C⁻¹(m' − m).

    Draws lose weight (:func:`frame_change_weight`) with the KL divergence between the two Gaussians.

    :param loc: m', ``(d,)``.
    :param factor: C', ``(d, d)``, lower triangular.
    """
    old = jnp.where(sums.weight > 0, sums.factor, factor)
    ratio, both = _solve(factor, old), jnp.column_stack([factor, jnp.where(sums.weight > 0, loc - sums.loc, 0.0)])
    inverse, shift = jnp.split(_solve(old, both), [loc.size], axis=1)
    affine = jnp.column_stack([-ratio @ shift, ratio])
    affine = jnp.concatenate([jnp.eye(1, loc.size + 1, dtype=loc.dtype), affine])
    gram, cross = jnp.split(jnp.concatenate([sums.gram, sums.cross]) @ affine.T, [loc.size + 1])
    gram, cross = affine @ gram, inverse.T @ cross
    total, tiny = jnp.sum(diagonal(gram)[1:]), jnp.finfo(gram.dtype).tiny
    spread = constants.spread_max * loc.size * sums.weight / jnp.maximum(total, tiny)
    kl = 0.5 * (jnp.sum(inverse**2) - loc.size - 2 * jnp.sum(jnp.log(diagonal(inverse))) + jnp.sum(shift**2))
    weight = frame_change_weight(kl, spread)
    # All draws are forgotten if the sums are not finite in the new frame.
    ok = jnp.isfinite((jnp.sum(gram) + jnp.sum(cross)) * weight)
    return RegressionSums(loc, factor, sums.influence, *(jnp.where(ok, weight * x, 0.0) for x in (gram, cross)))


def frame_change_weight(kl: jax.Array, spread: jax.Array) -> jax.Array:
    """The factor of remembered draws' weights after the Gaussian has changed by ``kl`` nats: min(spread, 1)²/(1 + kl).

    n draws of q are worth n E[w]²/E[w²] draws of q₊ with the importance weights w = q₊/q, and E[w²] ≥ exp(KL(q₊ ‖ q)).
    1/(1 + kl) has the slope of exp(−kl) at 0 and a longer tail, because a regression is exact for a quadratic f
    wherever the draws are. Without the factor kidiq takes 187 steps to 0.1 nats instead of 17, arK 72 instead of 11,
    mesquite 87 instead of 29, eight schools 13 instead of 17 (docs/benchmarks/ablation.md).

    :param kl: KL(q₊ ‖ q), nats.
    :param spread: ``spread_max`` times the expected mean square of draws, over that of these draws in the new frame.
    """
    return jnp.minimum(spread, 1.0) ** 2 / (1 + kl)


def add_draws(
    sums: RegressionSums, x: jax.Array, g: jax.Array, precision: jax.Array | None, constants: RuleConstants = CONSTANTS
) -> RegressionSums:
    """The sums with more draws, winsorized if their influence ‖e‖²(1 + ‖x‖²) is too large.

    In the bound the median represents the new draws, so that their outliers cannot raise it.

    :param x: draws in the sums' frame, ``(S, d)``.
    :param g: gradients of f there, ``(S, d)``.
    :param precision: P of the present Gaussian in that frame, ``(d, d)``; ``None`` for the identity.
    """
    sums = forget(sums, *x.shape)
    square = lambda rows: jnp.sum(rows**2, axis=1)
    influence = square(g - (x if precision is None else x @ precision)) * (1 + square(x))
    total = sums.weight * sums.influence
    bound = jnp.maximum(constants.influence_max * (total + len(x) * jnp.median(influence)), 1.0)
    weight = jnp.sqrt(jnp.minimum(1.0, bound / jnp.maximum(influence, bound)))[:, None]
    u = jnp.column_stack([jnp.ones_like(weight), x])
    gram, cross = jnp.split((weight * jnp.column_stack([u, g])).T @ u, [u.shape[1]])
    return sums._replace(
        influence=(total + jnp.sum(jnp.minimum(influence, bound))) / (sums.weight + len(x)),
        gram=sums.gram + gram,
        cross=sums.cross + cross,
    )


def forget(sums: RegressionSums, new: int, d: int) -> RegressionSums:
    """The sums before S = ``new`` draws are added: of n draws n − S(1 − (d + 1)/n) are kept, so that n ≈ √(2(d + 1)St).

    A step goes S/n of the way to the fit of its own draws. If no draw was forgotten that would be 1/t, which is too
    short where the loss is flatter than the Fisher matrix: a Poisson hierarchy with 32 particles stayed 3 nats off for
    hundreds of steps. With 1/√t the average of the iterates removes the remaining noise (Polyak & Juditsky 1992). At
    least the d + 1 draws that determine a fit are kept; with 3(d + 1) a funnel took 772 steps instead of 355.
    """
    n = jnp.maximum(sums.weight, 1.0)
    kept = 1 - jnp.clip(new / n * (1 - (d + 1) / n), 0.0, 1.0)
    return sums._replace(gram=kept * sums.gram, cross=kept * sums.cross)


def fit(
    sums: RegressionSums, precision: jax.Array | None, constants: RuleConstants = CONSTANTS
) -> tuple[jax.Array, jax.Array]:
    """b ``(d,)`` and Δ ``(d, d)``, symmetric: the slope and the curvature beyond the precision P of the Gaussian.

    The residuals of the gradients from the present Gaussian are fitted, so that directions without draws do not change:

        e_s = g_s − P x_s,     min  Σ w_s ‖e_s − b − Δ x_s‖² + λ (‖b‖² + ‖Δ‖²)     over b and symmetric Δ.

    In the eigenbasis of the centred Gram matrix G = Σ w x xᵀ − ssᵀ/(n + λ) the normal equations
    ΔG + GΔ + 2λΔ = E + Eᵀ are solved entry by entry.
    """
    n, s = sums.weight + constants.ridge, sums.gram[1:, 0]
    missing = sums.cross - (sums.gram[1:] if precision is None else precision @ sums.gram[1:])
    slope = missing[:, 0]
    gram = sums.gram[1:, 1:] - jnp.outer(s, s) / n
    cross = missing[:, 1:] - jnp.outer(slope, s) / n
    # A NaN would keep the eigensolver busy; the step is skipped nevertheless, because the slope is NaN as well.
    values, vectors = jnp.linalg.eigh(jnp.where(jnp.all(jnp.isfinite(gram)), gram, 0.0))
    values = jnp.maximum(values, 0.0)
    rotated = vectors.T @ cross @ vectors
    entries = (rotated + rotated.T) / (values[:, None] + values + 2 * constants.ridge)
    curvature = vectors @ entries @ vectors.T
    return (slope - curvature @ s) / n, curvature


def _solve(lower: jax.Array, right: jax.Array) -> jax.Array:
    return solve_triangular(lower, right, lower=True)
