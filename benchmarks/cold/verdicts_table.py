# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Seconds of the processor that a verdict takes, beside those of the fit before it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.posteriordb.table import markdown

from .jobs import GUIDES, Cell, cells, chosen
from .results import Store
from .rivals_table import SHARED

HEADING = "## Verdicts"
_HEAD = (
    "posterior, guide", "`fit`, s", "its verdict, s", "×", "verdict before, s", "before, ×",
    "same model, new process: `fit`, s", "verdict, s", "verdict before, s",
    "new data, same process: `fit`, s", "verdict, s", "compilations", "verdict before, s",
)  # fmt: skip

Result = dict[str, Any]


class Pair(NamedTuple):
    """The measurements of an environment, and those of an earlier version of this package."""

    now: Store
    before: Store | None

    def found(self, cell: Cell, line: str, before: bool = False) -> list[Result]:
        """The measurements of a line, by rounds."""
        store = self.before if before else self.now
        return store.all_rounds(cell, line) if store else []


def verdicts(stores: list[tuple[Store, Store | None]]) -> str:
    """A table for each environment that has measured verdicts; empty if none has."""
    return "\n\n".join(part for pair in stores if (part := _table(Pair(*pair))))


def _table(pair: Pair) -> str:
    measured = [cell for cell in cells(chosen([]), list(GUIDES)) if pair.found(cell, "judged")]
    if not measured:
        return ""
    first = pair.found(measured[0], "judged")[0]
    packages = ", ".join(f"{name} {first[name]}" for name in ("jax", "numpyro"))
    ratios = [_ratio(pair.found(cell, "judged")) for cell in measured]
    before = [x for cell in measured if np.isfinite(x := _ratio(pair.found(cell, "judged", before=True)))]
    was = f" (before: {np.median(before):.2f})" if before else ""
    about = f"Python {first['python']}, {packages}. {SHARED}"
    middle = f"The median of verdict over `fit` is {np.median(ratios):.2f}{was}."
    return f"{about} {middle}\n\n{markdown(_HEAD, [_line(pair, cell) for cell in measured]).rstrip()}"


def _ratio(found: list[Result]) -> float:
    return _median(found, lambda x: x["verdict"]["cpu"]) / _median(found, lambda x: x["cpu"])


def _median(found: list[Result], figure: Callable[[Result], float]) -> float:
    return float(np.median([figure(result) for result in found])) if found else float("nan")


def _line(pair: Pair, cell: Cell) -> tuple[str, ...]:
    guide = "full" if cell.guide == GUIDES[0] else "mean field"
    now, next_, old = pair.found(cell, "judged"), pair.found(cell, "judged_again"), pair.found(cell, "judged", True)
    first, fitted = lambda x: x["verdict"]["cpu"], lambda x: x["cpu"]
    again = lambda name, figure="cpu": lambda x: x["again"][name][figure]
    figures = (
        (_median(now, fitted), 1), (_median(now, first), 1), (_ratio(now), 2), (_median(old, first), 1),
        (_ratio(old), 2), (_median(next_, fitted), 1), (_median(next_, first), 1),
        (_median(pair.found(cell, "judged_again", True), first), 1),
        (_median(now, again("fit")), 2), (_median(now, again("verdict")), 2),
        (_median(now, again("verdict", "compilations")), 0), (_median(old, again("verdict")), 1),
    )  # fmt: skip
    return f"{cell.posterior.split('-')[0]}, {guide}", *(f"{x:.{n}f}" if np.isfinite(x) else "–" for x, n in figures)
