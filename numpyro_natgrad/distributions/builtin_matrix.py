# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""NumPyro's distributions of directions, matrices and vectors, for :mod:`.distributions.exponential_family`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import i0e, multigammaln
from numpyro import distributions as dist

from numpyro_natgrad.distributions.builtin import stack, trigamma_excess
from numpyro_natgrad.distributions.exponential_family import (
    Arguments,
    positive_step,
    register_exponential_family,
    register_fisher,
)
from numpyro_natgrad.distributions.gaussian import inverse_lower, lower_factor, positive_ratio

#: From here on log I₀ is a series of six terms. Relative errors of A″, which is what cancels first (against mpmath):
#: in float64 8e-13 by truncation at κ = 200, and 2e-11 by cancellation in I₁/I₀ just below; in float32 2e-7, the
#: precision, at κ = 30, and 5e-4 just below.
_BESSEL_SERIES_FROM = {"float32": 30.0, "float64": 200.0}
#: The coefficients ((2k−1)!!)² / k! of (8κ)^−k for k = 5, …, 1. The first omitted one is 150078.
_HANKEL = (7441.875, 459.375, 37.5, 4.5, 1.0)
#: Eigenvalues of a new rate matrix, in units of the old one, are at least this many roundings of the largest. Cholesky
#: factorizations succeed with more than d(d+1)/2 roundings (Higham 2002, theorem 10.7): 100 suffice up to d = 13.
_CONDITION_ROUNDINGS = 1e2
#: Degrees of freedom exceed d − 1 by at least this many roundings, because NumPyro's bijection takes the logarithm of
#: the difference.
_BOUND_ROUNDINGS = 4


def _concentration(eta: jax.Array) -> jax.Array:
    """κ = |η|, differentiable at zero."""
    return jnp.sqrt(jnp.sum(eta**2, axis=-1) + jnp.finfo(eta.dtype).tiny)


def _log_bessel(kappa: jax.Array) -> jax.Array:
    """A(κ) = log I₀(κ), whose second derivative, about 1/(2κ²), cancels in I₁/I₀ where κ is large.

    There it is Hankel's series I₀ = e^κ (2πκ)^(−½) Σ ((2k−1)!!)² / (k! (8κ)^k) (Abramowitz & Stegun, 9.7.1).
    """
    large = kappa > _BESSEL_SERIES_FROM["float64" if kappa.dtype == jnp.float64 else "float32"]
    # Under `jnp.where` each branch needs an argument without an overflow where the other one is used.
    far, near = jnp.where(large, kappa, 100.0), jnp.where(large, 1.0, kappa)
    series = jnp.polyval(jnp.asarray([*_HANKEL, 0.0], kappa.dtype), 1 / (8 * far))
    return kappa + jnp.where(large, jnp.log1p(series) - 0.5 * jnp.log(2 * jnp.pi * far), jnp.log(i0e(near)))


def _solve_von_mises(eta: jax.Array, gradient: jax.Array) -> jax.Array:
    # ∇²A(|η|) = A″ rrᵀ + A′/κ (I − rrᵀ) with r = η/κ has the condition number 2κ: each part is inverted by itself.
    kappa = _concentration(eta)
    slope_of = lambda k: jax.jvp(_log_bessel, (k,), (jnp.ones_like(k),))[1]
    slope, curvature = (x[..., None] for x in jax.jvp(slope_of, (kappa,), (jnp.ones_like(kappa),)))
    r = eta / kappa[..., None]
    along = jnp.sum(gradient * r, axis=-1, keepdims=True) * r
    return along / curvature + (gradient - along) * kappa[..., None] / slope


register_exponential_family(
    dist.VonMises,  # η = κ (cos, sin) of the location, T = (cos z, sin z)
    natural=lambda loc, concentration: stack(concentration * jnp.cos(loc), concentration * jnp.sin(loc)),
    log_normalizer=lambda eta: _log_bessel(_concentration(eta)),
    solve=_solve_von_mises,
    arguments=lambda eta: {"loc": jnp.arctan2(eta[..., 1], eta[..., 0]), "concentration": _concentration(eta)},
)


def _vech(concentration: jax.Array, matrix: jax.Array) -> jax.Array:
    """η from the degrees of freedom and the lower triangle of a symmetric matrix."""
    d = matrix.shape[-1]
    lower = matrix[..., *np.tril_indices(d)]
    return jnp.concatenate([jnp.broadcast_to(jnp.asarray(concentration), lower.shape[:-1])[..., None], lower], axis=-1)


