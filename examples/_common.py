# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Shared by the examples: fits scored on common draws, tables and k-hat by ArviZ, and one figure.

Learning curves and diagnostics use the log importance weights of a guide at its own draws,

    w(z) = log p(x, z) - log q(z),   z ~ q,        ELBO = E[w]   (nats).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
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
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.svi import SVIState
from numpyro.optim import Adam, _NumPyroOptim
from tqdm import tqdm

from numpyro_natgrad import NaturalGradient, Verdict, to_arviz, to_nuts

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"

# Okabe and Ito's palette, which is safe for colour blindness.
NATURAL = "#d55e00"
OTHERS = ("#0072b2", "#009e73", "#cc79a7")

FIT, EVALUATION = 0, 1  # seeds
PARTICLES = 8
DRAWS = 4000
WARMUP, SAMPLES, CHAINS = 500, 1000, 2  # of NUTS


class Problem(NamedTuple):
    """A model, a guide, and the arguments of both."""

    model: Callable[..., Any]
    guide: AutoGuide
    args: tuple[Array, ...]

    def svi(self, optimizer: _NumPyroOptim) -> SVI:
        """The SVI with this optimizer; all optimizers use the same number of particles."""
        return SVI(self.model, self.guide, optimizer, Trace_ELBO(num_particles=PARTICLES))


class Curve(NamedTuple):
    """One fit, scored at checkpoints.

    :param label: the optimizer, as the legend names it.
    :param steps: steps taken at each checkpoint, shape `(n,)`.
    :param seconds: wall-clock seconds of those steps, without checkpoints and compilation, shape `(n,)`.
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
    """Parse the command line that the comparisons share.

    :param description: help text of the example.
    :param figure: file name of the figure under `docs/figures`.
    :param steps: default number of natural-gradient steps.
    :param adam_steps: default number of steps of each Adam.
    :param sizes: further integer options, each with its default and its help text.
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

    The ELBO of one particle is the log weight of its draw, for any model and guide. The same key gives the same
    underlying draws, so that differences between fits have little noise.

    :param model: the model, `p`.
    :param guide: the guide, `q`.
    :param params: the guide's parameters, as `svi.get_params` returns them.
    :param key: key of the draws.
    :param args: arguments of model and guide.
    """

    def weight(key: Array) -> Array:
        return -Trace_ELBO().loss(key, params, model, guide, *args)

    return jax.vmap(weight)(random.split(key, DRAWS))


def khat(log_weight: Array | np.ndarray) -> float:
    """Pareto shape of the largest weights; below 0.7 the guide can be trusted as an importance proposal.

    :param log_weight: log importance weights.
    """
    log_weight = np.asarray(log_weight, dtype=np.float64)
    try:
        from arviz_stats.base import array_stats
    except ImportError:  # ArviZ 0.x
        return float(az.psislw(log_weight)[1])
    return float(array_stats.psislw(-log_weight)[1])


def summary(draws: Mapping[str, Array | np.ndarray], **labels: Any) -> str:
    """Table of means, standard deviations and intervals, by ArviZ 0.x and 1.x alike.

    :param draws: independent draws of each variable, along its first axis.
    :param labels: `dims` and `coords`, as ArviZ takes them.
    """
    one_chain = {name: np.asarray(value)[None] for name, value in draws.items()}
    # Independent draws need no diagnostics of chains.
    return str(az.summary(az.convert_to_dataset(one_chain, **labels), kind="stats").to_string())


def follow(label: str, problem: Problem, optimizer: _NumPyroOptim, steps: int, judged: Problem | None = None) -> Curve:
    """Take `steps` steps from the common start; the ELBO is estimated at each checkpoint, with the clock stopped.

    :param label: name of the fit.
    :param problem: the problem to fit.
    :param optimizer: the optimizer.
    :param steps: number of steps.
    :param judged: the problem whose ELBO is scored, by default the fitted one; it has all of the data if the fit uses
        minibatches.
    """
    svi, args = problem.svi(optimizer), problem.args
    whole = judged or problem

    @jax.jit
    def advance(state: SVIState, number: int) -> SVIState:
        return lax.fori_loop(0, number, lambda _, s: svi.update(s, *args)[0], state)

    def weights(state: SVIState) -> Array:
        params, common = svi.get_params(state), random.key(EVALUATION)
        return log_weights(whole.model, whole.guide, params, common, *whole.args)

    state = svi.init(random.key(FIT), *args)
    jax.block_until_ready(advance(state, 1))  # compiles; this step is not kept
    marks, rates, elbo = np.unique(np.geomspace(1, steps, 25).round().astype(int)), [], []
    for number in tqdm(np.diff(marks, prepend=0), desc=label, unit="checkpoint"):
        before = time.perf_counter()
        state = jax.block_until_ready(advance(state, int(number)))
        rates.append((time.perf_counter() - before) / number)
        drawn = weights(state)
        elbo.append(float(drawn.mean()))
    # All steps cost the same, and other programs can only slow them down.
    return Curve(label, marks, min(rates) * marks, np.array(elbo), svi.get_params(state), drawn)


def report(problem: Problem, optimizer: NaturalGradient) -> str:
    """How the Fisher matrix of every parameter is computed, as a table.

    :param problem: what is fitted.
    :param optimizer: what fits it.
    """
    svi = problem.svi(optimizer)
    return optimizer.report(svi, svi.init(random.key(FIT), *problem.args), *problem.args)


def follow_adam(problem: Problem, steps: int) -> list[Curve]:
    """Adam at two common rates, and with a cosine decay.

    :param problem: the problem to fit.
    :param steps: number of steps of each.
    """
    rates = {
        "Adam(0.1)": 0.1,
        "Adam(0.01)": 0.01,
        "Adam(0.1), cosine decay": optax.cosine_decay_schedule(0.1, steps),
    }
    return [follow(label, problem, Adam(rate), steps) for label, rate in rates.items()]


def posterior(problem: Problem, curve: Curve) -> dict[str, Array]:
    """Draws of the latent variables after a fit.

    :param problem: the fitted problem.
    :param curve: the fit.
    """
    draw = partial(problem.guide.sample_posterior, sample_shape=(DRAWS,))
    return draw(random.key(EVALUATION), curve.params, *problem.args)


def figure_path(description: str, figure: str) -> Path:
    """Parse a command line whose only option is where the figure goes.

    :param description: help text of the example.
    :param figure: file name of the figure under `docs/figures`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=FIGURES / figure, help="path of the figure")
    return parser.parse_args().output


