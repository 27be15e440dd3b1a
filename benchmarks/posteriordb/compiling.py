# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.posteriordb compiling``: compile time, and the cost of a step by how it was compiled.

Adam and the natural gradient are each compiled as ``SVI.run`` does (``jax.jit``) and as :func:`numpyro_natgrad.fit`
does (:mod:`numpyro_natgrad.infer.loop`): the same loop of the same length, one after the other, with empty
caches. ``table`` uses Adam's seconds as ``SVI.run`` and the natural gradient's as ``fit``.
"""

import itertools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import optax
from numpyro.optim import optax_to_numpyro
from tqdm import tqdm

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.compilation.programs import quick_jit

from . import svi
from .checkout import arguments
from .guides import GUIDES
from .models import MODELS
from .results import COMPILING, Timed, remembered
from .table import markdown
from .target import starts, target

OUTPUT = pathlib.Path("docs/benchmarks/compiling.md")
STEPS = 60
GUIDES_TIMED = ("AutoMultivariateNormal", "AutoNormal")
OPTIMIZERS = {"adam": lambda: optax_to_numpyro(optax.adam(0.01)), "natural_gradient": NaturalGradient}
COMPILERS = {"SVI.run": jax.jit, "fit": quick_jit}

_HEAD = (
    "posterior", "guide", "Adam, as SVI.run", "Adam, as fit", "natural gradient, as SVI.run",
    "natural gradient, as fit", "fit / SVI.run with Adam", "both as fit", "step: as fit / as SVI.run",
)  # fmt: skip
_HOW = """# Compile time

Written by `python -m benchmarks.posteriordb compiling`. Seconds of tracing, lowering and XLA for one loop of {steps}
steps; float64, 8 particles. *As SVI.run* is `jax.jit`. *As fit* is how `fit` compiles: it asks XLA for less
optimization. The first ratio is what a user sees who changes from `SVI.run` with Adam to `fit`. The second compares
both compiled as `fit` does, which
`XLA_FLAGS="--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=1"` does for Adam. The last column is
the price: the seconds of a step. jaxlib 0.12 does not accept the first of these flags and refuses to start with it;
there, `fit` compiles light programs without optimization ([why](../compilation.md)). The whole wait for an answer, on
both versions, is measured [elsewhere](cold.md).
"""


def write(checkout: pathlib.Path, results: pathlib.Path, models: list[str]) -> str:
    """Time these posteriors, add those that were timed before (kept beside the results), and write the document."""
    results.mkdir(parents=True, exist_ok=True)
    timed = remembered(results / COMPILING)
    for place in tqdm(list(itertools.product(models, GUIDES_TIMED))):
        timed[place] = _all_timed(checkout, *place)
    flat = [[*place, *way, *seconds] for place, ways in timed.items() for way, seconds in ways.items()]
    (results / COMPILING).write_text(json.dumps(flat))
    ratios = np.array([_ratios(ways) for ways in timed.values()])
    rows = [
        (model.split("-")[0], GUIDES[guide].family, *(f"{t.compiling:.1f}" for t in ways.values()), *map(_two, ratio))
        for ((model, guide), ways), ratio in zip(timed.items(), ratios, strict=True)
    ]
    ends = ("median", np.median(ratios, 0)), ("worst", ratios.max(0))
    last = [(name, *5 * [""], *map(_two, x)) for name, x in ends]
    OUTPUT.write_text(_HOW.format(steps=STEPS) + "\n" + markdown(_HEAD, rows + last))
    return f"wrote {OUTPUT}"


def _ratios(ways: dict[tuple[str, str], Timed]) -> tuple[float, float, float]:
    adam, quick_adam, ours, quick = ways.values()
    return quick.compiling / adam.compiling, quick.compiling / quick_adam.compiling, quick.step / ours.step


def _all_timed(checkout: pathlib.Path, model: str, guide: str) -> dict[tuple[str, str], Timed]:
    function, data = MODELS[model].function, arguments(checkout, model)
    begun = starts(function, data, 1)
    problem = svi.Problem(function, data, target(function, data), GUIDES[guide], begun, (STEPS, 0))
    ways = itertools.product(OPTIMIZERS.items(), COMPILERS.items())
    return {(name, how): _timed(problem, make(), jit) for (name, make), (how, jit) in ways}


def _timed(problem: svi.Problem, optimizer: Any, jit: Any) -> Timed:
    jax.clear_caches()
    walk, begun = svi.walker(problem, np.array([STEPS]), svi.PARTICLES), svi.start(problem, 0)
    compiled, compiling = svi.compile_timed(lambda z, key: walk(optimizer, z, key), begun, jit)
    return Timed(compiling, min(svi.step_seconds(compiled, begun, STEPS)))


def _two(x: float) -> str:
    return f"{x:.2f}"
