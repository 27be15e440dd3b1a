# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Draws the gap against steps and seconds, one panel for each posterior, and a performance profile."""

import pathlib
from typing import Any

import matplotlib as mpl
import numpy as np

from .comparison import GUIDES, NATURAL
from .methods import METHODS
from .models import MODELS
from .results import GAPS, Entry, load, oracle

mpl.use("Agg")
import matplotlib.pyplot as plt

FOLDER = pathlib.Path("docs/figures")
#: Okabe and Ito's palette, which is safe for colour blindness.
COLOURS = {NATURAL: "#0072B2", "adam": "#D55E00", "batch_and_match": "#009E73", "deterministic_advi": "#CC79A7",
           "deterministic_mean_field": "#CC79A7", "blackjax_fullrank": "#E69F00", "blackjax_meanfield": "#E69F00",
           "pathfinder": "#56B4E9"}  # fmt: skip
BEST_OF = {"adam": "Adam, best of 10 settings each"}
STYLE: Any = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 8.5,
         "axes.titlelocation": "left", "axes.linewidth": 0.6, "legend.frameon": False}  # fmt: skip
FLOOR = 1e-3


def draw(results: pathlib.Path) -> str:
    """Draw all figures from the stored results."""
    entries = [e for e in load(results) if e.precision == "x64" and e.method in COLOURS]
    FOLDER.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(STYLE):
        for guide, title in GUIDES.items():
            here = [e for e in entries if e.guide == guide]
            if here:
                name = f"posteriordb_{title.split()[0]}_gap.png"
                written += [
                    _save(_gaps(here, x, title), name.replace(".png", f"_{x}.png")) for x in ("steps", "seconds")
                ]
        written.append(_save(_profiles(entries), "posteriordb_profile.png"))
    return "\n".join(written)


def _save(figure: Any, name: str) -> str:
    figure.savefig(FOLDER / name, dpi=160, bbox_inches="tight")
    plt.close(figure)
    return f"wrote {FOLDER / name}"


def _title(method: str) -> str:
    return BEST_OF.get(method, METHODS[method].title)


def chosen(entries: list[Entry]) -> dict[str, dict[str, Entry]]:
    """By posterior and method, the method's best setting."""
    by: dict[str, dict[str, list[Entry]]] = {}
    for e in entries:
        by.setdefault(e.model, {}).setdefault(e.method, []).append(e)
    return {m: {name: oracle(by[m][name]) for name in COLOURS if name in by[m]} for m in MODELS if m in by}


def _gaps(entries: list[Entry], x: str, title: str) -> Any:
    table = chosen(entries)
    rows = -(-len(table) // 4)
    figure, axes = plt.subplots(rows, min(len(table), 4), figsize=(10.5, 2.0 * rows + 0.7), squeeze=False, sharey=True)
    for axis, (model, methods) in zip(axes.flat, table.items(), strict=False):
        for method, entry in methods.items():
            _line(axis, entry, x, COLOURS[method], _title(method))
        axis.axhline(GAPS[0], color="0.6", lw=0.6, ls=(0, (4, 3)), zorder=0)
        axis.set(xscale="log", yscale="log", ylim=(FLOOR, 3e4), title=model.split("-")[0].replace("_", " "))
    for axis in axes.flat[len(table) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(x if x == "steps" else "seconds, compiled")
    for axis in axes[:, 0]:
        axis.set_ylabel("gap to best ELBO, nats")
    handles = {h.get_label(): h for a in axes.flat for h in a.get_lines() if not h.get_label().startswith("_")}
    figure.suptitle(f"{title[0].upper()}{title[1:]}: medians over seeds, with the range", x=0.01, y=1.0, ha="left")
    figure.legend(handles=list(handles.values()), loc="upper center", ncols=3, bbox_to_anchor=(0.5, 0.0))
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure


def _line(axis: Any, entry: Entry, x: str, colour: str, label: str) -> None:
    """The median over seeds with the range. Non-finite gaps lie above the axis."""
    length = min(len(fit["elbos"]) for fit in entry.fits)
    at = np.median([fit[x][:length] for fit in entry.fits], 0)
    elbos = np.array([fit["elbos"][:length] for fit in entry.fits])
    gaps = np.where(np.isfinite(elbos), np.maximum(entry.best - elbos, FLOOR), 1e12)
    axis.plot(at, np.median(gaps, 0), color=colour, lw=1.4, label=label, marker="o" if length == 1 else None, ms=4)
    axis.fill_between(at, gaps.min(0), gaps.max(0), color=colour, alpha=0.18, lw=0)


def _profiles(entries: list[Entry]) -> Any:
    """Dolan and Moré (2002): on which share of the posteriors a method needs at most τ times what the best one does."""
    guides = [g for g in GUIDES if any(e.guide == g for e in entries)]
    figure, axes = plt.subplots(2, len(guides), figsize=(4.6 * len(guides), 5.2), squeeze=False, sharey=True)
    for column, guide in enumerate(guides):
        table = chosen([e for e in entries if e.guide == guide])
        for axis, cost in zip(axes[:, column], ("gradients", "seconds"), strict=True):
            _profile(axis, table, cost)
            axis.set_xlabel(f"τ: times the fewest {cost} to {GAPS[0]} nats")
        axes[0, column].set_title(f"{GUIDES[guide][0].upper()}{GUIDES[guide][1:]}")
    for axis in axes[:, 0]:
        axis.set_ylabel("share of posteriors")
    figure.tight_layout()
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 0.0))
    return figure


def _profile(axis: Any, table: dict[str, dict[str, Entry]], cost: str) -> None:
    methods = [m for m in COLOURS if any(m in row for row in table.values())]
    spent = np.array(
        [[row[m].median(cost, GAPS[0]) if m in row else np.inf for m in methods] for row in table.values()]
    )
    least = spent.min(1, keepdims=True)
    ratio = spent / np.where(np.isfinite(least), least, 1.0)
    for column, method in zip(ratio.T, methods, strict=True):
        steps = np.sort(column[np.isfinite(column)])
        x, y = np.r_[1.0, steps, 1e4], np.r_[0.0, np.arange(1, len(steps) + 1), len(steps)] / len(column)
        axis.step(x, y, where="post", color=COLOURS[method], lw=1.6, label=_title(method))
    axis.set(xscale="log", xlim=(0.95, 1e3), ylim=(-0.02, 1.03))
