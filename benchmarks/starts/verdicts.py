# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What ``verdict`` says of starts that did not arrive, and whether doing what it says first mends them.

Advice is recognised by a word of the recommendation, the one that stands first in it. Three kinds can be followed here:
further steps (as many as a stop is continued by), more particles (four times as many, from the same start), and another
start (the best of the next four). A start is mended if it is then within ``GAIN`` nats of the best ELBO.
"""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from numpyro_natgrad import verdict

from .cases import PROBLEMS
from .fitting import Starts
from .judging import Judge
from .problems import SETTINGS
from .results import Cell, Store
from .stops import GAIN, MORE_STEPS
from .table import arrived, gaps

#: Words of a recommendation, and the advice that each stands for.
WORDS = {
    "more steps": "more steps",
    "further steps": "more steps",
    "another start": "another start",
    "other start": "another start",
    "num_starts": "another start",
    "init_to_median": "another start",
    "particles": "more particles",
    "LocScaleReparam": "reparameterisation",
    "TraceEnum_ELBO": "enumeration",
    "AutoMultivariateNormal": "full covariance",
    "flow": "flow",
    "NUTS": "NUTS",
    "is good": "use it",
    "is usable": "use it",
}
#: Starts of a row that are judged at most; others are as likely to be in the same place.
JUDGED = 2
#: Starts that stand in for a bad one.
OTHERS = 4


def advice(recommendation: str) -> str:
    """The first advice of a recommendation."""
    at = {word: recommendation.find(word) for word in WORDS}
    given = {word: place for word, place in at.items() if place >= 0}
    return WORDS[min(given, key=lambda word: given[word])] if given else "other"


def judged(cell: Cell, store: Store, label: str, starts: Starts, judge: Judge) -> list[dict[str, Any]]:
    """Verdicts on starts of a row that did not arrive."""
    ours = store.read(cell, f"ours-{label}")
    if ours is None:
        raise ValueError(f"{' '.join(cell)} has no results of ours: run `--methods ours` first.")
    steps, best = max(map(int, ours["elbos"])), store.best(cell)
    final = gaps(ours["elbos"][str(steps)], best)
    bad = [i for i in range(len(final)) if not final[i] <= GAIN][:JUDGED]
    if not bad:
        return []
    setting, problem = SETTINGS[cell.setting], PROBLEMS[cell.problem]
    walk = starts.walk(starts.states, steps, every=steps)
    said = [_verdict(starts, walk.states[-1], i) for i in bad]

    def mended(i: int, action: str) -> bool | None:
        if action == "another start":
            return arrived(np.roll(final, -i - 1)[:OTHERS]) > 0
        if action == "more steps":
            states = starts.resumed(walk.states[-1])
            ends = starts.walk(states, MORE_STEPS, every=MORE_STEPS).states[-1]
        elif action == "more particles":
            more = Starts(problem, cell.guide, setting._replace(particles=4 * setting.particles), len(final))
            ends = more.walk(more.states, steps, every=steps).states[-1]
        else:
            return None
        return bool(gaps(judge.elbos(starts.params(ends)).tolist(), best)[i] <= GAIN)

    for i, found in zip(bad, said, strict=True):
        found |= {"start": i, "gap": float(final[i]), "mended": mended(i, found["advice"])}
    return said


def _verdict(starts: Starts, states: Any, i: int) -> dict[str, Any]:
    svi = starts.set_up(training={})
    params = svi.constrain_fn(jax.tree.map(lambda x: x[i], starts.params(states)))
    found = verdict(svi, params, jax.random.key(2), *starts.args)
    return {"k_hat": found.k_hat, "advice": advice(found.recommendation), "recommendation": found.recommendation}


def table(store: Store, label: str, cells: Iterable[Cell]) -> str:
    """A row for each verdict, and how often the first advice mends."""
    lines = ["| row | start | gap | k-hat | says | advice | mends |\n| --- | --- | --- | --- | --- | --- | --- |"]
    outcomes = []
    for cell in cells:
        for x in (store.read(cell, f"verdicts-{label}") or {"verdicts": []})["verdicts"]:
            outcomes.append(x["mended"])
            mends = {None: "–", True: "yes", False: "no"}[x["mended"]]
            where = f"{' '.join(cell)} | {x['start']} | {x['gap']:.2g} | {x['k_hat']:.2f}"
            lines.append(f"| {where} | {x['recommendation']} | {x['advice']} | {mends} |")
    followed = [x for x in outcomes if x is not None]
    summary = (
        f"{len(outcomes)} bad starts; of {len(followed)} whose first advice can be followed here, {sum(followed)} "
    )
    return "\n".join([*lines, "", summary + "are mended by it."]) + "\n"
