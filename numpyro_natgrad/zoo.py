# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""NumPyro's distributions, stated to the registry of :mod:`.exponential`: one short paragraph each.

    Gamma   η = (α, β)   T = (log z, −z)   A = log Γ(α) − α log β

η is chosen so that a bounded argument is a bounded coordinate, and free ones are free: (α, β) instead of (α−1, −β).
Fisher blocks that are no ∇²A: location–scale families σ⁻²[[a, b], [b, c]] with the score s of the standard density,
a = E[s²], b = E[z s²], c = E[(1 + zs)²], in closed form.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp, softplus
from jax.scipy.special import betaln, gammaln, i0e, multigammaln, polygamma
from numpyro import distributions as dist
from numpyro.distributions import BernoulliLogits, BernoulliProbs, BinomialLogits, BinomialProbs

from .exponential import Arguments, Metric, register_exponential, register_fisher, shrunk
from .gaussian import inverse_lower, lower_factor, positive

_EULER = float(np.euler_gamma)


def _stack(*coordinates: Any) -> jax.Array:
    return jnp.stack(jnp.broadcast_arrays(*coordinates), axis=-1)


def _named(*names: str) -> Any:
    """η whose coordinates *are* the arguments of these names."""
    return lambda eta: {name: eta[..., i] for i, name in enumerate(names)}


# ---- Gamma and what is built on it -----------------------------------------------------------------------------------


def _excess(x: jax.Array) -> jax.Array:
    """x ψ₁(x) − 1 = 1/(2x) + 1/(6x²) − 1/(30x⁴) + …, without the cancellation of the difference at large x."""
    y = 1 / jnp.maximum(x, 8.0)
    series = y * (1 / 2 + y * (1 / 6 - y**2 * (1 / 30 - y**2 * (1 / 42 - y**2 / 30))))
    return jnp.where(x > 8.0, series, x * polygamma(1, x) - 1)


def _gamma_solve(eta: jax.Array, gradient: jax.Array) -> jax.Array:
    # F⁻¹ = [[α, β], [β, β²ψ₁]] / (αψ₁ − 1), written so that nothing cancels at large α.
    (alpha, beta), (g_alpha, g_beta) = (jnp.moveaxis(x, -1, 0) for x in (eta, gradient))
    first = (alpha * g_alpha + beta * g_beta) / _excess(alpha)
    return _stack(first, beta / alpha * (first + beta * g_beta))


register_exponential(
    dist.Gamma,
    natural=lambda concentration, rate: _stack(concentration, rate),
    log_normalizer=lambda eta: gammaln(eta[..., 0]) - eta[..., 0] * jnp.log(eta[..., 1]),
    arguments=_named("concentration", "rate"),
    lower=0.0,
    solve=_gamma_solve,
)
# InverseGamma is a transformed Gamma, LogNormal a transformed Normal: their Fisher is that of what they transform.
register_exponential(
    dist.Exponential,
    natural=lambda rate: _stack(rate),
    log_normalizer=lambda eta: -jnp.log(eta[..., 0]),
    arguments=_named("rate"),
    lower=0.0,
)
register_exponential(
    dist.Chi2,  # T = log(z/2)/2
    natural=lambda df: _stack(df),
    log_normalizer=lambda eta: gammaln(eta[..., 0] / 2),
    arguments=_named("df"),
    lower=0.0,
)


def _dirichlet_solve(eta: jax.Array, gradient: jax.Array) -> jax.Array:
    # F = D − ψ₁(s) 11ᵀ with D = diag ψ₁(c), by Sherman & Morrison. With h(c) = c − 1/ψ₁(c) = excess(c)/ψ₁(c) and s the
    # sum of c, the denominator 1 − ψ₁(s) Σ 1/ψ₁(c) is ((1 + excess(s)) Σh − s excess(s)) / s, of which nothing cancels.
    total, curvature = jnp.sum(eta, axis=-1, keepdims=True), polygamma(1, eta)
    excess = _excess(total)
    h = jnp.sum(_excess(eta) / curvature, axis=-1, keepdims=True)
    along = jnp.sum(gradient / curvature, axis=-1, keepdims=True)
    share = (1 + excess) * along / ((1 + excess) * h - total * excess)
    return (gradient + share) / curvature


