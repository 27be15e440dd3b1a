# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The table of the calibration, and the two figures above it."""

import math
from typing import Any

from .measure import Row, answer_is_good, called_good

HEAD = (
    *("problem", "guide", "k-hat", "guide: mean off", "sd ratio", "its weights: k-hat", "mean off", "sd ratio"),
    *("`verdict`", "the answer it names", "first advice", "after it", "second advice", "after both"),
)


def outcomes(rows: list[Row]) -> list[str]:
    """How a fit ends, and how it ends after following one advice and two."""
    if any("error" in x for x in rows):
        rows = rows[: next(i for i, x in enumerate(rows) if "error" in x)]
    return [("good" if answer_is_good(x) else "bad") + (", used" if called_good(x) else "") for x in rows]


def table(stored: dict[str, Any]) -> str:
    """The figures, the table and the problems that were dropped."""
    fits = {(p, g): rows for p, x in stored.items() for g, rows in x.get("rows", {}).items() if rows}
    usable = {key: rows for key, rows in fits.items() if "error" not in rows[0]}
    failed = [f"* {p}, {g}: {rows[0]['error']}" for (p, g), rows in fits.items() if "error" in rows[0]]
    lines = [_summary(usable), "", f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
    lines += [f"| {' | '.join(_cells(p, g, rows))} |" for (p, g), rows in usable.items()]
    without = [f"* {p}: {x['reference']['dropped']}" for p, x in stored.items() if "dropped" in x.get("reference", {})]
    lines += ["", "Problems without a reference:", "", *without] if without else []
    lines += ["", "Fits or verdicts that raised:", "", *failed] if failed else []
    return "\n".join(lines) + "\n"


def _cells(problem: str, guide: str, rows: list[Row]) -> list[str]:
    first = rows[0]
    weighted = first["weighted_k_hat"] if math.isfinite(first["weighted_k_hat"]) else first["k_hat"]
    numbers = [f"{x:.2f}" for x in (*first["guide"], weighted, *first["importance_weighted"])]
    says = "good" if called_good(first) else "bad"
    wrong = called_good(first) != answer_is_good(first)
    after = outcomes(rows)
    said = [x.get("advice", "") for x in rows]
    pad = lambda x: [*x, "–", "–", "–"]
    name = pad(after)[0].partition(",")[0]
    return [
        *(problem, guide.partition(" ")[0], f"{first['k_hat']:.2f}", *numbers),
        *(f"**{says}**" if wrong else says, f"**{name}**" if wrong else name),
        *(said[0], pad(after)[1], pad(said)[1] if len(after) > 1 else "–", pad(after)[2]),
    ]


def _summary(fits: dict[tuple[str, str], list[Row]]) -> str:
    first = [rows[0] for rows in fits.values()]
    bad, good = [x for x in first if not answer_is_good(x)], [x for x in first if answer_is_good(x)]
    missed = sum(map(called_good, bad))
    refused = sum(not called_good(x) for x in good)
    called = [rows for rows in fits.values() if not called_good(rows[0]) and not answer_is_good(rows[0])]
    followed = [rows for rows in called if len(outcomes(rows)) > 1]
    within = lambda rows, n: any("good" in x for x in outcomes(rows)[1 : n + 1])
    lines = [
        f"* {len(first)} fits of {len({p for p, _ in fits})} problems.",
        f"* Bad answers: {len(bad)}; `verdict` calls {missed} of them good ({_percent(missed, len(bad))}).",
        f"* Good answers: {len(good)}; `verdict` calls {refused} of them bad ({_percent(refused, len(good))}).",
        f"* Answers that `verdict` calls good: {len(good) - refused + missed}; {missed} of them are bad "
        f"({_percent(missed, len(good) - refused + missed)}).",
        f"* Bad answers that `verdict` calls bad: {len(called)}. Its advice was followed for {len(followed)} of them: "
        f"followed once, it leads to a good answer for {sum(within(x, 1) for x in followed)}, once or twice for "
        f"{sum(within(x, 2) for x in followed)}.",
    ]
    kinds = sorted({rows[0]["advice"] for rows in called})
    for kind in kinds:
        some = [rows for rows in called if rows[0]["advice"] == kind]
        tried = [rows for rows in some if len(outcomes(rows)) > 1]
        lines.append(
            f"* First advice *{kind}*: {len(some)} fits, followed in {len(tried)}, good after it in "
            f"{sum(within(x, 1) for x in tried)}."
        )
    return "\n".join(lines)


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "none"
