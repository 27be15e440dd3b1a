# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Bayesian networks by minibatches with one particle: held-out log-likelihood and calibration by epochs and seconds.

``SVI`` with ``AutoNormal`` and ``NaturalGradient()`` or Adam, each from the guide's default start; an IVON step (Shen
et al. 2024, algorithm 1); and a Laplace approximation of the last layer at Adam's maximum a posteriori. Adam, IVON and
the maximum take the best of four rates, by the held-out log-likelihood after the last epoch. Predictions average 32
draws of the weights. The calibration error is the mean distance of confidence and accuracy over ten bins of confidence
(classification), or of the nominal and actual coverage of nine central intervals (regression).
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
from jax.flatten_util import ravel_pytree
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.optim import Adam

from numpyro_natgrad import NaturalGradient

from .network_tasks import TASKS, Rows, Task

EPOCHS = (5, 20, 50)
RATES = (0.1, 0.03, 0.01, 0.003)
DRAWS = 32
#: Epochs, at the most, that a rival has to use as many seconds as ours.
MOST_EPOCHS = 300


class Method(NamedTuple):
    """One way to train: a start, a step along one batch, and outputs at some inputs for :data:`DRAWS` draws."""

    start: Callable[[jax.Array], Any]
    step: Callable[[Any, Rows], Any]
    outputs: Callable[[Any, jax.Array], jax.Array]


def by_svi(task: Task, optimizer: Any) -> Method:
    """``SVI`` with a mean-field guide and one particle, NumPyro's default."""
    svi = SVI(task.model, AutoNormal(task.model), optimizer, Trace_ELBO())

    def outputs(state: Any, x: jax.Array) -> jax.Array:
        predictive = Predictive(task.model, guide=svi.guide, params=svi.get_params(state), num_samples=DRAWS)
        return predictive(jax.random.key(9), x)["output"]

    first = tuple(each[: task.batch] for each in task.train)
    return Method(lambda key: svi.init(key, *first), lambda state, batch: svi.update(state, *batch)[0], outputs)


