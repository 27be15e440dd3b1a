# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Every particle a value of its own, inside a loss that averages over particles it does not show."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir


def own(copies: jax.Array, key: jax.Array) -> jax.Array:
    """A particle's copy: row s of ``copies`` in the s-th particle, told apart by its key; outside a batch, row 0."""
    # A primitive, because only a batching rule sees that what it is called for is a batch of particles.
    return _own.bind(copies, _data(key))


_own = core.Primitive("own")


@_own.def_impl
def _first(copies: jax.Array, key: jax.Array) -> jax.Array:
    return copies[0]


@_own.def_abstract_eval
def _abstract(copies: Any, key: Any) -> Any:
    return copies.update(shape=copies.shape[1:])


def partner(key: jax.Array) -> jax.Array:
    """The key of a particle's partner: of 2h particles the second half has the keys of the first, one too many its own.

    Outside a batch, the key.
    """
    found = _partner.bind(_data(key))
    return jax.random.wrap_key_data(found, impl=jax.random.key_impl(key)) if _is_typed(key) else found


def _is_typed(key: jax.Array) -> bool:
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _data(key: jax.Array) -> jax.Array:
    return jax.random.key_data(key) if _is_typed(key) else key


def signs(particles: int) -> jax.Array:
    """1 for the first of a pair of partners and who has none, −1 for the second; ``(particles,)``."""
    half = particles // 2
    return jnp.concatenate([jnp.ones(half), -jnp.ones(half), jnp.ones(particles % 2)])


def _batch(args: tuple[jax.Array, jax.Array], dims: tuple[int | None, int | None]) -> tuple[jax.Array, int]:
    (copies, key), (along, by) = args, dims
    if along is not None:
        return jnp.moveaxis(copies, along, 0)[:, 0], 0
    size = key.shape[by or 0]
    return copies if size == copies.shape[0] else jnp.broadcast_to(copies[0], (size, *copies.shape[1:])), 0


def _transpose(slope: Any, copies: Any, key: jax.Array) -> tuple[jax.Array, None]:
    rest = jnp.zeros((copies.aval.shape[0] - 1, *slope.shape), slope.dtype)
    return jnp.concatenate([slope[None], rest]), None


ad.defjvp(_own, lambda tangent, copies, key: _own.bind(tangent, key), None)
ad.primitive_transposes[_own] = _transpose
batching.primitive_batchers[_own] = _batch
mlir.register_lowering(_own, mlir.lower_fun(_first, multiple_results=False))

_partner = core.Primitive("partner")


@_partner.def_impl
def _alone(key: jax.Array) -> jax.Array:
    return key


@_partner.def_abstract_eval
def _like(key: Any) -> Any:
    return key


def _paired(args: tuple[jax.Array], dims: tuple[int]) -> tuple[jax.Array, int]:
    keys = jnp.moveaxis(args[0], dims[0], 0)
    half = len(keys) // 2
    return jnp.concatenate([keys[:half], keys[:half], keys[2 * half :]]), 0


batching.primitive_batchers[_partner] = _paired
mlir.register_lowering(_partner, mlir.lower_fun(_alone, multiple_results=False))
