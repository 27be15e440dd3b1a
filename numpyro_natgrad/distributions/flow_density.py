# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The score of a normalizing flow at its own draw, without the inverse of the flow.

z = T_φ(x) with density ℓ(φ, x) = log n(x) − log|∂T_φ/∂x|. Held at the frozen z, x moves with φ:

    x(φ) = x − (∂T/∂x)⁻¹ (T_φ(x) − z)        (one Newton step: exact in value and first derivative)
    ∇_φ log q_φ(z) = ∂_φ ℓ − (∂_φ T)ᵀ w,     (∂T/∂x)ᵀ w = ∂_x ℓ

A block neural autoregressive flow has no inverse at all; that of an inverse autoregressive flow calls its network as
often as there are latents, one call after the other, where the d columns of ∂T/∂x are one batch.
"""

import copy
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from numpyro import distributions as dist
from numpyro.distributions.flows import BlockNeuralAutoregressiveTransform, InverseAutoregressiveTransform
from numpyro.distributions.util import sum_rightmost

#: Transforms that own parameters in closures, where no tree of leaves shows them, and map vectors to vectors.
FLOWS = (InverseAutoregressiveTransform, BlockNeuralAutoregressiveTransform)


def at_draw(fn: Any, intermediates: Any) -> Any:
    """The same distribution; its ``log_prob`` at its own frozen draw needs no inverse of a flow.

    :param fn: any distribution; one without a flow is returned as it is.
    :param intermediates: what ``sample`` noted down on its way to the draw.
    """
    if isinstance(fn, dist.TransformedDistribution):
        if not intermediates or not any(isinstance(t, FLOWS) for t in fn.transforms):
            return fn
        changed = copy.copy(fn)
        changed.log_prob = lambda value, *_: _log_prob(fn, value, intermediates)
        return changed
    if isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        outer = copy.copy(fn)
        outer.base_dist = at_draw(fn.base_dist, intermediates)
        return outer
    return fn


def _log_prob(fn: Any, value: jax.Array, intermediates: Any) -> jax.Array:
    """As ``TransformedDistribution.log_prob``, from the draw back to the base; second derivatives are not exact."""
    total, y, event_dim = jnp.zeros(()), value, fn.event_dim
    for transform, (x, _) in reversed(list(zip(fn.transforms, intermediates, strict=True))):
        x, log_det = _pulled(transform, stop_gradient(x), y)
        extra = event_dim - transform.codomain.event_dim
        total = total - sum_rightmost(log_det, extra)
        y, event_dim = x, transform.domain.event_dim + extra
    return total + sum_rightmost(fn.base_dist.log_prob(y), event_dim - fn.base_dist.event_dim)


def _pulled(transform: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x(φ) with T_φ(x(φ)) = y, and log|∂T_φ/∂x| there, both to first order in φ and y."""
    if not isinstance(transform, FLOWS):
        preimage = transform.inv(y)
        return preimage, transform.log_abs_det_jacobian(preimage, y)
    reached, log_det = _forward(transform, x)
    jacobian, slope = _linearised(transform, x)
    shift = jnp.linalg.solve(jacobian, (y - reached)[..., None])[..., 0]
    return x + shift, log_det + jnp.sum(slope * shift, axis=-1)


def _forward(transform: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, intermediates = transform.call_with_intermediates(x)
    return y, transform.log_abs_det_jacobian(x, y, intermediates)


def _linearised(transform: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """∂T/∂x, ``(..., d, d)``, and ∂ log|∂T/∂x| / ∂x, ``(..., d)``, of frozen parameters."""
    flat = x.reshape(-1, x.shape[-1])
    jacobian, slope = jax.vmap(jax.jacfwd(lambda v: _forward(transform, v)))(flat)
    return stop_gradient((jacobian.reshape(*x.shape, x.shape[-1]), slope.reshape(x.shape)))
