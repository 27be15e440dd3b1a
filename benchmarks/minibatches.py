# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Minibatches of 1/10 to 1/10,000 of the data: the distance from the exact answer, beside Adam's best rate.

    python -m benchmarks.minibatches [--kind logistic] [--ratio 100] [--particles 8] [--document]

*logistic* and *Poisson* are regressions of 20,000 rows on 8 correlated covariates, with a full Gaussian; the exact
answer is Newton's mode and Hessian in float64. *local Normal* and *local Poisson* are 20,000 groups, each with a
latent of its own in the guide (``AutoNormal`` with ``create_plates``), of which a step draws B at random; the exact
answer is the optimum of the ELBO in closed form, found by coordinate ascent in float64. The *error* is the distance
of the means of the global latents from the answer, as root mean square over directions, averaged over the seeds. Its
unit is the posterior standard deviation, for groups the standard deviation that the answer has by the choice of the
rows. Each batch has its own optimum, √(N/B) away; the average of T of them is √(N/B/T) away, which is the
*reference*. (The batches of an epoch of the regressions are a permutation, so that an average of whole epochs can be
nearer.) *sd* is the mean factor by which the guide's standard deviations of the coefficients are off. Our options are
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
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from tqdm import tqdm

from numpyro_natgrad import NaturalGradient

OUTPUT = pathlib.Path("docs/benchmarks/minibatches.md")
COVARIATES, RATES, EPOCHS = 8, (0.1, 0.03, 0.01, 0.003), (1, 2, 5)
#: N, and N/B; the smallest batches have 2 rows.
ROWS, RATIOS = 20_000, (10, 100, 1000, 10_000)
HEADS = ("model", "N/B", "B", "particles", "batches", "reference", "error", "sd", "Adam's best error", "its rate", "sd")


class Task(NamedTuple):
    """A model and guide for batches, ``batch(t)`` with the arguments of batch ``t``, and the distance of a fit."""

    model: Callable[..., None]
    guide: Callable[[], Any]
    batch: Callable[[jax.Array], tuple[Any, ...]]
    errors: Callable[[Any], tuple[float, float]]


def regression(kind: str, size: int, count: int) -> Task:
    """Bernoulli (``logistic``) or Poisson data with a standard Normal prior on the coefficients."""
    rng, d, rows = np.random.default_rng(0), COVARIATES, ROWS
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

    root, sd = np.linalg.cholesky(hessian), np.sqrt(np.diag(np.linalg.inv(hessian)))

    def errors(params: Any) -> tuple[float, float]:
        off = (np.asarray(params["auto_loc"], float) - mode) @ root
        scale = np.sqrt(np.sum(np.asarray(params["auto_scale_tril"], float) ** 2, axis=-1))
        return root_mean_square(off), float(np.exp(np.mean(np.abs(np.log(scale / sd)))))

    arrays, index = jnp.asarray(x, jnp.float32), jnp.asarray(batches(rows, size, count))
    outcomes = jnp.asarray(y, jnp.float32)
    guide = partial(AutoMultivariateNormal, model)
    return Task(model, guide, lambda t: (arrays[index[t]], outcomes[index[t]]), errors)


def root_mean_square(off: np.ndarray) -> float:
    """Root mean square over the last axis, averaged over the fits."""
    return float(np.mean(np.sqrt(np.mean(off**2, axis=-1))))


def local_rows(kind: str, size: int, count: int) -> Task:
    """Groups with a latent each: three Normal values (``local Normal``), or the sum of three counts."""
    rng = np.random.default_rng(0)
    theta = 0.5 + 0.7 * rng.normal(size=ROWS)
    normal = kind == "local Normal"
    y = theta + rng.normal(size=ROWS) / np.sqrt(3) if normal else rng.poisson(3 * np.exp(theta))
    data = jnp.asarray(y, jnp.float32)

    def model() -> None:
        mean, sd = numpyro.sample("mean", dist.Normal(0, 5)), numpyro.sample("sd", dist.LogNormal(0, 1))
        with numpyro.plate("groups", ROWS, subsample_size=size) as index:
            latent = numpyro.sample("theta", dist.Normal(mean, sd))
            noise = dist.Normal(latent, 1 / np.sqrt(3)) if normal else dist.Poisson(3 * jnp.exp(latent))
            numpyro.sample("y", noise, obs=data[index])

    exact = local_optimum(y, normal)
    parts = np.stack([local_optimum(part, normal) for part in np.split(rng.permutation(y), 100)])
    unit = np.std(parts, axis=0) / np.sqrt(len(parts))

    def errors(params: Any) -> tuple[float, float]:
        found = np.stack([params["mean_auto_loc"], params["sd_auto_loc"]], axis=-1)
        return root_mean_square((found - exact) / unit), np.nan

    plates = lambda: numpyro.plate("groups", ROWS, subsample_size=size)
    return Task(model, partial(AutoNormal, model, create_plates=plates), lambda t: (), errors)


