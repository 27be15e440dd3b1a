# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Steps of ``SVI.update`` in chunks: one compiled loop of at most :data:`STEPS_PER_CHUNK` steps.

The number of steps is an input of the program, so that a shorter last chunk does not compile again. A program lives as
long as its ``SVI``, and is reused if that is fitted again with the same arguments. Fixed data are constants of the
program, as in ``SVI.run``, and a model may branch on their values. Minibatches are inputs, as under
``jit(svi.update)``.

A hundred small steps run for a tenth of a second, after ten seconds of compilation. On a CPU they are as fast and
compile in half the time if kernels are emitted directly instead of through MLIR, and optimized at LLVM's first level.
Without any optimization Hessian-vector products take thirteen times as long. jaxlib 0.10 has these options; 0.12 emits
kernels through MLIR only, so that the default options are used.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice, takewhile
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro.infer.svi import SVI, SVIState

from numpyro_natgrad.blocks.partition import Partition
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import Loss
from numpyro_natgrad.step.state import StepInfo

Function = TypeVar("Function", bound=Callable[..., Any])

#: Measured with jaxlib 0.10 by ``python -m benchmarks.posteriordb compiling``.
QUICK_OPTIONS = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}
#: Steps between two checks of convergence, so that at most four steps are superfluous. Not tuned.
STEPS_PER_CHUNK = 5


def quick_jit(function: Function) -> Function:
    """``jax.jit`` with :data:`QUICK_OPTIONS` on a CPU, if XLA knows them, and with the default options otherwise."""
    quick = jax.default_backend() == "cpu" and are_known()
    return cast(Function, jax.jit(function, compiler_options=QUICK_OPTIONS if quick else None))


@cache
def are_known() -> bool:
    """Whether this XLA knows the options, which are not part of the interface of JAX."""
    try:
        jax.jit(lambda: 0, compiler_options=QUICK_OPTIONS)()
    except jax.errors.JaxRuntimeError:
        return False
    return True


class StepRecords(NamedTuple):
    """Loss and :class:`.StepInfo` of each step of a chunk, ``(STEPS_PER_CHUNK,)``, padded after the last step."""

    loss: jax.Array
    info: StepInfo


Arguments = tuple[Any, ...]
Shapes = tuple[tuple[int, ...], ...]


class StaticInputs(NamedTuple):
    """What a program was compiled for; ``parts`` are model, guide, loss and optimizer, which an ``SVI`` may replace."""

    parts: tuple[Any, ...]
    args: Arguments
    kwargs: dict[str, Any]
    forward: bool


Chunk = Callable[[SVIState, int, Arguments], tuple[SVIState, StepRecords]]


class Program(NamedTuple):
    """A compiled chunk ``(state, steps, batches) -> (state, records)``, and its blocks for all shapes of ``batches``.

    A chunk has at most :data:`STEPS_PER_CHUNK` steps; ``batches`` are their stacked arguments, or ``()``.
    """

    chunk: Chunk
    partitions: dict[Shapes, Partition]


#: The last program of every ``SVI``, with what it was compiled for.
_COMPILED: "weakref.WeakKeyDictionary[SVI, tuple[StaticInputs, Program]]" = weakref.WeakKeyDictionary()


def compiled(svi: SVI, static: StaticInputs) -> Program:
    """The program for these inputs: the last one of this ``SVI`` if they are the same, else a new one."""
    known = _COMPILED.get(svi)
    if known is None or not is_same(known[0], static):
        known = snapshot(static), _program(weakref.ref(svi), static)
        _COMPILED[svi] = known
    return known[1]


