# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""NumPyro's univariate, simplex and discrete distributions, for :mod:`.distributions.exponential_family`.

    Gamma   η = (α, β)   T = (log z, −z)   A = log Γ(α) − α log β

The coordinates of each η are unbounded or bounded from below by 0: (α, β) instead of (α−1, −β). Location–scale
families are no exponential families. With the score s = ∂ log f/∂z of the standard density f, their Fisher matrix is
σ⁻² [[a, b], [b, c]], a = E[s²], b = E[z s²], c = E[(1 + zs)²].
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp, softplus
from jax.scipy.special import betaln, gammaln, polygamma
from jax.typing import ArrayLike
from numpyro import distributions as dist
from numpyro.distributions import BernoulliLogits, BernoulliProbs, BinomialLogits, BinomialProbs

from numpyro_natgrad.distributions.exponential_family import (
    Arguments,
    Metric,
    positive_step,
    register_exponential_family,
    register_fisher,
)

Elementwise = Callable[[jax.Array], jax.Array]
Move = Callable[[jax.Array, jax.Array, float], jax.Array]

_EULER = float(np.euler_gamma)
#: From here on ``trigamma_excess`` is a series. Its first omitted term is 5/66 x⁻¹⁰, 1e-9 of the result at x = 8 and
#: less beyond (confirmed against mpmath); below, the plain difference loses a factor of 2x ≤ 16 in precision.
_TRIGAMMA_SERIES_FROM = 8.0
#: Probabilities are at least tiny^0.45 of the floating-point type: then the product of two is a normal number.
_TINY_POWER = 0.45
#: Probabilities are at most 1 minus this many roundings for each outcome: NumPyro's bijections recover 1 − Σp by a sum
#: over all outcomes, and every one of them contributes a rounding error.
_ODDS_ROUNDINGS = 4
#: A rate e^η is at most max^0.9 of the floating-point type, and at least its inverse: it can be multiplied by max^0.1
#: (7e3 in float32) without an overflow.
_RATE_POWER = 0.9


def stack(*coordinates: ArrayLike) -> jax.Array:
    """η, shape ``(*batch, k)``, from its coordinates."""
    return jnp.stack(jnp.broadcast_arrays(*coordinates), axis=-1)


def _by_name(*names: str) -> Callable[[jax.Array], Arguments]:
    """The map from η to arguments, where the coordinates of η are the arguments of these names."""
    return lambda eta: {name: eta[..., i] for i, name in enumerate(names)}


# ---- Gamma and what is built on it -----------------------------------------------------------------------------------


def trigamma_excess(x: jax.Array) -> jax.Array:
    """x ψ₁(x) − 1 = 1/(2x) + 1/(6x²) − 1/(30x⁴) + 1/(42x⁶) − 1/(30x⁸) + …, where the difference would cancel.

    The series is that of Abramowitz & Stegun, 6.4.12.
    """
    y = 1 / jnp.maximum(x, _TRIGAMMA_SERIES_FROM)
    series = y * (1 / 2 + y * (1 / 6 - y**2 * (1 / 30 - y**2 * (1 / 42 - y**2 / 30))))
    return jnp.where(x > _TRIGAMMA_SERIES_FROM, series, x * polygamma(1, x) - 1)


def _gamma_solve(eta: jax.Array, gradient: jax.Array) -> jax.Array:
    # F⁻¹ = [[α, β], [β, β²ψ₁(α)]] / (αψ₁(α) − 1), in terms that do not cancel at large α.
    (alpha, beta), (g_alpha, g_beta) = (jnp.moveaxis(x, -1, 0) for x in (eta, gradient))
    first = (alpha * g_alpha + beta * g_beta) / trigamma_excess(alpha)
    return stack(first, beta / alpha * (first + beta * g_beta))


register_exponential_family(
    dist.Gamma,
    natural=lambda concentration, rate: stack(concentration, rate),
    log_normalizer=lambda eta: gammaln(eta[..., 0]) - eta[..., 0] * jnp.log(eta[..., 1]),
    arguments=_by_name("concentration", "rate"),
    lower=0.0,
    solve=_gamma_solve,
)
# `InverseGamma` is a transformed Gamma and `LogNormal` a transformed Normal, with the Fisher matrix of their base.
register_exponential_family(
    dist.Exponential,
    natural=lambda rate: stack(rate),
    log_normalizer=lambda eta: -jnp.log(eta[..., 0]),
    arguments=_by_name("rate"),
    lower=0.0,
)
register_exponential_family(
    dist.Chi2,  # T = log(z/2)/2
    natural=lambda df: stack(df),
    log_normalizer=lambda eta: gammaln(eta[..., 0] / 2),
    arguments=_by_name("df"),
    lower=0.0,
)