register_exponential(
    dist.Dirichlet,
    natural=lambda concentration: concentration,
    log_normalizer=lambda eta: jnp.sum(gammaln(eta), -1) - gammaln(jnp.sum(eta, -1)),
    arguments=lambda eta: {"concentration": eta},
    lower=0.0,
    solve=_dirichlet_solve,
)
register_exponential(
    dist.Beta,
    natural=lambda concentration1, concentration0: _stack(concentration1, concentration0),
    log_normalizer=lambda eta: betaln(eta[..., 0], eta[..., 1]),
    arguments=_named("concentration1", "concentration0"),
    lower=0.0,
    solve=_dirichlet_solve,
)
register_exponential(
    dist.Kumaraswamy,  # T = log(1 − zᵃ) at fixed a
    natural=lambda concentration0: _stack(concentration0),
    log_normalizer=lambda eta, concentration1: -jnp.log(eta[..., 0]),
    arguments=_named("concentration0"),
    lower=0.0,
    fixed=("concentration1",),
)


# ---- scales and tails with one natural parameter ---------------------------------------------------------------------

register_exponential(
    dist.HalfNormal,  # η = σ⁻², T = −z²/2
    natural=lambda scale: _stack(scale**-2),
    log_normalizer=lambda eta: -0.5 * jnp.log(eta[..., 0]),
    arguments=lambda eta: {"scale": eta[..., 0] ** -0.5},
    lower=0.0,
)
register_exponential(
    dist.Pareto,  # T = −log z; the scale bounds the support and has no Fisher
    natural=lambda alpha: _stack(alpha),
    log_normalizer=lambda eta, scale: -jnp.log(eta[..., 0]) - eta[..., 0] * jnp.log(scale),
    arguments=_named("alpha"),
    lower=0.0,
    fixed=("scale",),
)


# ---- discrete distributions ------------------------------------------------------------------------------------------


def _log(probability: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(probability, jnp.finfo(jnp.result_type(probability, float)).tiny))


def _tellable(eta: jax.Array, outcomes: int = 2) -> tuple[float, float]:
    """The least log-odds, and the greatest, that come back through NumPyro's bijections with a gradient.

    A small probability only has to be no zero, with room for a product of two. One that is nearly certain is known by
    what is left of the stick, 1 − Σp, which as many roundings as there are outcomes blur.
    """
    info = jnp.finfo(eta.dtype)
    return 0.45 * math.log(float(info.tiny)), -math.log(4 * outcomes * float(info.eps))


def _odds_move(eta: jax.Array, change: jax.Array, margin: float) -> jax.Array:
    return jnp.clip(eta + change, *_tellable(eta, eta.shape[-1] + 1))


def _success_move(eta: jax.Array, change: jax.Array, margin: float) -> jax.Array:
    # η = −log p
    rare, likely = _tellable(eta)
    return jnp.clip(shrunk(eta, change, margin), math.exp(-likely), -rare)


def _failure_move(eta: jax.Array, change: jax.Array, margin: float) -> jax.Array:
    # η = −log(1 − p)
    rare, likely = _tellable(eta)
    return jnp.clip(shrunk(eta, change, margin), math.exp(rare), likely)


def _exp(x: jax.Array) -> jax.Array:
    """e^x, positive and finite whatever x."""
    limit = 0.9 * math.log(float(jnp.finfo(x.dtype).max))
    return jnp.exp(jnp.clip(x, -limit, limit))


def _logit(probs: jax.Array) -> jax.Array:
    return _log(probs) - _log(1 - probs)


def _log_complement(eta: jax.Array) -> jax.Array:
    """log(1 − e^−η) for η > 0."""
    return jnp.log(-jnp.expm1(-eta))


def _binary(cls: type, to_logits: Any, back: Any, trials: tuple[str, ...] = (), move: Any = None) -> None:
    def log_normalizer(eta: jax.Array, total_count: Any = 1.0) -> jax.Array:
        # log(1 + e^η), from the side where neither it nor its derivatives round to those of η.
        x = eta[..., 0]
        return total_count * jnp.where(x > 0, x + softplus(-x), softplus(x))

    register_exponential(cls, natural=to_logits, log_normalizer=log_normalizer, arguments=back, fixed=trials, move=move)


for _cls, _trials in ((BernoulliLogits, ()), (BinomialLogits, ("total_count",))):
    _binary(_cls, lambda logits: _stack(logits), _named("logits"), _trials)
