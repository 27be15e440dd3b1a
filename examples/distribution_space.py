# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
Natural gradients in two dimensions
===================================

Distances between parameters are not distances between distributions.

The upper panels show two pairs of Gaussians whose means differ by 4 units: the KL between the narrow ones is larger.
The lower panels show steepest descent in the parameters and in KL, towards the same target. After A. Kristiadi's
article "Natural Gradient Descent".

Run it with ``python examples/distribution_space.py``; ``--help`` lists what can be changed.
"""

# sphinx_gallery_thumbnail_path = 'figures/distribution_space.png'

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import FIGURES, NATURAL, OTHERS, plain, save
from jax import Array, lax, random
from matplotlib.axes import Axes
from numpyro.infer import SVI, TraceMeanField_ELBO
from numpyro.infer.svi import SVIState
from numpyro.optim import SGD, _NumPyroOptim

from numpyro_natgrad import NaturalGradient

MEANS = (-2.0, 2.0)
TARGET = dist.Normal(0.0, 0.5)
# Narrower than the target and far from it: a small change of its mean is a KL of many nats.
START = (1.5, 0.1)  # mean, standard deviation
RATE, MAX_KL = 0.1, 0.2
FLOOR = 1e-4  # nats


# %%
# A guide and its target
# ----------------------


def model() -> None:
    """A model whose posterior is a known Normal."""
    numpyro.sample("z", TARGET)


def guide() -> None:
    """The Normal to be fitted. NumPyro's optimizers move `loc` and `log scale`."""
    loc = numpyro.param("loc", START[0])
    scale = numpyro.param("scale", START[1], constraint=dist.constraints.positive)
    numpyro.sample("z", dist.Normal(loc, scale))


def kl_to_target(loc: Array, scale: Array) -> Array:
    """KL(q ‖ target), the loss, in nats.

    :param loc: means of the guide.
    :param scale: standard deviations of the guide.
    """
    return dist.kl_divergence(dist.Normal(loc, scale), TARGET)


def kl(loc: Array, scale: Array) -> Array:
    """KL between the guides before and after each step, which `max_kl` limits, in nats.

    :param loc: means along the path.
    :param scale: standard deviations along the path.
    """
    before, after = dist.Normal(loc[:-1], scale[:-1]), dist.Normal(loc[1:], scale[1:])
    return dist.kl_divergence(before, after)


# %%
# Two paths
# ---------


def path(optimizer: _NumPyroOptim, steps: int) -> tuple[Array, Array]:
    """Means and standard deviations along the path, including the start.

    The loss is `TraceMeanField_ELBO`, here exactly the KL, so that there is no noise.

    :param optimizer: the optimizer.
    :param steps: number of steps.
    """
    svi = SVI(model, guide, optimizer, TraceMeanField_ELBO())

    def step(state: SVIState, _: None) -> tuple[SVIState, dict[str, Array]]:
        return svi.update(state)[0], svi.get_params(state)

    walk = jax.jit(lambda state: lax.scan(step, state, length=steps + 1))
    _, params = walk(svi.init(random.key(0)))
    return params["loc"], params["scale"]


# %%
# The figure
# ----------


def draw_pair(axis: Axes, variance: float) -> None:
    """Two Gaussians whose means are 4 units apart, and their KL.

    :param axis: where to draw.
    :param variance: variance of both.
    """
    pair = [dist.Normal(mean, np.sqrt(variance)) for mean in MEANS]
    z = jnp.linspace(-7.0, 7.0, 600)
    for gaussian, colour in zip(pair, OTHERS, strict=False):
        density = jnp.exp(gaussian.log_prob(z))
        axis.plot(z, density, color=colour, lw=1.8)
        axis.fill_between(z, density, color=colour, alpha=0.15)
    nats = float(dist.kl_divergence(*pair))
    axis.set_title(f"variance {variance:g}: means 4 apart, KL = {nats:g} nats")
    axis.set(xlabel="z", ylabel="density", ylim=(0.0, 0.65))


def draw_paths(axis: Axes, paths: dict[str, tuple[Array, Array]]) -> None:
    """Both paths over contours of the loss, in NumPyro's unconstrained parameters.

    :param axis: where to draw.
    :param paths: means and standard deviations along the path of each optimizer.
    """
    loc, log_scale = jnp.meshgrid(jnp.linspace(-0.6, 2.0, 200), jnp.linspace(-2.6, 0.3, 200))
    loss, levels = kl_to_target(loc, jnp.exp(log_scale)), np.geomspace(0.05, 20.0, 9)
    axis.contour(loc, log_scale, loss, levels, colors="0.75", linewidths=0.9)
    for label, (means, scales) in paths.items():
        axis.plot(means, np.log(scales), label=label, **look(label))
    axis.plot(TARGET.loc, np.log(TARGET.scale), "*", color="black", ms=13)
    for text, spot in {"start": START, "target": (TARGET.loc, TARGET.scale)}.items():
        axis.annotate(text, (spot[0], np.log(spot[1])), (6, 8), textcoords="offset points")
    axis.set(xlabel="mean", ylabel="log standard deviation", aspect="equal")
    axis.set_title("paths over contours of the loss, KL(q ‖ p)")


def draw_moves(axis: Axes, paths: dict[str, tuple[Array, Array]]) -> None:
    """The KL of each step.

    :param axis: where to draw.
    :param paths: means and standard deviations along the path of each optimizer.
    """
    for label, (means, scales) in paths.items():
        nats = kl(means, scales)
        nats = jnp.where(nats < FLOOR, jnp.nan, nats)  # converged
        axis.semilogy(1 + np.arange(len(nats)), nats, label=label, **look(label))
    axis.set(xlabel="step", ylabel="KL(q before ‖ q after) (nats)", ylim=(FLOOR, 1e3))
    axis.set_title("nats moved by each step")
    axis.legend(frameon=False)


def look(label: str) -> dict[str, Any]:
    """Style of the line of an optimizer.

    :param label: name of the optimizer.
    """
    colour = NATURAL if "natural" in label else OTHERS[0]
    return {"color": colour, "marker": "o", "ms": 3.5, "lw": 1.8}


# %%
# All together
# ------------


def main() -> None:
    """Compute both paths and draw the four panels."""
    parser = argparse.ArgumentParser(description="Natural gradients in two dimensions.")
    parser.add_argument("--steps", type=int, default=25, help="steps of each path")
    parser.add_argument("--output", type=Path, default=FIGURES / "distribution_space.png")
    chosen = parser.parse_args()
    paths = {
        f"gradient, rate {RATE:g}": path(SGD(RATE), chosen.steps),
        f"natural gradient, {MAX_KL:g} nats a step": path(NaturalGradient(step_size=1.0, max_kl=MAX_KL), chosen.steps),
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
    draw_pair(axes[0, 0], variance=2.0)
    draw_pair(axes[0, 1], variance=0.5)
    draw_paths(axes[1, 0], paths)
    draw_moves(axes[1, 1], paths)
    for axis in axes.flat:
        plain(axis)
    save(figure, chosen.output)


if __name__ == "__main__":
    main()
