# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.stress_tests``: default options on the models of :mod:`.stress_cases`, beside Adam.

Every fit is scored at marks on one common set of 4096 draws, on all of the data. *Best −ELBO* is the lowest one known:
that of the optimum if there is a closed form, else of a run with 64 particles, or of any fit of the table. *Steps* are
those to the first mark within 0.1 nats of it. A fit is a *failure* if it is not within 1 nat after all of its steps.
Adam's rate is the one of four that ends lowest, with a cosine decay over its 5000 steps.

Without names of cases the whole table is printed, each precision in its own process; ``--x64`` is double precision.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.optim import optax_to_numpyro
from tqdm import tqdm

from numpyro_natgrad import NaturalGradient

from .stress_cases import CASES, GUIDES, StressCase

RATES, ADAM_STEPS, STEPS, DRAWS = (0.1, 0.03, 0.01, 0.003), 5000, 1000, 4096
DONE, FAILED = 0.1, 1.0
HEADS = (
    *("case", "guide", "dtype", "best −ELBO", "steps, median", "steps, worst seed"),
    *("gap at 100 steps", "gap at 300", "gap at 1000", "skipped steps", "marks with NaN", "failures"),
    *("Adam's rate", "Adam's steps", "Adam's gap at 5000", "Adam's failures"),
)


class Fits(NamedTuple):
    """Fits of all seeds: marks (steps), −ELBO (seed, mark), nats, skipped steps (seed,), number of non-finite marks."""

    marks: np.ndarray
    losses: np.ndarray
    skipped: np.ndarray
    nans: int

    def reached(self, target: float) -> np.ndarray:
        """First mark within the target, per seed; infinity if there is none."""
        hit = self.losses <= target
        return np.where(hit.any(1), self.marks[hit.argmax(1)], np.inf)

    def gap(self, mark: int, best: float) -> float:
        """Median over the seeds, nats."""
        return float(np.median(self.losses[:, np.searchsorted(self.marks, mark)])) - best

    def failures(self, best: float) -> int:
        """Number of fits that do not end within a nat."""
        return int((~(self.losses[:, -1] <= best + FAILED)).sum())


def marks(steps: int) -> np.ndarray:
    """Steps at which a fit is scored: geometric with ratio 9/8, and 100, 300 and the last."""
    return np.unique(np.r_[np.geomspace(5, steps, round(8 * np.log(steps / 5))).astype(int), 100, 300, steps])


class Fitted(NamedTuple):
    """An SVI of a case, with its guide's −ELBO on the common draws."""

    svi: SVI
    score: Callable[[Any], jax.Array]


def fitted(case: StressCase, guide: str, optimizer: Any, particles: int) -> Fitted:
    """The case with a guide of this name."""
    auto = GUIDES[guide](case.model, init_loc_fn=case.start)
    elbo, key = Trace_ELBO(DRAWS), jax.random.key(2026)
    score = jax.jit(lambda params: elbo.loss(key, params, case.model, auto, *case.data))
    return Fitted(SVI(case.model, auto, optimizer, Trace_ELBO(particles)), score)


def fits(case: StressCase, guide: str, optimizer: Any, steps: int, *, seeds: int, particles: int) -> Fits:
    """One fit for every seed, compiled once."""
    svi, score = fitted(case, guide, optimizer, particles)

    @jax.jit
    def advance(state: Any, number: Any) -> Any:
        return jax.lax.fori_loop(0, number, lambda _, s: svi.update(s, *case.data, batch=case.batch)[0], state)

    at, losses, skipped, nans = marks(steps), [], [], 0
    for seed in tqdm(range(seeds), desc=f"{case.title}, {guide}", leave=False):
        state, curve = svi.init(jax.random.key(seed), *case.data, batch=case.batch), []
        for number in np.diff(at, prepend=0):
            state = advance(state, int(number))
            params = svi.get_params(state)
            nans += not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))
            curve.append(float(score(params)))
        losses.append(curve)
        skipped.append(_skipped(svi, state))
    return Fits(at, np.nan_to_num(np.array(losses), nan=np.inf, posinf=np.inf), np.array(skipped), nans)


def _skipped(svi: SVI, state: Any) -> int:
    return int(svi.optim.info(state).skipped_total) if isinstance(svi.optim, NaturalGradient) else 0


def natural(case: StressCase, guide: str, steps: int = STEPS) -> tuple[Fits, float]:
    """Fits with default options, and the best loss known without Adam."""
    shipped = fits(case, guide, NaturalGradient(), steps, seeds=case.seeds, particles=case.particles)
    return shipped, min(best(case, guide, steps), float(shipped.losses.min()))


def best(case: StressCase, guide: str, steps: int = STEPS) -> float:
    """−ELBO of the optimum if there is a closed form, else of a run with 64 particles."""
    if guide in case.optimum:
        _, score = fitted(case, guide, NaturalGradient(), 1)
        return float(score(case.optimum[guide]))
    return float(fits(case, guide, NaturalGradient(), steps, seeds=1, particles=64).losses.min())


def adam(case: StressCase, guide: str) -> tuple[float, Fits]:
    """The rate that ends lowest, and its fits."""

    def at(rate: float) -> Fits:
        optimizer = optax_to_numpyro(optax.adam(optax.cosine_decay_schedule(rate, ADAM_STEPS)))
        return fits(case, guide, optimizer, ADAM_STEPS, seeds=case.seeds, particles=case.particles)

    return min(((rate, at(rate)) for rate in RATES), key=lambda pair: float(np.median(pair[1].losses[:, -1])))


def row(case: StressCase, guide: str) -> str:
    """One line of the table."""
    ours, known = natural(case, guide)
    rate, theirs = adam(case, guide)
    lowest = min(known, float(theirs.losses.min()))
    reached = ours.reached(lowest + DONE)
    cells = [
        *(case.title, guide, str(jnp.zeros(()).dtype), f"{lowest:.2f}"),
        *(_count(float(np.median(reached))), _count(float(reached.max()))),
        *(_nats(ours.gap(mark, lowest)) for mark in (100, 300, STEPS)),
        *(f"{np.median(ours.skipped):.0f}", str(ours.nans), f"{ours.failures(lowest)} of {case.seeds}"),
        *(f"{rate:g}", _count(float(np.median(theirs.reached(lowest + DONE)))), _nats(theirs.gap(ADAM_STEPS, lowest))),
        f"{theirs.failures(lowest)} of {case.seeds}",
    ]
    return f"| {' | '.join(cells)} |"


def _count(x: float) -> str:
    return f"{x:.0f}" if np.isfinite(x) else "never"


def _nats(x: float) -> str:
    return f"{x:.3f}" if abs(x) < 100 else f"{x:.2g}"


def main() -> None:
    """The chosen rows, or the whole table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stress_tests", description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"some of: {', '.join(CASES)}; default: all, in both precisions")
    parser.add_argument("--x64", action="store_true", help="double precision")
    options = parser.parse_args()
    if not options.cases:
        print("\n".join([f"| {' | '.join(HEADS)} |", "| --- " * len(HEADS) + "|"]), flush=True)
        for flags in ([], ["--x64"]):
            subprocess.run([sys.executable, "-m", "benchmarks.stress_tests", *CASES, *flags], check=True)
        return
    jax.config.update("jax_enable_x64", options.x64)
    for case in (CASES[name]() for name in options.cases):
        for guide in case.guides:
            print(row(case, guide), flush=True)


if __name__ == "__main__":
    main()
