# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Writes docs/benchmarks/posteriordb.md: comparisons over all posteriors, medians by posterior, and Adam's settings."""

import importlib.metadata as meta
import os
import pathlib
import platform
from collections.abc import Sequence

import numpy as np

from .comparison import ADAM, NATURAL, comparisons
from .guides import GUIDES
from .methods import METHODS
from .models import MODELS
from .results import GAPS, Entry, best_single, load, oracle

OUTPUT = pathlib.Path("docs/benchmarks/posteriordb.md")

_COLUMNS = (
    "method", "precision", "steps", "gradients", "seconds", "with compilation", "gradients, 0.01", "seconds, 0.01",
    "final gap", "s.e.", "k̂", "mean error, worst (median)", "sd ratio", "failures",
)  # fmt: skip

_HOW = """
*Gap* is how many nats the ELBO of a fit is below the best ELBO that any method found with the same family of guides on
the same posterior (including a run with 64 particles), scored in double precision on up to {draws} common draws. *s.e.*
is the Pareto-smoothed standard error of the final ELBO, an upper bound, and *k̂* the shape of its importance weights.
*Steps*, *gradients* (of one draw's log density) and *seconds* (of the compiled loop) are what a fit needed to come
within 0.1 nats, or within 0.01 nats where the column says so: medians over {seeds} seeds, with the least and the most.
*Mean error* is in reference standard deviations; *sd ratio* is the least, median and greatest ratio of fitted to
reference standard deviation over the parameters. *With compilation* compiles the natural gradient as `fit` does and
Adam as `SVI.run` does ([compile time](compiling.md) has both ways for both). A *failure* never came within 1 nat or
ended with a non-finite ELBO. *Adam, oracle* is the best of ten settings on that posterior, chosen with hindsight;
*Adam, best single* is the best setting over all posteriors. Two rivals are Adam with path gradients (sticking the
landing) and with Price's gradient, each at the best of five rates with a cosine decay, so that the gain of the
estimator can be told from that of the natural gradient. Adam is scored at steps 10 % apart, the natural gradient at
every step up to 60.

`python -m benchmarks.posteriordb --checkout PATH --draws {draws}` runs what is missing; `… table` and `… figures` write
this document. PATH is a clone of https://github.com/stan-dev/posteriordb. The heads of `benchmarks/posteriordb/*.py`
say how the rest is measured. [Design](../design.md#known-weaknesses) explains the slow and the failed fits.
"""

_FIGURES = """
![gap against steps, full Gaussian](../figures/posteriordb_full_gap_steps.png)

![gap against steps, mean field](../figures/posteriordb_mean_gap_steps.png)

![performance profiles](../figures/posteriordb_profile.png)

Against seconds: [full Gaussian](../figures/posteriordb_full_gap_seconds.png),
[mean field](../figures/posteriordb_mean_gap_seconds.png).
"""


def write(results: pathlib.Path) -> str:
    """Write the document from the stored results."""
    entries = load(results)
    parts = [header(entries), _FIGURES, compared(entries)]
    for guide in GUIDES:
        here = [e for e in entries if e.guide == guide]
        if here:
            parts += [f"## {guide}\n", *(medians(model, here) for model in MODELS), settings(here)]
    OUTPUT.write_text("\n".join(part for part in parts if part))
    return f"wrote {OUTPUT}"


def header(entries: list[Entry]) -> str:
    """Title, versions and the meaning of the columns."""
    versions = ", ".join(f"{name} {meta.version(name)}" for name in ("jax", "numpyro", "optax"))
    seeds = max(len(e.fits) for e in entries)
    return (
        "# Twelve posteriors of posteriordb\n\nWritten by `python -m benchmarks.posteriordb table`. "
        f"Python {platform.python_version()}, {versions}, {os.cpu_count()} CPU cores. Eight particles.\n"
        + _HOW.format(seeds=seeds, draws=int(entries[0].draws))
    )


