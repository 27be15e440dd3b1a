# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Distributions inside NumPyro's wrappers: the base, its arguments, the KL of the whole, and the density of flows.

    Masked(Independent(Expanded(Transformed(base))))      F is the base's, summed over the copies that are not masked

A transform without parameters changes neither the KL nor the Fisher matrix.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jax.typing import ArrayLike
from numpyro import distributions as dist
from numpyro.distributions.flows import BlockNeuralAutoregressiveTransform, InverseAutoregressiveTransform
from numpyro.distributions.kl import kl_divergence
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import sum_rightmost

from numpyro_natgrad.distributions import exponential_family
from numpyro_natgrad.distributions.exponential_family import Arguments

#: Transforms of vectors whose parameters are in a closure, where ``jax.tree.leaves`` does not find them.
FLOWS = (InverseAutoregressiveTransform, BlockNeuralAutoregressiveTransform)
_COPIES = (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)
_WRAPPERS = (*_COPIES, dist.TransformedDistribution)


def closed_form_kl(fn: dist.Distribution) -> jax.Array | None:
    """KL(q_frozen ‖ q_φ) or its quadratic model, in nats, shape ``fn.batch_shape``; ``None`` if it is not known.

    The registry of :mod:`.exponential_family` takes precedence over NumPyro's ``kl_divergence``.
    """
    if isinstance(fn, dist.Delta):
        return jnp.zeros(fn.batch_shape)
    if exponential_family.is_registered(type(fn)):
        arguments = distribution_arguments(fn)
        return exponential_family.registered_kl(type(fn), jax.tree.map(stop_gradient, arguments), arguments)
    if isinstance(fn, dist.TransformedDistribution) and not owns_parameters(fn.transforms):
        inner = closed_form_kl(fn.base_dist)
        return None if inner is None else sum_rightmost(inner, jnp.ndim(inner) - len(fn.batch_shape))
    if isinstance(fn, _COPIES):
        return _kl_of_copies(fn)
    fn = with_broadcast_loc(fn)
    try:
        return jnp.asarray(kl_divergence(map_arguments(stop_gradient, fn), fn))
    except NotImplementedError:
        return None


