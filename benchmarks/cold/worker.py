# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.cold.worker JOB CHECKOUT``: one measurement in this process; the last line is its JSON.

The clock begins after all imports, with the data in memory as NumPy arrays, and ends when the parameters are ready:

    begin;  SVI(model, guide(model), optimizer, loss);  fit or svi.run;  block_until_ready(params);  end

Importance weights and ELBO of the answer come after the clock, in double precision.
"""

import importlib.metadata as meta
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.monitoring
import numpy as np
import numpyro
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import numpyro_natgrad
from benchmarks.posteriordb.checkout import arguments
from benchmarks.posteriordb.models import MODELS, Data
from numpyro_natgrad.diagnostics.importance import psis

from .clock import Clock
from .jobs import ADAM_RATE, ADAM_STEPS, NO_GUIDE, PARTICLES, RUN_STEPS, TOLERANCE, X64, Job, new_data

#: JAX records the seconds of every compilation under this name.
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
#: New data sets of a process that fits again, and steps that a compiled fit goes on for.
REFITS, FURTHER = 5, 200

Result = dict[str, Any]


class Problem(NamedTuple):
    """A posterior, and the guide, if any, that is fitted to it."""

    posterior: str
    guide: str
    data: Data
    seed: int

    @property
    def model(self) -> Callable[..., None]:
        """The model."""
        return MODELS[self.posterior].function

    def svi(self, optimizer: Any) -> SVI:
        """A new ``SVI`` with a new guide."""
        guide = {"AutoMultivariateNormal": AutoMultivariateNormal, "AutoNormal": AutoNormal}[self.guide]
        return SVI(self.model, guide(self.model), optimizer, Trace_ELBO(num_particles=PARTICLES))

    def fit(self, svi: SVI, data: Data) -> numpyro_natgrad.FitResult:
        """The fit of the demand, until the parameters are ready."""
        key = jax.random.key(self.seed)
        result = numpyro_natgrad.fit(svi, key, tolerance=TOLERANCE, progress_bar=False, **data)
        jax.block_until_ready(result.params)
        return result

    def judge(self, svi: SVI, result: numpyro_natgrad.FitResult, data: Data) -> None:
        """The verdict on a fit."""
        numpyro_natgrad.verdict(svi, result, jax.random.key(self.seed + 1), progress_bar=False, **data)

    def run(self, optimizer: Any, steps: int) -> Any:
        """NumPyro's own loop, until the parameters are ready."""
        result = self.svi(optimizer).run(jax.random.key(self.seed), steps, progress_bar=False, **self.data)
        jax.block_until_ready(result.params)
        return result


