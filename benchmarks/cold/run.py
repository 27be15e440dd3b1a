# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Run the missing measurements, one process after the other, round by round.

A round of a cell measures all lines, ours beside Adam. The cache folder of a process is its own: empty, or a copy.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from .jobs import Cell, Job, cells, chosen, rounds
from .results import Store

#: Seconds after which a measurement is stopped.
LIMIT = 900
#: Where the package keeps its cache, or ``off``; and the settings of JAX's cache, which would be used instead.
CACHE = "NUMPYRO_NATGRAD_CACHE"
JAX_CACHE = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")
#: The cache folders of a round. Three lines find what another one has left there, which is run first if it is missing.
FOLDERS = {
    "nothing": "own", "same": "own", "others": "others", "refit": "refit", "judged": "judged", "judged_again": "judged",
    "pymc": "pymc", "pymc_again": "pymc",
}  # fmt: skip
SECOND = {"same": ("fill", "own"), "judged_again": ("judged", "judged"), "pymc_again": ("pymc", "pymc")}


class Plan(NamedTuple):
    """What to run.

    :ivar Store store: the results of this environment.
    :ivar pathlib.Path checkout: of posteriordb.
    :ivar tuple lines: of the table.
    :ivar int rounds: of each line.
    """

    store: Store
    checkout: pathlib.Path
    lines: tuple[str, ...]
    rounds: int

    def missing(self, cell: Cell, turn: int) -> list[Job]:
        """The jobs of a cell's round that have no result."""
        jobs = (cell.job(line, turn) for line in self.lines if turn < rounds(line, self.rounds))
        return [job for job in jobs if not self.store.read(job)]


def run(plan: Plan, wanted: list[Cell]) -> list[str]:
    """Run the missing jobs and return what failed."""
    todo = [(cell, jobs) for turn in range(plan.rounds) for cell in wanted if (jobs := plan.missing(cell, turn))]
    failed: list[str] = []
    with tqdm(total=sum(len(jobs) for _, jobs in todo), unit="process") as bar:
        if any(job.line == "others" for _, jobs in todo for job in jobs):
            failed += prepare(plan, wanted, bar)
        for cell, jobs in todo:
            with tempfile.TemporaryDirectory() as scratch:
                failed += _round(plan, cell, jobs, pathlib.Path(scratch), bar)
    return failed


def _round(plan: Plan, cell: Cell, jobs: list[Job], scratch: pathlib.Path, bar: tqdm) -> Iterator[str]:
    """The jobs of a round, and what failed of them."""
    for job in jobs:
        before, folder = SECOND.get(job.line, ("", ""))
        if before and not (scratch / folder).exists():
            outcome(plan, cell.job(before, job.round), scratch / folder, bar)
        found = outcome(plan, job, _cache(plan, cell, job, scratch), bar)
        bar.update()
        if isinstance(found, str):
            yield f"{job}: {found}"
        else:
            plan.store.write(job, found)


def _cache(plan: Plan, cell: Cell, job: Job, scratch: pathlib.Path) -> pathlib.Path | None:
    """The folder for the cache of a job; none if it has none."""
    if job.line == "others":
        shutil.copytree(plan.store.prepared(cell), scratch / "others")
    return scratch / FOLDERS[job.line] if job.line in FOLDERS else None


def outcome(plan: Plan, job: Job, cache: pathlib.Path | None, bar: tqdm) -> dict[str, Any] | str:
    """The result of a job in a new process, or the end of what it said before it failed."""
    bar.set_postfix_str(str(job))
    arguments = [json.dumps(job), str(plan.checkout.absolute())]
    begin = time.perf_counter()
    try:
        process = subprocess.run(
            [sys.executable, "-m", "benchmarks.cold.worker", *arguments],
            env=_environment(cache), capture_output=True, text=True, timeout=LIMIT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"longer than {LIMIT} seconds"
    if process.returncode:
        return process.stderr[-2000:]
    return json.loads(process.stdout.splitlines()[-1]) | {"process": time.perf_counter() - begin}


def _environment(cache: pathlib.Path | None) -> dict[str, str]:
    """The variables of a worker: no cache of JAX's, and one folder for all other caches."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(JAX_CACHE)}
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        kept["PYTENSOR_FLAGS"] = f"base_compiledir={cache}"
    return kept | {CACHE: "off" if cache is None else str(cache)}


def prepare(plan: Plan, wanted: Iterable[Cell], bar: tqdm) -> list[str]:
    """Fill a cache with fits of all other posteriors for each wanted cell, and return what failed."""
    failed: list[str] = []
    missing = [cell for cell in wanted if not plan.store.prepared(cell).exists()]
    with tempfile.TemporaryDirectory() as scratch:
        for guide in sorted({cell.guide for cell in missing}):
            empty = pathlib.Path(scratch) / guide
            empty.mkdir(mode=0o700)
            _leave_out(plan, empty, every(guide), {c for c in missing if c.guide == guide}, bar, failed)
    return failed


def every(guide: str) -> list[Cell]:
    """All posteriors with this guide."""
    return list(cells(chosen([]), [guide]))


def _leave_out(
    plan: Plan, folder: pathlib.Path, left: list[Cell], wanted: set[Cell], bar: tqdm, failed: list[str]
) -> None:
    """Split the posteriors that this cache has not been used by until one is left, and keep the cache for that one.

    Each half is fitted into a copy for the other half. All twelve take 43 fits instead of 132.
    """
    if not wanted & set(left):
        return
    if len(left) == 1:
        kept = plan.store.prepared(left[0])
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, kept)
        return
    middle = len(left) // 2
    for name, fitted, rest in (("a", left[:middle], left[middle:]), ("b", left[middle:], left[:middle])):
        if wanted & set(rest):
            copy = folder.with_name(f"{folder.name}{name}")
            shutil.copytree(folder, copy)
            for cell in fitted:
                found = outcome(plan, cell.job("fill", 0), copy, bar)
                failed += [f"{cell.job('fill', 0)}: {found}"] if isinstance(found, str) else []
            _leave_out(plan, copy, rest, wanted, bar, failed)