def _dirichlet_solve(eta: jax.Array, gradient: jax.Array) -> jax.Array:
    # F = D − ψ₁(s) 11ᵀ with D = diag ψ₁(c) and s = Σc is inverted by the Sherman–Morrison formula. Its denominator
    # 1 − ψ₁(s) Σ 1/ψ₁(c) would cancel at large c. With e(x) = x ψ₁(x) − 1 (`trigamma_excess`) and
    # h(c) = c − 1/ψ₁(c) = e(c)/ψ₁(c) it equals ((1 + e(s)) Σh − s e(s)) / s, in which no digits are lost.
    total, curvature = jnp.sum(eta, axis=-1, keepdims=True), polygamma(1, eta)
    excess = trigamma_excess(total)
    h = jnp.sum(trigamma_excess(eta) / curvature, axis=-1, keepdims=True)
    along = jnp.sum(gradient / curvature, axis=-1, keepdims=True)
    shift = (1 + excess) * along / ((1 + excess) * h - total * excess)
    return (gradient + shift) / curvature


register_exponential_family(
    dist.Dirichlet,
    natural=lambda concentration: concentration,
    log_normalizer=lambda eta: jnp.sum(gammaln(eta), -1) - gammaln(jnp.sum(eta, -1)),
    arguments=lambda eta: {"concentration": eta},
    lower=0.0,
    solve=_dirichlet_solve,
)
register_exponential_family(
    dist.Beta,
    natural=lambda concentration1, concentration0: stack(concentration1, concentration0),
    log_normalizer=lambda eta: betaln(eta[..., 0], eta[..., 1]),
    arguments=_by_name("concentration1", "concentration0"),
    lower=0.0,
    solve=_dirichlet_solve,
)
register_exponential_family(
    dist.Kumaraswamy,  # T = log(1 − zᵃ) at fixed a
    natural=lambda concentration0: stack(concentration0),
    log_normalizer=lambda eta, concentration1: -jnp.log(eta[..., 0]),
    arguments=_by_name("concentration0"),
    lower=0.0,
    fixed=("concentration1",),
)


# ---- scales and tails with one natural parameter ---------------------------------------------------------------------

register_exponential_family(
    dist.HalfNormal,  # η = σ⁻², T = −z²/2
    natural=lambda scale: stack(scale**-2),
    log_normalizer=lambda eta: -0.5 * jnp.log(eta[..., 0]),
    arguments=lambda eta: {"scale": eta[..., 0] ** -0.5},
    lower=0.0,
)
register_exponential_family(
    dist.Pareto,  # T = −log z; the scale bounds the support and has no Fisher matrix
    natural=lambda alpha: stack(alpha),
    log_normalizer=lambda eta, scale: -jnp.log(eta[..., 0]) - eta[..., 0] * jnp.log(scale),
    arguments=_by_name("alpha"),
    lower=0.0,
    fixed=("scale",),
)


# ---- discrete distributions ------------------------------------------------------------------------------------------


def _log(probability: jax.Array) -> jax.Array:
    """The logarithm, finite at zero."""
    return jnp.log(jnp.maximum(probability, jnp.finfo(jnp.result_type(probability, float)).tiny))


def _log_odds_limits(eta: jax.Array, outcomes: int = 2) -> tuple[float, float]:
    """The least and the greatest log odds from which NumPyro's bijections return with a non-zero gradient."""
    info = jnp.finfo(eta.dtype)
    return _TINY_POWER * math.log(float(info.tiny)), -math.log(_ODDS_ROUNDINGS * outcomes * float(info.eps))


def _move_log_odds(eta: jax.Array, change: jax.Array, margin: float) -> jax.Array:
    return jnp.clip(eta + change, *_log_odds_limits(eta, eta.shape[-1] + 1))


def _move_success(eta: jax.Array, change: jax.Array, margin: float) -> jax.Array:
    """The move of η = −log p."""
    rare, likely = _log_odds_limits(eta)
    return jnp.clip(positive_step(eta, change, margin), math.exp(-likely), -rare)