def compared(entries: list[Entry]) -> str:
    """The comparisons over all posteriors."""
    rows = [c.cells() for c in comparisons(entries)]
    return "## Over all posteriors\n\nAdam is *Adam, oracle*.\n\n" + markdown(("guide", "measure", "value"), rows)


def medians(model: str, entries: list[Entry]) -> str:
    """One posterior's table; empty if there are no results."""
    here = [e for e in entries if e.model == model]
    if not here:
        return ""
    about = f"### {model}\n\n{MODELS[model].about}; best ELBO {here[0].best:.3f}\n\n"
    return about + markdown(_COLUMNS, [row(title, e) for title, e in shown(here, best_adam(entries))])


def best_adam(entries: list[Entry]) -> str:
    """Adam's best single setting."""
    adam = [e for e in entries if e.method == "adam"]
    return best_single(adam) if adam else ""


def shown(here: list[Entry], single: str) -> list[tuple[str, Entry]]:
    """Order of the rows: the natural gradient, Adam's oracle and best single setting, then the other methods."""
    first = [(f"**{METHODS[NATURAL].title}**", e) for e in here if e.method == NATURAL]
    adam = [e for e in here if e.method == "adam"]
    if adam:
        best = oracle(adam)
        first.append((f"Adam, oracle: {best.setting}", best))
        first += [(f"Adam, best single: {e.setting}", e) for e in adam if e.setting == single]
    for method in ADAM[1:]:
        if found := [e for e in here if e.method == method]:
            best = oracle(found)
            first.append((f"{METHODS[method].title}, oracle: {best.setting}", best))
    others = [e for e in here if e.method not in (NATURAL, *ADAM, "reference")]
    return [*first, *((f"{METHODS[e.method].title} {e.setting}".strip(), e) for e in others)]


def row(title: str, entry: Entry) -> tuple[str, ...]:
    """One method on one posterior."""
    near, nearer = GAPS
    costs = (("steps", near), ("gradients", near), ("seconds", near), ("total", near))
    return (
        title,
        entry.precision,
        *(spent(entry, cost, gap) for cost, gap in (*costs, ("gradients", nearer), ("seconds", nearer))),
        number(float(np.median(entry.gap()))),
        number(entry.middle("error")),
        number(entry.middle("khat")),
        f"{number(entry.middle('mean_worst'))} ({number(entry.middle('mean_median'))})",
        " – ".join(number(entry.middle(f"sd_{which}")) for which in ("least", "median", "most")),
        f"{entry.failures()} of {len(entry.fits)}",
    )


def spent(entry: Entry, cost: str, gap: float) -> str:
    """Median with the least and the most."""
    reached = entry.reached(cost, gap)
    ends = "–".join(number(float(x)) for x in (reached.min(), reached.max()))
    return f"{number(float(np.median(reached)))} ({ends})" if np.isfinite(reached).any() else "never"


def settings(entries: list[Entry]) -> str:
    """Steps to 0.1 nats of every setting of Adam, by posterior; empty if it was not run."""
    adam = [e for e in entries if e.method == "adam"]
    if not adam:
        return ""
    names = list(dict.fromkeys(e.setting for e in adam))
    found = {(e.model, e.setting): e for e in adam}
    models = [m for m in MODELS if (m, names[0]) in found]
    rows = [(m, *(number(found[m, n].median("steps", GAPS[0])) for n in names)) for m in models]
    return "### Adam's settings: steps to 0.1 nats\n\n" + markdown(("posterior", *names), rows)


def markdown(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def number(x: float) -> str:
    """Three digits without an exponent; infinity reads "never"."""
    if not np.isfinite(x):
        return "–" if np.isnan(x) else "never" if x > 0 else "−∞"
    digits = 0 if abs(x) >= 100 else 3 if abs(x) < 1 else 2 if abs(x) < 10 else 1
    return f"{x:.{digits}f}" if abs(x) < 1e7 else f"{x:.1e}"
