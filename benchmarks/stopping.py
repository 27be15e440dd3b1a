# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.stopping [case …]``: the true gap of a fit at the step where ``fit`` stops.

With ``--checkout PATH`` (of posteriordb) the cases are its posteriors, by (parts of) their names, in float64.

The stopping rule of ``fit``, its running estimate and its independent check, is applied every :data:`.STEPS_PER_CHUNK`
steps to fits of :data:`STEPS` steps from several seeds. A *check* is one call of the judge.
The true gap is the loss minus that of the reference, on the same :data:`DRAWS` draws. The reference is the best of the
seeds' mean iterates over the last half of the fits with the most particles. A stop is *right* if the true gap is below
twice the tolerance; *steps needed* count until it first is.
"""

import argparse
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from numpyro_natgrad import History, NaturalGradient
from numpyro_natgrad.compilation.data import Data, split
from numpyro_natgrad.infer.convergence import converged
from numpyro_natgrad.infer.loop import STEPS_PER_CHUNK
from numpyro_natgrad.infer.stop_check import StopCheck

from .cases import Case, eight_schools, gaussian
from .stress_cases import StressCase, centred_schools

SEEDS, STEPS, DRAWS = 10, 300, 4096
PARTICLES = (32, 8, 2)
TOLERANCES = (0.05, 0.01)


class Effort(NamedTuple):
    """Numbers of particles, the greatest first, and the number of draws that fits are scored on."""

    particles: tuple[int, ...]
    draws: int


class Fits(NamedTuple):
    """The history of each seed; states and true gaps, nats, with one column for each ``STEPS_PER_CHUNK`` steps."""

    svi: SVI
    data: Data
    particles: int
    histories: list[History]
    states: Any
    gaps: np.ndarray


class Stops(NamedTuple):
    """Per seed: the step where a fit stops (infinity: never), the true gap there, nats, steps needed, and checks."""

    steps: np.ndarray
    gaps: np.ndarray
    needed: np.ndarray
    checks: np.ndarray


def logistic() -> Case:
    """200 rows, 8 covariates whose scales differ a hundredfold."""
    draw = np.random.default_rng(1)
    x = draw.normal(size=(200, 8)) * np.logspace(-1, 1, 8) / 2
    y = draw.random(200) < 1 / (1 + np.exp(-x @ draw.normal(size=8)))

    def model(x: Any, y: Any) -> None:
        beta = numpyro.sample("beta", dist.Normal(0, 2).expand([8]).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=x @ beta).to_event(1), obs=y)

    return Case("logistic regression", model, (jnp.array(x, float), jnp.array(y, float)), 0.1, 1.0)


def poisson() -> Case:
    """Counts in ten groups of three, each group with its own log rate."""
    draw = np.random.default_rng(2)
    y = draw.poisson(np.exp(1 + 0.7 * draw.normal(size=10))[:, None], (10, 3))

    def model(y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 3))
        sigma = numpyro.sample("sigma", dist.HalfNormal(2))
        with numpyro.plate("groups", 10):
            a = numpyro.sample("a", dist.Normal(0, 1))
            numpyro.sample("y", dist.Poisson(jnp.exp(mu + sigma * a)[:, None]).to_event(1), obs=y)

    return Case("Poisson hierarchy", model, (jnp.array(y),), 0.1, 1.0)


def funnel() -> Case:
    """Neal (2003), with five dimensions in its neck."""

    def model() -> None:
        v = numpyro.sample("v", dist.Normal(0, 3))
        with numpyro.plate("neck", 5):
            numpyro.sample("z", dist.Normal(0, jnp.exp(v / 2)))

    return Case("funnel", model, (), 0.1, 1.0)


CASES: dict[str, Callable[[], Case | StressCase]] = {
    "gaussian": gaussian,
    "eight": eight_schools,
    "centred": centred_schools,
    "logistic": logistic,
    "poisson": poisson,
    "funnel": funnel,
}
GUIDES: dict[str, Callable[..., Any]] = {"full": AutoMultivariateNormal, "mean field": AutoNormal}


def fits(model: Callable[..., Any], guide: Any, data: tuple[Any, ...], effort: Effort) -> Iterator[tuple[int, Fits]]:
    """The fits of one model and guide, for every number of particles."""
    key = jax.random.key(0)
    svi = SVI(model, guide, NaturalGradient(), Trace_ELBO(effort.draws))
    svi.init(key, *data)
    score = jax.jit(lambda params: jax.lax.map(lambda p: svi.loss.loss(key, p, model, guide, *data), params))
    best = None
    for count in effort.particles:
        fitted = SVI(model, guide, NaturalGradient(), Trace_ELBO(count))
        records, params, states = _runs(fitted, data)
        if best is None:
            best = score(jax.tree.map(_settled, params)).min()
        gaps = np.stack([score(jax.tree.map(lambda x, i=i: x[i], params)) - best for i in range(SEEDS)])
        histories = [_history(jax.tree.map(lambda x, i=i: x[i], records)) for i in range(SEEDS)]
        yield count, Fits(fitted, split(fitted, data, {}), count, histories, states, gaps)


def _settled(x: np.ndarray) -> np.ndarray:
    return x[:, x.shape[1] // 2 :].mean(1)


def _runs(svi: SVI, data: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Loss and ``StepInfo`` of every step, parameters and states every ``STEPS_PER_CHUNK`` steps; ``(seeds, …)``."""
    svi.init(jax.random.key(0), *data)

    def step(state: Any, _: None) -> tuple[Any, Any]:
        state, loss = svi.update(state, *data)
        return state, (loss, svi.optim.info(state))

    def chunk(state: Any, _: None) -> tuple[Any, Any]:
        state, records = jax.lax.scan(step, state, None, length=STEPS_PER_CHUNK)
        return state, (records, state, svi.get_params(state))

    run = jax.jit(lambda key: jax.lax.scan(chunk, svi.init(key, *data), None, length=STEPS // STEPS_PER_CHUNK)[1])
    records, states, params = zip(*(run(jax.random.key(seed)) for seed in range(SEEDS)), strict=True)
    stacked = lambda parts: jax.tree.map(lambda *xs: np.stack(xs), *jax.device_get(parts))
    return stacked(records), stacked(params), states


def _history(records: Any) -> History:
    loss, info = jax.tree.map(np.ravel, records)
    fields = info.kl, info.step_size, info.newton_decrement, info.newton_decrement_error, info.limited, info.skipped
    return History(loss, *fields, np.zeros(STEPS))


def stops(fitted: Fits, tolerance: float) -> Stops:
    """The stops of all seeds at this tolerance."""
    found = [_stop(fitted, seed, tolerance) for seed in range(SEEDS)]
    return Stops(*(np.array(x) for x in zip(*found, strict=True)))


def _stop(fitted: Fits, seed: int, tolerance: float) -> tuple[float, float, float, int]:
    history, gaps, right = fitted.histories[seed], fitted.gaps[seed], fitted.gaps[seed] < 2 * tolerance
    needed = STEPS_PER_CHUNK * (1 + right.argmax()) if right.any() else np.inf
    check, checks = StopCheck(fitted.svi), set()
    for i in range(STEPS // STEPS_PER_CHUNK):
        steps = STEPS_PER_CHUNK * (i + 1)
        past = History(*(x[:steps] for x in history))
        if not converged(past, tolerance):
            continue
        state = jax.tree.map(lambda x, i=i: x[i], fitted.states[seed])
        granted = check.grants(past, state, fitted.data, steps, fitted.particles, None, tolerance)
        checks.add(check.at)
        if granted:
            return steps, gaps[i], needed, len(checks)
    return np.inf, np.nan, needed, len(checks)


def row(title: str, guide: str, particles: int, found: Stops, tolerance: float) -> str:
    """One line of the table."""
    stopped = np.isfinite(found.steps)
    right = int(np.sum(found.gaps[stopped] < 2 * tolerance))
    worst = f"{found.gaps[stopped].max():.3f}" if stopped.any() else "–"
    counts = f"{right} of {stopped.sum()}"
    return (
        f"| {title} | {guide} | {particles} | {tolerance} | {counts} | {worst} | {np.median(found.steps):.0f} | "
        f"{np.median(found.needed):.0f} | {np.mean(found.checks):.1f} |"
    )


HEAD = (
    "| case | guide | particles | tolerance | right stops | worst gap | steps at stop | steps needed | checks |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def table(cases: Iterable[tuple[str, str, Callable[..., Any], Any, tuple[Any, ...]]], effort: Effort) -> Iterator[str]:
    """The lines of the table, for cases ``(title, name of the guide, model, guide, data)``."""
    yield HEAD
    everything: dict[float, list[Stops]] = {tolerance: [] for tolerance in TOLERANCES}
    for title, name, model, guide, data in cases:
        for count, fitted in fits(model, guide, data, effort):
            for tolerance in TOLERANCES:
                found = stops(fitted, tolerance)
                everything[tolerance].append(found)
                yield row(title, name, count, found, tolerance)
    yield ""
    yield from (summary(tolerance, found) for tolerance, found in everything.items())


def summary(tolerance: float, found: list[Stops]) -> str:
    """A sentence over all fits at this tolerance."""
    steps, gaps, needed, checks = (np.concatenate(x) for x in zip(*found, strict=True))
    stopped = np.isfinite(steps)
    right = gaps[stopped] < 2 * tolerance
    ratio = (steps[stopped] / needed[stopped])[right]
    within, middle = np.mean(ratio <= 2), np.median(ratio)
    return (
        f"tolerance {tolerance} nats: {stopped.sum()} of {steps.size} fits stop within {STEPS} steps, "
        f"{right.mean():.1%} of them with a true gap below {2 * tolerance}; of those {within:.0%} within twice the "
        f"steps needed, and in the median after {middle:.2f} times the steps needed. A fit is "
        f"checked {checks.mean():.1f} times.\n"
    )


def posteriors(checkout: pathlib.Path, names: list[str]) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Title, model and data of posteriors of posteriordb."""
    from .posteriordb.checkout import arguments
    from .posteriordb.models import MODELS, named

    for name in map(named, names or MODELS):
        data, function = arguments(checkout, name), MODELS[name].function

        def model(*values: Any, names: Any = tuple(data), function: Any = function) -> None:
            function(**dict(zip(names, values, strict=True)))

        yield name.split("-")[0], model, tuple(data.values())


def main() -> None:
    """Print the table of the named cases, or of all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stopping", description=__doc__)
    parser.add_argument("case", nargs="*")
    parser.add_argument("--checkout", type=pathlib.Path, help="checkout of posteriordb")
    parser.add_argument(
        "--particles",
        default=",".join(map(str, PARTICLES)),
        help="with commas, the greatest first",
    )
    parser.add_argument("--draws", type=int, default=DRAWS, help="draws that fits are scored on")
    options = parser.parse_args()
    if options.checkout:
        jax.config.update("jax_enable_x64", True)
        made = posteriors(options.checkout, options.case)
    else:
        made = ((c.title, c.model, c.data) for c in (CASES[name]() for name in options.case or CASES))
    cases = ((title, name, model, guide(model), data) for title, model, data in made for name, guide in GUIDES.items())
    effort = Effort(tuple(map(int, options.particles.split(","))), options.draws)
    for line in table(cases, effort):
        print(line, flush=True)


if __name__ == "__main__":
    main()
