# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""Natural-gradient steps of a Gaussian q = N(m, KKᵀ), in the whitened coordinates u = K⁻¹(z − m).

With f = −log p, precision S = (KKᵀ)⁻¹, slope g = Kᵀ E[∇f] and curvature M = Kᵀ E[∇²f] K − I = Q Λ Qᵀ, the step
S₊ = (1−ρ) S + ρ E[∇²f], m₊ = m − ρ S₊⁻¹ E[∇f] in natural parameters (Khan & Rue 2023, eq. 12) is

    w = 1 + ρλ,   K₊ = K Q w^(−1/2) (rotated to be lower triangular),   m₊ = m − ρ K Q (Qᵀg / w)
    KL(q ‖ q₊) = ½ Σ [w − 1 − log w + ρ² (Qᵀg)² / w],      ‖v‖² = gᵀg + ½ tr M² in the Fisher metric

The covariance may widen by less than that (:func:`wait`): w is then larger in K₊, and the same in m₊.

No Fisher matrix is formed and no matrix is inverted. Float32 suffices, because rounding errors do not grow with the
condition number of KKᵀ. All functions accept leading batch axes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve


class GaussianTangent(NamedTuple):
    """A natural gradient at N(m, KKᵀ): the slope g, ``(..., d)``, and eigenvalues and eigenvectors of M, whitened.

    :ivar values: λ, ``(..., r)``; the other d − r are zero.
    :ivar vectors: Q, orthonormal, ``(..., d, r)``; ``None`` where M is diagonal (r = d).
    :ivar widening: the fraction of each negative λ by which the covariance widens, between 0 and 1, ``(..., r)``.
    """

    slope: jax.Array
    values: jax.Array
    vectors: jax.Array | None
    widening: jax.Array | float = 1.0


class StepKL(NamedTuple):
    """How far a step goes, nats; scalars, or one number for each block.

    :ivar forward: KL(q ‖ q₊), increasing in ρ, exact where it has a closed form.
    :ivar reverse: KL(q₊ ‖ q).
    :ivar predicted: the least reduction of the loss by the step, if the model is conjugate.
    """

    forward: jax.Array
    reverse: jax.Array
    predicted: jax.Array


def tangent(slope: jax.Array, curvature: jax.Array) -> GaussianTangent:
    """Diagonalize a dense symmetric M, shape ``(..., d, d)``."""
    values, vectors = jnp.linalg.eigh(curvature)
    return GaussianTangent(slope, values, vectors)


def sketched_tangent(slope: jax.Array, probes: jax.Array, image: jax.Array) -> GaussianTangent:
    """Approximate M from its products with k probes: M̂ = YVᵀ + VYᵀ − V(VᵀY)Vᵀ for orthonormal V and Y = MV.

    M̂ agrees with M on the span of V, is zero where M is, and has rank at most 2k. Its eigenvalues cost O(d k²).
    ``probes`` are V and ``image`` is Y, both ``(d, k)``.
    """
    basis, _ = jnp.linalg.qr(jnp.concatenate([probes, image], axis=1))
    v, y = basis.T @ probes, basis.T @ image
    inner = (probes.T @ image + image.T @ probes) / 2
    small = y @ v.T + v @ y.T - v @ inner @ v.T
    values, vectors = jnp.linalg.eigh(small)
    return GaussianTangent(slope, values, basis @ vectors)


def squared_norm(t: GaussianTangent) -> jax.Array:
    """Squared Fisher norm in nats, summed over the batch: twice the KL of a step of size 1, to second order."""
    return jnp.sum(t.slope**2) + 0.5 * jnp.sum(t.values**2)


def positive_ratio(x: jax.Array, margin: float) -> jax.Array:
    """Return 1 + x where it is at least ``margin``, and margin² / (2 margin − 1 − x) below.

    Both have the value ``margin`` and the slope 1 where they meet: the function is positive, increasing and
    continuously differentiable. A precision that a step multiplies by it stays positive definite, even if the log
    density is not concave or its curvature is noisy. The step is exact if no variance grows by more than 1/``margin``.
    """
    return jnp.where(x >= margin - 1, 1 + x, margin**2 / jnp.maximum(2 * margin - 1 - x, margin))


def wait(t: GaussianTangent, rho: jax.Array, limit: jax.Array | float, margin: float) -> GaussianTangent:
    """Let the covariance widen in each direction only as far as the mean has arrived there.

    A negative λ is multiplied by min(1, limit/δ²), where δ² = ρ²(Qᵀg)²/w is the squared step of the mean along its
    eigenvector, in standard deviations of the new guide. The mean takes the whole step, and narrowing never waits.
    A covariance that follows the local curvature at once is as wide as the prior before the mean has moved, and sees an
    average over everything: of a mixture far from its mode this average is a basin of its own.

    :param rho: the step size before the KL limit.
    :param limit: squared step of the mean up to which the covariance widens freely.
    """
    square = rho**2 * _coefficients(t) ** 2 / positive_ratio(rho * t.values, margin)
    return t._replace(widening=jnp.minimum(1.0, limit / jnp.maximum(square, jnp.finfo(square.dtype).tiny)))


