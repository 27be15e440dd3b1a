# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What a finished run says, method by method: what it took to come near the best ELBO, and who is whom's rival."""

import json
import pathlib
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np

#: How near is near, nats.
GAPS = (0.1, 0.01)
#: Further than this from the best ELBO at the end is a failure, nats.
FAILED = 1.0
#: Seconds of compilation that were measured side by side, if they were (:mod:`.compiling`), and how whom compiles.
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
    :ivar draws: that all results were scored on, at most.
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
        """What each seed had spent at the first mark within ``gap`` nats; infinity where there is none.

        ``total`` is seconds with compilation.
        """
        return np.array([self._reached(fit, cost, gap) for fit in self.fits])

    def median(self, cost: str, gap: float) -> float:
        """The seeds' median of what it took."""
        return float(np.median(self.reached(cost, gap)))

    def gap(self) -> np.ndarray:
        """What each seed is short of at its end, nats; infinity where it is not finite."""
        ends = np.array([fit["elbos"][-1] for fit in self.fits])
        return np.where(np.isfinite(ends), self.best - ends, np.inf)

    def failures(self) -> int:
        """Seeds that never came within a nat, or ended where nothing is finite."""
        never = ~np.isfinite(self.reached("steps", FAILED))
        return int(np.sum(never | ~np.isfinite(self.gap())))

    def middle(self, name: str) -> float:
        """The seeds' median of a figure of their ends: ``error``, ``khat``, or one of the moments' errors."""
        return float(np.median([fit["moments"].get(name, fit.get(name, np.nan)) for fit in self.fits]))

    def _reached(self, fit: dict[str, Any], cost: str, gap: float) -> float:
        hit = np.asarray(fit["elbos"]) >= self.best - gap
        if not hit.any():
            return np.inf
        spent = fit["seconds" if cost == "total" else cost][int(hit.argmax())]
        return spent + (fit["compiling"] if cost == "total" else 0.0)


def load(results: pathlib.Path) -> list[Entry]:
    """All entries of a folder of results.

    :raises SystemExit: if there are none, or if they were not scored on the same draws.
    """
    stored = [json.loads(path.read_text()) for path in sorted(results.glob("*/*.json"))]
    _time_compilation(stored, results / COMPILING)
    if len({about["draws"] for about in stored}) != 1:
        raise SystemExit(f"`{results}`: expected results scored on as many draws at most; got {len(stored)} files.")
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
    """Per posterior and guide, per optimizer and compiler, what has been timed."""
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
    """The order of settings: first within 0.1 nats, else first within one, else lowest at the end."""
    near, far = (entry.median("gradients", gap) for gap in (GAPS[0], FAILED))
    return near, far, float(np.median(entry.gap()))


def oracle(entries: list[Entry]) -> Entry:
    """The best of a method's settings on one posterior: a choice that nobody has in practice."""
    return min(entries, key=rank)


def best_single(entries: list[Entry]) -> str:
    """The one setting over all posteriors: within 0.1 nats on most of them, then with the fewest gradients."""
    settings = sorted({entry.setting for entry in entries})

    def order(setting: str) -> tuple[float, float]:
        spent = np.array([e.median("gradients", GAPS[0]) for e in entries if e.setting == setting])
        done = np.isfinite(spent)
        return -int(done.sum()), float(np.mean(np.log(spent[done]))) if done.any() else np.inf

    return min(settings, key=order)
