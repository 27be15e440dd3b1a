# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What the check of a stop finds by a Hessian at few and at many pairs of draws.

    python -m benchmarks.hessian_pairs --checkout PATH

PATH is a clone of https://github.com/stan-dev/posteriordb. After so many steps of one fit with a full Gaussian and 8
particles, in double precision, the check judges the parameters with its Hessian at 32, 64, 128, … pairs, and as many
draws for the gradients as it asks for, up to 65,536. *True gap* is the mean over 65,536 common draws between these
parameters and those after 3000 steps.
"""

import argparse
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_natgrad import FitResult, NaturalGradient, fit
from numpyro_natgrad.compilation.data import split
from numpyro_natgrad.infer.convergence import format_interval
from numpyro_natgrad.infer.judge import judge_of
from numpyro_natgrad.infer.judge_rule import JUDGE

from .stopping import posteriors

#: Posteriors by a part of their names, with the steps after which they are judged.
POSTERIORS = {"eight_schools": (30, 100), "GLMM": (100, 150), "radon_mn": (100, 200)}
CHUNKS = (1, 2, 4, 8, 16)
MOST_DRAWS, LAST, TOLERANCE = 2**16, 3000, 0.05


def lines(title: str, model: Callable[..., Any], data: tuple[Any, ...], numbers: tuple[int, ...]) -> Iterator[str]:
    """One fit, judged several times after each of these numbers of steps."""
    svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(num_particles=8))
    results: list[FitResult] = []
    for steps in (*numbers, LAST):
        before = results[-1] if results else None
        more = steps - (len(before.losses) if before else 0)
        results.append(fit(svi, random.key(0), *data, resume=before, max_steps=more, tolerance=0, progress_bar=False))
    *judged, best = (svi.optim.get_params(result.state.optim_state) for result in results)
    for steps, result, params in zip(numbers, results, judged, strict=False):
        judge = judge_of(svi, None, params, split(svi, data, {}))
        cells = []
        for chunks in CHUNKS:
            judge.hessian_chunks = chunks
            found = judge(params, result.state.rng_key, TOLERANCE, draws=MOST_DRAWS)
            cells.append(f"{format_interval(found.gain, found.error)} ({found.draws:,})")
        distance = gap(svi, params, best, data)
        yield f"| {title} | {params['auto_loc'].size} | {steps} | {distance:.3f} | {' | '.join(cells)} |"


def gap(svi: SVI, params: dict, best: dict, data: tuple[Any, ...]) -> float:
    """The difference between the losses of two sets of unconstrained parameters."""
    many = Trace_ELBO(num_particles=2**10)

    @jax.jit
    def difference(key: jax.Array) -> jax.Array:
        loss = lambda x: many.loss(key, svi.constrain_fn(x), svi.model, svi.guide, *data)
        return loss(params) - loss(best)

    return float(jax.lax.map(difference, random.split(random.key(1), 64)).mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=pathlib.Path, required=True, help="checkout of posteriordb")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    heads = ["posterior", "latents", "steps", "true gap", *(f"{JUDGE.chunk_pairs * chunks} pairs" for chunks in CHUNKS)]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for (title, model, data), numbers in zip(
        posteriors(options.checkout, list(POSTERIORS)), POSTERIORS.values(), strict=True
    ):
        for line in lines(title, model, data, numbers):
            print(line, flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