def _matrix(eta: jax.Array) -> jax.Array:
    """The symmetric matrix whose lower triangle is η[1:]."""
    d = (math.isqrt(8 * eta.shape[-1] - 7) - 1) // 2
    lower = jnp.zeros((*eta.shape[:-1], d, d), eta.dtype).at[..., *np.tril_indices(d)].set(eta[..., 1:])
    return lower + _transposed(jnp.tril(lower, -1))


def _wishart_normalizer(eta: jax.Array) -> jax.Array:
    # η = (n, R), T = (½ log|Z|, −½ Z, off-diagonals twice): A = log Γ_d(n/2) + ½ n d log 2 − ½ n log|R|
    n, rate = eta[..., 0], _matrix(eta)
    d = rate.shape[-1]
    logdet = 2 * jnp.sum(jnp.log(jnp.diagonal(jnp.linalg.cholesky(rate), axis1=-2, axis2=-1)), axis=-1)
    return multigammaln(n / 2, d) + 0.5 * n * (d * math.log(2.0) - logdet)


def _wishart_solve(eta: jax.Array, gradient: jax.Array) -> jax.Array:
    # F(ẋ, X) = (g, G) for changes ẋ of n and X of R reads ½n R⁻¹XR⁻¹ − ½ẋR⁻¹ = G and ¼ψ′_d(n/2) ẋ − ½ tr R⁻¹X = g, with
    # ψ′_d(a) = Σ_j ψ₁(a − j/2). The Schur complement of X, ¼ (ψ′_d(n/2) − 2d/n), has terms that do not
    # cancel. The gradient of a triangle contains G's off-diagonal entries twice.
    n, rate, g = eta[..., 0], _matrix(eta), _matrix(gradient)
    g = (g + g * jnp.eye(g.shape[-1], dtype=g.dtype)) / 2
    half, lag = n[..., None] / 2, jnp.arange(g.shape[-1]) / 2
    complement = 0.25 * jnp.sum((trigamma_excess(half - lag) + lag / half) / (half - lag), axis=-1)
    first = (gradient[..., 0] + jnp.sum(g * rate, axis=(-2, -1)) / n) / complement
    change = 2 * rate @ g @ rate + first[..., None, None] * rate
    return _vech(first, change / n[..., None, None])


def _wishart_move(eta: jax.Array, change: jax.Array, margin: float) -> jax.Array:
    # R₊ = L Q w Qᵀ Lᵀ with R = LLᵀ and L⁻¹ΔL⁻ᵀ = Q (w − 1) Qᵀ is positive definite if the eigenvalue ratios w are.
    factor = jnp.linalg.cholesky(_matrix(eta))
    inverse = inverse_lower(factor)
    whitened = inverse @ _matrix(change) @ _transposed(inverse)
    values, vectors = jnp.linalg.eigh(whitened)
    stretch = positive_ratio(values, margin)
    floor = _CONDITION_ROUNDINGS * jnp.finfo(eta.dtype).eps * jnp.max(stretch, axis=-1, keepdims=True)
    stretch = jnp.maximum(stretch, floor)
    root = lower_factor(factor @ vectors * jnp.sqrt(stretch)[..., None, :])
    least = factor.shape[-1] - 1.0
    distance = eta[..., 0] - least
    above = least * (1 + _BOUND_ROUNDINGS * float(jnp.finfo(eta.dtype).eps))
    concentration = jnp.maximum(least + positive_step(distance, change[..., 0], margin), above)
    return _vech(concentration, root @ _transposed(root))


def _inverse(matrix: jax.Array) -> jax.Array:
    factor = inverse_lower(jnp.linalg.cholesky(matrix))
    return _transposed(factor) @ factor


def _rate_matrix(**forms: jax.Array) -> jax.Array:
    """The rate matrix from the one of ``rate_matrix``, ``scale_matrix`` and ``scale_tril`` that is given."""
    return forms["rate_matrix"] if "rate_matrix" in forms else _inverse(_scale_matrix(**forms))


def _scale_matrix(**forms: jax.Array) -> jax.Array:
    """The scale matrix from the same three."""
    if "scale_matrix" in forms:
        return forms["scale_matrix"]
    if "rate_matrix" in forms:
        return _inverse(forms["rate_matrix"])
    return forms["scale_tril"] @ _transposed(forms["scale_tril"])


