# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
Time series: a level that wanders, and cycles
=============================================

The yearly flow of the Nile at Aswan as noise around a level that is a random walk, and the yearly number of sunspots as
an autoregression.

Run it with ``python examples/local_level.py``.
"""

# sphinx_gallery_thumbnail_path = 'figures/local_level.png'

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import NATURAL, OTHERS, beside_nuts, figure_path, nuts, plain, save, weighted_summary
from jax import Array, random
from matplotlib.figure import Figure
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from statsmodels.datasets import nile, sunspots

from numpyro_natgrad import NaturalGradient, Verdict, fit, verdict

LEVEL, AUTOREGRESSION = ["noise", "drift"], ["intercept", "phi", "sigma"]
LAGS = 9  # years; the order that Akaike's criterion chooses


# %%
# Data
# ----
#
# Both come with statsmodels: Durbin and Koopman (2012), *Time series analysis by state space methods*, and the numbers
# of SIDC, Brussels, for 1700 to 2008.


def flow() -> tuple[np.ndarray, Array]:
    """The years 1871 to 1970, and the flow of the Nile in 10⁸ m³."""
    table = nile.load_pandas().data
    return np.asarray(table["year"]), jnp.asarray(table["volume"].to_numpy(), float)


def roots_of_sunspots() -> tuple[np.ndarray, Array]:
    """The years, and square roots of the number of sunspots, whose variance is more even."""
    table = sunspots.load_pandas().data
    return np.asarray(table["YEAR"]), jnp.sqrt(jnp.asarray(table["SUNACTIVITY"].to_numpy(), float))


# %%
# The models
# ----------


def covariance(drift: Array, noise: Array, years: int) -> tuple[Array, Array]:
    """Covariances of the levels, a random walk from a first level with standard deviation 500, and of the flows."""
    step = jnp.arange(years)
    level = 500.0**2 + drift**2 * jnp.minimum(step[:, None], step)
    return level, level + noise**2 * jnp.eye(years)


def local_level(y: Array) -> None:
    """Noise around a random walk. All levels are Gaussian, and are summed out: a hundred latents become two.

    :param y: shape `(n,)`.
    """
    noise = numpyro.sample("noise", dist.HalfNormal(200.0))
    drift = numpyro.sample("drift", dist.HalfNormal(100.0))
    level, both = covariance(drift, noise, len(y))
    numpyro.sample("y", dist.MultivariateNormal(1000.0, both), obs=y)
    # Mean and standard deviation of each level, given the flows.
    numpyro.deterministic("level", 1000.0 + level @ jnp.linalg.solve(both, y - 1000.0))
    numpyro.deterministic("level_sd", jnp.sqrt(jnp.diag(level - level @ jnp.linalg.solve(both, level))))


def autoregression(y: Array) -> None:
    """Regression of each year on the `LAGS` years before it.

    :param y: shape `(n,)`.
    """
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 3.0))
    phi = numpyro.sample("phi", dist.Normal(0.0, 0.5).expand([LAGS]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(3.0))
    past = jnp.stack([y[LAGS - lag : len(y) - lag] for lag in range(1, LAGS + 1)], axis=-1)
    numpyro.sample("y", dist.Normal(intercept + past @ phi, sigma).to_event(1), obs=y[LAGS:])


# %%
# The fits
# --------


def run(model: Callable[..., Any], y: Array, sites: list[str]) -> Verdict:
    """Fit until less than 0.05 nats are to gain, and judge the fit.

    :param model: the model.
    :param y: the series.
    :param sites: to report.
    """
    svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(num_particles=8))
    result = fit(svi, random.key(0), y, tolerance=0.05, progress_bar=False)
    print(result.reason)
    return verdict(svi, result, random.key(1), y, sites=sites, progress_bar=False)


# %%
# The figure
# ----------


def spectrum(judged: Verdict, periods: np.ndarray) -> np.ndarray:
    """Power spectra of the autoregressions that were drawn, shape `(draws, periods)`.

    :param judged: the verdict on the fit.
    :param periods: years.
    """
    turns = np.exp(-2j * np.pi * np.arange(1, LAGS + 1)[:, None] / periods)
    return judged.draws["sigma"][:, None] ** 2 / np.abs(1 - judged.draws["phi"] @ turns) ** 2


def picture(level: Verdict, cycles: Verdict) -> Figure:
    """The level of the Nile, and the spectrum of sunspots, with 90 % intervals.

    :param level: the verdict on the first fit.
    :param cycles: the verdict on the second fit.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    periods, (years, volume) = np.geomspace(3, 60, 300), flow()
    noise = np.random.default_rng(0).standard_normal(level.draws["level"].shape)
    levels = level.draws["level"] + level.draws["level_sd"] * noise
    for axis, x, draws in zip(axes, [years, periods], [levels, spectrum(cycles, periods)], strict=True):
        low, middle, high = np.quantile(draws, [0.05, 0.5, 0.95], axis=0)
        axis.fill_between(x, low, high, color=NATURAL, alpha=0.3, lw=0, label="90 %")
        axis.plot(x, middle, color=NATURAL, lw=2, label="median")
        plain(axis)
    axes[0].plot(years, volume, "o", color="black", ms=3)
    axes[0].axvline(1899, color=OTHERS[0], ls=":", label="first dam begun")
    axes[0].set(xlabel="year", ylabel="flow (10⁸ m³)", title="Level of the Nile")
    axes[1].axvline(11, color=OTHERS[0], ls=":", label="11 years")
    axes[1].set(xscale="log", yscale="log", xlabel="period (years)", ylabel="power", title="Spectrum of sunspots")
    axes[1].set_xticks([3, 5, 11, 20, 60], ["3", "5", "11", "20", "60"], minor=False)
    axes[1].minorticks_off()
    for axis in axes:
        axis.legend(frameon=False, fontsize=9)
    return figure


def main() -> None:
    """Fit, judge, compare with NUTS, draw."""
    path = figure_path("Time series.", "local_level.png")
    verdicts = []
    for model, (_, y), sites in [(local_level, flow(), LEVEL), (autoregression, roots_of_sunspots(), AUTOREGRESSION)]:
        also = ["level", "level_sd"] if model is local_level else []
        judged = run(model, y, [*sites, *also])
        print(f"{judged}\n\n{weighted_summary(judged, sites)}\n\n{beside_nuts(judged, nuts(model, y), sites)}\n")
        verdicts.append(judged)
    save(picture(*verdicts), path)


if __name__ == "__main__":
    main()
