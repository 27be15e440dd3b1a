# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""NumPyro's distributions, stated to the registry of :mod:`.exponential_family`: one short paragraph each.

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
from jax.scipy.special import betaln, gammaln, polygamma
from numpyro import distributions as dist
from numpyro.distributions import BernoulliLogits, BernoulliProbs, BinomialLogits, BinomialProbs

from numpyro_natgrad.distributions.exponential_family import (
    Arguments,
    Metric,
    positive_step,
    register_exponential_family,
    register_fisher,
)

_EULER = float(np.euler_gamma)


def stack(*coordinates: Any) -> jax.Array:
    return jnp.stack(jnp.broadcast_arrays(*coordinates), axis=-1)


def _named(*names: str) -> Any:
    """η whose coordinates *are* the arguments of these names."""
    return lambda eta: {name: eta[..., i] for i, name in enumerate(names)}


# ---- Gamma and what is built on it -----------------------------------------------------------------------------------


def trigamma_excess(x: jax.Array) -> jax.Array:
    """x ψ₁(x) − 1 = 1/(2x) + 1/(6x²) − 1/(30x⁴) + …, without the cancellation of the difference at large x."""
    y = 1 / jnp.maximum(x, 8.0)
    series = y * (1 / 2 + y * (1 / 6 - y**2 * (1 / 30 - y**2 * (1 / 42 - y**2 / 30))))
    return jnp.where(x > 8.0, series, x * polygamma(1, x) - 1)


def _gamma_solve(eta: jax.Array, gradient: jax.Array) -> jax.Array:
    # F⁻¹ = [[α, β], [β, β²ψ₁]] / (αψ₁ − 1), written so that nothing cancels at large α.
    (alpha, beta), (g_alpha, g_beta) = (jnp.moveaxis(x, -1, 0) for x in (eta, gradient))
    first = (alpha * g_alpha + beta * g_beta) / trigamma_excess(alpha)
    return stack(first, beta / alpha * (first + beta * g_beta))


register_exponential_family(
    dist.Gamma,
    natural=lambda concentration, rate: stack(concentration, rate),
    log_normalizer=lambda eta: gammaln(eta[..., 0]) - eta[..., 0] * jnp.log(eta[..., 1]),
    arguments=_named("concentration", "rate"),
    lower=0.0,
    solve=_gamma_solve,
)
# InverseGamma is a transformed Gamma, LogNormal a transformed Normal: their Fisher is that of what they transform.
register_exponential_family(
    dist.Exponential,
    natural=lambda rate: stack(rate),
    log_normalizer=lambda eta: -jnp.log(eta[..., 0]),
    arguments=_named("rate"),
    lower=0.0,
)
register_exponential_family(
    dist.Chi2,  # T = log(z/2)/2
    natural=lambda df: stack(df),
    log_normalizer=lambda eta: gammaln(eta[..., 0] / 2),
    arguments=_named("df"),
    lower=0.0,
)


def _dirichlet_solve(eta: jax.Array, gradient: jax.Array) -> jax.Array:
    # F = D − ψ₁(s) 11ᵀ with D = diag ψ₁(c) and s = Σc is inverted by the Sherman–Morrison formula. Its denominator
    # 1 − ψ₁(s) Σ 1/ψ₁(c) would cancel at large c. With e(x) = x ψ₁(x) − 1 (`trigamma_excess`) and
    # h(c) = c − 1/ψ₁(c) = e(c)/ψ₁(c) it equals ((1 + e(s)) Σh − s e(s)) / s, in which no digits are lost.
    total, curvature = jnp.sum(eta, axis=-1, keepdims=True), polygamma(1, eta)
    much = trigamma_excess(total)
    h = jnp.sum(trigamma_excess(eta) / curvature, axis=-1, keepdims=True)
    along = jnp.sum(gradient / curvature, axis=-1, keepdims=True)
    share = (1 + much) * along / ((1 + much) * h - total * much)
    return (gradient + share) / curvature


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
    arguments=_named("concentration1", "concentration0"),
    lower=0.0,
    solve=_dirichlet_solve,
)
register_exponential_family(
    dist.Kumaraswamy,  # T = log(1 − zᵃ) at fixed a
    natural=lambda concentration0: stack(concentration0),
    log_normalizer=lambda eta, concentration1: -jnp.log(eta[..., 0]),
    arguments=_named("concentration0"),
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
    dist.Pareto,  # T = −log z; the scale bounds the support and has no Fisher
    natural=lambda alpha: stack(alpha),
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
    return jnp.clip(positive_step(eta, change, margin), math.exp(-likely), -rare)


def _failure_move(eta: jax.Array, change: jax.Array, margin: float) -> jax.Array:
    # η = −log(1 − p)
    rare, likely = _tellable(eta)
    return jnp.clip(positive_step(eta, change, margin), math.exp(rare), likely)


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

    register_exponential_family(
        cls, natural=to_logits, log_normalizer=log_normalizer, arguments=back, fixed=trials, move=move
    )


for _cls, _trials in ((BernoulliLogits, ()), (BinomialLogits, ("total_count",))):
    _binary(_cls, lambda logits: stack(logits), _named("logits"), _trials)
for _cls, _trials in ((BernoulliProbs, ()), (BinomialProbs, ("total_count",))):
    _binary(
        _cls,
        lambda probs: stack(_logit(probs)),
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
    move=_odds_move,
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
    move=_odds_move,
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
    move=_failure_move,
)
register_exponential_family(
    dist.GeometricLogits,
    natural=lambda logits: stack(softplus(logits)),
    log_normalizer=lambda eta: -_log_complement(eta[..., 0]),
    arguments=lambda eta: {"logits": eta[..., 0] + _log_complement(eta[..., 0])},
    lower=0.0,
)


def _negative_binomial(cls: type, name: str, to_eta: Any, back: Any, move: Any = None) -> None:
    """p^z (1−p)^r at fixed r: η = −log p, T = −z."""
    register_exponential_family(
        cls,
        natural=lambda **given: stack(to_eta(given[name])),
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