for _cls, _trials in ((BernoulliProbs, ()), (BinomialProbs, ("total_count",))):
    _binary(
        _cls,
        lambda probs: _stack(_logit(probs)),
        lambda eta: {"probs": jax.nn.sigmoid(eta[..., 0])},
        _trials,
        _odds_move,
    )


def _softmax_solve(eta: jax.Array, gradient: jax.Array) -> jax.Array:
    # F = diag p − ppᵀ knows no common shift of the logits, and g is orthogonal to it: F(g/p + c) = g for any c.
    v = gradient / jnp.maximum(jax.nn.softmax(eta), jnp.finfo(eta.dtype).tiny)
    return v - jnp.mean(v, axis=-1, keepdims=True)


def _simplex_solve(eta: jax.Array, gradient: jax.Array) -> jax.Array:
    # With the last probability as the reference, F⁻¹ = diag(1/p) + 11ᵀ/p_K.
    p = jnp.maximum(_probabilities(eta), jnp.finfo(eta.dtype).tiny)
    return gradient / p[..., :-1] + jnp.sum(gradient, axis=-1, keepdims=True) / p[..., -1:]


def _probabilities(eta: jax.Array) -> jax.Array:
    return jax.nn.softmax(_with_reference(eta))


def _with_reference(eta: jax.Array) -> jax.Array:
    return jnp.concatenate([eta, jnp.zeros_like(eta[..., :1])], axis=-1)


register_exponential(
    dist.CategoricalLogits,
    natural=lambda logits: logits,
    log_normalizer=lambda eta: logsumexp(eta, axis=-1),
    arguments=lambda eta: {"logits": eta},
    solve=_softmax_solve,
)
register_exponential(
    dist.CategoricalProbs,
    natural=lambda probs: _log(probs[..., :-1]) - _log(probs[..., -1:]),
    log_normalizer=lambda eta: logsumexp(_with_reference(eta), axis=-1),
    arguments=lambda eta: {"probs": _probabilities(eta)},
    solve=_simplex_solve,
    move=_odds_move,
)
register_exponential(
    dist.MultinomialLogits,
    natural=lambda logits: logits,
    log_normalizer=lambda eta, total_count: total_count * logsumexp(eta, axis=-1),
    arguments=lambda eta: {"logits": eta},
    fixed=("total_count",),
)
register_exponential(
    dist.MultinomialProbs,
    natural=lambda probs: _log(probs[..., :-1]) - _log(probs[..., -1:]),
    log_normalizer=lambda eta, total_count: total_count * logsumexp(_with_reference(eta), axis=-1),
    arguments=lambda eta: {"probs": _probabilities(eta)},
    fixed=("total_count",),
    move=_odds_move,
)
register_exponential(
    dist.Poisson,
    natural=lambda rate: _stack(_log(rate)),
    log_normalizer=lambda eta: jnp.exp(eta[..., 0]),
    arguments=lambda eta: {"rate": _exp(eta[..., 0])},
)
register_exponential(
    dist.GeometricProbs,  # p(1−p)^z: η = −log(1−p), T = −z
    natural=lambda probs: _stack(-jnp.log1p(-probs)),
    log_normalizer=lambda eta: -_log_complement(eta[..., 0]),
    arguments=lambda eta: {"probs": -jnp.expm1(-eta[..., 0])},
    lower=0.0,
    move=_failure_move,
)
register_exponential(
    dist.GeometricLogits,
    natural=lambda logits: _stack(softplus(logits)),
    log_normalizer=lambda eta: -_log_complement(eta[..., 0]),
    arguments=lambda eta: {"logits": eta[..., 0] + _log_complement(eta[..., 0])},
    lower=0.0,
)


def _negative_binomial(cls: type, name: str, to_eta: Any, back: Any, move: Any = None) -> None:
    """p^z (1−p)^r at fixed r: η = −log p, T = −z."""
    register_exponential(
        cls,
        natural=lambda **given: _stack(to_eta(given[name])),
        log_normalizer=lambda eta, total_count: -total_count * _log_complement(eta[..., 0]),
        arguments=lambda eta: {name: back(eta[..., 0])},
        lower=0.0,
        fixed=("total_count",),
        move=move,
    )


