# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Densities that stand for log q and log p, so that a derivative of the loss becomes what is asked for.

*Lengths* are zero, and their derivative along a tangent d is ½ dᵀFd nats: the KL that a small step d moves.

    ½ d² ∂²KL(q_frozen ‖ q) = ½ dᵀFd,     ½ (∂_d log q(z))² = ½ dᵀFd  in the mean over draws z

That is no derivative of any function, being quadratic in d, but a rule for it is all that forward mode asks for
(``jax.custom_jvp``). What follows a site is affine in its density, so that the loss becomes such a length too, and the
gradient of its derivative with respect to d is Fd: one pass forward, one back, none of them through second derivatives.

Beside them, Gaussian and exponential-family densities whose dependence on their parameters has been changed.
"""

import copy
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from numpyro.distributions.util import sum_rightmost

from numpyro_natgrad.distributions import exponential_family
from numpyro_natgrad.distributions.wrappers import closed_form_kl, distribution_arguments, with_log_prob
from numpyro_natgrad.options import StructureError

Density = Callable[[Any, Any], jax.Array]


class FisherEstimate(StrEnum):
    """How the Fisher matrix of one site is computed; the values are the words of the report.

    The empirical Fisher matrix is the second moment of the scores at the observed data. It is no Fisher matrix, whose
    expectation is over data drawn from the model.
    """

    CLOSED_FORM = "closed form"
    MONTE_CARLO = "Monte Carlo"
    EMPIRICAL = "empirical"


def zero_density(fn: Any, value: Any) -> jax.Array:
    return jnp.zeros(fn.batch_shape)


def squared_score_surrogate(fn: Any, value: Any) -> jax.Array:
    """The length by the score at a frozen draw, nats per batch element.

    F is the outer product of scores: unbiased for the Fisher and positive semi-definite (the Hessian of −log q at a
    draw is not).
    """
    return _half_square(fn.log_prob(value))


def kl_surrogate(fn: Any, value: Any = None) -> jax.Array:
    """The length by the closed-form KL of a distribution to itself, nats per batch element."""
    if closed_form_kl(fn) is None:
        raise StructureError(f"`{type(fn).__name__}` has no closed-form Fisher; expected a registered distribution.")
    leaves, tree = jax.tree.flatten(fn)
    nats: Any = lambda *x: closed_form_kl(jax.tree.unflatten(tree, x))

    @jax.custom_jvp
    def length(*x: Any) -> jax.Array:
        return jnp.zeros(fn.batch_shape)

    @length.defjvp
    def _(x: Any, d: Any) -> tuple[jax.Array, jax.Array]:
        slope = lambda *y: jax.jvp(nats, y, d)[1]
        return length(*x), 0.5 * jax.jvp(slope, x, d)[1]

    return length(*leaves)


@jax.custom_jvp
def _half_square(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x)


@_half_square.defjvp
def _(x: Any, d: Any) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros_like(x[0]), 0.5 * jnp.square(d[0])


def fisher_surrogate(estimate: FisherEstimate) -> Density:
    """What stands for log q (:class:`.Frozen`) so that the loss becomes a length."""
    return kl_surrogate if estimate == FisherEstimate.CLOSED_FORM else squared_score_surrogate


def fisher_product(length: Callable[[jax.Array], jax.Array], x: jax.Array, *, forward: bool = False) -> Callable:
    """d ↦ Fd, linear, from a function whose derivative along d at ``x`` is ½ dᵀFd.

    :param length: ``(P,) -> ()``.
    :param forward: differentiate in forward mode only.
    """
    along = lambda d: jax.jvp(length, (x,), (d,))[1]
    return jax.linearize((jax.jacfwd if forward else jax.grad)(along), jnp.zeros_like(x))[1]


def likelihood_surrogate(estimate: FisherEstimate, key: jax.Array) -> Density:
    """What stands for −log p of an observed site. The Fisher does not look at the data; the empirical one does.

    Where there is no closed form, data is drawn from the model at its present parameters.
    """
    if estimate != FisherEstimate.MONTE_CARLO:
        return fisher_surrogate(estimate)

    def density(fn: Any, value: Any) -> jax.Array:
        return squared_score_surrogate(fn, stop_gradient(fn.sample(key)))

    return density


def prior_surrogate(estimate: FisherEstimate, key: jax.Array) -> Density:
    """What stands for −log p of a site at a point of the guide: its Fisher, and the curvature of its value.

    ½ d(z − E z)² / Var z is the curvature of −log p for a normal prior and positive semi-definite for any. A prior
    without mean or variance adds nothing.
    """

    def density(fn: Any, value: Any) -> jax.Array:
        metric = likelihood_surrogate(estimate, key)(fn, value)
        try:
            residual, variance = value - fn.mean, stop_gradient(fn.variance)
        except NotImplementedError:
            return metric
        known = jnp.isfinite(variance) & (variance > 0)
        moved = _half_square(jnp.where(known, residual, 0.0))
        return metric + sum_rightmost(moved / jnp.where(known, variance, 1.0), fn.event_dim)

    return density


def with_frozen_arguments(base: Any) -> Any:
    return with_log_prob(base, jax.tree.map(stop_gradient, base).log_prob)


def with_shifted_draws(base: Any, shift: jax.Array) -> Any:
    """The same distribution with ``shift`` added to its draws, and the log-density it had."""
    return _with_transformed_draws(base, lambda x: x + shift.reshape(x.shape))


def with_rescaled_draws(base: Any, mean: jax.Array, by: jax.Array) -> Any:
    """The same with each draw x moved by ``by`` (x − mean), which is taken for a constant."""
    return _with_transformed_draws(base, lambda x: x + by * stop_gradient(x - mean.reshape(x.shape)))


def with_antithetic_draws(base: Any, mean: jax.Array, sign: jax.Array) -> Any:
    """The same with each draw x moved to mean + sign (x − mean): a draw of a symmetric distribution again."""

    def mirror(x: jax.Array) -> jax.Array:
        m = mean.reshape(x.shape)
        return m + sign.astype(x.dtype) * (x - m)

    return _with_transformed_draws(base, mirror)


def _with_transformed_draws(base: Any, move: Callable[[jax.Array], jax.Array]) -> Any:
    changed = copy.copy(base)
    changed.sample = lambda key, sample_shape=(): move(base.sample(key, sample_shape))
    return changed


def with_detached_log_prob(base: Any, perturbation: jax.Array) -> Any:
    def log_prob(value: jax.Array) -> jax.Array:
        x = stop_gradient(value)
        statistic = sum_rightmost(perturbation.reshape(jnp.shape(x)) * x, base.event_dim)
        return stop_gradient(base.log_prob(x)) + statistic - stop_gradient(statistic)

    return with_log_prob(base, log_prob)


def with_tilted_log_prob(base: Any, perturbation: jax.Array) -> Any:
    frozen = jax.tree.map(stop_gradient, base)
    family, arguments = exponential_family.find_exponential_family(type(base)), distribution_arguments(frozen)
    assert family is not None
    eta = family.natural(**exponential_family.free_arguments(family, arguments))

    def log_prob(value: jax.Array, intermediates: Any = None) -> jax.Array:
        # ⟨t, T(x)⟩ up to a constant: log q is affine in η.
        rebuilt = lambda at: type(base)(**family.arguments(at), validate_args=False).log_prob(value)
        tilt = jax.jvp(rebuilt, (eta,), (jnp.broadcast_to(perturbation, eta.shape),))[1]
        return frozen.log_prob(value) + tilt - stop_gradient(tilt)

    return with_log_prob(base, log_prob)
