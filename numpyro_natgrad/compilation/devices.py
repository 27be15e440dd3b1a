# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Arrays that are spread over several devices, perhaps of several processes: what JAX does not do by itself for them.

Such an array has to be an input of a program, because JAX refuses it as a constant if other processes hold a part of
it. It stays in parts: only what a person or the host needs is fetched, and then whole, into every process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from numpyro_natgrad.compilation.data import place


def is_spread(x: Any) -> bool:
    """Whether an array lies on several devices, in parts or in copies."""
    return place(x) is not None


def fetch(tree: Any) -> Any:
    """The arrays of a tree in NumPy, whole in every process."""

    def whole(x: Any) -> Any:
        in_parts = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return multihost_utils.process_allgather(x, tiled=True) if in_parts else x

    return jax.device_get(jax.tree.map(whole, tree))


def placed_like(values: Any, like: Any) -> Any:
    """Arrays of NumPy, spread as those of another tree are where these have the same shape, and else as they are."""

    def put(x: np.ndarray, y: Any) -> Any:
        fits = is_spread(y) and x.shape == y.shape
        return jax.make_array_from_callback(x.shape, y.sharding, lambda part: x[part]) if fits else x

    return jax.tree.map(put, values, like)


@contextmanager
def explained_loss() -> Iterator[None]:
    """Say what an error of the runtime means if there are several processes: usually that one of them has died."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1:
            error.add_note(
                f"raised in process {jax.process_index()} of {jax.process_count()}, most likely because another one "
                "has ended. This one cannot go on: start all of them again, from the last state that was saved."
            )
        raise


def check_processes(tree: Any) -> None:
    """Refuse arrays of several processes that do not hash strings alike.

    NumPyro sums over sets of names, in the order of their hashes. The processes would make different programs, and add
    up what does not belong together.

    :raises RuntimeError: if the hashes differ.
    """
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)):
        return
    found = multihost_utils.process_allgather(np.int32(hash("site") % 2**31))
    if len(set(found.tolist())) > 1:
        raise RuntimeError(
            "the processes order sets of names differently, and would compile different programs: expected the same "
            "hashes of strings in all of them. Set the environment variable `PYTHONHASHSEED=0` before each starts."
        )