register_exponential_family(
    dist.WishartCholesky,
    natural=lambda concentration, **forms: _vech(concentration, _rate_matrix(**forms)),
    log_normalizer=_wishart_normalizer,
    arguments=lambda eta: {"concentration": eta[..., 0], "rate_matrix": _matrix(eta)},
    solve=_wishart_solve,
    move=_wishart_move,
)
register_exponential_family(
    dist.InverseWishartCholesky,  # Z⁻¹ is Wishart, with this scale as its rate
    natural=lambda concentration, **forms: _vech(concentration, _scale_matrix(**forms)),
    log_normalizer=_wishart_normalizer,
    arguments=lambda eta: {"concentration": eta[..., 0], "scale_matrix": _matrix(eta)},
    solve=_wishart_solve,
    move=_wishart_move,
)


def _matrix_normal(at: Arguments, d: Arguments) -> jax.Array:
    # The covariance V ⊗ U has the whitened change I ⊗ X + Y ⊗ I, with ½ ‖·‖² = ½ (p ‖X‖² + n ‖Y‖²) + tr X tr Y.
    rows, columns = (inverse_lower(at[f"scale_tril_{side}"]) for side in ("row", "column"))
    x, y = (_symmetric(inverse @ d[f"scale_tril_{side}"]) for inverse, side in ((rows, "row"), (columns, "column")))
    shift = rows @ d["loc"] @ _transposed(columns)
    n, p = x.shape[-1], y.shape[-1]
    return _norm2(shift) + 0.5 * (p * _norm2(x) + n * _norm2(y)) + _trace(x) * _trace(y)


def _student_matrix(at: Arguments, d: Arguments) -> jax.Array:
    inverse, df = inverse_lower(at["scale_tril"]), at["df"]
    n = inverse.shape[-1]
    x, shift = _symmetric(inverse @ d["scale_tril"]), jnp.einsum("...ij,...j->...i", inverse, d["loc"])
    share = (df + n) / (df + n + 2)
    return share * (jnp.sum(shift**2, -1) + 0.5 * _norm2(x)) - _trace(x) ** 2 / (2 * (df + n + 2))


def _low_rank_normal(at: Arguments, d: Arguments) -> jax.Array:
    r"""dmᵀS dm + ½ tr(S dΣ S dΣ) with dΣ = dV Vᵀ + V dVᵀ + diag(dψ), in units of ψ^½: A = V, a = dV, e = diag(dψ).

    With I + AᵀA = LLᵀ and B = AL⁻ᵀ the precision is S = I − BBᵀ, and the terms of the trace are

        tr(S X S X) = 2 tr G² + 2 tr(J aᵀSa),   G = AᵀSa, J = AᵀSA     for X = aAᵀ + Aaᵀ
        tr(S X S e) = 2 Σ_i e_i (Sa)_i·(SA)_i
        tr(S e S e) = Σ_i e_i² (1 − 2‖B_i‖²) + ‖BᵀeB‖²
    """
    scale = jnp.sqrt(at["cov_diag"])
    dm, e = d["loc"] / scale, d["cov_diag"] / at["cov_diag"]
    A, a = at["cov_factor"] / scale[..., None], d["cov_factor"] / scale[..., None]
    inner = _transposed(A) @ A
    lower = jnp.linalg.cholesky(inner + jnp.eye(inner.shape[-1], dtype=inner.dtype))
    B = _transposed(jax.lax.linalg.triangular_solve(lower, _transposed(A), left_side=True, lower=True))
    S = lambda x: x - B @ (_transposed(B) @ x)
    Sa, SA = S(a), S(A)
    G, J, BeB = _transposed(A) @ Sa, _transposed(A) @ SA, _transposed(B) @ (e[..., None] * B)
    along = 2 * _total(G * _transposed(G)) + 2 * _total(J * (_transposed(a) @ Sa))
    crossed = 4 * jnp.sum(e * jnp.sum(Sa * SA, -1), -1)
    own = jnp.sum(e**2 * (1 - 2 * jnp.sum(B**2, -1)), -1) + _total(BeB**2)
    return jnp.sum(dm * S(dm[..., None])[..., 0], -1) + 0.5 * (along + crossed + own)


def _symmetric(lower: jax.Array) -> jax.Array:
    return lower + _transposed(lower)


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _total(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=(-2, -1))


def _norm2(x: jax.Array) -> jax.Array:
    return _total(x**2)


def _trace(x: jax.Array) -> jax.Array:
    return jnp.trace(x, axis1=-2, axis2=-1)


register_fisher(dist.MatrixNormal, _matrix_normal)
register_fisher(dist.MultivariateStudentT, _student_matrix, fixed=("df",))
register_fisher(dist.LowRankMultivariateNormal, _low_rank_normal)
