# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""A method that repeats one step, as one compiled loop that keeps its Gaussians at some of the steps.

Seconds are those of the whole loop, divided evenly among the steps: a clock between steps would cost more than a step.
The caller keeps the compiled loop for its other seeds.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .path import Path

State = Any


def marks(steps: int) -> np.ndarray:
    """Every step up to 60, then every few per cent."""
    return np.unique(np.minimum(np.r_[1:61, np.geomspace(60, max(steps, 60), 40).astype(int)], steps))


class Walk(NamedTuple):
    """A compiled loop of ``steps`` steps, and the seconds that compiling took."""

    loop: Callable[[State, jax.Array], tuple[Any, Any]]
    steps: int
    compiling: float

    def __call__(self, state: State, key: jax.Array, gradients: int) -> Path:
        """The path from this state; ``gradients`` are those that one step evaluates."""
        at = marks(self.steps)
        begin = time.perf_counter()
        loc, factor = jax.device_get(jax.block_until_ready(self.loop(state, key)))
        seconds = (time.perf_counter() - begin) * at / self.steps
        return Path(loc, factor, at, at * gradients, seconds, self.compiling)


def prepare(
    step: Callable[[Any, State, jax.Array], State], gaussian: Callable[[State], Any], state: State, steps: int
) -> Walk:
    """Compile.

    :param step: (index from 0, state, key) → state.
    :param gaussian: state → loc (d,) and factor.
    :param state: example with the shapes and dtypes of later calls.
    """

    def loop(state: State, key: jax.Array) -> Any:
        def until(carry: tuple[Any, State], mark: Any) -> tuple[tuple[Any, State], Any]:
            begin, state = carry
            state = lax.fori_loop(begin, mark, lambda t, s: step(t, s, jax.random.fold_in(key, t)), state)
            return (mark, state), gaussian(state)

        at = jnp.asarray(marks(steps))
        return lax.scan(until, (jnp.zeros_like(at[0]), state), at)[1]

    compiled, compiling = timed_compile(loop, state, jax.random.key(0))
    return Walk(compiled, steps, compiling)


def timed_compile(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], float]:
    """The function compiled for these arguments, and the seconds of compilation."""
    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled, time.perf_counter() - begin