def _move_failure(eta: jax.Array, change: jax.Array, margin: float) -> jax.Array:
    """The move of η = −log(1 − p)."""
    rare, likely = _log_odds_limits(eta)
    return jnp.clip(positive_step(eta, change, margin), math.exp(rare), likely)


def _exp(x: jax.Array) -> jax.Array:
    """e^x, positive and finite for every x."""
    limit = _RATE_POWER * math.log(float(jnp.finfo(x.dtype).max))
    return jnp.exp(jnp.clip(x, -limit, limit))


def _logit(probs: jax.Array) -> jax.Array:
    return _log(probs) - _log(1 - probs)


def _log_complement(eta: jax.Array) -> jax.Array:
    """log(1 − e^−η) for η > 0."""
    return jnp.log(-jnp.expm1(-eta))


def _register_binary(
    cls: type,
    natural: Callable[..., jax.Array],
    arguments: Callable[[jax.Array], Arguments],
    fixed: tuple[str, ...] = (),
    move: Move | None = None,
) -> None:
    """η = log(p / (1 − p)), T = z, A = n log(1 + e^η)."""

    def log_normalizer(eta: jax.Array, total_count: float | jax.Array = 1.0) -> jax.Array:
        # log(1 + e^η) in the form whose derivatives are not rounded to those of η, or to zero.
        x = eta[..., 0]
        return total_count * jnp.where(x > 0, x + softplus(-x), softplus(x))

    register_exponential_family(
        cls, natural=natural, log_normalizer=log_normalizer, arguments=arguments, fixed=fixed, move=move
    )


for _cls, _trials in ((BernoulliLogits, ()), (BinomialLogits, ("total_count",))):
    _register_binary(_cls, lambda logits: stack(logits), _by_name("logits"), _trials)
for _cls, _trials in ((BernoulliProbs, ()), (BinomialProbs, ("total_count",))):
    _register_binary(
        _cls,
        lambda probs: stack(_logit(probs)),
        lambda eta: {"probs": jax.nn.sigmoid(eta[..., 0])},
        _trials,
        _move_log_odds,
    )


def _softmax_solve(eta: jax.Array, gradient: jax.Array) -> jax.Array:
    # F = diag p − ppᵀ is singular along a common shift of the logits, to which g is orthogonal: F(g/p + c) = g.
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


register_exponential_family(
    dist.CategoricalLogits,
    natural=lambda logits: logits,
    log_normalizer=lambda eta: logsumexp(eta, axis=-1),
    arguments=lambda eta: {"logits": eta},
    solve=_softmax_solve,
)
register_exponential_family(
    dist.CategoricalProbs,
    natural=lambda probs: _log(probs[..., :-1]) - _log(probs[..., -1:]),
    log_normalizer=lambda eta: logsumexp(_with_reference(eta), axis=-1),
    arguments=lambda eta: {"probs": _probabilities(eta)},
    solve=_simplex_solve,
    move=_move_log_odds,
)
register_exponential_family(
    dist.MultinomialLogits,
    natural=lambda logits: logits,
    log_normalizer=lambda eta, total_count: total_count * logsumexp(eta, axis=-1),
    arguments=lambda eta: {"logits": eta},
    fixed=("total_count",),
)
register_exponential_family(
    dist.MultinomialProbs,
    natural=lambda probs: _log(probs[..., :-1]) - _log(probs[..., -1:]),
    log_normalizer=lambda eta, total_count: total_count * logsumexp(_with_reference(eta), axis=-1),
    arguments=lambda eta: {"probs": _probabilities(eta)},
    fixed=("total_count",),
    move=_move_log_odds,
)
register_exponential_family(
    dist.Poisson,
    natural=lambda rate: stack(_log(rate)),
    log_normalizer=lambda eta: jnp.exp(eta[..., 0]),
    arguments=lambda eta: {"rate": _exp(eta[..., 0])},
)
register_exponential_family(
    dist.GeometricProbs,  # p(1−p)^z: η = −log(1−p), T = −z
    natural=lambda probs: stack(-jnp.log1p(-probs)),
    log_normalizer=lambda eta: -_log_complement(eta[..., 0]),
    arguments=lambda eta: {"probs": -jnp.expm1(-eta[..., 0])},
    lower=0.0,
    move=_move_failure,
)
register_exponential_family(
    dist.GeometricLogits,
    natural=lambda logits: stack(softplus(logits)),
    log_normalizer=lambda eta: -_log_complement(eta[..., 0]),
    arguments=lambda eta: {"logits": eta[..., 0] + _log_complement(eta[..., 0])},
    lower=0.0,
)


