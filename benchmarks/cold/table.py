# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The tables of one environment: what is wanted of all rows, and each row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.posteriordb.table import markdown

from .jobs import GUIDES, Cell, cells, chosen
from .results import Store

#: Lines that are compared with Adam: what they say, and the wanted median and worst ratio.
COMPARED = {
    "nothing": ("nothing on disk", 1.0, 1.3),
    "others": ("a model never fitted before, on a machine that has fitted others", 0.7, 1.0),
    "same": ("the same model and shapes, new data, new process", 0.25, 0.4),
    "run": ("`SVI.run` with `NaturalGradient()`, 100 steps", 1.5, 2.0),
}
#: Seconds beyond the steps, at most, of a fit of new data in the same process.
BEYOND = 0.1
_SHORT = {"AutoMultivariateNormal": "full", "AutoNormal": "mean field"}

Result = dict[str, Any]


class Row(NamedTuple):
    """All measurements of a posterior and a guide, by lines; a line may have none.

    :ivar str clock: what ratios compare: ``seconds``, or ``cpu`` where other work shares the cores.
    """

    cell: Cell
    lines: dict[str, list[Result]]
    clock: str

    @property
    def name(self) -> str:
        """Posterior and guide."""
        return f"{self.cell.posterior.split('-')[0]}, {_SHORT[self.cell.guide]}"

    @property
    def rounds(self) -> int:
        """Measurements of Adam, or of any line without them."""
        return len(self.lines["adam"]) or max(map(len, self.lines.values()))

    @property
    def versions(self) -> str:
        """What it was measured with."""
        first = next(found[0] for found in self.lines.values() if found)
        packages = ", ".join(f"{name} {first[name]}" for name in ("jax", "jaxlib", "numpyro"))
        cores = "one core" if first["cores"] == 1 else f"{first['cores']} cores"
        return f"Python {first['python']}, {packages}, {cores}"

    def median(self, line: str, figure: str = "") -> float:
        """Median over rounds of a figure, or else of the clock; NaN without any."""
        figure = figure or self.clock
        found = [result[figure] for result in self.lines[line] if figure in result]
        return float(np.median(found)) if found else float("nan")

    def ratio(self, line: str) -> float:
        """Seconds of a line over those of Adam: ratio of the medians."""
        return self.median(line) / self.median("adam")

    @property
    def step(self) -> float:
        """Milliseconds of a step of a compiled fit."""
        return 1e3 * self.median("nothing", f"step_{self.clock}")

    def again(self, figure: str) -> np.ndarray:
        """A figure of every fit of new data in the same process."""
        return np.array([one[figure] for result in self.lines["refit"] for one in result["again"]], float)

    def fresh(self, figure: str) -> float:
        """A figure of the fit with a new ``SVI`` in the same process."""
        return float(np.mean([result["fresh"][figure] for result in self.lines["refit"]] or [float("nan")]))

    def scored(self, line: str, figure: str) -> float:
        """A figure of the answer of the first round."""
        return next((result[figure] for result in self.lines[line] if figure in result), float("nan"))


def rows(store: Store, clock: str = "seconds") -> list[Row]:
    """Posteriors and guides with any measurement."""
    lines = ("adam", "refit", *COMPARED)
    several = cells(chosen([]), list(GUIDES))
    found = (Row(cell, {line: store.all_rounds(cell, line) for line in lines}, clock) for cell in several)
    return [row for row in found if any(row.lines.values())]


def summary(found: list[Row], before: list[Row]) -> list[str]:
    """The table over all rows."""
    head = ("from a standing start, Adam = 1", "median", "worst", "of", "wanted")
    lines = [_compared(found, line) for line in COMPARED]
    return [markdown(head, [*lines, *_same_process(found), *_steps(found, before)]).rstrip()]


def _compared(found: list[Row], line: str) -> tuple[str, ...]:
    says, median, worst = COMPARED[line]
    wanted = f"≤ {median:g} × / ≤ {worst:g} ×"
    return says, *_spread(found, lambda row: row.ratio(line), "{:.2f} ×"), wanted


def _spread(found: list[Row], figure: Callable[[Row], float], form: str) -> tuple[str, str, str]:
    """Median, worst with its row, and number of rows of a figure."""
    known = [(x, row.name) for row in found if np.isfinite(x := figure(row))]
    if not known:
        return "–", "–", "0"
    worst, name = max(known)
    return form.format(np.median([x for x, _ in known])), f"{form.format(worst)} ({name})", str(len(known))


def _same_process(found: list[Row]) -> list[tuple[str, ...]]:
    """New data of the same shapes in the same process, with the same ``SVI`` and with a new one."""
    most = lambda row: float(np.max(row.again("compilations"), initial=-1))
    count = lambda row: most(row) if most(row) >= 0 else float("nan")
    middle = lambda row: float(np.median(row.again("beyond"))) if row.again("beyond").size else float("nan")
    again, fresh = "new data of the same shapes, same process", "the same with a new `SVI` and a new guide"
    return [
        (f"{again}: compilations", *_spread(found, count, "{:.0f}"), "0"),
        (f"{again}: seconds beyond the steps", *_spread(found, middle, "{:.2f} s"), f"≤ {BEYOND:g} s"),
        (f"{fresh}: compilations", *_spread(found, lambda row: row.fresh("compilations"), "{:.0f}"), ""),
        (f"{fresh}: seconds beyond the steps", *_spread(found, lambda row: row.fresh("beyond"), "{:.2f} s"), ""),
    ]


def _steps(found: list[Row], before: list[Row]) -> list[tuple[str, ...]]:
    """Seconds of a compiled step, and their ratio to those of an earlier version of this package."""
    old = {row.cell: row.step for row in before}
    ratio = lambda row: row.step / old.get(row.cell, float("nan"))
    compared = ("a compiled step, over that before these changes", *_spread(found, ratio, "{:.2f} ×"), "≤ 1 ×")
    return [
        ("a compiled step", *_spread(found, lambda row: row.step, "{:.2f} ms"), ""),
        *([compared] if before else []),
    ]


def each(found: list[Row]) -> list[str]:
    """The table of single rows."""
    head = (
        "posterior, guide", "Adam, s", "nothing on disk, s", "×", "others fitted, ×", "same model, ×", "`SVI.run`, ×",
        "same process: compilations", "s beyond steps", "step, ms", "steps", "stopped itself", "k̂", "k̂ of Adam",
        "ELBO above Adam's, nats",
    )  # fmt: skip
    return [markdown(head, [_line(row) for row in found]).rstrip()]


def _line(row: Row) -> tuple[str, ...]:
    again, beyond = row.again("compilations"), row.again("beyond")
    stopped = [result["converged"] for result in row.lines["nothing"]]
    return (
        row.name,
        _number(row.median("adam"), "{:.1f}"),
        _number(row.median("nothing"), "{:.1f}"),
        *(_number(row.ratio(line), "{:.2f}") for line in COMPARED),
        _number(float(again.max()) if again.size else float("nan"), "{:.0f}"),
        _number(float(np.median(beyond)) if beyond.size else float("nan"), "{:.2f}"),
        _number(row.step, "{:.2f}"),
        _number(row.median("nothing", "steps"), "{:.0f}"),
        f"{sum(stopped)} of {len(stopped)}",
        _number(row.scored("nothing", "khat"), "{:.2f}"),
        _number(row.scored("adam", "khat"), "{:.2f}"),
        _number(row.scored("nothing", "elbo") - row.scored("adam", "elbo"), "{:+.4g}"),
    )


def _number(x: float, form: str) -> str:
    return form.format(x) if np.isfinite(x) else "–"
