# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Run the missing cells of the table, one after the other or in several processes."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from numpyro_natgrad.infer.loop import STEPS_PER_CHUNK

from .cases import PROBLEMS
from .fitting import RATES, Starts
from .judging import Judge
from .problems import COMMON, SETTINGS
from .results import Cell, Store
from .stops import judged_stops
from .table import best_rate, gaps

#: A cell's process ends after so many cells, which releases the memory of its programs.
CELLS_PER_PROCESS = 6


class Plan(NamedTuple):
    """What to run.

    :ivar Store store: the folder of results.
    :ivar str label: of our results, to compare two versions of the package.
    :ivar tuple methods: of :data:`METHODS`.
    :ivar int starts: random starts of each cell.
    :ivar int steps: steps of the natural gradient.
    """

    store: Store
    label: str
    methods: tuple[str, ...]
    starts: int
    steps: int

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells that lack a result."""
        return [c for c in cells if any(not self.store.read(c, self.stored(m)) for m in self.methods)]

    def stored(self, method: str) -> str:
        """The name that results of a method are stored under."""
        return method if method == "adam" else f"{method}-{self.label}"


def cells(only: Iterable[str], guides: Iterable[str], settings: Iterable[str], *, tenth: bool) -> Iterator[Cell]:
    """The cells of the table: the common setting of all problems first."""
    for setting in sorted(settings, key=lambda name: name != COMMON):
        for problem in PROBLEMS.values():
            chosen = (not tenth or (problem.tenth and setting == COMMON)) and (not only or problem.name in only)
            if chosen and (setting == COMMON or problem.every_setting):
                yield from (Cell(problem.name, guide, setting) for guide in guides if guide in problem.guides)


def run(plan: Plan, wanted: list[Cell], jobs: int) -> list[str]:
    """Run the missing cells and return what failed."""
    missing, failed = plan.missing(wanted), []
    with tqdm(total=len(missing), smoothing=0.1) as bar:
        for cell, outcome in _outcomes(plan, missing, jobs):
            bar.write(f"{'/'.join(cell)}: {outcome.splitlines()[-1]}")
            bar.update()
            if outcome.startswith("Traceback"):
                failed.append(f"{'/'.join(cell)}: {outcome}")
    return failed


def _outcomes(plan: Plan, missing: list[Cell], jobs: int) -> Iterator[tuple[Cell, str]]:
    if jobs == 1:
        yield from ((cell, run_cell(plan, cell)) for cell in missing)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _pin, max_tasks_per_child=CELLS_PER_PROCESS) as pool:
        futures = {pool.submit(run_cell, plan, cell): cell for cell in missing}
        yield from ((futures[future], future.result()) for future in as_completed(futures))


def _pin() -> None:
    """A process keeps to one core: programs as small as these run no faster on several."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})


def run_cell(plan: Plan, cell: Cell) -> str:
    """Run the methods that are missing, and say how long each took; or the traceback of what failed."""
    said = []
    try:
        with jax.enable_x64(SETTINGS[cell.setting].x64):
            problem = PROBLEMS[cell.problem]
            starts = Starts(problem, cell.guide, SETTINGS[cell.setting], plan.starts)
            judge = Judge(problem, cell.guide, plan.starts)
            for method in METHODS:
                if method in plan.methods and not plan.store.read(cell, plan.stored(method)):
                    begin = time.perf_counter()
                    result = METHODS[method](plan, cell, starts, judge)
                    seconds = round(time.perf_counter() - begin, 1)
                    plan.store.write(cell, plan.stored(method), result | {"total": seconds})
                    said.append(f"{method} {seconds:.0f} s {result['seconds']}")
    except Exception:
        return traceback.format_exc()
    finally:
        jax.clear_caches()
    return ", ".join(said) or "stored meanwhile by another process"


def _adam(plan: Plan, cell: Cell, starts: Starts, judge: Judge) -> dict[str, Any]:
    begin = starts.params(starts.states)
    ends, seconds = {}, []
    for rate in RATES:
        clock = time.perf_counter()
        ends[rate] = starts.adam(rate, begin)[-1]
        seconds.append(round(time.perf_counter() - clock, 1))
    return {"elbos": {f"{rate:g}": judge.elbos(end).tolist() for rate, end in ends.items()}, "seconds": seconds}


def _ours(plan: Plan, cell: Cell, starts: Starts, judge: Judge) -> dict[str, Any]:
    clock = [time.perf_counter()]
    walk = starts.walk(starts.states, plan.steps)
    clock.append(time.perf_counter())
    marks = sorted({max(1, plan.steps // 3 // STEPS_PER_CHUNK) * STEPS_PER_CHUNK, plan.steps})
    elbos = {}
    for mark in marks:
        state = walk.states[mark // STEPS_PER_CHUNK - 1]
        elbos[str(mark)] = judge.elbos(starts.params(state)).tolist()
    clock.append(time.perf_counter())
    finite = [x for found in elbos.values() for x in found if np.isfinite(x)]
    best = max([plan.store.best(cell), *finite])
    adam = plan.store.read(cell, "adam")
    rate = best_rate({name: gaps(x, best) for name, x in adam["elbos"].items()}) if adam else "0.03"
    stops = judged_stops(starts, walk, judge, best, float(rate))
    clock.append(time.perf_counter())
    skipped = int(walk.records[1].skipped.sum())
    return {"elbos": elbos, "stops": stops, "skipped": skipped, "seconds": np.diff(clock).round(1).tolist()}


#: Methods in the order in which they are run, because each needs the results of those before.
METHODS = {"adam": _adam, "ours": _ours}