def nuts(model: Callable[..., Any], *args: Any, **settings: Any) -> dict[str, np.ndarray]:
    """Draws of all sites by NUTS, from `CHAINS` chains that run at once.

    :param model: the model.
    :param args: its arguments.
    :param settings: of `NUTS`, such as `target_accept_prob`.
    """
    return _sample(NUTS(model, **settings), WARMUP, None, args)


def nuts_from_fit(problem: Problem, curve: Curve) -> dict[str, np.ndarray]:
    """Draws by NUTS that starts from a fit: its points, its mass matrix and its step size.

    :param problem: the fitted problem.
    :param curve: the fit.
    """
    svi = problem.svi(NaturalGradient())
    svi.init(random.key(FIT), *problem.args)
    start = to_nuts(svi, curve.params, random.key(EVALUATION), *problem.args, num_chains=CHAINS)
    return _sample(start.kernel, start.num_warmup, start.init_params, problem.args)


def _sample(kernel: NUTS, warmup: int, init_params: Any, args: tuple[Any, ...]) -> dict[str, np.ndarray]:
    sampler = MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=SAMPLES,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    sampler.run(random.key(EVALUATION), *args, init_params=init_params)
    return {name: np.asarray(value) for name, value in sampler.get_samples().items()}


def weighted_summary(judged: Verdict, sites: Sequence[str]) -> str:
    """ArviZ's table of means, standard deviations and intervals of importance-weighted draws.

    :param judged: the verdict on a fit.
    :param sites: names of the sites.
    """
    data = to_arviz(judged, random.key(EVALUATION))
    return str(az.summary(data, var_names=list(sites), kind="stats").to_string())


def beside_nuts(judged: Verdict, reference: dict[str, np.ndarray], sites: Sequence[str]) -> str:
    """Means and standard deviations of the weighted guide beside those by NUTS, one line for each entry of the sites.

    :param judged: the verdict on a fit.
    :param reference: draws by NUTS.
    :param sites: names of the sites.
    """
    moments = {name: (judged.importance_weighted[name].mean, judged.importance_weighted[name].sd) for name in sites}
    return _beside(moments, reference, "weighted guide")


def guide_beside_nuts(draws: Mapping[str, Array], reference: dict[str, np.ndarray], sites: Sequence[str]) -> str:
    """The same for draws of a guide, without weights.

    :param draws: of the guide, along the first axis.
    :param reference: draws by NUTS.
    :param sites: names of the sites.
    """
    return _beside({name: (draws[name].mean(0), draws[name].std(0)) for name in sites}, reference, "guide")


def _beside(moments: dict[str, tuple[Any, Any]], reference: dict[str, np.ndarray], title: str) -> str:
    lines = [f"{'':<16}{title:>20}{'NUTS':>20}{'difference/sd':>15}{'sd ratio':>10}"]
    for name, both in moments.items():
        mean, sd = (np.ravel(np.asarray(x)) for x in both)
        draws = reference[name].reshape(len(reference[name]), -1)
        for i, (mine, width, other, spread) in enumerate(zip(mean, sd, draws.mean(0), draws.std(0), strict=True)):
            label = name if len(mean) == 1 else f"{name}[{i}]"
            cells = f"{f'{mine:.3f} ± {width:.3f}':>20}{f'{other:.3f} ± {spread:.3f}':>20}"
            lines.append(f"{label:<16}{cells}{(mine - other) / spread:>15.2f}{width / spread:>10.2f}")
    return "\n".join(lines)


def scoreboard(curves: Sequence[Curve]) -> str:
    """One line for each fit: its cost, its ELBO, and the k-hat of its draws.

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

    :param curves: the fits; the first one is drawn on top.
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
    :param curves: the fits; the first one is drawn on top.
    :param depth: how many nats below the best ELBO the axes reach.
    """
    # The first curve is drawn last, on top of the others.
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
    """Keep two spines and a light grid.

    :param axis: the axis.
    """
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write the figure, create its folder if necessary, and print the path. The figure stays open for a notebook.

    :param figure: the figure.
    :param path: path of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"\nfigure: {path}")
