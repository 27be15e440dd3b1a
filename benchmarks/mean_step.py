# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.mean_step``: the mean step at the exact optimum, over many keys, for every estimator.

A step whose size looks at the very draw that it multiplies is biased where gradients are skewed. The model is a product
of Poisson log-rates, whose best Gaussian is known by one-dimensional optimization. A fit stays there for
:data:`STEPS` steps, which form its statistics; the change of the natural parameters in the next step is averaged.
"""

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from scipy import optimize
from tqdm.auto import tqdm

from numpyro_natgrad import NaturalGradient

OUTPUT = pathlib.Path("docs/benchmarks/mean_step.md")
HEADING = "## The table\n\n"
#: Two latents, each with a count in every row, and how many rows a minibatch has.
DATA, BATCH = np.array([[0.0, 2.0], [1.0, 5.0], [0.0, 3.0], [0.0, 4.0], [2.0, 3.0], [0.0, 1.0]]), 2
#: Steps at the optimum before the one that is measured.
STEPS = 30
GUIDES = {"full": AutoMultivariateNormal, "mean field": AutoNormal}
#: Guide, estimator, and rows of a step (``None``: all).
ROWS: list[tuple[str, Any, int | None]] = [
    ("full", None, None),
    ("full", "second_order", None),
    ("full", "first_order", None),
    ("mean field", None, None),
    ("mean field", "second_order", None),
    ("mean field", "first_order", None),
    ("full", None, BATCH),
    ("mean field", None, BATCH),
]
PARTICLES = (1, 2, 8)


def counts(rows: int | None) -> Any:
    """Counts with log-rates of their own, of all rows or of a minibatch."""

    def model() -> None:
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        with numpyro.plate("rows", len(DATA), subsample_size=rows) as some:
            numpyro.sample("y", dist.Poisson(jnp.exp(z)).to_event(1), obs=jnp.array(DATA, float)[some])

    return model


def optimum() -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations that maximize E[Σy z − n eᶻ − z²/2] + log s; every term has a closed form."""
    n, found = len(DATA), []
    for total in DATA.sum(0):
        loss = lambda x, t=total: (
            n * np.exp(x[0] + x[1] ** 2 / 2) - t * x[0] + (x[0] ** 2 + x[1] ** 2) / 2 - np.log(x[1])
        )
        start = [np.log((total + 0.5) / n), (total + 1) ** -0.5]
        found.append(optimize.minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14}).x)
    means, scales = np.array(found).T
    return means, scales


def natural(params: dict[str, jax.Array]) -> jax.Array:
    """Λm and Λ."""
    full = "auto_scale_tril" in params
    factor = params["auto_scale_tril"] if full else jnp.diag(params["z_auto_scale"])
    precision = jnp.linalg.inv(factor @ factor.T)
    return jnp.concatenate([precision @ params["auto_loc" if full else "z_auto_loc"], precision.ravel()])


def changes(guide: str, estimator: Any, rows: int | None, particles: int, keys: int) -> np.ndarray:
    """The change of the natural parameters by one step at the optimum, ``(keys, 6)``."""
    model, (mean, scale) = counts(rows), optimum()
    svi = SVI(model, GUIDES[guide](model), NaturalGradient(estimator=estimator), Trace_ELBO(particles))
    state = svi.init(random.key(0))
    if guide == "full":
        values = {"auto_loc": jnp.array(mean), "auto_scale_tril": jnp.diag(jnp.array(scale))}
    else:
        values = {"z_auto_loc": jnp.array(mean), "z_auto_scale": jnp.array(scale)}
    exact = svi.constrain_fn(values, invert=True)

    def at_optimum(state: Any) -> Any:
        count, new = state.optim_state
        return state._replace(optim_state=(count, new._replace(params=exact, average=exact)))

    def last_step(key: Any) -> jax.Array:
        stay = lambda state, _: (at_optimum(svi.update(state)[0]), None)
        before = lax.scan(stay, at_optimum(state)._replace(rng_key=key), None, length=STEPS)[0]
        after = svi.update(before)[0].optim_state[1].params
        return natural(svi.constrain_fn(after)) - natural(values)

    return np.asarray(jax.jit(lambda ks: lax.map(last_step, ks, batch_size=500))(random.split(random.key(1), keys)))


def row(guide: str, estimator: Any, rows: int | None, keys: int) -> str:
    """The largest bias of the changes for each number of particles, in their standard deviations."""
    cells = []
    for particles in PARTICLES:
        found = changes(guide, estimator, rows, particles, keys)
        found = found[:, found.std(0) > 0]
        bias = np.abs(found.mean(0)) / found.std(0)
        cells.append(f"{bias.max():.3f}")
    return f"| {guide} | {estimator or 'default'} | {rows or 'all'} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table, and write it to the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mean_step", description=__doc__)
    parser.add_argument("--keys", type=int, default=20_000)
    parser.add_argument("--document", action="store_true", help=f"write the table to {OUTPUT}")
    options = parser.parse_args()
    lines = [
        f"| guide | estimator | rows a step | {' | '.join(f'{n} particles' for n in PARTICLES)} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    with jax.enable_x64(True):
        lines += [row(guide, estimator, rows, options.keys) for guide, estimator, rows in tqdm(ROWS)]
    noise = 1 / np.sqrt(options.keys)
    table = "\n".join([*lines, "", f"{options.keys} keys: a bias of zero scatters by {noise:.3f}.", ""])
    print(table)
    if options.document:
        OUTPUT.write_text(OUTPUT.read_text().partition(HEADING)[0] + HEADING + table)


if __name__ == "__main__":
    main()
