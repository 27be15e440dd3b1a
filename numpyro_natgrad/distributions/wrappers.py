# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Distributions seen through their wrappers: the base, its arguments, and the KL of the whole to itself.

    Masked(Independent(Expanded(Transformed(base))))      F is the base's, summed over what the wrappers repeat

NumPyro's own KLs are asked first, then the registry (:mod:`.exponential_family`).
"""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from numpyro import distributions as dist
from numpyro.distributions.kl import kl_divergence
from numpyro.distributions.util import sum_rightmost

from numpyro_natgrad.distributions import exponential_family
from numpyro_natgrad.distributions.flow_density import FLOWS

_WRAPPERS = (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution, dist.TransformedDistribution)


def closed_kl(fn: Any) -> jax.Array | None:
    """KL(q_frozen ‖ q_φ), or its quadratic model, seen through transforms without parameters; ``None`` if unknown.

    NumPyro's registry is asked first, then :mod:`.exponential_family`.
    """
    if isinstance(fn, dist.Delta):
        return jnp.zeros(fn.batch_shape)
    if exponential_family.is_registered(type(fn)):
        return _registered(fn)
    if isinstance(fn, dist.TransformedDistribution) and not owns_parameters(fn.transforms):
        inner = closed_kl(fn.base_dist)
        return None if inner is None else sum_rightmost(inner, jnp.ndim(inner) - len(fn.batch_shape))
    if isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        return _unwrapped(fn)
    fn = spelt_out(fn)
    try:
        return jnp.asarray(kl_divergence(jax.tree.map(stop_gradient, fn), fn))
    except NotImplementedError:
        return None


def spelt_out(fn: Any) -> Any:
    """One number as the mean of a multivariate Gaussian stands for all of its entries, which NumPyro's KL forgets."""
    if not isinstance(fn, dist.MultivariateNormal):
        return fn
    fn = copy.copy(fn)
    fn.loc = jnp.broadcast_to(fn.loc, fn.shape())
    return fn


def _registered(fn: Any) -> jax.Array | None:
    arguments = distribution_arguments(fn)
    return exponential_family.divergence(type(fn), jax.tree.map(stop_gradient, arguments), arguments)


def _unwrapped(fn: Any) -> jax.Array | None:
    inner = closed_kl(fn.base_dist)
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


def has_path(fn: Any) -> bool:
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
    outer = copy.copy(fn)
    outer.base_dist = map_base(fn.base_dist, change)
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
