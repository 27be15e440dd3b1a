# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""Gaussians N(m, D(I + WWᵀ)D) with D = diag(s) and W of shape (d, r): Fisher, KL and steps in O(d r²), never d × d.

Everything is seen in units of s. With WᵀW = X diag(λ) Xᵀ, which is r × r,

    S = (I + WWᵀ)⁻¹ = I − WX (1 + λ)⁻¹ XᵀWᵀ,     S^½ = I − WX f(λ) XᵀWᵀ,   f(λ) = 1 / (√(1+λ) (1 + √(1+λ)))

A step's optimum, for a loss with Hessian H (in the same units), is where q's precision agrees with H along W and on the
diagonal: (H − S) W = 0 and diag(H − S) = 0, which are ∇_W L and ∇_s L. One is met with the other held, in turns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_natgrad.distributions.gaussian import inverse_lower, positive_ratio

#: Turns of :func:`project`, which starts at the guide as it is.
PROJECTION_SWEEPS = 8


class Spectrum(NamedTuple):
    """Of WWᵀ: λ, ``(r,)``, and WX, ``(d, r)``, whose columns are eigenvectors of length √λ."""

    values: jax.Array
    columns: jax.Array


def spectrum(factor: jax.Array) -> Spectrum:
    """The eigenvalues of WWᵀ, from those of the r × r matrix WᵀW."""
    values, vectors = jnp.linalg.eigh(factor.T @ factor)
    return Spectrum(jnp.maximum(values, 0.0), factor @ vectors)


def precision_diagonal(factor: jax.Array) -> jax.Array:
    """diag S, ``(d,)``: the reciprocals are the conditional variances in units of s²."""
    values, columns = spectrum(factor)
    return 1 - jnp.sum(columns**2 / (1 + values), axis=1)


def precision_product(factor: jax.Array, x: jax.Array) -> jax.Array:
    """S x for x of shape ``(d, n)``."""
    values, columns = spectrum(factor)
    return x - columns @ ((columns.T @ x) / (1 + values)[:, None])


def forward_kl(factor: jax.Array, new: jax.Array, ratio: jax.Array, shift: jax.Array) -> jax.Array:
    """KL(N(0, I + WWᵀ) ‖ N(x, diag(t)(I + W₊W₊ᵀ)diag(t))) in nats, summed term by term so that nothing large cancels.

    :param factor: W, ``(d, r)``.  :param new: W₊, ``(d, r)``.  :param ratio: t, ``(d,)``.  :param shift: x, ``(d,)``.
    """
    before, after = spectrum(factor), spectrum(new)
    root = jnp.sqrt(1 + after.values)

    def squared(y: jax.Array) -> jax.Array:  # yᵀS₊y
        along = (after.columns.T @ y) / (root * (1 + root))[:, None]
        return jnp.sum((y - after.columns @ along) ** 2)

    square = ratio**-2
    explained = jnp.sum(after.columns**2 / (1 + after.values), axis=1)
    independent = jnp.sum(square - 1 - jnp.log(square)) - jnp.sum(square * explained)
    logs = jnp.sum(jnp.log1p(after.values)) - jnp.sum(jnp.log1p(before.values))
    return 0.5 * (independent + logs + squared(factor / ratio[:, None]) + squared((shift / ratio)[:, None]))


def procrustes_align(factor: jax.Array, like: jax.Array) -> jax.Array:
    """WQ, Q the rotation for which it is closest to ``like``.

    W and WQ are one covariance. Averages of iterates, and losses compared at the same draws, want the same W for it.
    """
    left, _, right = jnp.linalg.svd(factor.T @ like, full_matrices=False)
    return factor @ (left @ right)


class LowRankTangent(NamedTuple):
    """A natural gradient at W, in units of s.

    :ivar factor: W, ``(d, r)``.
    :ivar slope: E[∇f], ``(d,)``.
    :ivar diagonal: diag(H − S), ``(d,)``.
    :ivar basis: T, orthonormal columns, ``(d, n)``: the first r span W.
    :ivar root: R = (I + TᵀWWᵀT)^½, ``(n, n)``: the standard deviations along T.
    :ivar values: eigenvalues of M = R TᵀHT R − I, the whitened curvature along T, and
    :ivar vectors: their eigenvectors.
    """

    factor: jax.Array
    slope: jax.Array
    diagonal: jax.Array
    basis: jax.Array
    root: jax.Array
    values: jax.Array
    vectors: jax.Array


class LowRankStep(NamedTuple):
    """Where a step leads: s₊/s ``(d,)``, W₊ ``(d, r)``, (m₊ − m)/s ``(d,)``; its columns as TY, Y ``(n, r)``."""

    ratio: jax.Array
    factor: jax.Array
    shift: jax.Array
    coefficients: jax.Array


def tangent(
    factor: jax.Array, slope: jax.Array, diagonal: jax.Array, basis: jax.Array, image: jax.Array
) -> LowRankTangent:
    """:param image: HT, ``(d, n)``. The rest as in :class:`LowRankTangent`."""
    root = covariance_root(factor, basis)
    inner = root @ (basis.T @ image) @ root
    values, vectors = jnp.linalg.eigh((inner + inner.T) / 2 - jnp.eye(root.shape[0], dtype=root.dtype))
    return LowRankTangent(factor, slope, diagonal, basis, root, values, vectors)


