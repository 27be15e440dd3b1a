# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The table in Markdown, one row for each problem, guide and setting, and the figures over all rows."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from .cases import PROBLEMS
from .results import Cell, Store
from .stops import GAIN, is_false, is_other_basin

HEAD = (
    "| problem | kind | guide | setting | ours, a third | ours | Adam 0.1 | 0.03 | 0.01 | median gap | worst gap | "
    "Adam's median | Adam's worst | stops | false | other basin | non-finite |\n| {} |"
).format(" | ".join(["---"] * 17))


class Row(NamedTuple):
    """A row in figures.

    :ivar numpy.ndarray ours: gaps to the best ELBO, after a third of the steps and after all, nats; ``(2, starts)``.
    :ivar dict adam: gaps by rate, ``(starts,)``; infinite where the ELBO is not finite.
    :ivar list stops: as stored.
    """

    cell: Cell
    ours: np.ndarray
    adam: dict[str, np.ndarray]
    stops: list[dict[str, Any]]

    @property
    def best_rate(self) -> str:
        """Adam's best rate on this row."""
        return best_rate(self.adam)

    @property
    def any_rate(self) -> int:
        """Starts that some rate of Adam brings home."""
        return arrived(np.min(list(self.adam.values()), 0))

    @property
    def false_stops(self) -> int:
        """Stops at which going on gains more than ``GAIN`` nats."""
        return sum(is_false(stop) for stop in self.stops)

    @property
    def non_finite(self) -> int:
        """Stops at an ELBO that is not finite."""
        return sum(not np.isfinite(stop["elbo"]) for stop in self.stops)


def best_rate(adam: dict[str, np.ndarray]) -> str:
    """The rate with which most starts arrive, and of those the one with the best median gap."""
    return max(adam, key=lambda rate: (arrived(adam[rate]), -float(np.median(adam[rate]))))


def arrived(gaps: np.ndarray) -> int:
    """Number of starts within ``GAIN`` nats of the best ELBO."""
    return int(np.sum(gaps <= GAIN))


def best_of(row: Row, count: int) -> float:
    """The share of sets of so many random starts whose best one, after a third of the steps, arrives in the end.

    If the starts are in the order of their gaps after a third of the steps, start i is the best one of as many sets as
    there are choices of the others from the starts behind it.
    """
    third, last = row.ours[0], row.ours[-1]
    behind = np.arange(len(last))[::-1]
    sets = [math.comb(k, count - 1) for k in behind]
    return float(np.dot(sets, last[np.argsort(third, kind="stable")] <= GAIN) / math.comb(len(last), count))


def rows(store: Store, label: str, cells: Iterable[Cell]) -> list[Row]:
    """The rows of all cells that have both results."""
    found = []
    for cell in cells:
        ours, adam = store.read(cell, f"ours-{label}"), store.read(cell, "adam")
        if ours and adam:
            best = store.best(cell)
            mine = np.array([gaps(x, best) for _, x in sorted(ours["elbos"].items(), key=lambda item: int(item[0]))])
            found.append(Row(cell, mine, {rate: gaps(x, best) for rate, x in adam["elbos"].items()}, ours["stops"]))
    return found


def gaps(elbos: list[float], best: float) -> np.ndarray:
    """Nats to the best ELBO; infinite where an ELBO is not finite."""
    if not np.isfinite(best):  # of no method
        return np.full(len(elbos), np.inf)
    x = np.array(elbos, float)
    return best - np.where(np.isfinite(x), x, -np.inf)


def table(found: list[Row]) -> str:
    """Table and summary."""
    return "\n".join([HEAD, *map(line, found), "", *summary(found)]) + "\n"


def line(row: Row) -> str:
    """One line of the table."""
    third, ours = row.ours[0], row.ours[-1]
    adam = row.adam[row.best_rate]
    behind = "**" if is_behind(row) else ""
    others = sum(is_other_basin(stop) and not is_false(stop) for stop in row.stops)
    cells = [
        row.cell.problem,
        PROBLEMS[row.cell.problem].kind,
        row.cell.guide,
        row.cell.setting,
        arrived(third),
        f"{behind}{arrived(ours)}{behind}",
        *(arrived(x) for x in row.adam.values()),
        *(f"{x:.2g}" for x in (np.median(ours), np.max(ours), np.median(adam), np.max(adam))),
        len(row.stops),
        f"**{row.false_stops}**" if row.false_stops else 0,
        others,
        row.non_finite,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def is_behind(row: Row) -> bool:
    """Whether fewer starts arrive than with Adam's best rate on this row; one start is noise."""
    return arrived(row.ours[-1]) <= arrived(row.adam[row.best_rate]) - 2


def summary(found: list[Row]) -> list[str]:
    """The figures over all rows, each with what is wanted of it."""
    if not found:
        return ["No results yet."]
    behind = [" ".join(row.cell) for row in found if is_behind(row)]
    ours, anyhow = sum(arrived(row.ours[-1]) for row in found), sum(row.any_rate for row in found)
    single = {rate: sum(arrived(row.adam[rate]) for row in found) for rate in found[0].adam}
    total = sum(row.ours.shape[1] for row in found)
    stops, false = sum(len(row.stops) for row in found), sum(row.false_stops for row in found)
    several = [" ".join(row.cell) for row in found if row.false_stops > 1]
    rate = max(single, key=lambda name: single[name])
    return [
        f"{len(found)} rows, {total} starts.",
        "",
        f"* Rows where fewer starts arrive than with Adam's best single rate there (wanted: none): {len(behind)}. "
        + listed(behind),
        f"* Starts that arrive: {ours}; any rate of Adam brings {anyhow} home: {ours / max(anyhow, 1):.1%} (wanted: at "
        f"least 95 %). Adam's best single rate over all, {rate}: {single[rate]} (wanted: fewer than ours).",
        f"* False stops: {false} of {stops}, {false / max(stops, 1):.1%} (wanted: at most 1 %). Rows with more than "
        f"one (wanted: none): {len(several)}. {listed(several)}",
        *several_starts(found),
        f"* Stops at an ELBO that is not finite (wanted: none): {sum(row.non_finite for row in found)}.",
    ]


def several_starts(found: list[Row]) -> list[str]:
    """How often the best of several starts arrives, and on how many rows it does so in less than 19 of 20 cases."""
    most = found[0].ours.shape[1]
    shares = {n: np.array([best_of(row, n) for row in found]) for n in (1, 2, 4, 8) if n <= most}
    each = "; ".join(f"{n}: {np.mean(x):.1%}, {np.sum(x < 0.95 - 1e-9)}" for n, x in shares.items())
    return [
        "* Of so many starts, the best one after a third of the steps arrives; and rows where it does so in fewer than "
        f"95 % of the cases: {each}."
    ]


def listed(names: list[str]) -> str:
    """Names, separated by semicolons."""
    return "; ".join(names) + "." if names else ""