def _kl_of_copies(fn: dist.Distribution) -> jax.Array | None:
    inner = closed_form_kl(fn.base_dist)
    if inner is None:
        return None
    if isinstance(fn, dist.Independent):
        return sum_rightmost(inner, fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return jnp.where(fn._mask, inner, 0.0)
    return jnp.broadcast_to(inner, fn.batch_shape)


def with_broadcast_loc(fn: dist.Distribution) -> dist.Distribution:
    """Broadcast a scalar ``loc`` of a multivariate Gaussian to its event: NumPyro's ``kl_divergence`` does not."""
    if not isinstance(fn, dist.MultivariateNormal):
        return fn
    fn = copy.copy(fn)
    fn.loc = jnp.broadcast_to(fn.loc, fn.shape())
    return fn


def base_distribution(fn: dist.Distribution) -> dist.Distribution:
    """The distribution inside all wrappers."""
    while is_wrapper(fn):
        fn = fn.base_dist
    return fn


def is_wrapper(fn: dist.Distribution) -> bool:
    """Whether the Fisher matrix is that of ``fn.base_dist``; a registered class has its own."""
    return isinstance(fn, _WRAPPERS) and not exponential_family.is_registered(type(fn))


def is_reparameterized(fn: dist.Distribution) -> bool:
    """Whether draws are differentiable functions of the arguments.

    NumPyro's Wishart distributions do not say so. They are drawn by Bartlett's decomposition, and JAX differentiates χ²
    variables with respect to their degrees of freedom.
    """
    return bool(fn.has_rsample) or isinstance(base_distribution(fn), dist.WishartCholesky | dist.InverseWishartCholesky)


def is_masked(fn: dist.Distribution) -> bool:
    return is_wrapper(fn) and (isinstance(fn, dist.MaskedDistribution) or is_masked(fn.base_dist))


def map_base(fn: dist.Distribution, change: Callable[[dist.Distribution], dist.Distribution]) -> dist.Distribution:
    """Return the same distribution with ``change`` applied to the one inside its wrappers."""
    return _rewrapped(fn, map_base(fn.base_dist, change)) if is_wrapper(fn) else change(fn)


def _rewrapped(fn: dist.Distribution, base: dist.Distribution) -> dist.Distribution:
    outer = copy.copy(fn)
    outer.base_dist = base
    return outer


def with_log_prob(fn: dist.Distribution, log_prob: Callable[..., jax.Array]) -> dist.Distribution:
    """The same distribution with another log density, of the same class, so that registries of KLs still find it."""
    changed = copy.copy(fn)
    changed.log_prob = log_prob
    return changed


def flatten_arguments(fn: dist.Distribution) -> tuple[list[Any], Callable[[Sequence[Any]], dist.Distribution]]:
    """The leaves of a distribution, and the function that makes it from them.

    NumPyro keeps the names of arguments in a set, so that ``jax.tree.flatten`` finds them in another order in every
    process. These leaves are in the order of the names, and a program that depends on them is the same in the next one.
    """
    names = type(fn).gather_pytree_data_fields()
    children, rest = fn.tree_flatten()
    ordered = dict(sorted(zip(names, children, strict=True)))
    parts = {name: _flattened(child) for name, child in ordered.items()}

    def rebuild(leaves: Sequence[Any]) -> dist.Distribution:
        left = iter(leaves)
        made = {name: make([next(left) for _ in found]) for name, (found, make) in parts.items()}
        return type(fn).tree_unflatten(rest, tuple(made[name] for name in names))

    return [x for found, _ in parts.values() for x in found], rebuild


def _flattened(child: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    if isinstance(child, dist.Distribution):
        return flatten_arguments(child)
    leaves, tree = jax.tree.flatten(child)
    return leaves, partial(jax.tree.unflatten, tree)


def map_arguments(function: Callable[[Any], Any], fn: dist.Distribution) -> dist.Distribution:
    """``jax.tree.map``, in an order that does not change from process to process."""
    leaves, rebuild = flatten_arguments(fn)
    return rebuild([function(x) for x in leaves])


def owns_parameters(chain: Sequence[Transform]) -> bool:
    """Whether transforms may hold parameters: leaves that are not Python or NumPy constants, or a flow's closure."""
    leaves = (leaf for leaf in jax.tree.leaves(chain) if not isinstance(leaf, bool | int | float | np.ndarray))
    return any(True for _ in leaves) or any(isinstance(t, FLOWS) for t in chain)


def distribution_arguments(base: dist.Distribution) -> Arguments:
    """The arguments that were passed to the constructor, without those that NumPyro derives from them on access."""
    found = {name: _argument(base, name) for name in type(base).arg_constraints}
    return {name: jnp.asarray(x, jnp.result_type(float, x)) for name, x in found.items() if x is not None}


def _argument(base: dist.Distribution, name: str) -> ArrayLike | None:
    # A property, such as the mean of `NegativeBinomial2`, is computed from what the constructor has stored.
    is_property = isinstance(getattr(type(base), name, None), property)
    return getattr(base, name) if is_property else base.__dict__.get(name)


def base_shape(fn: dist.Distribution, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a draw of the innermost distribution, expanded."""
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


#: For every transform of a distribution its input and its own intermediate values.
Intermediates = Sequence[tuple[jax.Array, Any]]


def without_flow_inverse(fn: dist.Distribution, intermediates: Intermediates) -> dist.Distribution:
    """The same distribution with a ``log_prob`` that, at the frozen draw, does not invert a flow.

    ``intermediates`` are those that ``sample_with_intermediates`` returned with the draw.
    """
    if isinstance(fn, dist.TransformedDistribution):
        if not intermediates or not any(isinstance(t, FLOWS) for t in fn.transforms):
            return fn
        return with_log_prob(fn, lambda value, *_: _flow_log_prob(fn, value, intermediates))
    if isinstance(fn, _WRAPPERS):
        return _rewrapped(fn, without_flow_inverse(fn.base_dist, intermediates))
    return fn


def _flow_log_prob(fn: dist.Distribution, value: jax.Array, intermediates: Intermediates) -> jax.Array:
    """``TransformedDistribution.log_prob`` at its own draw; its first derivatives are exact, its second are not."""
    total, y, event_dim = jnp.zeros(()), value, fn.event_dim
    for transform, (x, _) in reversed(list(zip(fn.transforms, intermediates, strict=True))):
        x, log_det = _preimage(transform, stop_gradient(x), y)
        extra = event_dim - transform.codomain.event_dim
        total = total - sum_rightmost(log_det, extra)
        y, event_dim = x, transform.domain.event_dim + extra
    return total + sum_rightmost(fn.base_dist.log_prob(y), event_dim - fn.base_dist.event_dim)


def _preimage(transform: Transform, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x(φ) with T_φ(x(φ)) = y, and log|∂T_φ/∂x| there, both to first order in φ and y."""
    if not isinstance(transform, FLOWS):
        x = transform.inv(y)
        return x, transform.log_abs_det_jacobian(x, y)
    image, log_det = _flow_forward(transform, x)
    jacobian, slope = _flow_jacobian(transform, x)
    shift = jnp.linalg.solve(jacobian, (y - image)[..., None])[..., 0]
    return x + shift, log_det + jnp.sum(slope * shift, axis=-1)


def _flow_forward(transform: Transform, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, intermediates = transform.call_with_intermediates(x)
    return y, transform.log_abs_det_jacobian(x, y, intermediates)


def _flow_jacobian(transform: Transform, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """∂T/∂x, ``(..., d, d)``, and ∂ log|∂T/∂x| / ∂x, ``(..., d)``, at frozen parameters."""
    flat = x.reshape(-1, x.shape[-1])
    jacobian, slope = jax.vmap(jax.jacfwd(lambda v: _flow_forward(transform, v)))(flat)
    return stop_gradient((jacobian.reshape(*x.shape, x.shape[-1]), slope.reshape(x.shape)))
