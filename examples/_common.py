# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What the examples share: fits followed on common draws, tables and k-hat from ArviZ, one figure.

Every number rests on the log importance weights of a guide at its own draws,

    w(z) = log p(x, z) - log q(z),   z ~ q,        ELBO = E[w]   (nats),

so one function of a few lines serves the learning curves and the diagnostics alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import arviz as az
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array, lax, random
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.svi import SVIState
from numpyro.optim import Adam, _NumPyroOptim
from tqdm import tqdm

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.diagnostics.arviz_compat import psis

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"

# Okabe and Ito's palette, which the common forms of colour blindness keep apart.
NATURAL = "#d55e00"
OTHERS = ("#0072b2", "#009e73", "#cc79a7")

FIT, EVALUATION = 0, 1  # seeds
PARTICLES = 8
DRAWS = 4000
TIMED = 300  # steps that the clock runs for, at most: one costs what another costs


class Problem(NamedTuple):
    """What is fitted: a model, a guide, and the arguments of both."""

    model: Callable[..., Any]
    guide: AutoGuide
    args: tuple[Array, ...]

    def svi(self, optimizer: _NumPyroOptim) -> SVI:
        """The fit by `optimizer`, with as many particles for one as for the other."""
        return SVI(self.model, self.guide, optimizer, Trace_ELBO(num_particles=PARTICLES))


class Curve(NamedTuple):
    """One fit, followed on its way.

    :param label: the optimizer, as the legend names it.
    :param steps: steps taken at each checkpoint, shape `(n,)`.
    :param seconds: wall-clock seconds of those steps, in a fit without checkpoints and without
        compilation, shape `(n,)`.
    :param elbo: ELBO in nats at each checkpoint, on draws common to all fits, shape `(n,)`.
    :param params: the guide's parameters at the last checkpoint.
    :param weights: log importance weights there, in nats.
    """

    label: str
    steps: np.ndarray
    seconds: np.ndarray
    elbo: np.ndarray
    params: dict[str, Array]
    weights: Array