def kl(t: GaussianTangent, rho: jax.Array, margin: float) -> StepKL:
    """How far a step goes, exactly, summed over the batch; the prediction is KL(q ‖ q₊)/ρ where nothing waits."""
    w, precision, a = _ratios(t, rho, margin)
    logs, square = jnp.log(precision), (rho * a) ** 2 / w
    each = [
        precision - 1 - logs + square * (precision / w),
        1 / precision - 1 + logs + square / w,
        precision - 1 - logs + square,
    ]
    outside = rho**2 * _squared_residual(t, a)
    forward, reverse, predicted = (0.5 * (jnp.sum(x) + outside) for x in each)
    return StepKL(forward, reverse, predicted / jnp.maximum(rho, jnp.finfo(w.dtype).tiny))


def mean_shift(t: GaussianTangent, rho: jax.Array, margin: float) -> jax.Array:
    """K⁻¹(m₊ − m), shape ``(..., d)``."""
    w, _, a = _ratios(t, rho, margin)
    if t.vectors is None:
        return -rho * a / w
    return -rho * (t.slope + _expand(t.vectors, a * (1 / w - 1)))


def relative_factor(t: GaussianTangent, rho: jax.Array, margin: float) -> jax.Array:
    """K⁻¹K₊: lower triangular ``(..., d, d)``, or its diagonal ``(..., d)`` where M is diagonal.

    It is the lower triangular root of B⁻¹ for B = I + Q (w − 1) Qᵀ, by a QR factorization of the symmetric root. A
    Cholesky factorization would square the condition number of that root.
    """
    root = 1 / jnp.sqrt(_ratios(t, rho, margin)[1])
    if t.vectors is None:
        return root
    eye = jnp.eye(t.slope.shape[-1], dtype=root.dtype)
    return lower_factor(eye + (t.vectors * (root - 1)[..., None, :]) @ _transpose(t.vectors))


def precision_change(t: GaussianTangent, rho: jax.Array, margin: float) -> jax.Array:
    """Kᵀ(S₊ − S)K = Q (w − 1) Qᵀ, ``(..., d, d)``: the change of the whitened precision."""
    assert t.vectors is not None
    return (t.vectors * (_ratios(t, rho, margin)[1] - 1)[..., None, :]) @ _transpose(t.vectors)


def _ratios(t: GaussianTangent, rho: jax.Array, margin: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """w, by which the mean's step is divided; by what the precision is multiplied; and Qᵀg."""
    waiting = jnp.where(t.values < 0, t.widening * t.values, t.values)
    return positive_ratio(rho * t.values, margin), positive_ratio(rho * waiting, margin), _coefficients(t)


def _coefficients(t: GaussianTangent) -> jax.Array:
    """Qᵀg."""
    return t.slope if t.vectors is None else jnp.einsum("...dr,...d->...r", t.vectors, t.slope)


def _squared_residual(t: GaussianTangent, coefficients: jax.Array) -> jax.Array | float:
    """The squared length of the slope's part orthogonal to Q, where w = 1; exactly zero if Q is square."""
    if t.vectors is None or t.vectors.shape[-1] == t.slope.shape[-1]:
        return 0.0
    return jnp.sum((t.slope - _expand(t.vectors, coefficients)) ** 2)


def _expand(vectors: jax.Array, coefficients: jax.Array) -> jax.Array:
    return jnp.einsum("...dr,...r->...d", vectors, coefficients)


# ---- linear algebra --------------------------------------------------------------------------------------------------


def lower_factor(square_root: jax.Array) -> jax.Array:
    """L lower triangular with positive diagonal and L Lᵀ = A Aᵀ, from any A of shape ``(..., d, n)``."""
    upper = jnp.linalg.qr(_transpose(square_root), mode="r")
    signs = jnp.where(diagonal(upper) < 0, -1, 1).astype(upper.dtype)
    return _transpose(upper * signs[..., None])


def diagonal(x: jax.Array) -> jax.Array:
    """The diagonals of square matrices, as a slice: ``jnp.diagonal`` gathers, which is a kernel of its own."""
    d = x.shape[-1]
    return x.reshape(*x.shape[:-2], d * d)[..., :: d + 1]


def inverse_lower(lower: jax.Array) -> jax.Array:
    eye = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
    return lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)


def scaled_cholesky_solve(
    matrix: jax.Array, rhs: jax.Array, *, damping: jax.Array | float, scale: jax.Array | None = None
) -> jax.Array:
    """Solve (A + damping · D) x = b with D = diag(scale), by a Cholesky factor of D^(−½) A D^(−½) + damping · I.

    The parameters may differ by orders of magnitude: with ``scale`` = diag A, the default, the factorized matrix has a
    unit diagonal, which minimizes its condition number up to a factor n (van der Sluis 1969).

    :param matrix: A, symmetric positive semi-definite, ``(..., n, n)``. Only its lower triangle is read.
    :param rhs: b, ``(..., n)``.
    :param damping: relative to ``scale``: one number, or one for each parameter, ``(..., n)``.
    :param scale: positive, ``(..., n)``. In its default, zeros of diag A are replaced by the smallest normal number.
    """
    if scale is None:
        scale = jnp.maximum(diagonal(matrix), jnp.finfo(rhs.dtype).tiny)
    root = jnp.sqrt(scale)
    scaled = matrix / (root[..., :, None] * root[..., None, :])
    eye = jnp.eye(root.shape[-1], dtype=root.dtype)
    factor = cho_factor(scaled + jnp.asarray(damping, root.dtype)[..., None] * eye, lower=True)
    return cho_solve(factor, (rhs / root)[..., None])[..., 0] / root


def _transpose(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)