def local_optimum(y: np.ndarray, normal: bool) -> np.ndarray:
    """Mean and log sd of the latents that maximize the ELBO; the guide's sd of either is neglected (1/√N)."""
    mean, variance = np.mean(y if normal else np.log(y / 3 + 0.5)), 0.5
    m, v = np.full(len(y), mean), np.full(len(y), 0.2)
    for _ in range(300):
        rate = np.full(len(y), 3.0) if normal else 3 * np.exp(m + v / 2)
        gap = 3 * (m - y) if normal else rate - y
        v = 1 / (rate + 1 / variance)
        m = m - v * (gap + (m - mean) / variance)
        mean, variance = np.mean(m), np.mean(v + (m - mean) ** 2)
    return np.array([mean, np.log(variance) / 2])


TASKS = {"logistic": regression, "Poisson": regression, "local Normal": local_rows, "local Poisson": local_rows}


def batches(rows: int, size: int, count: int) -> np.ndarray:
    """The rows of ``count`` batches, ``(count, size)``: a new permutation in every epoch."""
    rng, each = np.random.default_rng(1), rows // size
    epochs = [rng.permutation(rows)[: each * size].reshape(each, size) for _ in range(-(-count // each))]
    return np.concatenate(epochs)[:count]


def errors(
    task: Task, optimizer: Callable[[], Any], particles: int, marks: list[int], seeds: int
) -> Iterator[tuple[float, float]]:
    """Error and factor of the standard deviations after each of ``marks`` batches."""
    # an autoguide keeps the start of its first set-up
    each = [SVI(task.model, task.guide(), optimizer(), Trace_ELBO(num_particles=particles)) for _ in range(seeds)]
    states = [svi.init(random.key(k), *task.batch(jnp.array(0))) for k, svi in enumerate(each)]
    state, svi = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), each[0]

    def step(t: jax.Array, state: Any) -> Any:
        return jax.vmap(lambda s: svi.update(s, *task.batch(t))[0])(state)

    run, taken = jax.jit(lambda state, start, stop: lax.fori_loop(start, stop, step, state)), 0
    for mark in marks:
        state, taken = run(state, taken, mark), mark
        yield task.errors(jax.vmap(svi.get_params)(state))


def decaying_adam(rate: float, count: int) -> optax.GradientTransformation:
    """Adam with a cosine decay over ``count`` steps."""
    return optax.adam(optax.cosine_decay_schedule(rate, count))


def lines(kind: str, ratio: int, particles: int, seeds: int, most: int) -> Iterator[str]:
    """The lines of one model, one size of batches and one number of particles."""
    size, count = ROWS // ratio, min(ratio * max(EPOCHS), most)
    task = TASKS[kind](kind, size, count)
    marks = sorted({m for m in (*(ratio * e for e in EPOCHS), count) if m <= count})
    fits: dict[str | float, Callable[[], Any]] = {"ours": NaturalGradient}
    fits.update({rate: partial(decaying_adam, rate, count) for rate in RATES})
    found = {
        name: list(errors(task, make, particles, marks, seeds))
        for name, make in tqdm(fits.items(), desc=f"{kind}, N/B = {ratio}, {particles} particles", leave=False)
    }
    for k, mark in enumerate(marks):
        rate = min(RATES, key=lambda x: np.nan_to_num(found[x][k][0], nan=np.inf))
        (error, factor), (theirs, its) = found["ours"][k], found[rate][k]
        cells = [kind, f"{ratio:,}", str(size), str(particles), f"{mark:,}", f"{np.sqrt(ratio / mark):.2f}"]
        cells += [f"{error:.2f}", factor_cell(factor), f"{theirs:.2f}", str(rate), factor_cell(its)]
        yield f"| {' | '.join(cells)} |"


def factor_cell(factor: float) -> str:
    """The factor, where it is measured."""
    return "–" if np.isnan(factor) else f"{factor:.2f}"


def main() -> None:
    """Print the lines that the arguments choose, by default all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.minibatches", description=__doc__)
    parser.add_argument("--kind", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--ratio", nargs="*", type=int, choices=RATIOS, default=list(RATIOS))
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
