# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.many_fits``: seconds of ``fit_many`` and of a loop over ``fit``, for ten folds.

The regression and its folds are those of ``docs/many_fits.md``. The first call compiles, with nothing on disk; the
second one has other keys and compiles nothing. Seconds are those of the processor (``time.process_time``), which
other programs on the machine change less than those of a clock.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_natgrad import NaturalGradient, fit, fit_many

ROWS = 100
OPTIONS: dict[str, Any] = {"tolerance": 0.05, "cache": False, "progress_bar": False}


def model(x: jax.Array, y: jax.Array, kept: jax.Array) -> None:
    """Poisson regression of the rows that a fold keeps."""
    level = numpyro.sample("level", dist.Normal(0, 2))
    slope = numpyro.sample("slope", dist.Normal(0, 2).expand([3]).to_event(1))
    with numpyro.plate("row", len(x)), numpyro.handlers.mask(mask=kept):
        numpyro.sample("y", dist.Poisson(jnp.exp(level + x @ slope)), obs=y)


def data(folds: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Covariates, counts, and which rows each fold keeps, ``(folds, rows)``."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(ROWS, 3))
    y = draw.poisson(np.exp(0.5 + x @ np.array([0.8, -0.4, 0.0])))
    fold = draw.permutation(ROWS) % folds
    return jnp.array(x, float), jnp.array(y, float), jnp.array(fold[None, :] != np.arange(folds)[:, None])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_fits", description=__doc__)
    parser.add_argument("--folds", type=int, default=10, help="number of fits (default: 10)")
    folds = parser.parse_args().folds
    x, y, kept = data(folds)

    def make() -> SVI:
        return SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(num_particles=8))

    together, alone = make(), make()
    ways: dict[str, Callable[[jax.Array], Any]] = {
        "`fit_many`": lambda keys: fit_many(together, keys, x, y, kept, in_axes=(None, None, 0), **OPTIONS),
        "a loop over `fit`": lambda keys: [
            fit(alone, key, x, y, rows, **OPTIONS) for key, rows in zip(keys, kept, strict=True)
        ],
    }
    print("| | first call, s | second call, s | converged |\n| --- | --- | --- | --- |")
    for label, way in ways.items():
        seconds = []
        for seed in range(2):
            before = time.process_time()
            found = way(jax.random.split(jax.random.key(seed), folds))
            seconds.append(time.process_time() - before)
        converged = sum(bool(one.converged) for one in found)
        print(f"| {label} | {seconds[0]:.1f} | {seconds[1]:.2f} | {converged} of {folds} |", flush=True)


if __name__ == "__main__":
    main()
