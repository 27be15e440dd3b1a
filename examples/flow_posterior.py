# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
A banana-shaped posterior, fitted by a flow
===========================================

A banana-shaped posterior, which a Gaussian guide cannot follow and a normalizing flow can.

The data have the mean a + b² and identify a and b only through their priors, so that the posterior lies along a
parabola. With two latents a grid gives it to all digits, with the log evidence log p(y). The distance of a guide is::

    log p(y) - ELBO = KL(q ‖ posterior)      (nats)

A flow has no Fisher matrix in closed form: ``NaturalGradient`` estimates it from the scores of draws.

Run it with ``python examples/flow_posterior.py``; ``--help`` lists what can be changed.
"""

# sphinx_gallery_thumbnail_path = 'figures/flow_posterior.png'

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import DRAWS, NATURAL, OTHERS, Curve, Problem, follow, options, plain, posterior, save
from jax import Array, random
from matplotlib.axes import Axes
from numpyro.infer.autoguide import AutoGuide, AutoIAFNormal, AutoMultivariateNormal
from numpyro.infer.util import log_density
from numpyro.optim import Adam

from numpyro_natgrad import NaturalGradient

NOISE, TRUTH, SIZE = 2.0, 1.0, 50
RANGE = {"a": (-3.5, 3.0), "b": (-2.6, 2.6)}


# %%
# The model
# ---------


def model(y: Array) -> None:
    """Data whose mean is a + b².

    :param y: the data, shape `(n,)`.
    """
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("datum", len(y)):
        numpyro.sample("y", dist.Normal(a + b**2, NOISE), obs=y)


# %%
# The posterior on a grid
# -----------------------


class Truth(NamedTuple):
    """The posterior on a grid.

    :param grid: values of `a` and of `b`, each of shape `(n, n)`.
    :param density: their posterior density, shape `(n, n)`.
    :param evidence: log p(y), nats.
    """

    grid: tuple[Array, Array]
    density: Array
    evidence: float

    def mean(self, values: Array) -> float:
        """Posterior mean.

        :param values: of a function of `a` and `b` on the grid, shape `(n, n)`.
        """
        return float(jnp.sum(self.density * values) / jnp.sum(self.density))


def truth(y: Array) -> Truth:
    """Integrate the model on a grid, whose error is far below what is printed.

    :param y: the data.
    """
    axes = [jnp.linspace(-6.0, 6.0, 601)] * 2
    a, b = jnp.meshgrid(*axes)
    joint = lambda a, b: log_density(model, (y,), {}, {"a": a, "b": b})[0]
    log_joint = jax.jit(jax.vmap(jax.vmap(joint)))(a, b)
    cell = float(axes[0][1] - axes[0][0]) ** 2
    evidence = jax.scipy.special.logsumexp(log_joint) + np.log(cell)
    return Truth((a, b), jnp.exp(log_joint - evidence), float(evidence))


# %%
# The figure
# ----------


def draw_posterior(axis: Axes, exact: Truth, draws: dict[str, Array], title: str, colour: str) -> None:
    """Draws of a guide over contours of the exact posterior.

    :param axis: where to draw.
    :param exact: the posterior.
    :param draws: of the guide.
    :param title: what the panel shows.
    :param colour: of the draws.
    """
    axis.plot(draws["a"][:1500], draws["b"][:1500], ".", color=colour, ms=2, alpha=0.5)
    levels = float(exact.density.max()) * np.array([0.02, 0.1, 0.3, 0.6, 0.9])
    axis.contour(*exact.grid, exact.density, levels, colors="black", linewidths=0.8)
    axis.set(xlabel="a", ylabel="b", xlim=RANGE["a"], ylim=RANGE["b"], title=title)


def draw_gaps(axis: Axes, exact: Truth, curves: list[Curve]) -> None:
    """KL of every fit against its steps.

    :param axis: where to draw.
    :param exact: the posterior.
    :param curves: the fits of the flow, the natural gradient's first.
    """
    for curve, colour in zip(curves, (NATURAL, *OTHERS[1:]), strict=True):
        gap = np.maximum(exact.evidence - curve.elbo, 1e-3)
        axis.loglog(curve.steps, gap, color=colour, label=curve.label, marker="o", ms=3.5, lw=1.8)
    axis.set(xlabel="steps", ylabel="KL(q ‖ posterior) (nats)", title="the flow, on its way")
    axis.legend(frameon=False)


def report(label: str, exact: Truth, curve: Curve, draws: dict[str, Array]) -> str:
    """One line: how far a fit is from the posterior, and the mean of b² beside the exact one.

    :param label: of the guide.
    :param exact: the posterior.
    :param curve: the fit.
    :param draws: of the guide.
    """
    error = float(curve.weights.std() / np.sqrt(DRAWS))
    gap = f"{exact.evidence - float(curve.weights.mean()):.3f} ± {error:.3f}"
    spread = f"{float(jnp.mean(draws['b'] ** 2)):.2f}"
    return f"{label + ', ' + curve.label:<32}{curve.steps[-1]:>7}{curve.seconds[-1]:>9.2f}{gap:>18}{spread:>9}"


# %%
# All together
# ------------


def main() -> None:
    """Fit the Gaussian and the flow, compare both with the grid, and draw the figure."""
    chosen = options("A flow fitted by natural gradients.", "flow_posterior.png", steps=300, adam_steps=3000)
    y = TRUTH + NOISE * random.normal(random.key(3), (SIZE,))
    exact = truth(y)
    guides: dict[str, AutoGuide] = {"Gaussian": AutoMultivariateNormal(model), "flow": AutoIAFNormal(model)}
    gaussian, flow = (Problem(model, guide, (y,)) for guide in guides.values())
    bell = follow("natural gradient", gaussian, NaturalGradient(), chosen.steps)
    curves = [follow("natural gradient", flow, NaturalGradient(), chosen.steps)]
    curves += [follow(f"Adam({rate:g})", flow, Adam(rate), chosen.adam_steps) for rate in (0.01, 0.001)]
    draws = {"Gaussian": posterior(gaussian, bell), "flow": posterior(flow, curves[0])}
    print(f"{'guide, optimizer':<32}{'steps':>7}{'seconds':>9}{'KL (nats)':>18}{'E[b²]':>9}")
    print(report("Gaussian", exact, bell, draws["Gaussian"]))
    for curve in curves:
        print(report("flow", exact, curve, posterior(flow, curve)))
    print(f"{'the posterior, on a grid':<32}{'':>34}{exact.mean(exact.grid[1] ** 2):>9.2f}")
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.0), layout="constrained")
    for axis, (name, drawn), colour in zip(axes, draws.items(), (OTHERS[0], NATURAL), strict=False):
        draw_posterior(axis, exact, drawn, f"{name} guide, {chosen.steps} natural-gradient steps", colour)
    draw_gaps(axes[2], exact, curves)
    for axis in axes:
        plain(axis)
    save(figure, chosen.output)


if __name__ == "__main__":
    main()
