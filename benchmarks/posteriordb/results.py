# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Stored results by method: the cost of reaching the best ELBO, and the best settings of Adam."""

import json
import pathlib
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np

#: Gaps to the best ELBO at which costs are compared, nats.
GAPS = (0.1, 0.01)
#: A fit that never comes within this gap is a failure, nats.
FAILED = 1.0
#: File of compile times measured side by side (:mod:`.compiling`), and how each method is compiled in the tables.
COMPILING = "compiling.json"
COMPILED_AS = {"adam": "SVI.run", "natural_gradient": "fit"}
COSTS = ("steps", "gradients", "seconds", "total")


class Timed(NamedTuple):
    """Seconds to compile, and of a step."""

    compiling: float
    step: float


class Entry(NamedTuple):
    """One method with one setting on one posterior with one guide: its fits, a seed each.

    :ivar fits: as stored; see :mod:`.run`.
    :ivar draws: most draws that results were scored on.
    :ivar best: the best ELBO of any method and precision on this posterior with this guide's family.
    """

    model: str
    guide: str
    precision: str
    method: str
    setting: str
    fits: tuple[dict[str, Any], ...]
    draws: int
    best: float

    def reached(self, cost: str, gap: float) -> np.ndarray:
        """Cost of each seed up to the first mark within ``gap`` nats; infinity if there is none.

        ``total`` is seconds with compilation.
        """
        return np.array([self._reached(fit, cost, gap) for fit in self.fits])

    def median(self, cost: str, gap: float) -> float:
        """Median over seeds of the cost."""
        return float(np.median(self.reached(cost, gap)))

    def gap(self) -> np.ndarray:
        """Final gap of each seed, nats; infinity if it is not finite."""
        ends = np.array([fit["elbos"][-1] for fit in self.fits])
        return np.where(np.isfinite(ends), self.best - ends, np.inf)

    def failures(self) -> int:
        """Number of seeds that never came within a nat or ended with a non-finite ELBO."""
        never = ~np.isfinite(self.reached("steps", FAILED))
        return int(np.sum(never | ~np.isfinite(self.gap())))

    def middle(self, name: str) -> float:
        """Median over seeds of a final score: ``error``, ``khat``, or an error of the moments."""
        return float(np.median([fit["moments"].get(name, fit.get(name, np.nan)) for fit in self.fits]))

    def _reached(self, fit: dict[str, Any], cost: str, gap: float) -> float:
        hit = np.asarray(fit["elbos"]) >= self.best - gap
        if not hit.any():
            return np.inf
        spent = fit["seconds" if cost == "total" else cost][int(hit.argmax())]
        return spent + (fit["compiling"] if cost == "total" else 0.0)


def load(results: pathlib.Path) -> list[Entry]:
    """All entries of a folder of results.

    :raises SystemExit: if there are none, or if they were scored on different numbers of draws.
    """
    stored = [json.loads(path.read_text()) for path in sorted(results.glob("*/*.json"))]
    _time_compilation(stored, results / COMPILING)
    if len({about["draws"] for about in stored}) != 1:
        raise SystemExit(f"`{results}`: expected results of one `--draws`; found {len(stored)} files.")
    best: dict[tuple[str, str], float] = defaultdict(lambda: -np.inf)
    for about in stored:
        elbos = np.concatenate([fit["elbos"] for fit in about["fits"]])
        where = about["model"], about["guide"]
        best[where] = max(best[where], np.max(elbos[np.isfinite(elbos)], initial=-np.inf))
    return [entry for about in stored for entry in _entries(about, best[about["model"], about["guide"]])]


def _time_compilation(stored: list[dict[str, Any]], path: pathlib.Path) -> None:
    timed = remembered(path)
    for about in stored:
        way = about["method"], COMPILED_AS.get(about["method"], "")
        seconds = timed.get((about["model"], about["guide"]), {}).get(way)
        if seconds and about["precision"] == "x64":
            for fit in about["fits"]:
                fit["compiling"] = seconds.compiling


def remembered(path: pathlib.Path) -> dict[tuple[str, str], dict[tuple[str, str], Timed]]:
    """Stored compile times, by posterior and guide, then by optimizer and compiler."""
    timed: dict[tuple[str, str], dict[tuple[str, str], Timed]] = {}
    for model, guide, optimizer, how, *seconds in json.loads(path.read_text()) if path.exists() else []:
        timed.setdefault((model, guide), {})[optimizer, how] = Timed(*seconds)
    return timed


def _entries(about: dict[str, Any], best: float) -> list[Entry]:
    settings: dict[str, list[Any]] = defaultdict(list)
    for fit in about["fits"]:
        settings[fit["setting"]].append(fit)
    where = (about["model"], about["guide"], about["precision"], about["method"])
    return [Entry(*where, setting, tuple(fits), about["draws"], best) for setting, fits in settings.items()]


def rank(entry: Entry) -> tuple[float, ...]:
    """Sort key of settings: cost to 0.1 nats, then cost to 1 nat, then the final gap."""
    near, far = (entry.median("gradients", gap) for gap in (GAPS[0], FAILED))
    return near, far, float(np.median(entry.gap()))


def oracle(entries: list[Entry]) -> Entry:
    """The best of a method's settings on one posterior, chosen with hindsight."""
    return min(entries, key=rank)


def best_single(entries: list[Entry]) -> str:
    """The best setting over all posteriors: it reaches 0.1 nats on most of them, then with the fewest gradients."""
    settings = sorted({entry.setting for entry in entries})

    def order(setting: str) -> tuple[float, float]:
        spent = np.array([e.median("gradients", GAPS[0]) for e in entries if e.setting == setting])
        done = np.isfinite(spent)
        return -int(done.sum()), float(np.mean(np.log(spent[done]))) if done.any() else np.inf

    return min(settings, key=order)
