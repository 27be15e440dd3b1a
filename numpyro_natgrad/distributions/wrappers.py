# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Distributions under NumPyro's wrappers: the base, its arguments, the KL of the whole, and the density of flows.

Masked(Independent(Expanded(Transformed(base))))      F is the sum of the base's F over the copies that count
"""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from numpyro import distributions as dist
from numpyro.distributions.flows import BlockNeuralAutoregressiveTransform, InverseAutoregressiveTransform
from numpyro.distributions.kl import kl_divergence
from numpyro.distributions.util import sum_rightmost

from numpyro_natgrad.distributions import exponential_family

#: Transforms of vectors whose parameters are in a closure, where ``jax.tree.leaves`` does not find them.
FLOWS = (InverseAutoregressiveTransform, BlockNeuralAutoregressiveTransform)
_WRAPPERS = (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution, dist.TransformedDistribution)


def closed_form_kl(fn: Any) -> jax.Array | None:
    """KL(q_frozen ‖ q_φ), or its quadratic model, seen through transforms without parameters; ``None`` if unknown.

    NumPyro's registry is asked first, then :mod:`.exponential_family`.
    """
    if isinstance(fn, dist.Delta):
        return jnp.zeros(fn.batch_shape)
    if exponential_family.is_registered(type(fn)):
        return _registered(fn)
    if isinstance(fn, dist.TransformedDistribution) and not owns_parameters(fn.transforms):
        inner = closed_form_kl(fn.base_dist)
        return None if inner is None else sum_rightmost(inner, jnp.ndim(inner) - len(fn.batch_shape))
    if isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        return _unwrapped(fn)
    fn = with_broadcast_loc(fn)
    try:
        return jnp.asarray(kl_divergence(jax.tree.map(stop_gradient, fn), fn))
    except NotImplementedError:
        return None


def with_broadcast_loc(fn: Any) -> Any:
    """One number as the mean of a multivariate Gaussian stands for all of its entries, which NumPyro's KL forgets."""
    if not isinstance(fn, dist.MultivariateNormal):
        return fn
    fn = copy.copy(fn)
    fn.loc = jnp.broadcast_to(fn.loc, fn.shape())
    return fn


def _registered(fn: Any) -> jax.Array | None:
    arguments = distribution_arguments(fn)
    return exponential_family.registered_kl(type(fn), jax.tree.map(stop_gradient, arguments), arguments)


