# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.posteriordb compiling``: how long XLA takes, and what a step costs by how it was compiled.

Adam and the natural gradient, each compiled as ``SVI.run`` does (``jax.jit``) and as :func:`numpyro_natgrad.fit` does
(:mod:`numpyro_natgrad.compilation`): the same loop of the same length, traced, lowered and compiled with nothing
remembered of the one before, one after the other. ``table`` takes Adam's seconds as ``SVI.run`` and the natural
gradient's as ``fit`` from here.
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
from numpyro_natgrad.infer.compilation import quickly

from . import svi
from .checkout import arguments
from .guides import GUIDES
from .models import MODELS
from .results import COMPILING, Timed, remembered
from .table import markdown
from .target import starts, target

OUTPUT = pathlib.Path("docs/compiling.md")
STEPS = 60
GUIDES_TIMED = ("AutoMultivariateNormal", "AutoNormal")
OPTIMIZERS = {"adam": lambda: optax_to_numpyro(optax.adam(0.01)), "natural_gradient": NaturalGradient}
COMPILERS = {"SVI.run": jax.jit, "fit": quickly}

_HEAD = (
    "posterior", "guide", "Adam, as SVI.run", "Adam, as fit", "natural gradient, as SVI.run",
    "natural gradient, as fit", "fit / SVI.run with Adam", "both as fit", "a step, as fit / as SVI.run",
)  # fmt: skip
_HOW = """# Seconds of compilation

Written by `python -m benchmarks.posteriordb compiling`: tracing, lowering and XLA, float64, eight particles, one loop
of {steps} steps. *As SVI.run* is `jax.jit`; *as fit* is how [`fit`](../numpyro_natgrad/compilation.py) compiles. The
first ratio is what a user sees who goes from `SVI.run` with Adam to `fit`; the second what is left if Adam were
compiled like that as well, which
`XLA_FLAGS="--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=1"` does. The last one is the price:
the seconds of a step. JAXlib 0.12 does not know the first of these flags (and does not start with it): there all
columns are as SVI.run.
"""


def write(checkout: pathlib.Path, results: pathlib.Path, models: list[str]) -> str:
    """The table, as a document, of these posteriors and of those timed before, whose seconds lie beside the results."""
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
