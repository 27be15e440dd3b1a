# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What is measured: one job is one measurement, in a process of its own."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from benchmarks.posteriordb.models import MODELS, Data, named

#: Lines of the table, in the order in which a round measures them. ``same`` uses the cache that ``nothing`` filled.
#: ``judged`` is ``nothing`` with a verdict, and then both on new data; ``judged_again`` uses the cache that it filled.
LINES = ("nothing", "adam", "others", "same", "run", "refit", "judged", "judged_again")
GUIDES = ("AutoMultivariateNormal", "AutoNormal")
#: Packages beside ours, which have no guide: the lines of a round, and parts of the names of their posteriors.
RIVALS = {
    ("pymc", "pymc_again"): ("eight_schools", "kidiq", "mesquite", "wells"),
    ("blackjax",): tuple(MODELS),
    ("glmmtmb",): ("kidiq", "mesquite", "dogs", "wells", "radon", "GLMM"),
}
NO_GUIDE = "rival"

#: Particles; nats at which ``fit`` stops; steps and rate of Adam; steps of ``SVI.run`` with natural gradients.
PARTICLES, TOLERANCE, ADAM_STEPS, ADAM_RATE, RUN_STEPS = 8, 0.05, 2000, 0.01, 100
#: In float32 the covariance of this Gaussian process has no Cholesky factor without a jitter that changes the answer.
X64 = ("gp_pois_regr-gp_pois_regr",)
#: A representative tenth: a small posterior and a large one, and three rounds.
TENTH, TENTH_ROUNDS = (
    ("eight_schools-eight_schools_noncentered", "radon_mn-radon_hierarchical_intercept_noncentered"),
    3,
)

#: The outcome among the data of each model.
_OUTCOMES = ("y", "kid_score", "k", "Y", "weight", "log_radon", "C", "switched")


class Job(NamedTuple):
    """One measurement; ``line`` is one of :data:`LINES`, ``fill`` (not stored), or a line of :data:`RIVALS`."""

    line: str
    posterior: str
    guide: str
    round: int

    def __str__(self) -> str:
        return f"{self.posterior.split('-')[0]}, {self.guide}, {self.line} {self.round}"


class Cell(NamedTuple):
    """A row of the table."""

    posterior: str
    guide: str

    def job(self, line: str, turn: int) -> Job:
        """The measurement of this line in this round."""
        return Job(line, self.posterior, self.guide, turn)


def cells(posteriors: list[str], guides: list[str]) -> Iterator[Cell]:
    """The rows of the table."""
    return (Cell(posterior, guide) for posterior in posteriors for guide in guides)


def rounds(line: str, most: int) -> int:
    """Rounds of a line: ``refit`` fits several new data sets in one process."""
    return 1 if line == "refit" else most


def new_data(data: Data, seed: int) -> Data:
    """The data with a twentieth of the outcomes, at least three, in each other's places: other values, same shapes."""
    name = next(key for key in _OUTCOMES if key in data)
    y, rng = np.array(data[name]), np.random.default_rng(seed)
    rows = rng.choice(len(y), max(3, len(y) // 20), replace=False)
    y[rows] = np.roll(y[rows], 1, 0)
    return {**data, name: y} if np.any(y != data[name]) else new_data(data, seed + 1000)


def chosen(names: Iterable[str]) -> list[str]:
    """Posteriors by parts of their names; all if none are given."""
    return [named(name) for name in names] or list(MODELS)
