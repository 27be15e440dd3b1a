# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""When the judge of a fit is asked: at a proposed stop, by draws that the fit has paid for, and then more rarely."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_natgrad.compilation.data import Arguments, Data, types
from numpyro_natgrad.infer.convergence import Judgement, converged
from numpyro_natgrad.infer.history import History
from numpyro_natgrad.infer.judge import MIN_HELD, Judge, judge_of, number_held
from numpyro_natgrad.infer.judge_rule import JUDGE


class StopCheck:
    """The judge of a fit: compiled beside the first steps, and consulted ever more rarely after refusals.

    :ivar last: the last judgement, ``at`` the number of steps before it, and ``next`` that before the next one.
    :ivar seconds: seconds that all judgements took, with compilation.
    :ivar few: whether too few minibatches were left for a judgement.
    """

    def __init__(self, svi: SVI, steps: int = 0) -> None:
        self._svi, self.next = svi, steps
        self._judge: tuple[Any, Judge] | None = None
        self.last: Judgement | None = None
        self.at, self.seconds, self.few = 0, 0.0, False

    def compile(self, state: SVIState, data: Data, batches: Arguments = ()) -> Judge:
        """Start to compile the judge for these shapes, unless that was done before.

        :param batches: stacked arguments of at least one minibatch, or ``()``.
        """
        first = jax.tree.map(lambda x: x[0], batches)
        if self._judge is None or self._judge[0] != types(first):
            params = self._svi.optim.get_params(state.optim_state)
            judge = judge_of(self._svi, state.mutable_state, params, data, first)
            judge.compile(params, state.rng_key, batches)
            self._judge = types(first), judge
        return self._judge[1]

    def grants(
        self,
        history: History,
        state: SVIState,
        data: Data,
        steps: int,
        particles: float,
        hold: Callable[[int], Arguments] | None,
        tolerance: float,
    ) -> bool:
        """Whether the stop that the last steps propose, after so many in all, is granted.

        :param hold: the stacked arguments of at most so many coming steps; ``None`` for fixed data.
        """
        if steps < self.next:
            return False
        begin, batches = time.perf_counter(), ()
        if hold is not None:
            batches = hold(int(np.clip(steps // JUDGE.steps_per_batch, MIN_HELD, JUDGE.max_held)))
            self.few = number_held(batches) < MIN_HELD
            if self.few:
                return False
        params = self._svi.optim.get_params(state.optim_state)
        draws = JUDGE.draws * steps * (particles if math.isfinite(particles) else 1)
        judge = self.compile(state, data, batches)
        self.last = judge(params, state.rng_key, tolerance, batches, draws)
        paid = float(np.clip(self.last.required / draws, JUDGE.growth, JUDGE.noisy_growth))
        self.at, self.next = steps, math.ceil(paid * steps)
        self.seconds += time.perf_counter() - begin
        return self.last.grants(tolerance) and (
            not self.last.abstains or converged(history, tolerance, is_judged=False)
        )