def _unwrapped(fn: Any) -> jax.Array | None:
    inner = closed_form_kl(fn.base_dist)
    if inner is None:
        return None
    if isinstance(fn, dist.Independent):
        return sum_rightmost(inner, fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return jnp.where(fn._mask, inner, 0.0)
    return jnp.broadcast_to(inner, fn.batch_shape)


def base_distribution(fn: Any) -> Any:
    """The distribution under wrappers that a Fisher does not see."""
    while is_wrapper(fn):
        fn = fn.base_dist
    return fn


def is_wrapper(fn: Any) -> bool:
    return isinstance(fn, _WRAPPERS) and not exponential_family.is_registered(type(fn))


def is_reparameterized(fn: Any) -> bool:
    """Whether gradients flow through draws.

    NumPyro says no of Wishart distributions because of their concentration. But they are drawn by Bartlett's
    decomposition, and JAX knows the derivative of its χ variables by their degrees of freedom.
    """
    return bool(fn.has_rsample) or isinstance(base_distribution(fn), dist.WishartCholesky | dist.InverseWishartCholesky)


def is_masked(fn: Any) -> bool:
    return is_wrapper(fn) and (isinstance(fn, dist.MaskedDistribution) or is_masked(fn.base_dist))


def map_base(fn: Any, change: Callable[[Any], Any]) -> Any:
    """The same distribution with ``change`` applied to the one under its wrappers."""
    if not is_wrapper(fn):
        return change(fn)
    return _rewrapped(fn, map_base(fn.base_dist, change))


def _rewrapped(fn: Any, base: Any) -> Any:
    outer = copy.copy(fn)
    outer.base_dist = base
    return outer


def with_log_prob(fn: Any, log_prob: Callable[..., jax.Array]) -> Any:
    """The same distribution, of the same class (KL registries see no difference), with another log-density."""
    changed = copy.copy(fn)
    changed.log_prob = log_prob
    return changed


def owns_parameters(chain: Any) -> bool:
    """Whether a list of transforms may hold parameters: leaves of their tree but for constants, or a flow's closure."""
    leaves = (leaf for leaf in jax.tree.leaves(chain) if not isinstance(leaf, bool | int | float | np.ndarray))
    return any(True for _ in leaves) or any(isinstance(t, FLOWS) for t in chain)


def distribution_arguments(base: Any) -> dict[str, jax.Array]:
    """The arguments as given: lazily derived ones (a precision made from a Cholesky factor) are not in ``__dict__``."""
    found = {name: _argument(base, name) for name in type(base).arg_constraints}
    return {name: jnp.asarray(x, jnp.result_type(float, x)) for name, x in found.items() if x is not None}


def _argument(base: Any, name: str) -> Any:
    # ``NegativeBinomial2`` is given a mean and keeps what it computes from it.
    computed = isinstance(getattr(type(base), name, None), property)
    return getattr(base, name) if computed else base.__dict__.get(name)


def base_shape(fn: Any, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
    while is_wrapper(fn) and not isinstance(fn, dist.ExpandedDistribution):
        fn = fn.base_dist
    return tuple(sample_shape) + tuple(fn.shape())


# ---- normalizing flows -----------------------------------------------------------------------------------------------
#
# A flow z = T_φ(x) has the density log q_φ(z) = ℓ(φ, x) = log n(x) − log|∂T_φ/∂x| at x = T_φ⁻¹(z). Where z is a draw of
# the flow itself, x is known, and only its derivative with respect to φ at fixed z is missing. One Newton step from the
# known x is exact in value and first derivative:
#
#     x(φ) = x − (∂T/∂x)⁻¹ (T_φ(x) − z)
#     ∇_φ log q_φ(z) = ∂_φ ℓ − (∂_φ T)ᵀ w       where (∂T/∂x)ᵀ w = ∂_x ℓ
#
# No inverse of the flow is computed. A block neural autoregressive flow has none in closed form, and that of an inverse
# autoregressive flow calls its network d times in sequence for d latents; the d columns of ∂T/∂x are one batch.


def without_flow_inverse(fn: Any, intermediates: Any) -> Any:
    """Return the same distribution with a ``log_prob`` that, at the frozen draw, does not invert a flow.

    :param fn: any distribution; one without a flow is returned as it is.
    :param intermediates: the intermediate values that ``sample_with_intermediates`` returned with the draw.
    """
    if isinstance(fn, dist.TransformedDistribution):
        if not intermediates or not any(isinstance(t, FLOWS) for t in fn.transforms):
            return fn
        return with_log_prob(fn, lambda value, *_: _flow_log_prob(fn, value, intermediates))
    if isinstance(fn, _WRAPPERS):
        return _rewrapped(fn, without_flow_inverse(fn.base_dist, intermediates))
    return fn


def _flow_log_prob(fn: Any, value: jax.Array, intermediates: Any) -> jax.Array:
    """``TransformedDistribution.log_prob`` at its own draw; its first derivatives are exact, its second are not."""
    total, y, event_dim = jnp.zeros(()), value, fn.event_dim
    for transform, (x, _) in reversed(list(zip(fn.transforms, intermediates, strict=True))):
        x, log_det = _preimage(transform, stop_gradient(x), y)
        extra = event_dim - transform.codomain.event_dim
        total = total - sum_rightmost(log_det, extra)
        y, event_dim = x, transform.domain.event_dim + extra
    return total + sum_rightmost(fn.base_dist.log_prob(y), event_dim - fn.base_dist.event_dim)


def _preimage(transform: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x(φ) with T_φ(x(φ)) = y, and log|∂T_φ/∂x| there, both to first order in φ and y."""
    if not isinstance(transform, FLOWS):
        x = transform.inv(y)
        return x, transform.log_abs_det_jacobian(x, y)
    image, log_det = _flow_forward(transform, x)
    jacobian, slope = _flow_jacobian(transform, x)
    shift = jnp.linalg.solve(jacobian, (y - image)[..., None])[..., 0]
    return x + shift, log_det + jnp.sum(slope * shift, axis=-1)


def _flow_forward(transform: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, intermediates = transform.call_with_intermediates(x)
    return y, transform.log_abs_det_jacobian(x, y, intermediates)


def _flow_jacobian(transform: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """∂T/∂x, ``(..., d, d)``, and ∂ log|∂T/∂x| / ∂x, ``(..., d)``, at frozen parameters."""
    flat = x.reshape(-1, x.shape[-1])
    jacobian, slope = jax.vmap(jax.jacfwd(lambda v: _flow_forward(transform, v)))(flat)
    return stop_gradient((jacobian.reshape(*x.shape, x.shape[-1]), slope.reshape(x.shape)))
