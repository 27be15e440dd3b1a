# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Where ``fit`` would stop, and whether it should have gone on.

A stop is *false* if going on from there gains more than :data:`GAIN` nats: :data:`MORE_STEPS` further steps, or Adam
at its best rate on this problem. If the ELBO falls by more than that on the straight line between the two ends, the
gain lies in another basin: this is not counted as false, since the starts that arrive are counted for themselves.
"""

from typing import Any

import jax
import numpy as np

from numpyro_natgrad import History
from numpyro_natgrad.infer.convergence import converged
from numpyro_natgrad.infer.loop import STEPS_PER_CHUNK

from .fitting import Starts, Walk, gathered
from .judging import Judge

TOLERANCE = 0.05
#: Nats: a fit arrives within this of the best ELBO, and a stop is false beyond it.
GAIN = 0.3
MORE_STEPS = 1000
#: Points between the two ends at which a barrier is looked for.
POINTS = 9


def first_stops(walk: Walk) -> np.ndarray:
    """The step at which each start would stop; 0 if it would not."""
    loss = walk.records[0]
    return np.array([_first_stop(jax.tree.map(lambda x, i=i: x[i], walk.records)) for i in range(len(loss))])


def _first_stop(records: Any) -> int:
    loss, info = records
    fields = info.kl, info.step_size, info.newton_decrement, info.newton_decrement_error, info.limited, info.skipped
    history = History(loss, *fields, np.zeros(len(loss)))
    for step in range(STEPS_PER_CHUNK, len(loss) + 1, STEPS_PER_CHUNK):
        if converged(History(*(x[:step] for x in history)), TOLERANCE):
            return step
    return 0


def judged_stops(starts: Starts, walk: Walk, judge: Judge, best: float, rate: float) -> list[dict[str, Any]]:
    """Each stop: start, step, ELBO, Newton decrement, and the ELBOs and barriers of going on from there.

    A stop within ``GAIN`` of the best ELBO cannot gain more than that, and is not continued.
    """
    steps = first_stops(walk)
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
    further = {
        "ours": jax.device_get(starts.params(starts.walk(states, MORE_STEPS, every=MORE_STEPS).states[-1])),
        "adam": starts.adam(rate, params),
    }
    return {
        name: (judge.elbos(end), {i: _barrier(judge, params, end, i) for i in wanting}) for name, end in further.items()
    }


def _barrier(judge: Judge, start: Any, end: Any, i: int) -> float:
    """By how much the ELBO falls below its value at the start, on the line to the end; nats."""
    at = np.linspace(0, 1, POINTS + 2)[:-1]
    line = jax.tree.map(lambda a, b: np.stack([(1 - t) * a[i] + t * b[i] for t in at]), start, end)
    elbos = judge.elbos(line)
    return float(np.max(elbos[0] - elbos, initial=0.0))


def is_false(stop: dict[str, Any]) -> bool:
    """Whether a method gains by going on within the basin."""
    return any(_gains(stop, name) and not stop["barriers"][name] > GAIN for name in stop["continued"])


def is_other_basin(stop: dict[str, Any]) -> bool:
    """Whether a method gains by going on to another basin."""
    return any(_gains(stop, name) and stop["barriers"][name] > GAIN for name in stop["continued"])


def _gains(stop: dict[str, Any], name: str) -> bool:
    return stop["continued"][name] - stop["elbo"] > GAIN
