# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Where things are hard: ``NaturalGradient()`` as shipped on the models of :mod:`.hard_cases`, beside Adam.

Every fit is scored at marks on one common set of 4096 draws, on all of the data. *Best* is the lowest −ELBO known: of
the optimum if known, else of a run with 64 particles, or of any fit of the table. *Steps* are those to the first mark
within 0.1 nats of it. A fit *failed* if it is not within 1 nat after 1000 steps. Adam's rate is the one that
ends lowest of four (a choice that nobody has in practice), with a cosine decay over its 5000 steps.

``python -m benchmarks.hard`` prints the table, each precision in a process of its own; ``--x64`` with names of cases
prints rows of it.
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

from .hard_cases import CASES, GUIDES, HardCase

RATES, ADAM_STEPS, STEPS, DRAWS = (0.1, 0.03, 0.01, 0.003), 5000, 1000, 4096
DONE, FAILED = 0.1, 1.0
HEADS = (
    *("case", "guide", "dtype", "best −ELBO", "steps, median", "worst", "gap at 100", "at 300", "at 1000"),
    *("skipped", "NaN", "failures", "Adam's rate", "its steps", "its gap at 5000", "its failures"),
)


class Fits(NamedTuple):
    """Fits over the seeds: marks (steps), −ELBO (seed, mark) in nats, steps skipped (seed,), marks without a number."""

    marks: np.ndarray
    losses: np.ndarray
    skipped: np.ndarray
    nans: int

    def reached(self, target: float) -> np.ndarray:
        """First mark within the target, per seed; infinity where there is none."""
        hit = self.losses <= target
        return np.where(hit.any(1), self.marks[hit.argmax(1)], np.inf)

    def gap(self, mark: int, best: float) -> float:
        """Median over the seeds, nats."""
        return float(np.median(self.losses[:, np.searchsorted(self.marks, mark)])) - best

    def failures(self, best: float) -> int:
        """Fits that do not end within a nat."""
        return int((~(self.losses[:, -1] <= best + FAILED)).sum())


def marks(steps: int) -> np.ndarray:
    """Where a fit is scored: every eighth more, with 100, 300 and 1000 among them."""
    return np.unique(np.r_[np.geomspace(5, steps, round(8 * np.log(steps / 5))).astype(int), 100, 300, steps])


class Fitted(NamedTuple):
    """An SVI of a case, with its guide's −ELBO on the common draws."""

    svi: SVI
    score: Callable[[Any], jax.Array]


def fitted(case: HardCase, guide: str, optimizer: Any, particles: int) -> Fitted:
    """The case with a guide of this name."""
    auto = GUIDES[guide](case.model, init_loc_fn=case.start)
    elbo, key = Trace_ELBO(DRAWS), jax.random.key(2026)
    score = jax.jit(lambda params: elbo.loss(key, params, case.model, auto, *case.data))
    return Fitted(SVI(case.model, auto, optimizer, Trace_ELBO(particles)), score)


def fits(case: HardCase, guide: str, optimizer: Any, steps: int, *, seeds: int, particles: int) -> Fits:
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


def natural(case: HardCase, guide: str, steps: int = STEPS) -> tuple[Fits, float]:
    """The fits as shipped, and the best loss known without Adam."""
    shipped = fits(case, guide, NaturalGradient(), steps, seeds=case.seeds, particles=case.particles)
    return shipped, min(best(case, guide, steps), float(shipped.losses.min()))


def best(case: HardCase, guide: str, steps: int = STEPS) -> float:
    """−ELBO of the optimum where it is known, else of a run with 64 particles."""
    if guide in case.optimum:
        _, score = fitted(case, guide, NaturalGradient(), 1)
        return float(score(case.optimum[guide]))
    return float(fits(case, guide, NaturalGradient(), steps, seeds=1, particles=64).losses.min())


def adam(case: HardCase, guide: str) -> tuple[float, Fits]:
    """The rate that ends lowest, and its fits."""

    def at(rate: float) -> Fits:
        optimizer = optax_to_numpyro(optax.adam(optax.cosine_decay_schedule(rate, ADAM_STEPS)))
        return fits(case, guide, optimizer, ADAM_STEPS, seeds=case.seeds, particles=case.particles)

    return min(((rate, at(rate)) for rate in RATES), key=lambda pair: float(np.median(pair[1].losses[:, -1])))


def row(case: HardCase, guide: str) -> str:
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hard", description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"of: {', '.join(CASES)}; all, in both precisions, if left out")
    parser.add_argument("--x64", action="store_true", help="double precision")
    options = parser.parse_args()
    if not options.cases:
        print("\n".join([f"| {' | '.join(HEADS)} |", "| --- " * len(HEADS) + "|"]), flush=True)
        for flags in ([], ["--x64"]):
            subprocess.run([sys.executable, "-m", "benchmarks.hard", *CASES, *flags], check=True)
        return
    jax.config.update("jax_enable_x64", options.x64)
    for case in (CASES[name]() for name in options.cases):
        for guide in case.guides:
            print(row(case, guide), flush=True)


if __name__ == "__main__":
    main()
