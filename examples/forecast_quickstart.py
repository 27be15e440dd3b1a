# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
The quickstart of numpyro_forecast
==================================

``numpyro_forecast`` (Orduz, version 0.4) turns a NumPyro model of a time series into forecasts, whoever fits it. This
is the quickstart of its README, with ``NaturalGradient()`` in the place of ``Adam(0.01)``: its model, a random walk of
156 weeks and a season, its data, which have no noise, its guide, one particle and 1500 steps. The two changes after
that are ours: a guide with all correlations, and NUTS that starts from it. The series has a trend that the model lacks,
so that every forecast lags behind it.

It needs Python 3.12 and ``pip install numpyro_forecast``. Run it with ``python examples/forecast_quickstart.py``.
"""

# sphinx_gallery_thumbnail_path = 'figures/forecast_quickstart.png'

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import DRAWS, NATURAL, OTHERS, figure_path, log_weights, plain, save, summary
from jax import Array, random
from matplotlib.figure import Figure
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal
from numpyro.infer.reparam import LocScaleReparam
from numpyro.optim import Adam, _NumPyroOptim
from numpyro_forecast import Horizon, draw_posterior, eval_crps, forecast, innovations, predict
from numpyro_forecast.features import fourier_features

from numpyro_natgrad import NaturalGradient, to_nuts

PERIOD, WEEKS, AHEAD = 52, 156, 26
SITES = ["bias", "drift_scale", "sigma", "nu", "weight"]
KEY_FIT, KEY_POSTERIOR, KEY_FORECAST = random.split(random.key(0), 3)

# %%
# Data
# ----


def data() -> tuple[Array, Array]:
    """Features of the season, shape `(182, 6)`, and a series without noise, `(182, 1)`; 26 weeks are forecast."""
    week = jnp.arange(WEEKS + AHEAD)[:, None]
    features = fourier_features(WEEKS + AHEAD, period=float(PERIOD), num_terms=3)
    return features, jnp.sin(2 * jnp.pi * week / PERIOD) + 0.01 * week


# %%
# The model
# ---------


def model(covariates: Array, data: Array | None = None) -> None:
    """A random walk, a season and Student's t errors.

    :param covariates: features of the season, of all weeks.
    :param data: the series; weeks that it lacks are forecast.
    """
    horizon = Horizon.from_data(covariates, data)
    bias = numpyro.sample("bias", dist.Normal(0.0, 10.0))
    weight = numpyro.sample("weight", dist.Normal(0.0, 0.1).expand([covariates.shape[-1]]).to_event(1))
    drift_scale = numpyro.sample("drift_scale", dist.LogNormal(-3.0, 1.0))
    sigma = numpyro.sample("sigma", dist.LogNormal(-2.0, 1.0))
    nu = numpyro.sample("nu", dist.Gamma(10.0, 2.0))
    drift = innovations(horizon, "drift", dist.Normal(0.0, drift_scale), reparam=LocScaleReparam(0))
    mean = jnp.cumsum(drift, axis=-2) + bias + jnp.sum(weight * covariates, axis=-1, keepdims=True)
    predict(horizon, dist.StudentT(nu, 0.0, sigma), mean)


# %%
# Fits
# ----


class Forecast(NamedTuple):
    """A fit and its forecast.

    :param label: of the fit.
    :param elbo: nats, on `DRAWS` draws; NaN for NUTS.
    :param seconds: of the fit, with compilation.
    :param drawn: draws of the weeks ahead, shape `(n, AHEAD)`.
    :param crps: continuous ranked probability score of the weeks ahead; smaller is better.
    :param posterior: draws of the sites.
    """

    label: str
    elbo: float
    seconds: float
    drawn: np.ndarray
    crps: float
    posterior: dict[str, Array]


def ahead(label: str, elbo: float, began: float, posterior: dict[str, Array], covariates: Array, y: Array) -> Forecast:
    """The forecast of the weeks ahead from draws of the posterior.

    :param label: of the fit.
    :param elbo: nats.
    :param began: when the fit began, seconds.
    :param posterior: draws of the sites.
    :param covariates: features of all weeks.
    :param y: the series with the weeks that are held out.
    """
    seconds = time.perf_counter() - began
    drawn = forecast(KEY_FORECAST, model, posterior, y[:WEEKS], covariates)
    return Forecast(label, elbo, seconds, np.asarray(drawn)[..., 0], float(eval_crps(drawn, y[WEEKS:])), posterior)


def fitted(
    label: str, guide: AutoGuide, optimizer: _NumPyroOptim, particles: int, steps: int
) -> tuple[Forecast, SVI, dict[str, Any]]:
    """Fit the series and forecast; also the `SVI` and its parameters.

    :param label: of the fit.
    :param guide: the guide.
    :param optimizer: the optimizer.
    :param particles: draws a step.
    :param steps: number of steps.
    """
    covariates, y = data()
    args = covariates[:WEEKS], y[:WEEKS]
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=particles))
    began = time.perf_counter()
    params = svi.run(KEY_FIT, steps, *args, progress_bar=False).params
    elbo = float(log_weights(model, guide, params, KEY_POSTERIOR, *args).mean())
    posterior = draw_posterior(KEY_POSTERIOR, guide, params, num_samples=DRAWS)
    return ahead(label, elbo, began, posterior, covariates, y), svi, params


def by_nuts(svi: SVI, params: dict[str, Any]) -> Forecast:
    """NUTS with the initial points, the mass matrix and the step size of a fit.

    :param svi: the fit.
    :param params: its parameters.
    """
    covariates, y = data()
    args = covariates[:WEEKS], y[:WEEKS]
    began = time.perf_counter()
    start = to_nuts(svi, params, KEY_POSTERIOR, *args, num_chains=2)
    sampler = MCMC(
        start.kernel,
        num_warmup=start.num_warmup,
        num_samples=250,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    sampler.run(KEY_POSTERIOR, *args, init_params=start.init_params)
    return ahead("NUTS from the last fit", np.nan, began, sampler.get_samples(), covariates, y)


def run() -> list[Forecast]:
    """The quickstart by Adam and by natural gradients, with all correlations, and by NUTS."""
    adam, *_ = fitted("AutoNormal, Adam(0.01)", AutoNormal(model), Adam(0.01), 1, 1500)
    natural, *_ = fitted("AutoNormal, NaturalGradient()", AutoNormal(model), NaturalGradient(), 1, 1500)
    full, svi, params = fitted("AutoMultivariateNormal", AutoMultivariateNormal(model), NaturalGradient(), 8, 200)
    return [adam, natural, full, by_nuts(svi, params)]


# %%
# The figure
# ----------


def picture(forecasts: list[Forecast]) -> Figure:
    """The last year and each forecast, with intervals of 50 % and 90 %.

    :param forecasts: of each fit.
    """
    _, y = data()
    week = np.arange(WEEKS + AHEAD)
    figure, axes = plt.subplots(1, len(forecasts), figsize=(13, 3.6), sharey=True, layout="constrained")
    for axis, found in zip(axes, forecasts, strict=True):
        for level, alpha in ((0.9, 0.2), (0.5, 0.4)):
            low, high = np.quantile(found.drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
            axis.fill_between(week[WEEKS:], low, high, color=NATURAL, alpha=alpha, lw=0, label=f"forecast, {level:.0%}")
        axis.plot(week[WEEKS - PERIOD :], y[WEEKS - PERIOD :, 0], color=OTHERS[0], lw=1.2, label="series")
        axis.axvline(WEEKS - 0.5, color="black", lw=0.6, ls=":")
        axis.set(xlabel="week", title=f"{found.label}\nCRPS {found.crps:.3f}")
        plain(axis)
    axes[0].legend(frameon=False, loc="upper left")
    return figure


def main() -> None:
    """Fit, forecast, compare, draw."""
    path = figure_path("The quickstart of numpyro_forecast.", "forecast_quickstart.png")
    forecasts = run()
    print(f"{'fit':<32}{'ELBO (nats)':>12}{'seconds':>9}{'CRPS':>8}")
    for found in forecasts:
        elbo = "" if np.isnan(found.elbo) else f"{found.elbo:.1f}"
        print(f"{found.label:<32}{elbo:>12}{found.seconds:>9.1f}{found.crps:>8.3f}")
    print(f"\n{summary({name: forecasts[2].posterior[name] for name in SITES})}")
    save(picture(forecasts), path)


if __name__ == "__main__":
    main()
