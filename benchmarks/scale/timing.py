# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Compiled steps of several optimizers on one loss, timed in turns in one process."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from numpyro.infer import SVI


def compiled_step(svi: SVI, *args: Any) -> tuple[Any, Any]:
    """``svi.update`` as a program that reuses the memory of the state, and the state that it starts from."""
    state = svi.init(jax.random.key(0), *args)
    return jax.jit(svi.update, donate_argnums=0).lower(state, *args).compile(), state


def in_turns(steps: Mapping[str, Callable[[], Any]], seconds: float, least: int = 5) -> dict[str, float]:
    """Median milliseconds of each step. The steps take turns, so that other load on the machine affects all of them.

    :param seconds: time for all turns together, after two that are not counted.
    :param least: the least number of turns.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    end, turn = np.inf, 0
    while turn < least + 2 or time.perf_counter() < end:
        if turn == 2:
            end = time.perf_counter() + seconds
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step())
            times[name].append(time.perf_counter() - start)
        turn += 1
    return {name: 1e3 * float(np.median(each[2:])) for name, each in times.items()}


def step_costs(svis: Mapping[str, SVI], args: tuple[Any, ...], seconds: float = 15.0) -> dict[str, dict[str, float]]:
    """Of each optimizer the milliseconds of a compiled step, and the megabytes of state and temporaries."""
    compiled, states = {}, {}
    for name, svi in svis.items():
        compiled[name], states[name] = compiled_step(svi, *args)

    def advance(name: str) -> Callable[[], Any]:
        def step() -> Any:
            states[name], loss = compiled[name](states[name], *args)
            return loss, states[name]

        return step

    milliseconds = in_turns({name: advance(name) for name in svis}, seconds)
    return {
        name: {"milliseconds": milliseconds[name], "megabytes": megabytes(program)}
        for name, program in compiled.items()
    }


def megabytes(program: Any) -> float:
    """XLA's count of a program's memory: the state that it updates, and its temporaries."""
    m = program.memory_analysis()
    return (m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes) / 1e6
