# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Where ``fit`` would stop, and whether it should have gone on.

A stop is *false* if going on from there gains more than :data:`GAIN` nats: :data:`MORE_STEPS` further steps, or Adam
at its best rate on this problem. If the ELBO falls by more than that on the way there and on the straight line too, the
gain lies in another basin: this is not counted as false, since the starts that arrive are counted for themselves.
"""

import copy
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from numpyro_natgrad import History
from numpyro_natgrad.compilation.data import split
from numpyro_natgrad.infer.convergence import converged
from numpyro_natgrad.infer.loop import STEPS_PER_CHUNK
from numpyro_natgrad.infer.stop_check import StopCheck

from .fitting import MARKS, Starts, Walk, gathered
from .judging import Judge

TOLERANCE = 0.05
#: Nats: a fit arrives within this of the best ELBO, and a stop is false beyond it.
GAIN = 0.3
MORE_STEPS = 1000
#: Points of the straight line at which the ELBO is evaluated.
POINTS = 9


def granted_stops(starts: Starts, walk: Walk) -> np.ndarray:
    """The step at which ``fit`` would stop from each start; 0 if it would not within the walk."""
    proposed = [list(proposals(walk, i)) for i in range(starts.count)]
    if not any(proposed):
        return np.zeros(starts.count, int)
    svi = starts.set_up()
    data = split(svi, starts.args, starts.problem.training)
    first, steps = StopCheck(svi), []
    for start, at in enumerate(proposed):
        check = copy.copy(first)

        def stops(past: History, check: StopCheck = check, start: int = start) -> bool:
            state = _state(walk, start, past.steps)
            return check.grants(past, state, data, past.steps, starts.particles, None, TOLERANCE)

        steps.append(next((past.steps for past in at if stops(past)), 0))
        first._judge = check._judge  # compiled once for all starts
    return np.array(steps)


def _state(walk: Walk, start: int, step: int) -> Any:
    states = gathered(walk, np.full(len(walk.records[0]), step))
    return jax.tree.map(lambda x: x[start], states)


def proposals(walk: Walk, start: int) -> Iterator[History]:
    """The histories up to the steps after which a stop may be proposed, in their order."""
    loss, info = jax.tree.map(lambda x: x[start], walk.records)
    fields = info.kl, info.step_size, info.newton_decrement, info.newton_decrement_error, info.limited, info.skipped
    history = History(loss, *fields, np.zeros(len(loss)))
    for step in range(STEPS_PER_CHUNK, len(loss) + 1, STEPS_PER_CHUNK):
        past = History(*(x[:step] for x in history))
        if converged(past, TOLERANCE):
            yield past


def judged_stops(starts: Starts, walk: Walk, judge: Judge, best: float, rate: float) -> list[dict[str, Any]]:
    """Each stop: start, step, ELBO, Newton decrement, and the ELBOs and barriers of going on from there.

    A stop within ``GAIN`` of the best ELBO cannot gain more than that, and is not continued.
    """
    steps = granted_stops(starts, walk)
    stopped = [i for i, step in enumerate(steps) if step]
    if not stopped:
        return []
    ends = np.where(steps > 0, steps, len(walk.states) * STEPS_PER_CHUNK)
    states = gathered(walk, ends)
    params = jax.device_get(starts.params(states))
    elbos = judge.elbos(params)
    best = max(best, np.max(elbos[np.isfinite(elbos)], initial=-np.inf))
    wanting = [i for i in stopped if not elbos[i] >= best - GAIN]
    continued = _continued(starts, states, params, judge, wanting, rate) if wanting else {}
    decrements = walk.records[1].newton_decrement
    return [
        {
            "start": i,
            "step": int(steps[i]),
            "elbo": float(elbos[i]),
            "decrement": float(decrements[i, steps[i] - 1]),
            "continued": {name: float(found[i]) for name, (found, _) in continued.items() if i in wanting},
            "barriers": {name: barriers[i] for name, (_, barriers) in continued.items() if i in wanting},
        }
        for i in stopped
    ]


def _continued(
    starts: Starts, states: Any, params: Any, judge: Judge, wanting: list[int], rate: float
) -> dict[str, tuple[np.ndarray, dict[int, float]]]:
    """ELBOs after going on, and the ELBOs lost on the way there, by start."""
    walk = starts.walk(states, MORE_STEPS, every=MORE_STEPS // MARKS)
    ways = {
        "ours": [jax.device_get(starts.params(x)) for x in walk.states],
        "adam": starts.adam(rate, params),
    }
    return {
        name: (judge.elbos(way[-1]), {i: _barrier(judge, [params, *way], i) for i in wanting})
        for name, way in ways.items()
    }


def _barrier(judge: Judge, way: list[Any], start: int) -> float:
    """By how much the ELBO falls below its first value, on the way or on the straight line to its end; nats.

    The less of the two counts: the line leaves a curved valley, and the way of a large step size is rough.
    """
    way = [jax.tree.map(lambda x: np.asarray(x[start], np.float64), point) for point in way]
    at = np.linspace(0, 1, POINTS + 2)[1:-1]
    line = [jax.tree.map(lambda a, b, t=t: (1 - t) * a + t * b, way[0], way[-1]) for t in at]
    elbos = judge.elbos(jax.tree.map(lambda *xs: np.stack(xs), *way, *line))
    elbos = np.where(np.isnan(elbos), -np.inf, elbos)
    falls = np.where(elbos == elbos[0], 0.0, elbos[0] - elbos)  # both may be infinite
    return float(max(min(np.max(falls[: len(way)]), np.max(falls[len(way) :])), 0.0))


def is_false(stop: dict[str, Any]) -> bool:
    """Whether a method gains by going on within the basin."""
    return any(_gains(stop, name) and not stop["barriers"][name] > GAIN for name in stop["continued"])


def is_other_basin(stop: dict[str, Any]) -> bool:
    """Whether a method gains by going on to another basin."""
    return any(_gains(stop, name) and stop["barriers"][name] > GAIN for name in stop["continued"])


def _gains(stop: dict[str, Any], name: str) -> bool:
    return stop["continued"][name] - stop["elbo"] > GAIN
