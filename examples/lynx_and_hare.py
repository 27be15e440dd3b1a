# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
A differential equation: lynx and hare
======================================

Pelts of two species that the Hudson's Bay Company bought in 21 years, explained by the equations of Lotka and Volterra:

    du/dt = (α − βv) u,      dv/dt = (−γ + δu) v

Run it with ``python examples/lynx_and_hare.py``.
"""

# sphinx_gallery_thumbnail_path = 'figures/lynx_and_hare.png'

from __future__ import annotations

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import NATURAL, OTHERS, beside_nuts, figure_path, nuts, plain, save, weighted_summary
from jax import Array, lax, random
from matplotlib.figure import Figure
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_natgrad import NaturalGradient, Verdict, fit, verdict

SITES = ["theta", "start", "sigma"]
PARTS = 12  # steps of a year

# %%
# Data
# ----
#
# Thousands of pelts from 1900 to 1920: Howard (2009), *Modeling basics*, as in Carpenter's (2018) case study of Stan.

YEARS = np.arange(1900, 1921)
HARE = [
    30,
    47.2,
    70.2,
    77.4,
    36.3,
    20.6,
    18.1,
    21.4,
    22,
    25.4,
    27.1,
    40.3,
    57,
    76.6,
    52.3,
    19.5,
    11.2,
    7.6,
    14.6,
    16.2,
    24.7,
]
LYNX = [4, 6.1, 9.8, 35.2, 59.4, 41.7, 19, 13, 8.3, 9.1, 7.4, 8, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]
PELTS = jnp.array([HARE, LYNX]).T


# %%
# The model
# ---------


def solve(theta: Array, start: Array, years: int) -> Array:
    """Both populations at the end of each year, by the method of Runge and Kutta of order four, shape `(years, 2)`.

    :param theta: α, β, γ, δ, shape `(4,)`.
    :param start: shape `(2,)`.
    :param years: the number of years.
    """
    alpha, beta, gamma, delta = theta
    h = 1 / PARTS

    # The logarithms have the equations d log u/dt = α − βv, d log v/dt = −γ + δu, and cannot become negative.
    def slope(log_z: Array) -> Array:
        u, v = jnp.exp(log_z)
        return jnp.stack([alpha - beta * v, -gamma + delta * u])

    def step(z: Array, _: None) -> tuple[Array, None]:
        a = slope(z)
        b = slope(z + h / 2 * a)
        c = slope(z + h / 2 * b)
        d = slope(z + h * c)
        return z + h / 6 * (a + 2 * b + 2 * c + d), None

    def year(z: Array, _: None) -> tuple[Array, Array]:
        z, _ = lax.scan(step, z, length=PARTS)
        return z, z

    return jnp.exp(lax.scan(year, jnp.log(start), length=years)[1])


def model(pelts: Array) -> None:
    """Populations follow the equations, and pelts are log-normal around them. The priors are Carpenter's.

    :param pelts: of hare and lynx, in thousands, shape `(years, 2)`.
    """
    prior = dist.TruncatedNormal(jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05]), low=0.0)
    theta = numpyro.sample("theta", prior.to_event(1))
    start = numpyro.sample("start", dist.LogNormal(jnp.log(10.0), 1.0).expand([2]).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
    path = jnp.vstack([start, solve(theta, start, len(pelts) - 1)])
    numpyro.deterministic("path", path)
    numpyro.sample("pelts", dist.LogNormal(jnp.log(path), sigma).to_event(2), obs=pelts)


# %%
# The fit
# -------
#
# Most parameters lead to cycles of another length, from which no gradient leads back: the best of eight random starts
# is fitted.


def run() -> Verdict:
    """Fit until less than 0.05 nats are to gain, and judge the fit."""
    svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(num_particles=8))
    result = fit(svi, random.key(0), PELTS, tolerance=0.05, num_starts=8, progress_bar=False)
    print(result.reason)
    return verdict(svi, result, random.key(1), PELTS, sites=[*SITES, "path"], progress_bar=False)


# %%
# The figure
# ----------


def picture(judged: Verdict) -> Figure:
    """Pelts, and 90 % intervals of the populations.

    :param judged: the verdict on the fit.
    """
    figure, axis = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    bounds = np.quantile(judged.draws["path"], [0.05, 0.5, 0.95], axis=0)
    for i, (label, colour) in enumerate([("hare", OTHERS[0]), ("lynx", NATURAL)]):
        low, middle, high = bounds[..., i]
        axis.fill_between(YEARS, low, high, color=colour, alpha=0.25, lw=0)
        axis.plot(YEARS, middle, color=colour, lw=1.5, label=label)
        axis.plot(YEARS, PELTS[:, i], "o", color=colour, ms=4)
    axis.set(xlabel="year", ylabel="pelts (thousands)", ylim=(0, None))
    axis.set_xticks(YEARS[::5])
    axis.legend(frameon=False)
    plain(axis)
    return figure


def main() -> None:
    """Fit, judge, compare with NUTS, draw."""
    path = figure_path("Lynx and hare.", "lynx_and_hare.png")
    judged = run()
    print(f"{judged}\n\n{weighted_summary(judged, SITES)}\n")
    print(beside_nuts(judged, nuts(model, PELTS), SITES))
    save(picture(judged), path)


if __name__ == "__main__":
    main()