def _program(svi: "weakref.ref[SVI]", static: StaticInputs) -> Program:
    partitions: dict[Shapes, Partition] = {}

    def chunk(state: SVIState, steps: int, batches: Arguments) -> tuple[SVIState, StepRecords]:
        owner = svi()
        assert owner is not None
        recording = _recording(owner, partitions, shapes(batches))

        def body(i: jax.Array, carry: tuple[SVIState, StepRecords]) -> tuple[SVIState, StepRecords]:
            args = static.args + jax.tree.map(lambda x: x[i], batches)
            state, loss = recording.update(
                carry[0], *args, forward_mode_differentiation=static.forward, **static.kwargs
            )
            new = StepRecords(loss=loss, info=owner.optim.info(state))
            return state, jax.tree.map(lambda all_, x: all_.at[i].set(x), carry[1], new)

        info = state.optim_state[1].info
        records = jax.tree.map(
            lambda x: jnp.zeros(STEPS_PER_CHUNK, jnp.result_type(x)), StepRecords(loss=jnp.zeros(()), info=info)
        )
        return lax.fori_loop(0, steps, body, (state, records))

    return Program(chunk=quick_jit(chunk), partitions=partitions)


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


def is_same(old: StaticInputs, new: StaticInputs) -> bool:
    """Whether a program that was compiled for the old inputs holds for the new ones."""
    trees: list[Any] = [jax.tree.structure(x) for x in (old, new)]
    leaves = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=False)  # as many where the structures agree
    return trees[0] == trees[1] and all(_same_leaf(*pair) for pair in leaves)


def _same_leaf(old: Any, new: Any) -> bool:
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):  # which may have been written to
        return old.dtype == new.dtype and np.array_equal(old, new)
    if isinstance(old, bool | int | float | str):
        return type(old) is type(new) and old == new
    return old is new


def snapshot(static: StaticInputs) -> StaticInputs:
    """A copy of arrays that may be written to."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, static)


class BatchIterator:
    """The arguments of the next steps: none for fixed data, stacked minibatches otherwise."""

    def __init__(self, batches: Iterable[Any] | None) -> None:
        self._batches: Iterator[Any] | None = None if batches is None else iter(batches)
        self._pending: list[tuple[Any, ...]] = []

    @property
    def fixed(self) -> bool:
        """Whether all steps have the same arguments."""
        return self._batches is None

    def peek(self) -> tuple[Any, ...] | None:
        """The arguments of the next step, without consuming them; ``None`` if there are none."""
        self._read(1)
        return self._pending[0] if self._pending else None

    def hold(self, most: int) -> tuple[Any, ...]:
        """At most ``most`` of the next batches, of equal shapes and types, stacked, without consuming them."""
        self._read(most)
        held = self._pending[:most]
        alike = list(takewhile(lambda batch: _signature(batch) == _signature(held[0]), held))
        return jax.tree.map(_stacked, *alike) if alike else ()

    def _read(self, count: int) -> None:
        if self._batches is not None:
            missing = max(count - len(self._pending), 0)
            self._pending += [_arguments(batch) for batch in islice(self._batches, missing)]

    def take(self, most: int) -> tuple[int, tuple[Any, ...]]:
        """The number of steps, at most ``most``, and their batches of equal shapes and types, stacked and padded."""
        if self.fixed:
            return most, ()
        group: list[tuple[Any, ...]] = []
        while len(group) < most and (batch := self.peek()) is not None:
            if group and _signature(group[0]) != _signature(batch):
                break
            group.append(self._pending.pop(0))
        padded = group + group[-1:] * (STEPS_PER_CHUNK - len(group))
        return len(group), jax.tree.map(_stacked, *padded) if group else ()


def _stacked(*arrays: Any) -> Any:
    return (jnp if isinstance(arrays[0], jax.Array) else np).stack(arrays)


def _arguments(batch: Any) -> tuple[Any, ...]:
    """The arguments of one step: the entries of a tuple or list; anything else is a single argument."""
    several = isinstance(batch, tuple | list) and not hasattr(batch, "_fields")
    batch = tuple(batch) if several else (batch,)
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), batch)


def _signature(batch: Arguments) -> Any:
    leaves, tree = jax.tree.flatten(batch)
    return tree, [(x.shape, x.dtype) for x in leaves]
