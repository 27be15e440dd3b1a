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

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.blocks import partition
from numpyro_natgrad.blocks.gaussian import antithetic
from numpyro_natgrad.estimators import stein_regression
from numpyro_natgrad.infer.compilation import quickly
from numpyro_natgrad.step import natural_step, step_size

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
    """What is changed: constants of the rule (module, name, value), and options of the optimizer."""

    constants: tuple[tuple[Any, str, Any], ...] = ()
    options: Mapping[str, Any] = MappingProxyType({})


ABLATIONS = {
    "as shipped": Ablation(),
    "Hessian products, no regression": Ablation(options={"estimator": "second_order"}),
    "draws do not lose weight on the way": Ablation(((stein_regression, "worth", lambda kl, far: 1.0),)),
    "draws count for ever": Ablation(((stein_regression, "lasting", lambda sums, new, d: sums),)),
    "draws are not pulled in": Ablation(((stein_regression, "OUTLIER", float("inf")),)),
    "a hundred times the ridge": Ablation(((stein_regression, "RIDGE", 20.0),)),
    "every direction by every draw": Ablation(((antithetic, "parts", lambda d, particles: 1),)),
    "one radius a step": Ablation(((natural_step, "TRIALS", 1),)),
    "nothing is forgotten on the way": Ablation(((step_size, "FAR", float("inf")),)),
    "noise by the long mean alone": Ablation(((step_size, "RECENT", 1e9),)),
    "drift counts as noise": Ablation(((step_size, "DRIFT_MAX", 1.0),)),
    "no noise is left alone": Ablation(((step_size, "QUIET", 1e-9), (step_size, "QUIET_LATENT", 0.0))),
    "steps do not last": Ablation(((step_size, "LASTING", 0.0),)),
    "they last whatever the noise": Ablation(((step_size, "BORNE", float("inf")),)),
    "a nat of noise a latent shortens them": Ablation(((step_size, "BORNE", 1.0),)),
    "whatever is above noise is travel": Ablation(((step_size, "TRAVEL", 1.0),)),
    "outliers are not pulled in": Ablation(((step_size, "OUTLIER", float("inf")),)),
    "the last iterate, not the average": Ablation(((natural_step, "AVERAGE_DECAY", 1e9),)),
    "steps of length 1/2, whatever the noise": Ablation(options={"step_size": 0.5}),
    "no KL limit": Ablation(options={"max_kl": None}),
    "first order": Ablation(options={"estimator": "first_order"}),
    "every site by itself, not lifted": Ablation(((partition, "JOINT_LIMIT", 0),)),
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
    """The rule's constants are read when a step is traced."""
    with contextlib.ExitStack() as stack:
        for module, name, value in changed.constants:
            stack.enter_context(mock.patch.object(module, name, value))
        yield
