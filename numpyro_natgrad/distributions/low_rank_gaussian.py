# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""Low-rank Gaussians N(m, D(I + WWᵀ)D), D = diag(s), W of shape (d, r): norm, KL and steps in O(d r²).

No d × d matrix is formed. All quantities are in units of s. With WᵀW = X diag(λ) Xᵀ, which is r × r, the precision is

    S = (I + WWᵀ)⁻¹ = I − WX (1 + λ)⁻¹ XᵀWᵀ,     S^½ = I − WX f(λ) XᵀWᵀ,   f(λ) = 1 / (√(1+λ) (1 + √(1+λ)))

For a loss with Hessian H (in the same units) the optimum is where (H − S) W = 0 and diag(H − S) = 0, which are
∇_W L = 0 and ∇_s L = 0. A step solves the second equation at fixed W, then the first at the new s.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_natgrad.distributions.gaussian import inverse_lower, positive_ratio

#: Alternations between s and W in one :func:`project`. None of them raises the KL, and the next step starts from the
#: result. From a diagonal start 8 end at most 0.13 nats (typically 0.02) above the KL after 2000, on 40 random
#: precisions with 10 to 60 latents, rank 1 to 5 and condition number 1e2 to 1e4; 4 end 0.14 nats above it, 16 end 0.10.
PROJECTION_SWEEPS = 8


class Spectrum(NamedTuple):
    """Eigenvalues λ of WWᵀ, ``(r,)``, and WX, ``(d, r)``, whose columns are eigenvectors of length √λ."""

    values: jax.Array
    columns: jax.Array


def spectrum(factor: jax.Array) -> Spectrum:
    """The eigenvalues of WWᵀ, from those of the r × r matrix WᵀW."""
    values, vectors = jnp.linalg.eigh(factor.T @ factor)
    return Spectrum(jnp.maximum(values, 0.0), factor @ vectors)


def precision_diagonal(factor: jax.Array) -> jax.Array:
    """diag S, ``(d,)``: the reciprocal conditional variances, in units of s²."""
    values, columns = spectrum(factor)
    return 1 - jnp.sum(columns**2 / (1 + values), axis=1)


def precision_product(factor: jax.Array, x: jax.Array) -> jax.Array:
    """S x for x of shape ``(d, n)``."""
    values, columns = spectrum(factor)
    return x - columns @ ((columns.T @ x) / (1 + values)[:, None])


