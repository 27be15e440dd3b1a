# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Densities that stand for log q and log p, so that a derivative of the loss becomes what is asked for.

    ∇² KL(q_frozen ‖ q_φ) = ∇² ½(log q_φ − log q_frozen)²  (in the mean over draws)  = F

Beside them, Gaussian and exponential-family densities whose dependence on their parameters has been changed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from numpyro.distributions.util import sum_rightmost

from . import exponential
from .errors import StructureError
from .wrappers import arguments_of, closed_kl, with_log_prob

Density = Callable[[Any, Any], jax.Array]

#: How the Fisher of a site is got. The empirical one is no Fisher: its scores are those of the data as observed.
CLOSED, MONTE_CARLO, EMPIRICAL = "closed form", "Monte Carlo", "empirical"


def nothing(fn: Any, value: Any) -> jax.Array:
    return jnp.zeros(fn.batch_shape)


def half_squared_score(fn: Any, value: Any) -> jax.Array:
    """½(log q_φ(z) − log q_frozen(z))² at a frozen draw, nats per batch element.

    Its Hessian is the outer product of scores: unbiased for the Fisher and positive semi-definite (the Hessian of
    −log q at a draw is not).
    """
    log_prob = fn.log_prob(value)
    return 0.5 * jnp.square(log_prob - stop_gradient(log_prob))


def kl_to_self(fn: Any, value: Any = None) -> jax.Array:
    """A function whose Hessian is the Fisher in closed form, nats per batch element: KL(q_frozen ‖ q_φ) mostly."""
    closed = closed_kl(fn)
    if closed is None:
        raise StructureError(f"`{type(fn).__name__}` has no closed-form Fisher; expected a registered distribution.")
    return closed


def fisher_density(how: str) -> Density:
    """What stands for log q (:class:`Frozen`) so that the Hessian of the loss is the Fisher."""
    return kl_to_self if how == CLOSED else half_squared_score


def likelihood_density(how: str, key: jax.Array) -> Density:
    """What stands for −log p of an observed site. The Fisher does not look at the data; the empirical one does.

    Where there is no closed form, data is drawn from the model at its present parameters.
    """
    if how != MONTE_CARLO:
        return fisher_density(how)

    def density(fn: Any, value: Any) -> jax.Array:
        return half_squared_score(fn, stop_gradient(fn.sample(key)))

    return density


def prior_density(how: str, key: jax.Array) -> Density:
    """What stands for −log p of a site at a point of the guide: its Fisher, and the curvature of its value.

    ½ ((z − E z) − (z − E z)_frozen)² / Var z has the Hessian of −log p for a normal prior and is positive semi-definite
    for any. A prior without mean or variance adds nothing.
    """

    def density(fn: Any, value: Any) -> jax.Array:
        metric = likelihood_density(how, key)(fn, value)
        try:
            residual, variance = value - fn.mean, stop_gradient(fn.variance)
        except NotImplementedError:
            return metric
        known = jnp.isfinite(variance) & (variance > 0)
        moved = jnp.where(known, residual - stop_gradient(residual), 0.0)
        return metric + 0.5 * sum_rightmost(moved**2 / jnp.where(known, variance, 1.0), fn.event_dim)

    return density


def frozen_arguments(base: Any) -> Any:
    return with_log_prob(base, jax.tree.map(stop_gradient, base).log_prob)


def silent(base: Any, tap: jax.Array) -> Any:
    def log_prob(value: jax.Array) -> jax.Array:
        x = stop_gradient(value)
        statistic = sum_rightmost(tap.reshape(jnp.shape(x)) * x, base.event_dim)
        return stop_gradient(base.log_prob(x)) + statistic - stop_gradient(statistic)

    return with_log_prob(base, log_prob)


def tilted(base: Any, tap: jax.Array) -> Any:
    frozen = jax.tree.map(stop_gradient, base)
    family, arguments = exponential.exponential(type(base)), arguments_of(frozen)
    assert family is not None
    eta = family.natural(**exponential.given(family, arguments))

    def log_prob(value: jax.Array, intermediates: Any = None) -> jax.Array:
        # ⟨t, T(x)⟩ up to a constant: log q is affine in η.
        rebuilt = lambda at: type(base)(**family.arguments(at), validate_args=False).log_prob(value)
        tilt = jax.jvp(rebuilt, (eta,), (jnp.broadcast_to(tap, eta.shape),))[1]
        return frozen.log_prob(value) + tilt - stop_gradient(tilt)

    return with_log_prob(base, log_prob)
