# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Minibatches of 1/10 to 1/10,000 of the data: the distance from the exact answer, beside Adam's best rate.

    python -m benchmarks.minibatches [--kind logistic] [--ratio 100] [--particles 8] [--document]

Regressions of N rows on 8 correlated covariates, with a full Gaussian. The exact answer is Newton's mode and Hessian in
float64. The *error* is the distance of the guide's mean from the mode in posterior standard deviations, as root mean
square over directions, averaged over the seeds. Each batch of B rows has its own optimum, √(N/B) away; the average of
T of them is √(N/B/T) away, which is the *reference*. (The batches of an epoch are a permutation, so that an average of
whole epochs can be nearer.) *sd* is the mean factor by which the guide's standard deviations are off. Our options are
the defaults; Adam decays by a cosine over all batches, at the best of four rates, chosen at each mark with hindsight.
"""

import argparse
import pathlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax, random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from tqdm import tqdm

from numpyro_natgrad import NaturalGradient

OUTPUT = pathlib.Path("docs/benchmarks/minibatches.md")
COVARIATES, RATES, EPOCHS = 8, (0.1, 0.03, 0.01, 0.003), (1, 2, 5)
#: N/B with the rows N of the data set; the smallest batches have 2 rows.
ROWS = {10: 20_000, 100: 20_000, 1000: 20_000, 10_000: 20_000}
HEADS = ("model", "N/B", "B", "particles", "batches", "reference", "error", "sd", "Adam's best error", "its rate", "sd")


class Regression(NamedTuple):
    """A data set, its model for batches of rows, and the exact mode and Hessian of −log p."""

    x: np.ndarray
    y: np.ndarray
    model: Callable[..., None]
    mode: np.ndarray
    hessian: np.ndarray


def regression(kind: str, rows: int, seed: int = 0) -> Regression:
    """Bernoulli (``logistic``) or Poisson data with a standard Normal prior on the coefficients."""
    rng, d = np.random.default_rng(seed), COVARIATES
    x = rng.normal(size=(rows, d)) @ np.linalg.cholesky(0.5 * np.eye(d) + 0.5).T
    x = x if kind == "logistic" else 0.3 * x
    x[:, 0] = 1
    rate = x @ (0.5 * rng.normal(size=d))
    y = rng.random(rows) < 1 / (1 + np.exp(-rate)) if kind == "logistic" else rng.poisson(np.exp(rate))
    mode = np.zeros(d)
    for _ in range(20):  # Newton's method has converged after eight
        mean = 1 / (1 + np.exp(-x @ mode)) if kind == "logistic" else np.exp(x @ mode)
        weight = mean * (1 - mean) if kind == "logistic" else mean
        hessian = np.eye(d) + (x * weight[:, None]).T @ x
        mode = mode + np.linalg.solve(hessian, x.T @ (y - mean) - mode)

    def model(x: jax.Array, y: jax.Array) -> None:
        b = numpyro.sample("b", dist.Normal(0, 1).expand([d]).to_event(1))
        with numpyro.plate("rows", rows, subsample_size=len(x)):
            likelihood = dist.Bernoulli(logits=x @ b) if kind == "logistic" else dist.Poisson(jnp.exp(x @ b))
            numpyro.sample("y", likelihood, obs=y)

    return Regression(x.astype(np.float32), y.astype(np.float32), model, mode, hessian)


def batches(rows: int, size: int, count: int) -> np.ndarray:
    """The rows of ``count`` batches, ``(count, size)``: a new permutation in every epoch."""
    rng, each = np.random.default_rng(1), rows // size
    epochs = [rng.permutation(rows)[: each * size].reshape(each, size) for _ in range(-(-count // each))]
    return np.concatenate(epochs)[:count]


def errors(
    r: Regression, optimizer: Callable[[], Any], rows: np.ndarray, particles: int, marks: list[int], seeds: int
) -> Iterator[tuple[float, float]]:
    """Error and factor of the standard deviations after each of ``marks`` batches."""
    x, y, index = jnp.asarray(r.x), jnp.asarray(r.y), jnp.asarray(rows)
    guide = lambda: AutoMultivariateNormal(r.model)  # an autoguide keeps the start of its first set-up
    each = [SVI(r.model, guide(), optimizer(), Trace_ELBO(num_particles=particles)) for _ in range(seeds)]
    states = [svi.init(random.key(k), x[: rows.shape[1]], y[: rows.shape[1]]) for k, svi in enumerate(each)]
    state, svi = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), each[0]

    def step(t: jax.Array, state: Any) -> Any:
        return jax.vmap(lambda s: svi.update(s, x[index[t]], y[index[t]])[0])(state)

    run = jax.jit(lambda state, start, stop: lax.fori_loop(start, stop, step, state))
    root, sd, taken = np.linalg.cholesky(r.hessian), np.sqrt(np.diag(np.linalg.inv(r.hessian))), 0
    for mark in marks:
        state, taken = run(state, taken, mark), mark
        params = jax.vmap(svi.get_params)(state)
        off = (np.asarray(params["auto_loc"], float) - r.mode) @ root
        scale = np.sqrt(np.sum(np.asarray(params["auto_scale_tril"], float) ** 2, axis=-1))
        factor = np.exp(np.mean(np.abs(np.log(scale / sd))))
        yield float(np.mean(np.sqrt(np.mean(off**2, axis=1)))), float(factor)


def decaying_adam(rate: float, count: int) -> optax.GradientTransformation:
    """Adam with a cosine decay over ``count`` steps."""
    return optax.adam(optax.cosine_decay_schedule(rate, count))


def lines(kind: str, ratio: int, particles: int, seeds: int, most: int) -> Iterator[str]:
    """The lines of one model, one size of batches and one number of particles."""
    n, size = ROWS[ratio], ROWS[ratio] // ratio
    r, count = regression(kind, n), min(ratio * max(EPOCHS), most)
    marks = sorted({m for m in (*(ratio * e for e in EPOCHS), count) if m <= count})
    rows = batches(n, size, count)
    fits: dict[str | float, Callable[[], Any]] = {"ours": NaturalGradient}
    fits.update({rate: partial(decaying_adam, rate, count) for rate in RATES})
    found = {
        name: list(errors(r, make, rows, particles, marks, seeds))
        for name, make in tqdm(fits.items(), desc=f"{kind}, N/B = {ratio}, {particles} particles", leave=False)
    }
    for k, mark in enumerate(marks):
        rate = min(RATES, key=lambda x: np.nan_to_num(found[x][k][0], nan=np.inf))
        (error, factor), (theirs, its) = found["ours"][k], found[rate][k]
        cells = [kind, f"{ratio:,}", str(size), str(particles), f"{mark:,}", f"{np.sqrt(ratio / mark):.2f}"]
        cells += [f"{error:.2f}", f"{factor:.2f}", f"{theirs:.2f}", str(rate), f"{its:.2f}"]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the lines that the arguments choose, by default all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.minibatches", description=__doc__)
    parser.add_argument("--kind", nargs="*", choices=("logistic", "Poisson"), default=["logistic", "Poisson"])
    parser.add_argument("--ratio", nargs="*", type=int, choices=ROWS, default=list(ROWS))
    parser.add_argument("--particles", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--most", type=int, default=5000, help="batches a fit, at most")
    parser.add_argument("--document", action="store_true", help=f"write the table to {OUTPUT}")
    chosen = parser.parse_args()
    table = [f"| {' | '.join(HEADS)} |", "| --- " * len(HEADS) + "|"]
    print("\n".join(table), flush=True)
    for kind in chosen.kind:
        for ratio in chosen.ratio:
            for particles in chosen.particles:
                for line in lines(kind, ratio, particles, chosen.seeds, chosen.most):
                    print(line, flush=True)
                    table.append(line)
    if chosen.document:
        document(table)


def document(table: list[str]) -> None:
    """Write the table after the head of the page, which is kept."""
    head = OUTPUT.read_text().split("\n| model")[0].rstrip() if OUTPUT.exists() else "# Minibatches"
    OUTPUT.write_text("\n".join([head, "", *table, ""]))


if __name__ == "__main__":
    main()
