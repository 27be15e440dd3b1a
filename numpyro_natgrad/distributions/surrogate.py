# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Surrogate densities, which replace log q or log p to make a derivative of the loss the quantity that is needed.

A *Fisher surrogate* is a function with value zero whose derivative along a tangent d is ½ dᵀFd nats, the KL of a small
step d, either from the KL in closed form or from the score at a draw z:

    ½ d² ∂²KL(q_frozen ‖ q) = ½ dᵀFd,        E_z ½ (∂_d log q(z))² = ½ dᵀFd

A derivative is linear in d and this rule is quadratic, but forward-mode differentiation accepts it
(``jax.custom_jvp``). The loss is affine in each log density. Its derivative along d is therefore ½ dᵀFd as well, whose
gradient with respect to d is Fd: one forward and one backward pass, without second derivatives.

Other surrogates are Gaussian and exponential-family densities whose dependence on the parameters is changed.
"""

import copy
from collections.abc import Callable
from enum import StrEnum

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from numpyro import distributions as dist
from numpyro.distributions.util import sum_rightmost

from numpyro_natgrad.distributions import exponential_family
from numpyro_natgrad.distributions.wrappers import (
    Intermediates,
    closed_form_kl,
    distribution_arguments,
    flatten_arguments,
    map_arguments,
    with_log_prob,
)
from numpyro_natgrad.options import StructureError

#: A function of a distribution and a value, in place of ``fn.log_prob(value)``: nats, shape ``fn.batch_shape``.
Density = Callable[[dist.Distribution, jax.Array], jax.Array]
Tangents = tuple[jax.Array, ...]


class FisherEstimate(StrEnum):
    """How the Fisher matrix of one site is computed; the values are the words of the report.

    The empirical one is the second moment of the scores at the observed data; a Fisher matrix has data drawn from the
    model.
    """

    CLOSED_FORM = "closed form"
    MONTE_CARLO = "Monte Carlo"
    EMPIRICAL = "empirical"


def zero_density(fn: dist.Distribution, value: jax.Array) -> jax.Array:
    return jnp.zeros(fn.batch_shape)


# ---- Fisher surrogates -----------------------------------------------------------------------------------------------


def fisher_surrogate(estimate: FisherEstimate) -> Density:
    """The Fisher surrogate of a guide site, in place of log q (:class:`.Frozen`)."""
    return kl_surrogate if estimate == FisherEstimate.CLOSED_FORM else squared_score_surrogate


def kl_surrogate(fn: dist.Distribution, value: jax.Array | None = None) -> jax.Array:
    """The Fisher surrogate by the closed-form KL of a distribution to itself.

    :raises StructureError: if the KL is not known in closed form.
    """
    if closed_form_kl(fn) is None:
        raise StructureError(f"`{type(fn).__name__}` has no closed-form Fisher; expected a registered distribution.")
    leaves, rebuild = flatten_arguments(fn)

    def nats(*leaves: jax.Array) -> jax.Array | None:
        return closed_form_kl(rebuild(leaves))

    @jax.custom_jvp
    def surrogate(*leaves: jax.Array) -> jax.Array:
        return jnp.zeros(fn.batch_shape)

    @surrogate.defjvp
    def _(x: Tangents, d: Tangents) -> tuple[jax.Array, jax.Array]:
        slope = lambda *y: jax.jvp(nats, y, d)[1]
        return surrogate(*x), 0.5 * jax.jvp(slope, x, d)[1]

    return surrogate(*leaves)


def squared_score_surrogate(fn: dist.Distribution, value: jax.Array) -> jax.Array:
    """The Fisher surrogate by the score at a frozen draw.

    The outer product of scores is an unbiased F, positive semi-definite at every draw, unlike the Hessian of −log q.
    """
    return _half_square(fn.log_prob(value))


@jax.custom_jvp
def _half_square(x: jax.Array) -> jax.Array:
    """Zero, with the derivative ½ d² along d."""
    return jnp.zeros_like(x)


@_half_square.defjvp
def _(x: Tangents, d: Tangents) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros_like(x[0]), 0.5 * jnp.square(d[0])


def likelihood_surrogate(estimate: FisherEstimate, key: jax.Array) -> Density:
    """The Fisher surrogate of an observed site, in place of −log p.

    The scores of the Monte-Carlo estimate are at data drawn from the model; the empirical one uses the observed values.
    """
    if estimate != FisherEstimate.MONTE_CARLO:
        return fisher_surrogate(estimate)

    def density(fn: dist.Distribution, value: jax.Array) -> jax.Array:
        return squared_score_surrogate(fn, stop_gradient(fn.sample(key)))

    return density


def prior_surrogate(estimate: FisherEstimate, key: jax.Array) -> Density:
    """The surrogate of a latent site whose value z is a parameter: its Fisher matrix and the curvature of −log p in z.

    The curvature is ½ d(z − E z)² / Var z, which is exact for a normal prior and positive semi-definite for any other.
    It is left out for priors whose mean or variance does not exist.
    """

    def density(fn: dist.Distribution, value: jax.Array) -> jax.Array:
        metric = likelihood_surrogate(estimate, key)(fn, value)
        try:
            residual, variance = value - fn.mean, stop_gradient(fn.variance)
        except NotImplementedError:
            return metric
        known = jnp.isfinite(variance) & (variance > 0)
        curvature = _half_square(jnp.where(known, residual, 0.0)) / jnp.where(known, variance, 1.0)
        return metric + sum_rightmost(curvature, fn.event_dim)

    return density


def fisher_product(
    surrogate: Callable[[jax.Array], jax.Array], x: jax.Array, *, forward: bool = False
) -> Callable[[jax.Array], jax.Array]:
    """The linear function d ↦ Fd, from a function whose derivative along d at ``x`` is ½ dᵀFd.

    With ``forward``, only forward-mode differentiation is used.
    """
    along = lambda d: jax.jvp(surrogate, (x,), (d,))[1]
    return jax.linearize((jax.jacfwd if forward else jax.grad)(along), jnp.zeros_like(x))[1]


# ---- densities and draws whose dependence on the parameters is changed -----------------------------------------------


def with_frozen_arguments(base: dist.Distribution) -> dist.Distribution:
    """The same distribution, with a log density that depends on the parameters through its value alone."""
    return with_log_prob(base, map_arguments(stop_gradient, base).log_prob)


def with_detached_log_prob(base: dist.Distribution, perturbation: jax.Array) -> dist.Distribution:
    """The same distribution. Its log density has the gradient x with respect to ``perturbation``, and no other."""

    def log_prob(value: jax.Array) -> jax.Array:
        x = stop_gradient(value)
        statistic = sum_rightmost(perturbation.reshape(jnp.shape(x)) * x, base.event_dim)
        return stop_gradient(base.log_prob(x)) + statistic - stop_gradient(statistic)

    return with_log_prob(base, log_prob)


def with_tilted_log_prob(base: dist.Distribution, perturbation: jax.Array) -> dist.Distribution:
    """The same exponential family with frozen arguments: log q has the gradient T(x) with respect to ``perturbation``.

    The perturbation t has the shape of η.
    """
    frozen = map_arguments(stop_gradient, base)
    family, arguments = exponential_family.find_exponential_family(type(base)), distribution_arguments(frozen)
    assert family is not None
    eta = family.natural(**exponential_family.free_arguments(family, arguments))

    def log_prob(value: jax.Array, intermediates: Intermediates | None = None) -> jax.Array:
        # log q is affine in η, so that its derivative along t is ⟨t, T(x)⟩ up to a constant.
        rebuilt = lambda at: type(base)(**family.arguments(at), validate_args=False).log_prob(value)
        tilt = jax.jvp(rebuilt, (eta,), (jnp.broadcast_to(perturbation, eta.shape),))[1]
        return frozen.log_prob(value) + tilt - stop_gradient(tilt)

    return with_log_prob(base, log_prob)


def with_shifted_draws(base: dist.Distribution, shift: jax.Array) -> dist.Distribution:
    """The same distribution, with ``shift`` added to every draw and an unchanged log density."""
    return _with_transformed_draws(base, lambda x: x + shift.reshape(x.shape))


def with_rescaled_draws(base: dist.Distribution, mean: jax.Array, by: jax.Array) -> dist.Distribution:
    """The same distribution, with the constant ``by`` (x − mean) added to every draw x."""
    return _with_transformed_draws(base, lambda x: x + by * stop_gradient(x - mean.reshape(x.shape)))


def with_antithetic_draws(base: dist.Distribution, mean: jax.Array, sign: jax.Array) -> dist.Distribution:
    def reflect(x: jax.Array) -> jax.Array:
        m = mean.reshape(x.shape)
        return m + sign.astype(x.dtype) * (x - m)

    return _with_transformed_draws(base, reflect)


def _with_transformed_draws(base: dist.Distribution, transform: Callable[[jax.Array], jax.Array]) -> dist.Distribution:
    changed = copy.copy(base)
    changed.sample = lambda key, sample_shape=(): transform(base.sample(key, sample_shape))
    return changed
