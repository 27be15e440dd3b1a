# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
A forecast of carbon dioxide
============================

Monthly carbon dioxide above Mauna Loa from 1980 to 1999: a trend whose slope differs from year to year, a season, and
an autoregressive error. The two years after that are forecast, and compared with what was measured. This trend was
chosen among five, and the error in those two years was seen for three of them: it is not that of an untouched test.

Run it with ``python examples/forecast.py``.
"""

# sphinx_gallery_thumbnail_path = 'figures/forecast.png'

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import (
    DRAWS,
    NATURAL,
    OTHERS,
    PARTICLES,
    beside_nuts,
    figure_path,
    log_weights,
    nuts,
    plain,
    save,
    weighted_summary,
)
from jax import Array, lax, random
from matplotlib.figure import Figure
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.optim import Adam
from statsmodels.datasets import co2

from numpyro_natgrad import NaturalGradient, Verdict, fit, verdict

SITES = ["level", "slope", "change_sd", "season", "phi", "sigma"]
FIRST, MONTHS, AHEAD = 1980, 240, 24
YEARS = MONTHS // 12

# %%
# Data
# ----
#
# Keeling and Whorf (2004), weekly means in ppm; ``co2`` of statsmodels, which we average over months.


def read() -> tuple[Array, Array]:
    """Months to fit, and months to forecast, in ppm above 340."""
    weekly = co2.load_pandas().data["co2"]
    monthly = weekly.resample("MS").mean()[str(FIRST) :].to_numpy() - 340
    assert np.isfinite(monthly).all()
    return jnp.asarray(monthly[:MONTHS], float), jnp.asarray(monthly[MONTHS : MONTHS + AHEAD], float)


# %%
# The model
# ---------


def trend_and_season(level: Array, slope: Array, change: Array, season: Array) -> Array:
    """The mean of each month, ppm, shape `(12 * years,)`.

    :param level: in the first month.
    :param slope: its mean, ppm a year.
    :param change: how much it differs from this in each year, shape `(years,)`.
    :param season: coefficients of cosines and sines of one to three cycles a year, shape `(6,)`.
    """
    trend = level + jnp.cumsum(jnp.repeat(slope + change, 12)) / 12
    angle = 2 * jnp.pi * jnp.arange(len(trend))[:, None] / 12 * jnp.arange(1, 4)
    return trend + jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1) @ season


def model(y: Array) -> None:
    """The error of a month is `phi` times that of the month before, and noise.

    :param y: ppm, shape `(MONTHS,)`.
    """
    level = numpyro.sample("level", dist.Normal(0.0, 10.0))
    slope = numpyro.sample("slope", dist.Normal(1.5, 1.0))
    change_sd = numpyro.sample("change_sd", dist.LogNormal(-0.7, 0.5))
    with numpyro.plate("year", YEARS):
        change = numpyro.sample("change", dist.Normal(0.0, change_sd))
    season = numpyro.sample("season", dist.Normal(0.0, 3.0).expand([6]).to_event(1))
    phi, sigma = numpyro.sample("phi", dist.Beta(2.0, 2.0)), numpyro.sample("sigma", dist.LogNormal(-1.0, 1.0))
    mean = trend_and_season(level, slope, change, season)
    expected = mean + phi * jnp.append(0.0, (y - mean)[:-1])
    sd = jnp.append(sigma / jnp.sqrt(1 - phi**2), jnp.full(len(y) - 1, sigma))
    numpyro.sample("y", dist.Normal(expected, sd).to_event(1), obs=y)


# %%
# The fit
# -------


def run(y: Array) -> Verdict:
    """Fit until less than 0.05 nats are to gain, and judge the fit.

    :param y: ppm, shape `(MONTHS,)`.
    """
    svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(num_particles=PARTICLES))
    result = fit(svi, random.key(0), y, tolerance=0.05, progress_bar=False)
    print(f"{len(result.losses)} steps; {result.reason}")
    return verdict(svi, result, random.key(1), y, sites=[*SITES, "change"], progress_bar=False)


def by_adam(y: Array, steps: int) -> float:
    """The ELBO after so many steps of Adam(0.01), nats.

    :param y: ppm, shape `(MONTHS,)`.
    :param steps: number of steps.
    """
    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, Adam(0.01), Trace_ELBO(num_particles=PARTICLES))
    params = svi.run(random.key(0), steps, y, progress_bar=False).params
    return float(log_weights(model, guide, params, random.key(1), y).mean())


# %%
# The forecast
# ------------


def forecast(judged: Verdict, y: Array) -> np.ndarray:
    """Draws of the months ahead, ppm, shape `(DRAWS, AHEAD)`: with new slopes, and errors that go on.

    :param judged: the verdict on the fit, whose draws are resampled by their weights.
    :param y: the months that were fitted.
    """
    keys = random.split(random.key(3))
    chosen = random.choice(keys[0], judged.weights.size, (DRAWS,), p=jnp.asarray(judged.weights))
    draws: dict[str, Any] = {name: jnp.asarray(x)[chosen] for name, x in judged.draws.items()}

    def ahead(key: Array, draw: dict[str, Array]) -> Array:
        of_slope, of_error = random.split(key)
        change = jnp.append(draw["change"], draw["change_sd"] * random.normal(of_slope, (AHEAD // 12,)))
        mean = trend_and_season(draw["level"], draw["slope"], change, draw["season"])
        noise = draw["sigma"] * random.normal(of_error, (AHEAD,))
        step = lambda error, z: (draw["phi"] * error + z,) * 2
        errors = lax.scan(step, (y - mean[:MONTHS])[-1], noise)[1]
        return mean[MONTHS:] + errors

    return np.asarray(jax.vmap(ahead)(random.split(keys[1], DRAWS), draws))


def scores(drawn: np.ndarray, y: Array, truth: Array) -> str:
    """Errors of the forecast and of a seasonal one without a model, and the coverage of intervals.

    :param drawn: draws of the months ahead.
    :param y: the months that were fitted.
    :param truth: the months ahead, as measured.
    """
    before, last, measured = np.asarray(y)[-24:-12], np.asarray(y)[-12:], np.asarray(truth)
    naive = np.concatenate([last + (last.mean() - before.mean()) * (year + 1) for year in range(AHEAD // 12)])
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    error = lambda x: np.sqrt(np.mean((x - measured) ** 2))
    inside = np.sum((measured > low) & (measured < high))
    return (
        f"root mean square error {error(drawn.mean(0)):.2f} ppm; {error(naive):.2f} ppm by last year's months and its\n"
        f"growth. {inside} of {AHEAD} months are within the intervals of 90 %."
    )


# %%
# The figure
# ----------


def picture(drawn: np.ndarray, y: Array, truth: Array) -> Figure:
    """The last years, and the forecast with intervals of 50 % and 90 %.

    :param drawn: draws of the months ahead.
    :param y: the months that were fitted.
    :param truth: the months ahead, as measured.
    """
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    time, ahead = FIRST + np.arange(MONTHS) / 12, FIRST + np.arange(MONTHS, MONTHS + AHEAD) / 12
    axis.plot(time[-72:], 340 + np.asarray(y)[-72:], color="black", lw=1.2, label="fitted")
    for level, alpha in ((0.9, 0.2), (0.5, 0.4)):
        edges = 340 + np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
        axis.fill_between(ahead, *edges, color=NATURAL, alpha=alpha, lw=0, label=f"forecast, {level:.0%}")
    axis.plot(ahead, 340 + np.asarray(truth), "o", color=OTHERS[0], ms=4, label="measured later")
    axis.set(xlabel="year", ylabel="carbon dioxide (ppm)")
    axis.legend(frameon=False, loc="upper left")
    plain(axis)
    return figure


def main() -> None:
    """Fit, judge, compare with Adam and with NUTS, forecast, draw."""
    path = figure_path("A forecast of carbon dioxide.", "forecast.png")
    y, truth = read()
    judged = run(y)
    print(f"{judged}\n\n{weighted_summary(judged, SITES)}\n\n{beside_nuts(judged, nuts(model, y), SITES)}\n")
    print(f"ELBO {by_adam(y, 1000):.2f} nats after 1000 steps of Adam(0.01)")
    drawn = forecast(judged, y)
    print(f"\n{scores(drawn, y, truth)}")
    save(picture(drawn, y, truth), path)


if __name__ == "__main__":
    main()
