# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""A posterior as f(z) = −log p(z, y) of a flat, unconstrained z, and the starts of its fits."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.util import initialize_model

from .models import Data


class Target(NamedTuple):
    """A posterior of d unconstrained dimensions.

    :ivar potential: f, (d,) → scalar, nats; Jacobians of the transforms included.
    :ivar constrain: (d,) → the model's sites and deterministics by name.
    :ivar shapes: of the sites' unconstrained values, in their order in z (the order of NumPyro's guides).
    """

    potential: Callable[[jax.Array], jax.Array]
    constrain: Callable[[jax.Array], dict[str, jax.Array]]
    shapes: dict[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def split(self, z: Any) -> dict[str, Any]:
        """The sites' unconstrained values in z."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()])
        parts = jnp.split(z, ends[:-1])
        return {name: x.reshape(shape) for (name, shape), x in zip(self.shapes.items(), parts, strict=True)}


def target(function: Callable[..., None], arguments: Data) -> Target:
    """The posterior in the current precision."""
    # A copy, because JAX caches an index array in the precision of its first use.
    arguments = copy.deepcopy(arguments)
    info = initialize_model(jax.random.key(0), function, model_kwargs=arguments)
    shapes = {name: jnp.shape(x) for name, x in info.param_info.z.items()}
    empty = Target(info.potential_fn, info.postprocess_fn, shapes)
    return empty._replace(
        potential=lambda z: info.potential_fn(empty.split(z)), constrain=lambda z: info.postprocess_fn(empty.split(z))
    )


def starts(function: Callable[..., None], arguments: Data, seeds: int) -> np.ndarray:
    """Initial means, (seeds, d): uniform in (−2, 2), with finite value and gradient.

    They equal those of ``init_to_uniform``, for every method, guide and precision.
    """
    with jax.enable_x64(True):
        keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
        z = initialize_model(keys, function, model_kwargs=arguments).param_info.z  # sorted by name, unlike guides
        return np.concatenate([np.reshape(z[name], (seeds, -1)) for name in target(function, arguments).shapes], 1)
