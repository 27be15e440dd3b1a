# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Guides without a closed-form KL: steps and seconds to Adam's final ELBO.

    python -m benchmarks.flows [case ...]

Medians over 3 seeds, 8 particles, default options. ELBOs (nats) use 2000 draws common to all fits, at checkpoints 20 %
apart. Seconds are those of the compiled steps. The target is the ELBO of Adam after all its steps, at the best of ten
settings: five rates, each constant and with a cosine decay.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoBNAFNormal, AutoDAIS, AutoIAFNormal
from tqdm import tqdm

from numpyro_natgrad import NaturalGradient

from .posteriordb.svi import decaying_adam

RATES, SEEDS, PARTICLES, DRAWS = (0.03, 0.01, 0.003, 0.001, 0.0003), 3, 8, 2000
ADAM_STEPS, NATURAL_STEPS = 3000, 500
HEADS = (
    *("case", "Adam's rate", "Adam's ELBO", "Adam's steps", "natural-gradient steps"),
    *("Adam's seconds", "natural-gradient seconds", f"natural-gradient ELBO after {NATURAL_STEPS} steps"),
)
EFFECT = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def banana() -> None:
    """A Gaussian bent along a parabola; log evidence 0."""
    z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
    numpyro.factor("bend", dist.Normal(0, 1).log_prob(z[0]) + dist.Normal(z[0] ** 2, 0.3).log_prob(z[1]))


def funnel() -> None:
    """Neal's funnel with five latents in its neck; log evidence 0."""
    s = numpyro.sample("s", dist.Normal(0, 2))
    with numpyro.plate("n", 5):
        numpyro.sample("x", dist.Normal(0, jnp.exp(s / 2)))


def schools() -> None:
    """Eight schools, centred: a funnel with data."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", 8):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("effect", dist.Normal(theta, ERROR), obs=EFFECT)


class Case(NamedTuple):
    """A model and its guide; ``draws`` is the number of draws of the ELBO that scores a fit."""

    model: Callable[[], None]
    guide: Callable[[Any], Any]
    draws: int = DRAWS


CASES = {
    "banana, IAF": Case(banana, AutoIAFNormal),
    "banana, BNAF": Case(banana, AutoBNAFNormal),
    "funnel, IAF": Case(funnel, AutoIAFNormal),
    "schools, IAF": Case(schools, AutoIAFNormal),
    "banana, DAIS": Case(banana, AutoDAIS),
}


def settings(rates: tuple[float, ...]) -> tuple[tuple[float, bool], ...]:
    """Adam's settings: each rate constant, and with a cosine decay."""
    return tuple(itertools.product(rates, (False, True)))


def adam_over(steps: int) -> Callable[[Any], Any]:
    """Adam from its setting; a cosine decay is over this many steps."""
    return lambda setting: decaying_adam(setting[0], setting[1], steps)


def named(setting: tuple[float, bool]) -> str:
    """The setting as the tables show it."""
    rate, decays = setting
    return f"{rate:g}" + ", cosine" * decays


class Fit(NamedTuple):
    """ELBO at each checkpoint, nats, of each seed ``(seeds, checkpoints)``; milliseconds a step; steps taken there."""

    elbo: np.ndarray
    milliseconds: float
    marks: np.ndarray

    @property
    def final(self) -> float:
        return float(np.median(self.elbo[:, -1]))

    def reached(self, elbo: float) -> float:
        """Steps to the first checkpoint at ``elbo``, median over seeds; infinite if most never arrive."""
        arrived = [self.marks[curve >= elbo][:1] for curve in self.elbo]
        return float(np.median([a[0] if a.size else np.inf for a in arrived]))


def fits(
    case: Case, make: Callable[[Any], Any], rates: tuple[Any, ...], steps: int, seeds: int = SEEDS, first: int = 10
) -> list[Fit]:
    """One fit for every rate (the argument of ``make``); all of them run the same compiled program.

    The first checkpoint is at step ``first``.
    """
    guide = case.guide(case.model)
    base = SVI(case.model, guide, make(rates[0]), Trace_ELBO(PARTICLES))
    starts = [base.init(random.key(seed)) for seed in range(seeds)]

    def svi(rate: Any) -> SVI:
        changed = copy.copy(base)
        changed.optim = make(rate)
        return changed

    @jax.jit
    def advance(rate: Any, state: Any, number: Any) -> Any:
        return lax.fori_loop(0, number, lambda _, s: svi(rate).update(s)[0], state)

    @jax.jit
    def elbo(state: Any) -> Any:
        params = base.get_params(state)
        each = lambda key: -Trace_ELBO().loss(key, params, case.model, guide)
        return jnp.mean(lax.map(each, random.split(random.key(99), case.draws), batch_size=min(case.draws, 200)))

    marks = np.unique(np.geomspace(first, steps, 1 + round(np.log(steps / first) / np.log(1.2))).round().astype(int))
    jax.block_until_ready(advance(rates[0], starts[0], 1))
    return [
        _fit(lambda s, n, rate=rate: advance(rate, s, n), elbo, starts, marks)
        for rate in tqdm(rates, desc="fits", leave=False)
    ]


def _fit(advance: Callable, elbo: Callable, starts: list[Any], marks: np.ndarray) -> Fit:
    curves, seconds = [], []
    for state in tqdm(starts, desc="seeds", leave=False):
        curve, spent = [], 0.0
        for number in np.diff(marks, prepend=0):
            before = time.perf_counter()
            state = jax.block_until_ready(advance(state, int(number)))
            spent += time.perf_counter() - before
            curve.append(float(elbo(state)))
        seconds.append(spent)
        curves.append(curve)
    return Fit(np.nan_to_num(np.array(curves), nan=-np.inf), 1e3 * min(seconds) / marks[-1], marks)


def row(name: str) -> str:
    """One line of the table."""
    case = CASES[name]
    tried = settings(RATES)
    adams = fits(case, adam_over(ADAM_STEPS), tried, ADAM_STEPS)
    natural = fits(case, lambda rate: NaturalGradient(), (1.0,), NATURAL_STEPS)[0]
    best = int(np.argmax([fit.final for fit in adams]))
    adam = adams[best]
    mark = adam.final
    ours, theirs = natural.reached(mark), adam.reached(mark)
    cells = [
        *(name, named(tried[best]), f"{mark:.2f}", f"{theirs:.0f}", _number(ours, ".0f")),
        *(f"{theirs * adam.milliseconds / 1e3:.2f}", _number(ours * natural.milliseconds / 1e3, ".2f")),
        f"{natural.final:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _number(x: float, form: str) -> str:
    return format(x, form) if np.isfinite(x) else "never"


def main() -> None:
    """Print the table of the named cases, or of all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flows", description=__doc__)
    parser.add_argument("case", nargs="*", help=f"some of: {'; '.join(CASES)}; default: all")
    chosen = parser.parse_args().case or list(CASES)
    print(f"| {' | '.join(HEADS)} |\n{'| --- ' * len(HEADS)}|", flush=True)
    for name in chosen:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
