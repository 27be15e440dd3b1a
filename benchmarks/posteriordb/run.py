# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Run every missing combination of model, guide, method and precision, each model and guide in its own process.

Each combination leaves two files: ``.json`` with the measurements, and ``.npz`` with the final Gaussian of every fit.
Files that have the requested seeds and draws are kept, so that an interrupted run continues where it stopped.
"""

import json
import os
import pathlib
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

PRECISIONS = ("x64", "float32")


class Job(NamedTuple):
    """Methods to be run on one posterior with one guide in one precision."""

    model: str
    guide: str
    precision: str
    methods: tuple[str, ...]


class Plan(NamedTuple):
    """Options of a run.

    :ivar checkout: of posteriordb.
    :ivar results: the folder of the results.
    :ivar seeds: of every method.
    :ivar draws: that Gaussians are scored on at most; see :func:`.measure.enough`.
    :ivar steps: of the natural gradient; of Adam.
    """

    checkout: pathlib.Path
    results: pathlib.Path
    seeds: int = 5
    draws: int = 20_000
    steps: tuple[int, int] = (1000, 5000)

    def file(self, job: Job, method: str) -> pathlib.Path:
        """Where one method's results are."""
        return self.results / job.model / f"{job.guide}-{method}-{job.precision}.json"

    def missing(self, job: Job) -> Job:
        """The job with only those methods that have no stored results."""
        return job._replace(methods=tuple(m for m in job.methods if not self._done(self.file(job, m))))

    def _done(self, path: pathlib.Path) -> bool:
        if not path.exists():
            return False
        about = json.loads(path.read_text())
        return about["seeds"] >= self.seeds and about["draws"] == self.draws


def run(plan: Plan, jobs: list[Job]) -> list[Job]:
    """Run the missing jobs and return those that failed."""
    todo = [job for job in map(plan.missing, jobs) if job.methods]
    failed = []
    for job in (bar := tqdm(todo, unit="job")):
        bar.set_postfix_str(f"{job.model.split('-')[0]}, {job.guide}, {job.precision}")
        if subprocess.run([sys.executable, "-m", __package__, "one", *_flags(plan, job)]).returncode:
            failed.append(job)
    return failed


def _flags(plan: Plan, job: Job) -> list[str]:
    options = {
        "checkout": plan.checkout, "results": plan.results, "seeds": plan.seeds, "draws": plan.draws,
        "steps": plan.steps[0], "adam-steps": plan.steps[1], "models": job.model, "guides": job.guide,
        "methods": ",".join(job.methods), "precisions": job.precision,
    }  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def run_here(plan: Plan, job: Job) -> None:
    """One job, in this process."""
    import jax

    jax.config.update("jax_enable_x64", job.precision == "x64")
    jax.config.update("jax_enable_compilation_cache", False)
    from .checkout import arguments
    from .guides import GUIDES
    from .measure import Judge, base_draws, enough
    from .methods import METHODS
    from .models import MODELS
    from .reference import reference_draws
    from .svi import Problem
    from .target import starts, target

    function, data = MODELS[job.model].function, arguments(plan.checkout, job.model)
    begun = starts(function, data, plan.seeds)
    with jax.enable_x64(True):
        judge = Judge(target(function, data), base_draws(begun.shape[1], enough(data, plan.draws)))
    problem = Problem(function, data, target(function, data), GUIDES[job.guide], begun, plan.steps)
    known = reference_draws(plan.checkout, plan.results, job.model)
    for method in job.methods:
        tqdm.write(f"{job.model}, {job.guide}, {job.precision}: {METHODS[method].title}")
        _store(plan, job, method, list(_judged(METHODS[method].run(problem), judge, known)))


def _judged(attempts: Iterator[Any], judge: Any, known: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """The stored record of each fit (costs and ELBOs along its path, scores of its end), and its final Gaussian."""
    for setting, seed, path in attempts:
        elbo = judge.elbos(path.loc, path.factor)
        end = path.loc[-1], path.factor[-1]
        score = judge.score(*end)._asdict()
        moments = judge.moments(*end, known)._asdict() if known and np.isfinite(elbo[-1]) else {}
        costs = {name: np.asarray(getattr(path, name), float).tolist() for name in ("steps", "gradients", "seconds")}
        record = {"setting": setting, "seed": seed, "compiling": path.compiling, **costs, "elbos": elbo.tolist()}
        yield {**record, **score, "moments": moments}, end


def _store(plan: Plan, job: Job, method: str, fits: list[tuple[dict[str, Any], Any]]) -> None:
    """Write the JSON file last and atomically: if it exists, the run is complete."""
    path = plan.file(job, method)
    path.parent.mkdir(parents=True, exist_ok=True)
    ends: dict[str, list[Any]] = defaultdict(list)
    for _, (loc, factor) in fits:
        ends["loc"].append(loc)
        ends["factor"].append(factor)
    stacked: dict[str, Any] = {name: np.stack(x) for name, x in ends.items()}
    np.savez_compressed(path.with_suffix(".npz"), **stacked)
    about = {**job._asdict(), "method": method, "seeds": plan.seeds, "draws": plan.draws, "fits": [f for f, _ in fits]}
    about.pop("methods")
    part = path.with_suffix(".part")
    part.write_text(json.dumps(about))
    os.replace(part, path)