_negative_binomial(dist.NegativeBinomialProbs, "probs", lambda p: -_log(p), lambda eta: jnp.exp(-eta), _success_move)
_negative_binomial(
    dist.NegativeBinomialLogits,
    "logits",
    lambda logits: softplus(-logits),
    lambda eta: -eta - _log_complement(eta),
)
register_fisher(  # the mean is orthogonal to the concentration
    dist.NegativeBinomial2,
    lambda at, d: d["mean"] ** 2 / (at["mean"] * (1 + at["mean"] / at["concentration"])),
    fixed=("concentration",),
)


def _zero_inflated_poisson(at: Arguments, d: Arguments) -> jax.Array:
    # Zeros come with probability p₀ = g + (1−g)e^−λ. The others know of g by 1−g alone, and of λ by the Poisson's
    # Fisher without its zeros: ∑_{z>0} f s² = 1/λ − e^−λ, ∑_{z>0} f s = e^−λ, for the score s = z/λ − 1.
    gate, rate = at["gate"], at["rate"]
    none = jnp.exp(-rate)
    zero = gate + (1 - gate) * none
    change = (1 - none) * d["gate"] - (1 - gate) * none * d["rate"]
    others = (1 - none) / (1 - gate) * d["gate"] ** 2 - 2 * none * d["gate"] * d["rate"]
    return change**2 / zero + others + (1 - gate) * (1 / rate - none) * d["rate"] ** 2


register_fisher(dist.ZeroInflatedPoisson, _zero_inflated_poisson)


# ---- directions and matrices -----------------------------------------------------------------------------------------


def _length(eta: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(eta**2, axis=-1) + jnp.finfo(eta.dtype).tiny)


def _log_bessel(kappa: jax.Array) -> jax.Array:
    """A(κ) = log I₀(κ), whose curvature of 1/(2κ²) is rounded away in I₁/I₀ where κ is large.

    There by Hankel's series, I₀ = e^κ (2πκ)^(−½) Σ ((2k−1)!!)² / (k! (8κ)^k) (Abramowitz & Stegun, 9.7.1), six terms.
    """
    large = kappa > (200.0 if kappa.dtype == jnp.float64 else 30.0)
    far, near = jnp.where(large, kappa, 100.0), jnp.where(large, 1.0, kappa)
    series = jnp.polyval(jnp.asarray([7441.875, 459.375, 37.5, 4.5, 1.0, 0.0], kappa.dtype), 1 / (8 * far))
    return kappa + jnp.where(large, jnp.log1p(series) - 0.5 * jnp.log(2 * jnp.pi * far), jnp.log(i0e(near)))


def _solve_von_mises(eta: jax.Array, gradient: jax.Array) -> jax.Array:
    # ∇²A(|η|) = A″ rrᵀ + A′/κ (I − rrᵀ) along r = η/κ: as a matrix its condition is 2κ.
    kappa = _length(eta)
    slope_of = lambda k: jax.jvp(_log_bessel, (k,), (jnp.ones_like(k),))[1]
    slope, curvature = (x[..., None] for x in jax.jvp(slope_of, (kappa,), (jnp.ones_like(kappa),)))
    r = eta / kappa[..., None]
    along = jnp.sum(gradient * r, axis=-1, keepdims=True) * r
    return along / curvature + (gradient - along) * kappa[..., None] / slope


register_exponential(
    dist.VonMises,  # η = κ (cos, sin) of the location, T = (cos z, sin z)
    natural=lambda loc, concentration: _stack(concentration * jnp.cos(loc), concentration * jnp.sin(loc)),
    log_normalizer=lambda eta: _log_bessel(_length(eta)),
    solve=_solve_von_mises,
    arguments=lambda eta: {"loc": jnp.arctan2(eta[..., 1], eta[..., 0]), "concentration": _length(eta)},
)


def _vech(concentration: jax.Array, matrix: jax.Array) -> jax.Array:
    d = matrix.shape[-1]
    lower = matrix[..., *np.tril_indices(d)]
    return jnp.concatenate([jnp.broadcast_to(jnp.asarray(concentration), lower.shape[:-1])[..., None], lower], axis=-1)


def _matrix(eta: jax.Array) -> jax.Array:
    """The symmetric matrix behind the lower triangle in η[1:]."""
    d = (math.isqrt(8 * eta.shape[-1] - 7) - 1) // 2
    lower = jnp.zeros((*eta.shape[:-1], d, d), eta.dtype).at[..., *np.tril_indices(d)].set(eta[..., 1:])
    return lower + jnp.swapaxes(jnp.tril(lower, -1), -1, -2)