def _flat(task: Task, key: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    return ravel_pytree(task.net.init(key, task.train[0][:1]))


def _mean_loss(task: Task, unravel: Callable[[jax.Array], Any], flat: jax.Array, batch: Rows) -> jax.Array:
    x, y = batch
    return -jnp.mean(task.likelihood(task.net.apply(unravel(flat), x)).log_prob(y))


def by_ivon(task: Task, rate: float) -> Method:
    """IVON with a standard normal prior: weight decay 1/N, effective sample size N."""
    _, unravel = _flat(task, jax.random.key(0))
    rows, decay, beta1, beta2 = task.rows, 1 / task.rows, 0.9, 0.9995
    gradient = jax.grad(partial(_mean_loss, task, unravel))

    def start(key: jax.Array) -> Any:
        mean = _flat(task, key)[0]
        return mean, jnp.full_like(mean, 0.1), jnp.zeros_like(mean), jnp.zeros(()), key

    def deviation(h: jax.Array) -> jax.Array:
        return 1 / jnp.sqrt(rows * (h + decay))

    def step(state: Any, batch: Rows) -> Any:
        mean, h, momentum, count, key = state
        key, own = jax.random.split(key)
        sigma = deviation(h)
        noise = sigma * jax.random.normal(own, mean.shape)
        g = gradient(mean + noise, batch)
        estimate = g * noise / sigma**2
        momentum = beta1 * momentum + (1 - beta1) * g
        h = beta2 * h + (1 - beta2) * estimate + 0.5 * (1 - beta2) ** 2 * (h - estimate) ** 2 / (h + decay)
        count = count + 1
        mean = mean - rate * (momentum / (1 - beta1**count) + decay * mean) / (h + decay)
        return mean, h, momentum, count, key

    def outputs(state: Any, x: jax.Array) -> jax.Array:
        mean, h, *_ = state
        draws = mean + deviation(h) * jax.random.normal(jax.random.key(9), (DRAWS, mean.size))
        return jax.vmap(lambda w: task.net.apply(unravel(w), x))(draws)

    return Method(start, step, outputs)


def by_last_layer(task: Task, rate: float) -> Method:
    """Adam to the maximum a posteriori; then the Gauss–Newton Laplace approximation of the last dense layer."""
    _, unravel = _flat(task, jax.random.key(0))
    adam = optax.adam(rate)

    def loss(w: jax.Array, batch: Rows) -> jax.Array:
        return _mean_loss(task, unravel, w, batch) + 0.5 * jnp.sum(w**2) / task.rows

    def start(key: jax.Array) -> Any:
        w = _flat(task, key)[0]
        return w, adam.init(w)

    def step(state: Any, batch: Rows) -> Any:
        w, inner = state
        updates, inner = adam.update(jax.grad(loss)(w, batch), inner)
        return optax.apply_updates(w, updates), inner

    def outputs(state: Any, x: jax.Array) -> jax.Array:
        layers = unravel(state[0])["params"]
        name = max((n for n in layers if n.startswith("Dense")), key=lambda n: int(n.split("_")[1]))
        last, again = ravel_pytree(layers[name])

        def output(part: jax.Array, inputs: jax.Array) -> jax.Array:
            return task.net.apply({"params": {**layers, name: again(part)}}, inputs)

        def curvature(inputs: Rows) -> jax.Array:
            row, y = inputs[0][None], inputs[1]
            jacobian = jax.jacobian(lambda part: output(part, row)[0])(last)
            hessian = jax.hessian(lambda out: -task.likelihood(out).log_prob(y))(output(last, row)[0])
            values, vectors = jnp.linalg.eigh(hessian)
            root = jacobian.T @ (vectors * jnp.sqrt(jnp.maximum(values, 0)))
            return root @ root.T

        rows = tuple(each[:5000] for each in task.train)
        add = lambda total, row: (total + curvature(row), None)
        total = jax.lax.scan(add, jnp.zeros((last.size, last.size)), rows)[0]
        precision = total * task.rows / len(rows[0]) + jnp.eye(last.size)
        factor = jnp.linalg.cholesky(precision)
        noise = jax.random.normal(jax.random.key(9), (last.size, DRAWS))
        draws = last + jax.scipy.linalg.solve_triangular(factor.T, noise, lower=False).T
        return jax.vmap(lambda part: output(part, x))(draws)

    return Method(start, step, outputs)


METHODS: dict[str, tuple[Callable[..., Method], tuple[Any, ...]]] = {
    "ours": (lambda task, _: by_svi(task, NaturalGradient()), (None,)),
    "Adam": (lambda task, rate: by_svi(task, Adam(rate)), RATES),
    "IVON": (by_ivon, RATES),
    "last-layer Laplace": (by_last_layer, RATES),
}


def trained(task: Task, method: Method, marks: tuple[int, ...], limit: float = np.inf) -> dict[str, Any]:
    """Scores after each of ``marks`` epochs, and seconds an epoch, without compilation."""
    state = method.start(jax.random.key(0))
    epoch = jax.jit(lambda s, batches: jax.lax.scan(lambda s, b: (method.step(s, b), None), s, batches)[0])
    compiled = epoch.lower(state, task.epoch(jax.random.key(0))).compile()
    score, scores, seconds = jax.jit(partial(scored, task, method)), {}, 0.0
    for number in range(1, marks[-1] + 1):
        batches = task.epoch(jax.random.key(number))
        start = time.perf_counter()
        state = jax.block_until_ready(compiled(state, batches))
        seconds += time.perf_counter() - start
        if number in marks:
            scores[number] = [float(x) for x in score(state)]
    return {"scores": scores, "seconds": seconds / marks[-1]}


def scored(task: Task, method: Method, state: Any) -> tuple[jax.Array, jax.Array]:
    """Held-out log-likelihood a row, nats, of the mean of the predictions, and the calibration error."""
    x, y = task.test
    likelihood = task.likelihood(method.outputs(state, x))
    each = jax.nn.logsumexp(likelihood.log_prob(y), axis=0) - jnp.log(DRAWS)
    if isinstance(likelihood, dist.Normal):
        level = jnp.mean(likelihood.cdf(y), axis=0)
        nominal = jnp.arange(1, 10) / 10
        actual = jnp.mean(jnp.abs(2 * level - 1)[:, None] <= nominal, axis=0)
        return jnp.mean(each), jnp.mean(jnp.abs(actual - nominal))
    probabilities = jnp.mean(jax.nn.softmax(likelihood.logits), axis=0)
    confidence, right = jnp.max(probabilities, -1), jnp.argmax(probabilities, -1) == y
    member = jnp.clip((confidence * 10).astype(int), 0, 9)[:, None] == jnp.arange(10)
    gaps = jnp.abs(jnp.sum(jnp.where(member, (confidence - right)[:, None], 0.0), axis=0))
    return jnp.mean(each), jnp.sum(gaps) / len(y)


def measure(name: str, method: str) -> dict[str, Any]:
    """One row: the best rate of one method on one network."""
    task = TASKS[name]()
    make, rates = METHODS[method]
    runs = {rate: trained(task, make(task, rate), EPOCHS) for rate in rates}
    last = {rate: run["scores"][EPOCHS[-1]][0] for rate, run in runs.items()}
    best = max(last, key=lambda rate: np.nan_to_num(last[rate], nan=-np.inf))
    row = {"task": name, "method": method, "rate": best, **runs[best]}
    if method != "ours":
        ours = trained(task, METHODS["ours"][0](task, None), (2,))["seconds"]
        epochs = {n: min(max(1, round(n * ours / row["seconds"])), MOST_EPOCHS) for n in EPOCHS}
        marks = tuple(sorted(set(epochs.values())))
        longer = trained(task, make(task, best), marks)["scores"]
        row["equal seconds"] = {n: longer[epochs[n]] for n in EPOCHS}
        row["ours, seconds"] = ours
    return row


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    f"{task} {method}": partial(measure, task, method) for task in TASKS for method in METHODS
}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown."""
    heads = ["network", "method", "rate", "ms an epoch"]
    heads += [f"log-likelihood after {n} epochs" for n in EPOCHS] + [f"calibration error after {EPOCHS[-1]}"]
    heads += [f"log-likelihood in the seconds of {n} epochs of ours" for n in EPOCHS]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows.values():
        scores = {int(n): score for n, score in row["scores"].items()}
        equal = {int(n): score for n, score in row.get("equal seconds", row["scores"]).items()}
        cells = [row["task"], row["method"], str(row["rate"] or "–"), f"{1e3 * row['seconds']:.0f}"]
        cells += [f"{scores[n][0]:.3f}" for n in EPOCHS] + [f"{scores[EPOCHS[-1]][1]:.3f}"]
        lines.append(f"| {' | '.join([*cells, *(f'{equal[n][0]:.3f}' for n in EPOCHS)])} |")
    return "\n".join(lines)