def forward_kl(factor: jax.Array, new: jax.Array, ratio: jax.Array, shift: jax.Array) -> jax.Array:
    """KL(N(0, I + WWᵀ) ‖ N(x, diag(t)(I + W₊W₊ᵀ)diag(t))) in nats, as a sum of terms that do not cancel each other.

    ``factor`` is W, ``new`` is W₊, ``ratio`` is t = s₊/s and ``shift`` is x = (m₊ − m)/s.
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


def procrustes_align(factor: jax.Array, target: jax.Array) -> jax.Array:
    """WQ for the orthogonal Q that brings it closest to ``target`` (the orthogonal Procrustes problem).

    W and WQ have the same covariance, but iterates are averaged, and losses compared at common random numbers, in W.
    """
    left, _, right = jnp.linalg.svd(factor.T @ target, full_matrices=False)
    return factor @ (left @ right)


class LowRankTangent(NamedTuple):
    """A natural gradient at W, in units of s.

    :ivar factor: W, ``(d, r)``.
    :ivar slope: E[∇f], ``(d,)``.
    :ivar diagonal: diag(H − S), ``(d,)``.
    :ivar basis: T, orthonormal columns, ``(d, n)``, of which the first r span W.
    :ivar root: R = (I + TᵀWWᵀT)^½, ``(n, n)``: the root of the covariance along T.
    :ivar values: eigenvalues of M = R TᵀHT R − I, the whitened curvature along T, ``(n,)``.
    :ivar vectors: its eigenvectors, ``(n, n)``.
    """

    factor: jax.Array
    slope: jax.Array
    diagonal: jax.Array
    basis: jax.Array
    root: jax.Array
    values: jax.Array
    vectors: jax.Array


class LowRankStep(NamedTuple):
    """The Gaussian after a step, relative to the one before: s₊/s, ``(d,)``, W₊, ``(d, r)``, (m₊ − m)/s, ``(d,)``, Y.

    The columns of W₊ are those of TY, Y of shape ``(n, r)``, up to scale and rotation.
    """

    ratio: jax.Array
    factor: jax.Array
    shift: jax.Array
    coefficients: jax.Array


def tangent(
    factor: jax.Array, slope: jax.Array, diagonal: jax.Array, basis: jax.Array, image: jax.Array
) -> LowRankTangent:
    """The tangent from its slope, its diagonal and the products ``image`` = HT, ``(d, n)``, with an orthonormal T."""
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
    """Squared Fisher norm, nats, of the part of the tangent in the family.

    It adds to :func:`mean_scale_squared_norm` the part of M with an index among the first r columns of T, which span W.
    """
    rest = t.vectors[t.factor.shape[1] :]
    outside = (rest * t.values) @ rest.T
    return mean_scale_squared_norm(t.factor, t.slope, t.diagonal) + 0.5 * (jnp.sum(t.values**2) - jnp.sum(outside**2))


def mean_scale_squared_norm(factor: jax.Array, slope: jax.Array, diagonal: jax.Array) -> jax.Array:
    """Squared Fisher norm, nats, of the part that changes m and s: gᵀΣg + ½ Σ_i (diag(H − S)_i / S_ii)²."""
    scaled = diagonal / precision_diagonal(factor)
    return jnp.sum(slope**2) + jnp.sum((slope @ factor) ** 2) + 0.5 * jnp.sum(scaled**2)


def precision_diagonal_change(t: LowRankTangent, rho: jax.Array, margin: float) -> jax.Array:
    """diag(S₊ − S) for S₊ = S + ρ(H − S), ``(d,)``; every entry of diag S₊ stays positive (:func:`.positive_ratio`)."""
    old = precision_diagonal(t.factor)
    return old * (positive_ratio(rho * t.diagonal / old, margin) - 1)


def step(t: LowRankTangent, rho: jax.Array, margin: float) -> LowRankStep:
    r"""Take a step of size ρ: the low-rank Gaussian for the precision S₊ = S + ρ(H − S).

    *Scale.* One step of an EM algorithm decreases tr(S₊Σ) − log|Σ| over ψ = s² at fixed DW. With w the r common
    factors, log|Σ| is, up to a constant, twice the entropy of (z, w) minus that of w given z. With a fixed regression
    of w on z this is a lower bound on log|Σ|, and the objective with this bound has its minimum at

        1/ψ₊ = diag(S₊) + 1 − diag(S)   in units of the old s.

    ψ stays the same if diag(S₊) = diag(S).

    *Factor.* Along z = DTy the new precision is yᵀ R⁻¹ (I + ρM) R⁻¹ y, and the precision of the new scale alone is yᵀNy
    with N = Tᵀ diag(s/s₊)² T. Directions whose variance exceeds that of the new scale are eigenvectors u of this pencil
    with ℓ > 1. The r largest give the columns u √(ℓ − 1) of W₊ (Rayleigh–Ritz: the best choice within the span of T).

    *Mean.* The shift is −ρ S₊⁻¹ g with S₊ in all directions of T, beyond the r columns and with ℓ < 1 too.
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
    """Project N(·, KKᵀ) on the family by alternating the two updates of :func:`step`, from a start s and W.

    ``dense`` is K, for few latents. The columns of the new W are not restricted to a subspace: they are the r leading
    eigenvectors of the covariance in units of s.
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
    """The first r entries along the last axis, padded with zeros if there are fewer."""
    return jnp.pad(x[..., :r], [(0, 0)] * (x.ndim - 1) + [(0, max(0, r - x.shape[-1]))])