def _wishart_normalizer(eta: jax.Array) -> jax.Array:
    # η = (n, R), T = (½ log|Z|, −½ Z, off-diagonals twice): A = log Γ_d(n/2) + ½ n d log 2 − ½ n log|R|
    n, rate = eta[..., 0], _matrix(eta)
    d = rate.shape[-1]
    logdet = 2 * jnp.sum(jnp.log(jnp.diagonal(jnp.linalg.cholesky(rate), axis1=-2, axis2=-1)), axis=-1)
    return multigammaln(n / 2, d) + 0.5 * n * (d * math.log(2.0) - logdet)


def _wishart_solve(eta: jax.Array, gradient: jax.Array) -> jax.Array:
    # For changes ẋ of n and X of R: ½n R⁻¹XR⁻¹ − ½ẋR⁻¹ = G, ¼ψ′_d(n/2) ẋ − ½ tr R⁻¹X = g, ψ′_d(a) = Σ ψ₁(a − j/2).
    # Their Schur complement is ¼ (ψ′_d(n/2) − 2d/n), without the cancellation. (A triangle counts G's entries twice.)
    n, rate, g = eta[..., 0], _matrix(eta), _matrix(gradient)
    g = (g + g * jnp.eye(g.shape[-1], dtype=g.dtype)) / 2
    half, lag = n[..., None] / 2, jnp.arange(g.shape[-1]) / 2
    complement = 0.25 * jnp.sum((_excess(half - lag) + lag / half) / (half - lag), axis=-1)
    first = (gradient[..., 0] + jnp.sum(g * rate, axis=(-2, -1)) / n) / complement
    change = 2 * rate @ g @ rate + first[..., None, None] * rate
    return _vech(first, change / n[..., None, None])


def _wishart_move(eta: jax.Array, change: jax.Array, margin: float) -> jax.Array:
    # The rate moves in its own frame, R₊ = L Q w Qᵀ Lᵀ with R = LLᵀ and L⁻¹ΔL⁻ᵀ = Q (w − 1) Qᵀ: always positive.
    factor = jnp.linalg.cholesky(_matrix(eta))
    inverse = inverse_lower(factor)
    whitened = inverse @ _matrix(change) @ jnp.swapaxes(inverse, -1, -2)
    values, vectors = jnp.linalg.eigh(whitened)
    stretch = positive(values, margin)
    # A matrix whose condition number is beyond the precision is not one that has a Cholesky factor.
    stretch = jnp.maximum(stretch, 1e2 * jnp.finfo(eta.dtype).eps * jnp.max(stretch, axis=-1, keepdims=True))
    root = lower_factor(factor @ vectors * jnp.sqrt(stretch)[..., None, :])
    least = factor.shape[-1] - 1.0
    room = eta[..., 0] - least
    above = least * (1 + 4 * float(jnp.finfo(eta.dtype).eps))
    concentration = jnp.maximum(least + shrunk(room, change[..., 0], margin), above)
    return _vech(concentration, root @ jnp.swapaxes(root, -1, -2))


def _inverted(matrix: jax.Array) -> jax.Array:
    factor = inverse_lower(jnp.linalg.cholesky(matrix))
    return jnp.swapaxes(factor, -1, -2) @ factor


def _rate_of(rate_matrix: Any = None, scale_matrix: Any = None, scale_tril: Any = None) -> jax.Array:
    if rate_matrix is not None:
        return rate_matrix
    return _inverted(scale_matrix if scale_matrix is not None else scale_tril @ jnp.swapaxes(scale_tril, -1, -2))


def _scale_of(scale_matrix: Any = None, rate_matrix: Any = None, scale_tril: Any = None) -> jax.Array:
    if scale_matrix is not None:
        return scale_matrix
    return _inverted(rate_matrix) if rate_matrix is not None else scale_tril @ jnp.swapaxes(scale_tril, -1, -2)


register_exponential(
    dist.WishartCholesky,
    natural=lambda concentration, **forms: _vech(concentration, _rate_of(**forms)),
    log_normalizer=_wishart_normalizer,
    arguments=lambda eta: {"concentration": eta[..., 0], "rate_matrix": _matrix(eta)},
    solve=_wishart_solve,
    move=_wishart_move,
)
register_exponential(
    dist.InverseWishartCholesky,  # Z⁻¹ is Wishart, with this scale as its rate
    natural=lambda concentration, **forms: _vech(concentration, _scale_of(**forms)),
    log_normalizer=_wishart_normalizer,
    arguments=lambda eta: {"concentration": eta[..., 0], "scale_matrix": _matrix(eta)},
    solve=_wishart_solve,
    move=_wishart_move,
)


