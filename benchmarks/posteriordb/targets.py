# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What was asked for, what was reached, and whether that is it: one row for each demand.

Factors are medians over the seeds, Adam's oracle (its best setting on each posterior) over the natural gradient. A
method that never arrives has spent infinitely much; where neither arrives, the factor is nought: nothing was won.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .results import GAPS, Entry, oracle

NATURAL = "natural_gradient"
GUIDES = {"AutoMultivariateNormal": "full Gaussian", "AutoNormal": "mean field"}
#: Demands by guide: gradient evaluations and seconds won in the median, steps on every posterior.
ASKED = {"AutoMultivariateNormal": (10.0, 10.0, 60.0), "AutoNormal": (3.0, 2.0, 300.0)}
RIVALS = {
    "batch_and_match": "batch and match",
    "deterministic_advi": "deterministic ADVI",
    "deterministic_mean_field": "deterministic ADVI",
}


class Check(NamedTuple):
    """One demand."""

    demand: str
    asked: str
    reached: str
    met: bool


class Pair(NamedTuple):
    """The natural gradient and Adam's oracle on one posterior."""

    mine: Entry
    adam: Entry

    def factor(self, cost: str) -> float:
        """How many times less the natural gradient has spent at 0.1 nats."""
        mine, adam = (entry.median(cost, GAPS[0]) for entry in self)
        return adam / mine if np.isfinite(mine) else 0.0

    def ahead(self) -> float:
        """How much better it ends, nats."""
        mine, adam = (float(np.median(entry.gap())) for entry in self)
        return adam - mine if np.isfinite(mine) else -np.inf


def checks(entries: list[Entry]) -> list[Check]:
    """All demands that the results can answer."""
    rows: list[Check] = []
    for guide, title in GUIDES.items():
        pairs = _pairs(entries, guide)
        if pairs:
            rows += [c._replace(demand=f"{title}: {c.demand}") for c in _against_adam(pairs, *ASKED[guide])]
        rows += [c for rival in RIVALS for c in _against(entries, guide, rival)]
    mine = [e for e in entries if e.method == NATURAL]
    failures, fits = sum(e.failures() for e in mine), sum(len(e.fits) for e in mine)
    demand = f"failures of {fits} fits ({', '.join(sorted({e.precision for e in mine}))})"
    return [*rows, Check(demand, "0", str(failures), failures == 0)]


def _pairs(entries: list[Entry], guide: str) -> list[Pair]:
    here = [e for e in entries if (e.guide, e.precision) == (guide, "x64")]
    mine = {e.model: e for e in here if e.method == NATURAL}
    rivals = {model: [e for e in here if (e.model, e.method) == (model, "adam")] for model in mine}
    return [Pair(mine[model], oracle(found)) for model, found in rivals.items() if found]


def _against_adam(pairs: list[Pair], gradients: float, seconds: float, steps: float) -> list[Check]:
    slowest = max(pair.mine.median("steps", GAPS[0]) for pair in pairs)
    total = max(1 / f if (f := pair.factor("total")) > 0 else np.inf for pair in pairs)
    ahead = min(pair.ahead() for pair in pairs)
    return [
        *_factors("gradient evaluations to 0.1 nats", pairs, "gradients", gradients),
        *_factors("seconds to 0.1 nats, compiled", pairs, "seconds", seconds),
        _check("seconds with compilation, at worst", total, 1.2, "≤", "×"),
        _check("steps to 0.1 nats, at worst", slowest, steps, "≤", ""),
        _check("last ELBO less the oracle's, at worst, nats", ahead, -0.01, "≥", ""),
    ]


def _factors(what: str, pairs: list[Pair], cost: str, asked: float) -> list[Check]:
    won = [pair.factor(cost) for pair in pairs]
    return [
        _check(f"fewer {what}, median", float(np.median(won)), asked, "≥", "×"),
        _check(f"fewer {what}, at worst", min(won), 1.0, "≥", "×"),
    ]


def _against(entries: list[Entry], guide: str, rival: str) -> list[Check]:
    """Fewer gradients than a rival on more than half of the posteriors."""
    here = [e for e in entries if (e.guide, e.precision) == (guide, "x64")]
    mine = {e.model: e.median("gradients", GAPS[0]) for e in here if e.method == NATURAL}
    theirs = {e.model: e.median("gradients", GAPS[0]) for e in here if e.method == rival}
    both = sorted(mine.keys() & theirs.keys())
    won = sum(mine[model] < theirs[model] for model in both)
    demand = f"{GUIDES[guide]}: fewer gradient evaluations than {RIVALS[rival]}"
    return [Check(demand, f"> {len(both) / 2:g} of {len(both)}", str(won), 2 * won > len(both))] if both else []


def _check(demand: str, reached: float, asked: float, order: str, unit: str) -> Check:
    compare: Callable[[float, float], bool] = {"≥": float.__ge__, "≤": float.__le__}[order]
    return Check(demand, f"{order} {asked:g}{unit}", f"{reached:.3g}{unit}", compare(float(reached), float(asked)))
