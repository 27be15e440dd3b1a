# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.posteriordb ablation``: the step-size rule with one ingredient removed at a time.

Each cell is the first step within 0.1 nats of the best ELBO of the finished benchmark, or the gap after all steps if
there is none: the median over seeds, with the particles and the starts of that benchmark.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from tqdm import tqdm

from numpyro_natgrad import NaturalGradient, options
from numpyro_natgrad.compilation.programs import quick_jit
from numpyro_natgrad.estimators import stein_regression

from . import svi
from .checkout import arguments
from .guides import GUIDES
from .measure import Judge, base_draws, enough
from .models import MODELS, named
from .results import GAPS, load
from .table import markdown
from .target import starts, target

OUTPUT = pathlib.Path("docs/benchmarks/ablation.md")
STEPS, SEEDS, DRAWS = 200, 3, 4000
MARKS = np.unique(np.r_[1:61, np.geomspace(60, STEPS, 20).astype(int)])
CASES = (
    ("eight_schools", "AutoMultivariateNormal"),
    ("kidiq", "AutoMultivariateNormal"),
    ("arK", "AutoMultivariateNormal"),
    ("diamonds", "AutoMultivariateNormal"),
    ("eight_schools", "AutoNormal"),
    ("mesquite", "AutoNormal"),
    ("GLMM", "AutoNormal"),
)


_HOW = """# Ablation: the step-size rule with one ingredient removed

Written by `python -m benchmarks.posteriordb ablation`. Steps to 0.1 nats from the best ELBO, or the gap after {steps}
steps; medians over {seeds} seeds, float64, 8 particles. The ingredients are explained in
[step-size rule](../step_size_rule.md).

"""


class Ablation(NamedTuple):
    """What one row changes: constants of the rule, options of the optimizer, and functions (module, name, value)."""

    constants: Mapping[str, Any] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})
    functions: tuple[tuple[Any, str, Any], ...] = ()


ABLATIONS = {
    "the full rule": Ablation(),
    "Hessian-vector products in place of regression": Ablation(options={"estimator": "second_order"}),
    "regression: old draws keep their weight": Ablation(
        functions=((stein_regression, "frame_change_weight", lambda kl, far: 1.0),)
    ),
    "regression: window length unbounded": Ablation(
        functions=((stein_regression, "forget", lambda sums, new, d: sums),)
    ),
    "regression: no bound on outliers": Ablation({"influence_max": float("inf")}),
    "regression: ridge × 100": Ablation({"ridge": 20.0}),
    "antithetic draws: no sharing of directions": Ablation({"full_probes": 1_000_000}),
    "one trust-region trial per step": Ablation({"radius_trials": 1}),
    "statistics never discounted with distance": Ablation({"forgetting_kl": float("inf")}),
    "noise not bounded by the last three steps": Ablation({"recent_factor": 1e9}),
    "noise threshold τ = 0": Ablation({"noise_threshold": 1e-9, "noise_threshold_per_latent": 0.0}),
    "no step-size floor": Ablation({"step_size_floor": 0.0}),
    "step-size floor at any noise": Ablation({"floor_noise": float("inf")}),
    "step-size floor up to 1 nat of noise per latent": Ablation({"floor_noise": 1.0}),
    "stationarity threshold 1 in place of 5": Ablation(functions=((options.RuleConstants, "nonstationarity", 1.0),)),
    "no Huber weight": Ablation({"outlier": float("inf")}),
    "last iterate in place of the average": Ablation({"average_decay": 1e9}),
    "constant step size 1/2": Ablation(options={"step_size": 0.5}),
    "no trust region": Ablation(options={"max_kl": None}),
    "first-order estimator": Ablation(options={"estimator": "first_order"}),
    "no full-covariance proxy": Ablation({"joint_limit": 0}),
}


def write(checkout: pathlib.Path, results: pathlib.Path) -> str:
    """Run all rows and write the document."""
    best = {(e.model, e.guide): e.best for e in load(results)}
    if missing := [f"{model}, {guide}" for model, guide in CASES if (named(model), guide) not in best]:
        raise SystemExit(f"`{results}`: expected results of {'; '.join(missing)}. Run the benchmark on them first.")
    columns = [_column(checkout, named(model), guide, best) for model, guide in tqdm(CASES)]
    rows = [(name, *(column[name] for column in columns)) for name in ABLATIONS]
    titles = [f"{model}, {GUIDES[guide].family}" for model, guide in CASES]
    OUTPUT.write_text(_HOW.format(steps=STEPS, seeds=SEEDS) + markdown(("", *titles), rows))
    return f"wrote {OUTPUT}"


def _column(checkout: pathlib.Path, model: str, guide: str, best: dict[tuple[str, str], float]) -> dict[str, str]:
    function, data = MODELS[model].function, arguments(checkout, model)
    posterior, begun = target(function, data), starts(function, data, SEEDS)
    judge = Judge(posterior, base_draws(posterior.size, enough(data, DRAWS)))
    problem = svi.Problem(function, data, posterior, GUIDES[guide], begun, (STEPS, 0))
    return {name: _cell(problem, judge, best[model, guide], changed) for name, changed in ABLATIONS.items()}


def _cell(problem: svi.Problem, judge: Judge, best: float, changed: Ablation) -> str:
    with _patched(changed):
        walk = svi.walker(problem, MARKS, svi.PARTICLES)
        fit = lambda z, key: walk(NaturalGradient(**changed.options), z, key)
        compiled, _ = svi.compile_timed(fit, svi.start(problem, 0), quick_jit)
    gaps = []
    for seed in range(SEEDS):
        params = jax.device_get(compiled(*svi.start(problem, seed)))
        gaps.append(best - judge.elbos(*problem.guide.gaussian(problem.target, params)))
    return _cell_text(np.nan_to_num(np.array(gaps), nan=np.inf, posinf=np.inf))


def _cell_text(gaps: np.ndarray) -> str:
    near = gaps <= GAPS[0]
    steps = np.median(np.where(near.any(1), MARKS[near.argmax(1)], np.inf))
    if np.isfinite(steps):
        return f"{steps:.0f}"
    left = float(np.median(gaps[:, -1]))
    return f"{left:.3g} nats" if np.isfinite(left) else "diverged"


@contextlib.contextmanager
def _patched(changed: Ablation) -> Iterator[None]:
    """Optimizers created in this context use the constants; functions are looked up when a step is traced."""
    with contextlib.ExitStack() as stack:
        constants = options.RuleConstants()._replace(**changed.constants)
        stack.enter_context(mock.patch.object(options, "CONSTANTS", constants))
        for module, name, value in changed.functions:
            stack.enter_context(mock.patch.object(module, name, value))
        yield
