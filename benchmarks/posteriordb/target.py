# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""A posterior as every method sees it: f(z) = −log p(z, y) of a flat, unconstrained z, and where a fit of it starts."""

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
    :ivar shapes: of the sites' unconstrained values, in the order in which they stand in z (that of NumPyro's guides).
    :ivar first: z at which the model was traced, (d,): uniform in (−2, 2), as ``init_to_uniform`` draws it.
    """

    potential: Callable[[jax.Array], jax.Array]
    constrain: Callable[[jax.Array], dict[str, jax.Array]]
    shapes: dict[str, tuple[int, ...]]
    first: jax.Array

    @property
    def size(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def split(self, z: Any) -> dict[str, Any]:
        """The sites' unconstrained values in z."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()])
        parts = jnp.split(z, ends[:-1])
        return {name: x.reshape(shape) for (name, shape), x in zip(self.shapes.items(), parts, strict=True)}

    def join(self, values: dict[str, Any]) -> jax.Array:
        """z of the sites' unconstrained values."""
        return jnp.concatenate([jnp.ravel(values[name]) for name in self.shapes])


def target(function: Callable[..., None], arguments: Data, seed: int = 0) -> Target:
    """The posterior in the precision at hand."""
    info = initialize_model(jax.random.key(seed), function, model_kwargs=arguments)
    shapes = {name: jnp.shape(x) for name, x in info.param_info.z.items()}
    bare = Target(info.potential_fn, info.postprocess_fn, shapes, jnp.zeros(()))

    def potential(z: jax.Array) -> jax.Array:
        return info.potential_fn(bare.split(z))

    def constrain(z: jax.Array) -> dict[str, jax.Array]:
        return info.postprocess_fn(bare.split(z))

    return Target(potential, constrain, shapes, bare.join(info.param_info.z))


def starts(function: Callable[..., None], arguments: Data, seeds: int) -> np.ndarray:
    """Where the fits of each seed start, (seeds, d): the same for every method, guide and precision."""
    with jax.enable_x64(True):
        return np.stack([np.asarray(target(function, arguments, seed).first) for seed in range(seeds)])
