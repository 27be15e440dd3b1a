# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Results in a folder: one JSON file for each problem, guide, setting and method."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from .cases import PROBLEMS

FOLDER = pathlib.Path("benchmarks/results/starts")


class Cell(NamedTuple):
    """A row of the table: names of a problem, a guide and a setting."""

    problem: str
    guide: str
    setting: str


class Store(NamedTuple):
    """The folder of results."""

    folder: pathlib.Path

    def path(self, cell: Cell, method: str) -> pathlib.Path:
        """Where a result is stored; the method is ``adam`` or ``ours-LABEL``."""
        return self.folder / cell.problem / f"{cell.guide}-{cell.setting}-{method}.json"

    def read(self, cell: Cell, method: str) -> dict[str, Any] | None:
        """A result, or nothing if there is none for the problem as it is now."""
        return self._current(self.path(cell, method), cell.problem)

    def write(self, cell: Cell, method: str, result: dict[str, Any]) -> None:
        """Store a result."""
        path = self.path(cell, method)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(result | {"fingerprint": PROBLEMS[cell.problem].fingerprint}))
        temporary.replace(path)

    def best(self, cell: Cell) -> float:
        """The best ELBO that any method found with this guide, in any setting."""
        results = (self._current(p, cell.problem) for p in (self.folder / cell.problem).glob(f"{cell.guide}-*.json"))
        elbos = np.array([x for result in results if result for x in all_elbos(result)], float)
        return float(np.max(elbos[np.isfinite(elbos)], initial=-np.inf))

    def _current(self, path: pathlib.Path, problem: str) -> dict[str, Any] | None:
        if not path.exists():
            return None
        result = json.loads(path.read_text())
        return result if result["fingerprint"] == PROBLEMS[problem].fingerprint else None


def all_elbos(result: dict[str, Any]) -> list[float]:
    """Every ELBO of a result."""
    continued = [x for stop in result.get("stops", []) for x in stop["continued"].values()]
    return [x for elbos in result["elbos"].values() for x in elbos] + continued
