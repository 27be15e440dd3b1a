# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Steps of ``SVI.update`` in chunks: one compiled loop of at most :data:`STEPS_PER_CHUNK` steps.

The number of steps is an input of the program, so that a shorter last chunk does not compile again. A program lives as
long as its ``SVI``, and is reused if that is fitted again, with other data of the same shapes too (:mod:`.data`).
"""

import copy
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro.infer.svi import SVI, SVIState

from numpyro_natgrad.blocks.partition import Partition
from numpyro_natgrad.compilation.data import Arguments, Constants, Data, place, types
from numpyro_natgrad.compilation.initial import without_validation
from numpyro_natgrad.compilation.kept import KeptPrograms
from numpyro_natgrad.compilation.programs import in_background
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import Loss
from numpyro_natgrad.infer.history import History
from numpyro_natgrad.step.state import StepInfo

#: Steps between two checks of convergence, so that at most four steps are superfluous. Not tuned.
STEPS_PER_CHUNK = 5


class StepRecords(NamedTuple):
    """Loss and :class:`.StepInfo` of each step of a chunk, ``(STEPS_PER_CHUNK,)``, padded after the last step."""

    loss: jax.Array
    info: StepInfo


def history_of(records: StepRecords, steps: int, begin: float, end: float) -> History:
    """The first ``steps`` records, which were taken between two times, as a history."""
    loss, info = records
    seconds = begin + (end - begin) * np.arange(1, steps + 1) / steps
    fields = info.kl, info.step_size, info.newton_decrement, info.newton_decrement_error, info.limited, info.skipped
    return History(*(np.asarray(x)[:steps] for x in (loss, *fields, seconds)))


Chunk = Callable[[SVIState, int, Arguments, Data], tuple[SVIState, StepRecords]]
#: A chunk of several fits: ``(states, steps, active, data) -> (states, records)``.
StackedChunk = Callable[[SVIState, int, Any, Data], tuple[SVIState, StepRecords]]


class Program:
    """Chunks of steps of one ``SVI``, compiled for the shapes of states, minibatches and data.

    :ivar kept: its other programs.
    """

    def __init__(self, svi: "weakref.ref[SVI]", forward: bool) -> None:
        self._svi, self._forward = svi, forward
        self._compiled: dict[Any, tuple[Partition, Future[Chunk]]] = {}
        self._together: dict[Any, tuple[Partition, Future[StackedChunk]]] = {}
        self.kept = KeptPrograms()

    def compiled(self, state: SVIState, batches: Arguments, data: Data) -> "tuple[Partition, Future[Chunk]]":
        """Trace the steps and start to compile them, unless that was done before.

        :param batches: stacked arguments of the steps that follow those of ``data``, or ``()``.
        :return: the blocks that the steps update, and the program ``(state, steps, batches, data) -> (state, records)``
            of at most :data:`STEPS_PER_CHUNK` steps.
        """
        key = types((state, batches)), data.signature()
        if key not in self._compiled:
            found: list[Partition] = []
            steps = partial(self.steps, found=found)
            # What is spread over devices stays as it is spread; XLA decides about the rest.
            kept = jax.tree.map(place, state), None
            traced = jax.jit(steps, out_shardings=kept).trace(state, STEPS_PER_CHUNK, batches, data)
            self._compiled[key] = found[0], in_background(traced)
        return self._compiled[key]

    def together(self, states: SVIState, data: Data, axes: Any) -> "tuple[Partition, Future[StackedChunk]]":
        """The same for stacked states, in one ``vmap``.

        :param axes: the axes of ``data``, as for ``jax.vmap``.
        :return: the program leaves states as they are where ``active`` is false.
        """
        key = types(states), data.signature(), tuple(axes.inputs)
        if key not in self._together:
            found: list[Partition] = []
            one = lambda state, steps, data: self.steps(state, steps, (), data, found)
            each = jax.vmap(one, in_axes=(0, None, axes))

            def chunk(states: SVIState, steps: int, active: jax.Array, data: Data) -> tuple[SVIState, StepRecords]:
                new, records = each(states, steps, data)
                chosen = lambda x, y: jnp.where(active.reshape(active.shape + (1,) * (jnp.ndim(x) - 1)), x, y)
                return jax.tree.map(chosen, new, states), records

            active = jax.ShapeDtypeStruct(jnp.shape(states.optim_state[0]), bool)
            traced = jax.jit(chunk).trace(states, STEPS_PER_CHUNK, active, data)
            self._together[key] = found[0], in_background(traced)
        return self._together[key]

    def constrained(self, state: SVIState) -> "Future[Callable[[SVIState], Params]]":
        """``svi.get_params``."""
        owner = self._svi()
        assert owner is not None
        return self.kept("constrained", owner.get_params, state)

    def steps(
        self, state: SVIState, steps: int, batches: Arguments, data: Data, found: list[Partition]
    ) -> tuple[SVIState, StepRecords]:
        """The steps as a function to be traced; the partition of the parameters is appended to ``found``."""
        owner = self._svi()
        assert owner is not None
        recording = _recording(owner, found)
        args, kwargs = data.arguments()

        def body(i: jax.Array, carry: tuple[SVIState, StepRecords]) -> tuple[SVIState, StepRecords]:
            here = args + jax.tree.map(lambda x: x[i], batches)
            state, loss = recording.update(carry[0], *here, forward_mode_differentiation=self._forward, **kwargs)
            new = StepRecords(loss=loss, info=owner.optim.info(state))
            return state, jax.tree.map(lambda all_, x: all_.at[i].set(x), carry[1], new)

        info = state.optim_state[1].info
        records = jax.tree.map(
            lambda x: jnp.zeros(STEPS_PER_CHUNK, jnp.result_type(x)), StepRecords(loss=jnp.zeros(()), info=info)
        )
        return lax.fori_loop(0, steps, body, (state, records))


#: The last program of every ``SVI``, with its model, guide, loss and optimizer, which an ``SVI`` may replace.
_PROGRAMS: "weakref.WeakKeyDictionary[SVI, tuple[Constants, Program]]" = weakref.WeakKeyDictionary()


def program_of(svi: SVI, forward: bool) -> Program:
    """The program of this ``SVI``: the last one if its parts are the same, else a new one."""
    key = Constants(None, (svi.model, svi.guide, svi.loss, svi.optim, forward))
    known = _PROGRAMS.get(svi)
    if known is None or known[0] != key:
        known = _PROGRAMS[svi] = key, Program(weakref.ref(svi), forward)
    return known[1]


def _recording(svi: SVI, found: list[Partition]) -> SVI:
    """A copy of ``svi`` whose optimizer, a copy too, appends the partition that it finds in a loss to ``found``."""
    recording, optimizer = copy.copy(svi), copy.copy(svi.optim)

    def partition(fn: Loss, params: Params, forward: bool) -> Partition:
        found.append(svi.optim._partition(fn, params, forward))
        return found[-1]

    recording.optim, optimizer._partition = optimizer, partition
    recording.guide = without_validation(svi.guide)
    return recording