def _matrix_normal(at: Arguments, d: Arguments) -> jax.Array:
    # Covariance V ⊗ U, whitened change I ⊗ X + Y ⊗ I: ½ ‖·‖² = ½ (p ‖X‖² + n ‖Y‖²) + tr X tr Y
    rows, columns = (inverse_lower(at[f"scale_tril_{side}"]) for side in ("row", "column"))
    x, y = (_symmetric(inverse @ d[f"scale_tril_{side}"]) for inverse, side in ((rows, "row"), (columns, "column")))
    shift = rows @ d["loc"] @ jnp.swapaxes(columns, -1, -2)
    n, p = x.shape[-1], y.shape[-1]
    return _norm2(shift) + 0.5 * (p * _norm2(x) + n * _norm2(y)) + _trace(x) * _trace(y)


def _student_matrix(at: Arguments, d: Arguments) -> jax.Array:
    inverse, df = inverse_lower(at["scale_tril"]), at["df"]
    n = inverse.shape[-1]
    x, shift = _symmetric(inverse @ d["scale_tril"]), jnp.einsum("...ij,...j->...i", inverse, d["loc"])
    share = (df + n) / (df + n + 2)
    return share * (jnp.sum(shift**2, -1) + 0.5 * _norm2(x)) - _trace(x) ** 2 / (2 * (df + n + 2))


def _symmetric(lower: jax.Array) -> jax.Array:
    return lower + jnp.swapaxes(lower, -1, -2)


def _norm2(x: jax.Array) -> jax.Array:
    return jnp.sum(x**2, axis=(-2, -1))


def _trace(x: jax.Array) -> jax.Array:
    return jnp.trace(x, axis1=-2, axis2=-1)


register_fisher(dist.MatrixNormal, _matrix_normal)
register_fisher(dist.MultivariateStudentT, _student_matrix, fixed=("df",))


# ---- location and scale ----------------------------------------------------------------------------------------------


def _location_scale(a: float, b: float, c: float) -> Metric:
    def metric(at: Arguments, d: Arguments) -> jax.Array:
        shift, growth = d["loc"] / at["scale"], d["scale"] / at["scale"]
        return a * shift**2 + 2 * b * shift * growth + c * growth**2

    return metric


register_fisher(dist.Laplace, _location_scale(1, 0, 1))
register_fisher(dist.Cauchy, _location_scale(1 / 2, 0, 1 / 2))
register_fisher(dist.Logistic, _location_scale(1 / 3, 0, (3 + math.pi**2) / 9))
register_fisher(dist.SoftLaplace, _location_scale(1 / 2, 0, math.pi**2 / 8))
register_fisher(dist.Gumbel, _location_scale(1, _EULER - 1, math.pi**2 / 6 + (1 - _EULER) ** 2))
register_fisher(dist.HalfCauchy, lambda at, d: d["scale"] ** 2 / (2 * at["scale"] ** 2))


def _weibull(at: Arguments, d: Arguments) -> jax.Array:
    # log Z is a Gumbel of the minimum with location log λ and scale 1/k.
    k = at["concentration"]
    scale, shape = k * d["scale"] / at["scale"], d["concentration"] / k
    return scale**2 - 2 * (1 - _EULER) * scale * shape + (math.pi**2 / 6 + (1 - _EULER) ** 2) * shape**2


def _student(at: Arguments, d: Arguments) -> jax.Array:
    df, shift, growth = at["df"], d["loc"] / at["scale"], d["scale"] / at["scale"]
    gap = (polygamma(1, df / 2) - polygamma(1, (df + 1) / 2)) / 4
    tails = gap - (df + 5) / (2 * df * (df + 1) * (df + 3))
    place = ((df + 1) * shift**2 + 2 * df * growth**2) / (df + 3)
    return place - 4 * d["df"] * growth / ((df + 1) * (df + 3)) + tails * d["df"] ** 2


register_fisher(dist.Weibull, _weibull)
register_fisher(dist.StudentT, _student)