def options(
    description: str, figure: str, *, steps: int, adam_steps: int, **sizes: tuple[int, str]
) -> argparse.Namespace:
    """Read the command line that the comparisons have in common.

    :param description: what the help text says of the example.
    :param figure: file name of the figure under `docs/figures`.
    :param steps: default number of natural-gradient steps.
    :param adam_steps: default number of steps of each Adam.
    :param sizes: further numbers that can be chosen, each with its default and its help text.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help="natural-gradient steps")
    parser.add_argument("--adam-steps", type=int, default=adam_steps, help="steps of each Adam")
    for name, (default, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--output", type=Path, default=FIGURES / figure, help="path of the figure")
    return parser.parse_args()


@partial(jax.jit, static_argnames=("model", "guide"))
def log_weights(
    model: Callable[..., None],
    guide: Callable[..., Any],
    params: dict[str, Array],
    key: Array,
    *args: Array,
) -> Array:
    """Log importance weights `log p(x, z) - log q(z)` at `DRAWS` draws `z` of the guide, in nats.

    The ELBO of one particle *is* the log weight of its draw, so any model and guide will do.
    The same key gives the same underlying draws: differences between fits keep little noise.

    :param model: the model, which stands for `p`.
    :param guide: the guide, which stands for `q`.
    :param params: the guide's parameters, as `svi.get_params` returns them.
    :param key: key of the draws.
    :param args: arguments of model and guide.
    """

    def weight(key: Array) -> Array:
        return -Trace_ELBO().loss(key, params, model, guide, *args)

    return jax.vmap(weight)(random.split(key, DRAWS))


def khat(log_weight: Array) -> float:
    """Pareto shape of the largest weights: below 0.7 the guide serves as importance proposal.

    :param log_weight: log importance weights.
    """
    return psis(np.asarray(log_weight, dtype=np.float64))[1]


def summary(draws: dict[str, Array], **labels: Any) -> str:
    """Table of means, standard deviations and intervals, by ArviZ 0.x and 1.x alike.

    :param draws: independent draws of each variable, along its first axis.
    :param labels: `dims` and `coords`, as ArviZ takes them.
    """
    one_chain = {name: np.asarray(value)[None] for name, value in draws.items()}
    # Independent draws need no diagnostics of chains.
    return str(az.summary(az.convert_to_dataset(one_chain, **labels), kind="stats").to_string())


def follow(label: str, problem: Problem, optimizer: _NumPyroOptim, steps: int, judged: Problem | None = None) -> Curve:
    """Take `steps` steps from the common start: for the clock, and once more for the ELBO.

    :param label: name of the fit.
    :param problem: what to fit.
    :param optimizer: what takes the steps.
    :param steps: how many.
    :param judged: the problem whose ELBO is followed, by default the one that is fitted; it has all the data where
        the fit sees minibatches.
    """
    svi, args = problem.svi(optimizer), problem.args
    whole = judged or problem

    @jax.jit
    def advance(state: SVIState, number: int) -> SVIState:
        return lax.fori_loop(0, number, lambda _, s: svi.update(s, *args)[0], state)

    def weights(state: SVIState) -> Array:
        params, common = svi.get_params(state), random.key(EVALUATION)
        return log_weights(whole.model, whole.guide, params, common, *whole.args)

    start = state = svi.init(random.key(FIT), *args)
    jax.block_until_ready(advance(start, 0))  # compiles; no step is taken
    timed = min(steps, TIMED)
    seconds_a_step = fastest(lambda: advance(start, timed)) / timed
    marks, elbo = np.unique(np.geomspace(1, steps, 25).round().astype(int)), []
    for number in tqdm(np.diff(marks, prepend=0), desc=label, unit="checkpoint"):
        state = advance(state, int(number))
        elbo.append(float(weights(state).mean()))
    params = svi.get_params(state)
    return Curve(label, marks, seconds_a_step * marks, np.array(elbo), params, weights(state))


def report(problem: Problem, optimizer: NaturalGradient) -> str:
    """How the Fisher matrix of every parameter is computed, as a table.

    :param problem: what is fitted.
    :param optimizer: what fits it.
    """
    svi = problem.svi(optimizer)
    return optimizer.report(svi, svi.init(random.key(FIT), *problem.args), *problem.args)


def fastest(call: Callable[[], Any], times: int = 3) -> float:
    """Seconds of the fastest of a few calls: other programs can only make one slower.

    :param call: what to time, compiled already.
    :param times: how often.
    """

    def clock() -> float:
        before = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - before

    return min(clock() for _ in range(times))


def follow_adam(problem: Problem, steps: int) -> list[Curve]:
    """Adam at two usual rates, and with its rate annealed.

    :param problem: what to fit.
    :param steps: how many steps each takes.
    """
    rates = {
        "Adam(0.1)": 0.1,
        "Adam(0.01)": 0.01,
        "Adam(0.1), cosine decay": optax.cosine_decay_schedule(0.1, steps),
    }
    return [follow(label, problem, Adam(rate), steps) for label, rate in rates.items()]


def posterior(problem: Problem, curve: Curve) -> dict[str, Array]:
    """Draws of the latent variables after a fit.

    :param problem: what was fitted.
    :param curve: the fit.
    """
    draw = partial(problem.guide.sample_posterior, sample_shape=(DRAWS,))
    return draw(random.key(EVALUATION), curve.params, *problem.args)


def scoreboard(curves: Sequence[Curve]) -> str:
    """One line for each fit: what it cost, what it reached, how far its draws can be trusted.

    :param curves: the fits.
    """

    def line(curve: Curve) -> str:
        error = curve.weights.std() / np.sqrt(DRAWS)
        cost = f"{curve.label:<24}{curve.steps[-1]:>8}{curve.seconds[-1]:>9.2f}"
        return f"{cost}{curve.elbo[-1]:>12.2f} ± {error:<5.2f}{khat(curve.weights):>7.2f}"

    head = f"{'optimizer':<24}{'steps':>8}{'seconds':>9}{'ELBO ± s.e. (nats)':>20}{'k-hat':>7}"
    note = f"ELBO on {DRAWS} draws; seconds without compilation; k-hat below 0.7 is trustworthy."
    return "\n".join([head, *map(line, curves), note])


def picture(curves: Sequence[Curve], title: str, *, depth: float) -> Figure:
    """ELBO against steps and against seconds.

    :param curves: the fits, the one to look at first.
    :param title: headline of the figure.
    :param depth: how many nats below the best ELBO the axes reach.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.3), sharey=True, layout="constrained")
    draw_curves(axes, curves, depth=depth)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    return figure


def draw_curves(axes: Sequence[Axes], curves: Sequence[Curve], *, depth: float) -> None:
    """ELBO against steps on the first of two axes, against seconds on the second.

    :param axes: where to draw.
    :param curves: the fits, the one to look at first.
    :param depth: how many nats below the best ELBO the axes reach.
    """
    # Back to front: the first curve is drawn last.
    for curve, colour in reversed(list(zip(curves, (NATURAL, *OTHERS), strict=True))):
        look = {"color": colour, "label": curve.label, "marker": "o", "ms": 3.5, "lw": 1.8}
        axes[0].plot(curve.steps, curve.elbo, **look)
        axes[1].plot(curve.seconds, curve.elbo, **look)
    best = max(np.nanmax(curve.elbo) for curve in curves)
    axes[0].set(xlabel="steps", ylabel="ELBO (nats)", ylim=(best - depth, best + 0.05 * depth))
    axes[1].set_xlabel("seconds, compilation excluded")
    for axis in axes:
        axis.set_xscale("log")
        plain(axis)


def plain(axis: Axes) -> None:
    """Leave only what is read: two spines and a light grid.

    :param axis: what to clean.
    """
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write the figure, and its folder if need be, and say where.

    :param figure: what to write.
    :param path: where to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"\nfigure: {path}")
