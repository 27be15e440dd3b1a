# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Other packages: seconds of the processor from a standing start, and the k-hat of each answer, beside ours."""

from typing import Any

import numpy as np

from benchmarks.posteriordb.table import markdown

from .jobs import GUIDES, NO_GUIDE, RIVALS, Cell, chosen
from .results import Store

HEADING = "## Other packages"
SHARED = "The seconds are those of the processor, because other work shared it."
_NONE = "–"
LINES = tuple(line for lines in RIVALS for line in lines)
_HEAD = (
    "posterior", "`fit`, full, s", "same model again, s", "k̂", "`fit`, mean field, s", "same model again, s", "k̂",
    "PyMC's Pathfinder, s", "same model again, s", "k̂", "BlackJAX's Pathfinder, s", "k̂", "glmmTMB, s", "k̂",
)  # fmt: skip


def rivals(stores: list[Store]) -> str:
    """The table, from the environment that has measured other packages; empty if there is none."""
    for store in stores:
        lines = {posterior: _line(store, posterior) for posterior in chosen([])}
        if any(_found(store, posterior, line) for posterior in lines for line in LINES):
            columns = [column for column in zip(_HEAD, *lines.values(), strict=True) if set(column[1:]) != {_NONE}]
            head, *rest = zip(*columns, strict=True)
            return f"{_made_with(store)} {SHARED}\n\n{markdown(head, rest)}"
    return ""


def _found(store: Store, posterior: str, line: str, guide: str = NO_GUIDE) -> list[dict[str, Any]]:
    return store.all_rounds(Cell(posterior, guide), line)


def _line(store: Store, posterior: str) -> tuple[str, ...]:
    seconds = lambda line, guide=NO_GUIDE: _seconds(_found(store, posterior, line, guide))
    khat = lambda line, guide=NO_GUIDE: _khat(_found(store, posterior, line, guide))
    ours = [x for guide in GUIDES for x in (seconds("nothing", guide), seconds("same", guide), khat("nothing", guide))]
    pymc = seconds("pymc"), seconds("pymc_again"), khat("pymc")
    others = [x for line in ("blackjax", "glmmtmb") for x in (seconds(line), khat(line))]
    return posterior.split("-")[0], *ours, *pymc, *others


def _seconds(results: list[dict[str, Any]]) -> str:
    return f"{np.median([result['cpu'] for result in results]):.2f}" if results else _NONE


def _khat(results: list[dict[str, Any]]) -> str:
    known = [result["khat"] for result in results if "khat" in result]
    return f"{np.median(known):.2f}" if known else _NONE


def _made_with(store: Store) -> str:
    """Versions of the packages, and of JAX."""
    first = [found[0] for line in LINES for p in chosen([]) if (found := _found(store, p, line))]
    theirs = sorted({result["version"] for result in first})
    mine = ", ".join(f"{name} {first[0][name]}" for name in ("jax", "numpyro"))
    counts = {len(_found(store, p, line)) for line in LINES for p in chosen([])} - {0}
    rounds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    cores = "one core" if first[0]["cores"] == 1 else f"{first[0]['cores']} cores"
    return f"Python {first[0]['python']}, {mine}, {'; '.join(theirs)}; {cores}. Rounds: {rounds}."
