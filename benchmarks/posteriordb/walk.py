# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""A method that takes the same step over and over, as one compiled loop that keeps its Gaussians at some of the steps.

Seconds are those of the whole loop, shared out evenly among the steps: a clock between them would cost more than they.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .path import Path

State = Any


def marks(steps: int) -> np.ndarray:
    """Every step up to 60, then every few per cent."""
    return np.unique(np.minimum(np.r_[1:61, np.geomspace(60, max(steps, 60), 40).astype(int)], steps))


def walk(
    step: Callable[[Any, State, jax.Array], State],
    gaussian: Callable[[State], tuple[Any, Any]],
    state: State,
    key: jax.Array,
    steps: int,
    gradients: int,
) -> Path:
    """Take ``steps`` steps.

    :param step: (index from 0, state, key) → state.
    :param gaussian: state → loc (d,) and factor.
    :param gradients: evaluated in each step.
    """
    at = marks(steps)

    def until(carry: tuple[Any, State], mark: Any) -> tuple[tuple[Any, State], Any]:
        begin, state = carry
        state = lax.fori_loop(begin, mark, lambda t, s: step(t, s, jax.random.fold_in(key, t)), state)
        return (mark, state), gaussian(state)

    def run(state: State) -> tuple[Any, Any]:
        return lax.scan(until, (jnp.array(0), state), jnp.asarray(at))[1]

    begin = time.perf_counter()
    compiled = jax.jit(run).lower(state).compile()
    compiling = time.perf_counter() - begin
    begin = time.perf_counter()
    loc, factor = jax.device_get(jax.block_until_ready(compiled(state)))
    seconds = (time.perf_counter() - begin) * at / steps
    return Path(loc, factor, at, at * gradients, seconds, compiling)
