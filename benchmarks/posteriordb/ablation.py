# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.posteriordb ablation``: the rule with one ingredient removed at a time.

Each cell is the seeds' median of the first step within 0.1 nats of the best ELBO that the finished benchmark knows, or
the gap that is left after all steps, with as many particles and from the same starts as there.
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
from numpyro_natgrad.blocks.gaussian import antithetic
from numpyro_natgrad.estimators import stein_regression
from numpyro_natgrad.infer.compilation import quickly

from . import svi
from .checkout import arguments
from .guides import GUIDES
from .measure import Judge, base_draws, enough
from .models import MODELS, named
from .results import GAPS, load
from .table import markdown
from .target import starts, target

OUTPUT = pathlib.Path("docs/ablation.md")
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


class Ablation(NamedTuple):
    """What is changed: constants of the rule, options of the optimizer, and functions (module, name, value)."""

    constants: Mapping[str, Any] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})
    functions: tuple[tuple[Any, str, Any], ...] = ()


ABLATIONS = {
    "as shipped": Ablation(),
    "Hessian-vector products, no regression": Ablation(options={"estimator": "second_order"}),
    "draws do not lose weight with distance": Ablation(functions=((stein_regression, "worth", lambda kl, far: 1.0),)),
    "draws count for ever": Ablation(functions=((stein_regression, "lasting", lambda sums, new, d: sums),)),
    "influence of a draw is not truncated": Ablation({"influence_max": float("inf")}),
    "a hundred times the ridge": Ablation({"ridge": 20.0}),
    "every direction by every draw": Ablation(functions=((antithetic, "parts", lambda d, particles: 1),)),
    "one radius a step": Ablation({"radius_trials": 1}),
    "no forgetting with distance": Ablation({"forgetting_kl": float("inf")}),
    "noise by the running mean alone": Ablation({"recent_factor": 1e9}),
    "drift counts as noise": Ablation({"drift_max": 1.0}),
    "no noise threshold": Ablation({"noise_threshold": 1e-9, "noise_threshold_per_latent": 0.0}),
    "no floor of the step size": Ablation({"step_size_floor": 0.0}),
    "the floor holds whatever the noise": Ablation({"floor_noise": float("inf")}),
    "the floor holds up to a nat of noise per latent": Ablation({"floor_noise": 1.0}),
    "outliers are not shortened": Ablation({"outlier": float("inf")}),
    "the last iterate, not the average": Ablation({"average_decay": 1e9}),
    "steps of size 1/2, whatever the noise": Ablation(options={"step_size": 0.5}),
    "no KL limit": Ablation(options={"max_kl": None}),
    "first order": Ablation(options={"estimator": "first_order"}),
    "every site by itself, no full-covariance proxy": Ablation({"joint_limit": 0}),
}


def write(checkout: pathlib.Path, results: pathlib.Path) -> str:
    """The table, as a document."""
    best = {(e.model, e.guide): e.best for e in load(results)}
    if missing := [f"{model}, {guide}" for model, guide in CASES if (named(model), guide) not in best]:
        raise SystemExit(f"`{results}`: expected results of {'; '.join(missing)}. Run the benchmark on them first.")
    columns = [_column(checkout, named(model), guide, best) for model, guide in tqdm(CASES)]
    rows = [(name, *(column[name] for column in columns)) for name in ABLATIONS]
    titles = [f"{model}, {GUIDES[guide].family}" for model, guide in CASES]
    how = f"Steps to 0.1 nats, or what is left after {STEPS}; medians over {SEEDS} seeds, float64, eight particles."
    head = "# The rule with one ingredient removed\n\nWritten by `python -m benchmarks.posteriordb ablation`. "
    OUTPUT.write_text(f"{head}{how}\n\n" + markdown(("", *titles), rows))
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
        compiled, _ = svi.compile_timed(fit, svi.start(problem, 0), quickly)
    gaps = []
    for seed in range(SEEDS):
        params = jax.device_get(compiled(*svi.start(problem, seed)))
        gaps.append(best - judge.elbos(*problem.guide.gaussian(problem.target, params)))
    return _told(np.nan_to_num(np.array(gaps), nan=np.inf))


def _told(gaps: np.ndarray) -> str:
    near = gaps <= GAPS[0]
    steps = np.median(np.where(near.any(1), MARKS[near.argmax(1)], np.inf))
    return f"{steps:.0f}" if np.isfinite(steps) else f"{np.median(gaps[:, -1]):.3g} nats"


@contextlib.contextmanager
def _patched(changed: Ablation) -> Iterator[None]:
    """The constants are those of optimizers made meanwhile; functions are looked up when a step is traced."""
    with contextlib.ExitStack() as stack:
        constants = options.RuleConstants()._replace(**changed.constants)
        stack.enter_context(mock.patch.object(options, "CONSTANTS", constants))
        for module, name, value in changed.functions:
            stack.enter_context(mock.patch.object(module, name, value))
        yield