def _register_negative_binomial(
    cls: type, name: str, to_eta: Elementwise, from_eta: Elementwise, move: Move | None = None
) -> None:
    """p^z (1−p)^r at fixed r: η = −log p, T = −z, A = −r log(1 − e^−η)."""
    register_exponential_family(
        cls,
        natural=lambda **arguments: stack(to_eta(arguments[name])),
        log_normalizer=lambda eta, total_count: -total_count * _log_complement(eta[..., 0]),
        arguments=lambda eta: {name: from_eta(eta[..., 0])},
        lower=0.0,
        fixed=("total_count",),
        move=move,
    )


_register_negative_binomial(
    dist.NegativeBinomialProbs, "probs", lambda p: -_log(p), lambda eta: jnp.exp(-eta), _move_success
)
_register_negative_binomial(
    dist.NegativeBinomialLogits,
    "logits",
    lambda logits: softplus(-logits),
    lambda eta: -eta - _log_complement(eta),
)
register_fisher(  # the Fisher matrix is diagonal in mean and concentration, and has no closed form in the latter
    dist.NegativeBinomial2,
    lambda at, d: d["mean"] ** 2 / (at["mean"] * (1 + at["mean"] / at["concentration"])),
    fixed=("concentration",),
)


def _zero_inflated_poisson(at: Arguments, d: Arguments) -> jax.Array:
    # A zero has probability p₀ = g + (1−g)e^−λ. A positive z has probability (1−g) f(z) with the Poisson density f and
    # its score s = z/λ − 1, for which Σ_{z>0} f s² = 1/λ − e^−λ and Σ_{z>0} f s = e^−λ.
    gate, rate = at["gate"], at["rate"]
    none = jnp.exp(-rate)
    zero = gate + (1 - gate) * none
    change = (1 - none) * d["gate"] - (1 - gate) * none * d["rate"]
    others = (1 - none) / (1 - gate) * d["gate"] ** 2 - 2 * none * d["gate"] * d["rate"]
    return change**2 / zero + others + (1 - gate) * (1 / rate - none) * d["rate"] ** 2


register_fisher(dist.ZeroInflatedPoisson, _zero_inflated_poisson)


# ---- location and scale ----------------------------------------------------------------------------------------------


def _location_scale(a: float, b: float, c: float) -> Metric:
    def metric(at: Arguments, d: Arguments) -> jax.Array:
        shift, stretch = d["loc"] / at["scale"], d["scale"] / at["scale"]
        return a * shift**2 + 2 * b * shift * stretch + c * stretch**2

    return metric


register_fisher(dist.Laplace, _location_scale(1, 0, 1))
register_fisher(dist.Cauchy, _location_scale(1 / 2, 0, 1 / 2))
register_fisher(dist.Logistic, _location_scale(1 / 3, 0, (3 + math.pi**2) / 9))
register_fisher(dist.SoftLaplace, _location_scale(1 / 2, 0, math.pi**2 / 8))
register_fisher(dist.Gumbel, _location_scale(1, _EULER - 1, math.pi**2 / 6 + (1 - _EULER) ** 2))
register_fisher(dist.HalfCauchy, lambda at, d: d["scale"] ** 2 / (2 * at["scale"] ** 2))


def _weibull(at: Arguments, d: Arguments) -> jax.Array:
    # log z has a Gumbel distribution of the minimum, with location log λ and scale 1/k.
    k = at["concentration"]
    scale, shape = k * d["scale"] / at["scale"], d["concentration"] / k
    return scale**2 - 2 * (1 - _EULER) * scale * shape + (math.pi**2 / 6 + (1 - _EULER) ** 2) * shape**2


def _student(at: Arguments, d: Arguments) -> jax.Array:
    # Lange, Little & Taylor (1989), appendix B.
    df, shift, stretch = at["df"], d["loc"] / at["scale"], d["scale"] / at["scale"]
    gap = (polygamma(1, df / 2) - polygamma(1, (df + 1) / 2)) / 4
    shape = gap - (df + 5) / (2 * df * (df + 1) * (df + 3))
    location_scale = ((df + 1) * shift**2 + 2 * df * stretch**2) / (df + 3)
    return location_scale - 4 * d["df"] * stretch / ((df + 1) * (df + 3)) + shape * d["df"] ** 2


register_fisher(dist.Weibull, _weibull)
register_fisher(dist.StudentT, _student)
