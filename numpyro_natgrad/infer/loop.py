# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Steps of ``SVI.update`` by the chunk: one compiled loop of at most :data:`CHUNK` steps, whose number is data.

A last chunk that is shorter is the same program. What is compiled lives as long as its ``SVI`` and is used again where
the same ``SVI`` is given the same arguments. Fixed data are constants of the program, as in ``SVI.run``, so that a
model may look at its values; minibatches are its inputs, as under ``jit(svi.update)``.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro.infer.svi import SVI, SVIState

from numpyro_natgrad.blocks.partition import Partition
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import Loss
from numpyro_natgrad.infer.compilation import quickly
from numpyro_natgrad.step.state import StepInfo

#: Steps between two looks at the certificate.
CHUNK = 5


class Records(NamedTuple):
    """Losses and reports of a chunk's steps, each array of shape ``(CHUNK,)``; the leading ones count."""

    loss: jax.Array
    info: StepInfo


Arguments = tuple[Any, ...]
Shapes = tuple[tuple[int, ...], ...]


class Constant(NamedTuple):
    """What a compiled chunk holds on to.

    :ivar parts: model, guide, loss and optimizer of the ``SVI``, which can be given others.
    :ivar args: of every step; ``kwargs`` likewise.  :ivar forward: whether differentiation is forward.
    """

    parts: tuple[Any, ...]
    args: Arguments
    kwargs: dict[str, Any]
    forward: bool


Chunk = Callable[[SVIState, int, Arguments], tuple[SVIState, Records]]


class Program(NamedTuple):
    """A compiled chunk, and the partition of the loss that it was traced for.

    :ivar chunk: ``(state, steps, batches) -> (state, records)``, of :data:`CHUNK` steps at most; ``batches`` are the
        stacked arguments of the steps, or ``()``.
    :ivar partitions: the blocks of parameters, by the shapes of ``batches`` (:func:`shapes`).
    """

    chunk: Chunk
    partitions: dict[Shapes, Partition]


#: The last program of every ``SVI``, with what it was compiled for.
_COMPILED: "weakref.WeakKeyDictionary[SVI, tuple[Constant, Program]]" = weakref.WeakKeyDictionary()


def compiled(svi: SVI, constant: Constant) -> Program:
    """The program for these constants: the last one of this ``SVI`` if they are the same."""
    known = _COMPILED.get(svi)
    if known is None or not _same(known[0], constant):
        known = _snapshot(constant), _program(weakref.ref(svi), constant)
        _COMPILED[svi] = known
    return known[1]


def _program(svi: "weakref.ref[SVI]", constant: Constant) -> Program:
    partitions: dict[Shapes, Partition] = {}

    def chunk(state: SVIState, steps: int, batches: Arguments) -> tuple[SVIState, Records]:
        owner = svi()
        assert owner is not None
        recording = _recording(owner, partitions, shapes(batches))

        def body(i: jax.Array, carry: tuple[SVIState, Records]) -> tuple[SVIState, Records]:
            args = constant.args + jax.tree.map(lambda x: x[i], batches)
            state, loss = recording.update(
                carry[0], *args, forward_mode_differentiation=constant.forward, **constant.kwargs
            )
            new = Records(loss=loss, info=owner.optim.info(state))
            return state, jax.tree.map(lambda all_, x: all_.at[i].set(x), carry[1], new)

        info = state.optim_state[1].info
        records = jax.tree.map(lambda x: jnp.zeros(CHUNK, jnp.result_type(x)), Records(loss=jnp.zeros(()), info=info))
        return lax.fori_loop(0, steps, body, (state, records))

    return Program(chunk=quickly(chunk), partitions=partitions)


def _recording(svi: SVI, partitions: dict[Shapes, Partition], key: Shapes) -> SVI:
    """A copy of ``svi`` whose optimizer, a copy too, writes the partition that it finds in a loss to ``partitions``."""
    recording, optimizer = copy.copy(svi), copy.copy(svi.optim)

    def partition(fn: Loss, params: Params, forward: bool) -> Partition:
        partitions[key] = svi.optim._partition(fn, params, forward)
        return partitions[key]

    recording.optim, optimizer._partition = optimizer, partition
    return recording


def shapes(batches: Arguments) -> Shapes:
    """The shapes of all arrays."""
    return tuple(x.shape for x in jax.tree.leaves(batches))


def _same(old: Constant, new: Constant) -> bool:
    trees: list[Any] = [jax.tree.structure(x) for x in (old, new)]
    leaves = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=False)  # as many where the structures agree
    return trees[0] == trees[1] and all(_same_leaf(*pair) for pair in leaves)


def _same_leaf(old: Any, new: Any) -> bool:
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):  # which may have been written to
        return old.dtype == new.dtype and np.array_equal(old, new)
    if isinstance(old, bool | int | float | str):
        return type(old) is type(new) and old == new
    return old is new


def _snapshot(constant: Constant) -> Constant:
    return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, constant)


class Feed:
    """Hands out the arguments of the next steps: none for fixed data, stacked minibatches otherwise."""

    def __init__(self, batches: Iterable[Any] | None) -> None:
        self._batches: Iterator[Any] | None = None if batches is None else iter(batches)
        self._pending: list[tuple[Any, ...]] = []

    @property
    def fixed(self) -> bool:
        """Whether all steps have the same arguments."""
        return self._batches is None

    def peek(self) -> tuple[Any, ...] | None:
        """The arguments of the next step, which stay; ``None`` if there is none."""
        if not self._pending and self._batches is not None:
            self._pending = [_arguments(b) for b in _first(self._batches)]
        return self._pending[0] if self._pending else None

    def take(self, most: int) -> tuple[int, tuple[Any, ...]]:
        """How many steps, ``most`` at most, and their arguments, stacked and padded to :data:`CHUNK`."""
        if self.fixed:
            return most, ()
        group: list[tuple[Any, ...]] = []
        while len(group) < most and (batch := self.peek()) is not None:
            if group and _signature(group[0]) != _signature(batch):
                break
            group.append(batch)
            self._pending = []
        padded = group + group[-1:] * (CHUNK - len(group))
        return len(group), jax.tree.map(_stacked, *padded) if group else ()


def _stacked(*arrays: Any) -> Any:
    return (jnp if isinstance(arrays[0], jax.Array) else np).stack(arrays)


def _first(batches: Iterator[Any]) -> list[Any]:
    for batch in batches:
        return [batch]
    return []


def _arguments(batch: Any) -> tuple[Any, ...]:
    """A batch is the tuple (or list) of a step's arguments; anything else is the only one of them."""
    several = isinstance(batch, tuple | list) and not hasattr(batch, "_fields")
    batch = tuple(batch) if several else (batch,)
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), batch)


def _signature(batch: Arguments) -> Any:
    leaves, tree = jax.tree.flatten(batch)
    return tree, [(x.shape, x.dtype) for x in leaves]
