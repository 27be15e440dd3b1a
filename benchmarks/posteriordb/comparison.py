# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The natural gradient beside Adam and the other methods, over all posteriors: one row for each comparison.

Factors compare medians over the seeds; Adam is the best of its settings on each posterior. The cost of a method that
never arrives is infinite. Where neither arrives the factor is 0.
"""

from typing import NamedTuple

import numpy as np

from .results import GAPS, Entry, oracle

NATURAL = "natural_gradient"
#: Adam, by the estimator of its gradient: NumPyro's, and two of less variance.
ADAM = ("adam", "adam_path", "adam_price")
GUIDES = {"AutoMultivariateNormal": "full Gaussian", "AutoNormal": "mean field"}
RIVALS = {
    "batch_and_match": "batch and match",
    "deterministic_advi": "deterministic ADVI",
    "deterministic_mean_field": "deterministic ADVI",
}


class Comparison(NamedTuple):
    """One row: the family of guides (empty for all), what is compared, its value, and what is written after it."""

    guide: str
    measure: str
    value: float
    unit: str = ""

    def cells(self) -> tuple[str, str, str]:
        """As the table shows it."""
        return self.guide, self.measure, f"{self.value:.3g}{self.unit}"


class Pair(NamedTuple):
    """The natural gradient and Adam at its best setting on one posterior."""

    mine: Entry
    adam: Entry

    def factor(self, cost: str) -> float:
        """Adam's cost to 0.1 nats over the natural gradient's."""
        mine, adam = (entry.median(cost, GAPS[0]) for entry in self)
        return adam / mine if np.isfinite(mine) else 0.0

    def ahead(self) -> float:
        """Final ELBO of the natural gradient minus Adam's, nats."""
        mine, adam = (float(np.median(entry.gap())) for entry in self)
        return adam - mine if np.isfinite(mine) else -np.inf


def comparisons(entries: list[Entry]) -> list[Comparison]:
    """All comparisons that the results allow."""
    rows: list[Comparison] = []
    for guide in GUIDES:
        pairs = _pairs(entries, guide, ADAM[:1])
        rows += _against_adam(GUIDES[guide], pairs) if pairs else []
        rows += _against_estimators(entries, guide)
        rows += [c for rival in RIVALS for c in _against(entries, guide, rival)]
    mine = [e for e in entries if e.method == NATURAL]
    failures, fits = sum(e.failures() for e in mine), sum(len(e.fits) for e in mine)
    precisions = ", ".join(sorted({e.precision for e in mine}))
    return [*rows, Comparison("all", f"failures ({precisions})", failures, f" of {fits} fits")]


def _pairs(entries: list[Entry], guide: str, methods: tuple[str, ...]) -> list[Pair]:
    here = [e for e in entries if (e.guide, e.precision) == (guide, "x64")]
    mine = {e.model: e for e in here if e.method == NATURAL}
    rivals = {model: [e for e in here if e.model == model and e.method in methods] for model in mine}
    return [Pair(mine[model], oracle(found)) for model, found in rivals.items() if found]


def _against_adam(guide: str, pairs: list[Pair]) -> list[Comparison]:
    slowest = max(pair.mine.median("steps", GAPS[0]) for pair in pairs)
    total = max(1 / f if (f := pair.factor("total")) > 0 else np.inf for pair in pairs)
    return [
        *_factors(guide, "gradient evaluations", pairs, "gradients"),
        *_factors(guide, "seconds without compilation", pairs, "seconds"),
        Comparison(guide, "seconds with compilation to 0.1 nats, natural gradient / Adam: greatest", total, "×"),
        Comparison(guide, "steps to 0.1 nats: most", slowest),
        Comparison(guide, "final ELBO minus Adam's: least", min(pair.ahead() for pair in pairs), " nats"),
    ]


def _against_estimators(entries: list[Entry], guide: str) -> list[Comparison]:
    """Against the best of all estimators on each posterior, if more than NumPyro's was run."""
    if not any(e.guide == guide and e.method in ADAM[1:] for e in entries):
        return []
    pairs, best = _pairs(entries, guide, ADAM), "with Adam's best estimator on each posterior"
    return [
        *_factors(GUIDES[guide], f"gradient evaluations, {best},", pairs, "gradients"),
        *_factors(GUIDES[guide], f"seconds without compilation, {best},", pairs, "seconds"),
    ]


def _factors(guide: str, what: str, pairs: list[Pair], cost: str) -> list[Comparison]:
    won = [pair.factor(cost) for pair in pairs]
    return [
        Comparison(guide, f"{what} to 0.1 nats, Adam / natural gradient: {which}", float(value), "×")
        for which, value in (("median", np.median(won)), ("least", min(won)))
    ]


def _against(entries: list[Entry], guide: str, rival: str) -> list[Comparison]:
    """On how many posteriors the natural gradient evaluates fewer gradients than a rival."""
    here = [e for e in entries if (e.guide, e.precision) == (guide, "x64")]
    mine = {e.model: e.median("gradients", GAPS[0]) for e in here if e.method == NATURAL}
    theirs = {e.model: e.median("gradients", GAPS[0]) for e in here if e.method == rival}
    both = sorted(mine.keys() & theirs.keys())
    won = sum(mine[model] < theirs[model] for model in both)
    what = f"posteriors with fewer gradient evaluations than {RIVALS[rival]}"
    return [Comparison(GUIDES[guide], what, won, f" of {len(both)}")] if both else []
