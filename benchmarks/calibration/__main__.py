# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.calibration``: run what is missing of the benchmark, and print its table.

Every problem is a file of its own, which is written after each fit, so that a run can be interrupted and resumed.
"""

import argparse
import json
import multiprocessing
import pathlib
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import jax
from tqdm.auto import tqdm

from ..starts.cases import PROBLEMS
from . import measure
from .table import table

FOLDER = pathlib.Path("benchmarks/results/calibration")
OUTPUT = pathlib.Path("docs/benchmarks/calibration.md")
HEADING = "## The table\n\n"


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(PROBLEMS), choices=PROBLEMS, metavar="NAME")
    parser.add_argument("--starts", type=int, default=1, help="random starts of each guide")
    parser.add_argument("--cache", type=pathlib.Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--table", action="store_true", help="print the table of the stored results, and run nothing")
    parser.add_argument("--document", action="store_true", help=f"write the table to {OUTPUT}")
    options = parser.parse_args()
    if not options.table:
        run(options.only, options.starts, options.cache, options.jobs)
    stored = {name: read(options.cache, name) for name in options.only}
    text = table({name: x for name, x in stored.items() if x})
    print(text)
    if options.document:
        OUTPUT.write_text(OUTPUT.read_text().partition(HEADING)[0] + HEADING + text)


def run(names: list[str], starts: int, cache: pathlib.Path, jobs: int) -> None:
    """Run the problems with a progress bar."""
    with tqdm(total=len(names), smoothing=0.1) as bar:
        if jobs == 1:
            for name in names:
                bar.write(f"{name}: {run_problem(name, starts, cache)}")
                bar.update()
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, max_tasks_per_child=6) as pool:
            futures = {pool.submit(run_problem, name, starts, cache): name for name in names}
            for future in as_completed(futures):
                bar.write(f"{futures[future]}: {future.result()}")
                bar.update()


def run_problem(name: str, starts: int, cache: pathlib.Path) -> str:
    """Run what is missing of a problem, and say how it went."""
    problem = PROBLEMS[name]
    stored = read(cache, name)
    try:
        with jax.enable_x64(True):
            if "reference" not in stored:
                why = measure.dropped(problem)
                stored = {"reference": {"dropped": why} if why else measure.reference(problem), "rows": {}}
                write(cache, name, stored)
            if "dropped" in stored["reference"]:
                return stored["reference"]["dropped"]
            for start in range(starts):
                for guide in problem.guides:
                    if f"{guide} {start}" not in stored["rows"]:
                        rows = measure.rows(problem, guide, start, stored["reference"]["sites"])
                        stored["rows"][f"{guide} {start}"] = rows
                        write(cache, name, stored)
    except Exception:
        return traceback.format_exc()
    finally:
        jax.clear_caches()
    return "; ".join(f"{row}: {' → '.join(x.get('advice', 'error') for x in y)}" for row, y in stored["rows"].items())


def read(cache: pathlib.Path, name: str) -> dict[str, Any]:
    """What is stored of a problem, if the problem has not changed since."""
    path = cache / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("fingerprint") == PROBLEMS[name].fingerprint else {}


def write(cache: pathlib.Path, name: str, stored: dict[str, Any]) -> None:
    """Store what is known of a problem."""
    cache.mkdir(parents=True, exist_ok=True)
    part = cache / f"{name}.part"
    part.write_text(json.dumps(stored | {"fingerprint": PROBLEMS[name].fingerprint}))
    part.replace(cache / f"{name}.json")


if __name__ == "__main__":
    main()