class Compilations:
    """The seconds of every compilation by XLA from now on."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILE_EVENT:
            self.seconds.append(duration_secs)


def measure(job: Job, checkout: pathlib.Path) -> Result:
    """Seconds of one job, with what the fit says about itself."""
    jax.config.update("jax_enable_x64", job.posterior in X64)
    data = arguments(checkout, job.posterior)
    if job.line in ("same", "judged_again"):
        data = new_data(data, job.round)
    problem = Problem(job.posterior, job.guide, data, job.round)
    if job.guide == NO_GUIDE:
        from . import rivals

        return versions() | rivals.measure(job.line, problem)
    compilations = Compilations()
    clock = Clock()
    answer = _METHODS[job.line](problem)
    taken = clock.read() | {"x64": job.posterior in X64}
    compiled = {"compilations": len(compilations.seconds), "compile_seconds": sum(compilations.seconds)}
    found = taken | compiled | _about(job.line, answer, compilations, problem)
    if job.round == 0 and job.line in ("nothing", "adam"):
        found |= _scored(problem, answer.params)
    return versions() | found


def versions() -> Result:
    """What the measurement was made with."""
    packages = {name: meta.version(name) for name in ("jax", "jaxlib", "numpyro")}
    return {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0)), **packages}


class Fitted(NamedTuple):
    """A fit, and the ``SVI`` that goes on from it."""

    svi: SVI
    result: numpyro_natgrad.FitResult

    @property
    def params(self) -> dict[str, Any]:
        """The answer."""
        return self.result.params


def _fit(problem: Problem) -> Fitted:
    svi = problem.svi(numpyro_natgrad.NaturalGradient())
    return Fitted(svi, problem.fit(svi, problem.data))


_METHODS: dict[str, Callable[[Problem], Any]] = {
    "adam": lambda problem: problem.run(numpyro.optim.Adam(ADAM_RATE), ADAM_STEPS),
    "run": lambda problem: problem.run(numpyro_natgrad.NaturalGradient(), RUN_STEPS),
} | dict.fromkeys(("nothing", "others", "same", "refit", "fill", "judged", "judged_again"), _fit)


def _about(line: str, answer: Any, compilations: Compilations, problem: Problem) -> Result:
    """What a fit says about itself; with further fits in this process, which the clock leaves out."""
    if not isinstance(answer, Fitted):
        return {"steps": len(answer.losses)}
    if line == "refit":
        again = [_again(answer.svi, compilations, problem, seed + 1) for seed in range(REFITS)]
        fresh = _again(problem.svi(numpyro_natgrad.NaturalGradient()), compilations, problem, REFITS + 1)
        return {"again": again, "fresh": fresh}
    if line in ("judged", "judged_again"):
        return _judged(answer, compilations, problem)
    return _fitted(answer.result) | (_further_steps(answer, problem) if line == "nothing" else {})


def _judged(answer: Fitted, compilations: Compilations, problem: Problem) -> Result:
    """The seconds of a verdict, and those of another fit and its verdict on new data."""
    psis(np.linspace(0.0, 1.0, 100))  # imports ArviZ
    first = _timed(lambda: problem.judge(answer.svi, answer.result, problem.data), compilations)
    data, results = new_data(problem.data, problem.seed + 1), []
    fit = _timed(lambda: results.append(problem.fit(answer.svi, data)), compilations)
    again = _timed(lambda: problem.judge(answer.svi, results[0], data), compilations)
    return _fitted(answer.result) | {"verdict": first, "again": {"fit": fit, "verdict": again}}


def _timed(call: Callable[[], None], compilations: Compilations) -> Result:
    before, clock = len(compilations.seconds), Clock()
    call()
    return clock.read() | {"compilations": len(compilations.seconds) - before}


def _further_steps(answer: Fitted, problem: Problem) -> Result:
    """Seconds of a step of the compiled program, as the user waits and of the processor."""
    clock = Clock()
    numpyro_natgrad.fit(
        answer.svi, jax.random.key(0), init_state=answer.result.state, max_steps=FURTHER, tolerance=0,
        progress_bar=False, **problem.data,
    )  # fmt: skip
    return {f"step_{name}": x / FURTHER for name, x in clock.read().items()}


def _fitted(result: numpyro_natgrad.FitResult) -> Result:
    """The seconds of a step are a median, which leaves out compilation and what comes between chunks of steps."""
    steps = len(result.losses)
    step = float(np.median(np.diff(result.history.seconds))) if steps > 1 else float("nan")
    judge = float(result.judge_seconds)
    return {"steps": steps, "converged": result.converged, "reason": result.reason, "step": step, "judge": judge}


def _again(svi: SVI, compilations: Compilations, problem: Problem, seed: int) -> Result:
    """A fit of new data of the same shapes, in a process that has fitted before."""
    data, before = new_data(problem.data, seed), len(compilations.seconds)
    begin = time.perf_counter()
    result = problem.fit(svi, data)
    seconds = time.perf_counter() - begin
    about = _fitted(result)
    beyond = seconds - about["steps"] * about["step"]
    return {"seconds": seconds, "beyond": beyond, "compilations": len(compilations.seconds) - before} | about


def _scored(problem: Problem, params: Any) -> Result:
    """ELBO and k-hat of a Gaussian guide."""
    from . import scoring

    return scoring.gaussian(problem.model, problem.data, problem.guide, params)


def main() -> None:
    """Measure, and print JSON."""
    print(json.dumps(measure(Job(*json.loads(sys.argv[1])), pathlib.Path(sys.argv[2]))))


if __name__ == "__main__":
    main()
