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

import jax
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_natgrad import NaturalGradient, fit
from numpyro_natgrad.compilation.data import split
from numpyro_natgrad.infer.convergence import format_interval
from numpyro_natgrad.infer.judge import judge_of
from numpyro_natgrad.infer.judge_rule import JUDGE

#: Posteriors by a part of their names, with the steps after which they are judged.
POSTERIORS = {"eight_schools": (30, 100), "GLMM": (100, 150), "radon_mn": (100, 200)}
CHUNKS = (1, 2, 4, 8, 16)
MOST_DRAWS, LAST, TOLERANCE = 2**16, 3000, 0.05
PAIRS = JUDGE.group * JUDGE.chunk


def line(checkout: pathlib.Path, name: str, steps: int) -> str:
    """One fit, judged several times."""
    from .posteriordb.checkout import arguments
    from .posteriordb.models import MODELS, named

    title, data = named(name), arguments(checkout, named(name))
    model = MODELS[title].function
    svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(num_particles=8))
    go = lambda count, **given: fit(
        svi, random.key(0), max_steps=count, tolerance=0, progress_bar=False, **given, **data
    )
    fitted = go(steps)
    last = go(LAST - steps, resume=fitted)
    params, best = (svi.optim.get_params(x.state.optim_state) for x in (fitted, last))
    judge = judge_of(svi, None, params, split(svi, (), data))
    cells = []
    for chunks in CHUNKS:
        judge.hessian_chunks = chunks
        found = judge(params, fitted.state.rng_key, TOLERANCE, draws=MOST_DRAWS)
        cells.append(f"{format_interval(found.gain, found.error)} ({found.draws:,})")
    latents = next(iter(params["auto_loc"].shape))
    return f"| {title.split('-')[0]} | {latents} | {steps} | {gap(svi, params, best, data):.3f} | {' | '.join(cells)} |"


def gap(svi: SVI, params: dict, best: dict, data: dict) -> float:
    """The difference between the losses of two sets of unconstrained parameters."""
    many = Trace_ELBO(num_particles=2**10)

    @jax.jit
    def difference(key: jax.Array) -> jax.Array:
        loss = lambda x: many.loss(key, svi.constrain_fn(x), svi.model, svi.guide, **data)
        return loss(params) - loss(best)

    return float(jax.lax.map(difference, random.split(random.key(1), 64)).mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=pathlib.Path, required=True, help="checkout of posteriordb")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    heads = ["posterior", "latents", "steps", "true gap", *(f"{PAIRS * chunks} pairs" for chunks in CHUNKS)]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for name, numbers in POSTERIORS.items():
        for steps in numbers:
            print(line(options.checkout, name, steps), flush=True)
            jax.clear_caches()


if __name__ == "__main__":
    main()