def covariance_root(factor: jax.Array, basis: jax.Array) -> jax.Array:
    """(I + TᵀWWᵀT)^½, ``(n, n)``."""
    inner = basis.T @ factor
    values, vectors = jnp.linalg.eigh(inner @ inner.T)
    return (vectors * jnp.sqrt(1 + jnp.maximum(values, 0.0))) @ vectors.T


def squared_norm(t: LowRankTangent) -> jax.Array:
    """Squared Fisher norm, nats, of the part of the tangent that lies in the family.

    To :func:`mean_scale_squared_norm` it adds the part of M with at least one index among the first r columns of T,
    which span W.
    """
    rest = t.vectors[t.factor.shape[1] :]
    outside = (rest * t.values) @ rest.T
    return mean_scale_squared_norm(t.factor, t.slope, t.diagonal) + 0.5 * (jnp.sum(t.values**2) - jnp.sum(outside**2))


def mean_scale_squared_norm(factor: jax.Array, slope: jax.Array, diagonal: jax.Array) -> jax.Array:
    """The same of mean and diagonal: gᵀΣg + ½ Σ_i (diag(H − S)_i / S_ii)²."""
    scaled = diagonal / precision_diagonal(factor)
    return jnp.sum(slope**2) + jnp.sum((slope @ factor) ** 2) + 0.5 * jnp.sum(scaled**2)


def precision_diagonal_change(t: LowRankTangent, rho: jax.Array, margin: float) -> jax.Array:
    """What diag S gains, ``(d,)``."""
    old = precision_diagonal(t.factor)
    return old * (positive_ratio(rho * t.diagonal / old, margin) - 1)


def step(t: LowRankTangent, rho: jax.Array, margin: float) -> LowRankStep:
    r"""The member of the family at S + ρ(H − S): s for the old W first, then W and the mean for the new s.

    *s.*  Minimise tr(S₊Σ) − log|Σ| over ψ = s² at fixed DW. log|Σ| is the entropy of (z, w), w the r common variables,
    less that of w given z; with the regression of w on z held where it is, that is a lower bound (as in the EM
    algorithm), and

        1/ψ₊ = diag(S₊) + 1 − diag(S)   in units of the old s

    is where it leads: downhill, and nowhere if diag(S₊) = diag(S).

    *W.*  Along z = DTy, the new precision is yᵀ(S₊)y with S₊ = R⁻¹ (I + ρM) R⁻¹ and the new scale's own is yᵀNy with
    N = Tᵀdiag(s/s₊)²T. Directions of more variance than s₊ alone gives them are eigenvectors of the pencil with ℓ > 1;
    the r largest are W₊ = u √(ℓ − 1) (Rayleigh & Ritz: the best in the span of T).

    *m.*  −ρ S₊⁻¹ g with all that is known of S₊: also what lies along T beyond the r columns, or has ℓ < 1.
    """
    ratio = 1 / jnp.sqrt(1 + precision_diagonal_change(t, rho, margin))
    scaled = t.basis / ratio[:, None]
    half = (t.root @ t.vectors) / jnp.sqrt(positive_ratio(rho * t.values, margin))
    image = scaled @ half
    ell, inner = jnp.linalg.eigh(image.T @ image)
    ell, inner = jnp.maximum(ell[::-1], jnp.finfo(ell.dtype).tiny), inner[:, ::-1] / jnp.sqrt(ell[::-1])
    u = image @ inner
    weights = ratio * t.slope
    shift = -rho * ratio * (weights + u @ ((ell - 1) * (u.T @ weights)))
    coefficients = _leading_columns(half @ inner, t.factor.shape[1])
    lengths = jnp.sqrt(jnp.maximum(_leading_columns(ell - 1, t.factor.shape[1]), 0.0))
    factor = procrustes_align(scaled @ coefficients * lengths, t.factor / ratio[:, None])
    return LowRankStep(ratio, factor, shift, coefficients)


def project(
    dense: jax.Array, scale: jax.Array, factor: jax.Array, sweeps: int = PROJECTION_SWEEPS
) -> tuple[jax.Array, jax.Array]:
    """The member of the family nearest to N(·, KKᵀ), for few latents: s and W from K, ``(d, d)``, and a start.

    The same two turns as in :func:`step`, W in the span of everything: its columns are the r leading eigenvectors of
    the covariance in units of s.
    """
    covariance, r = dense @ dense.T, factor.shape[1]
    inverse = inverse_lower(dense)
    precision = jnp.sum(inverse**2, axis=0)

    def sweep(_: int, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        s, w = at
        new = 1 / jnp.sqrt(precision + (1 - precision_diagonal(w)) / s**2)
        ell, u = jnp.linalg.eigh(covariance / (new[:, None] * new))
        lengths = jnp.sqrt(jnp.maximum(_leading_columns(ell[::-1] - 1, r), 0.0))
        return new, _leading_columns(u[:, ::-1], r) * lengths

    new, w = jax.lax.fori_loop(0, sweeps, sweep, (scale, factor))
    return new, procrustes_align(w, scale[:, None] * factor / new[:, None])


def _leading_columns(x: jax.Array, r: int) -> jax.Array:
    """The first r along the last axis, with zeros for those that there are not."""
    return jnp.pad(x[..., :r], [(0, 0)] * (x.ndim - 1) + [(0, max(0, r - x.shape[-1]))])
