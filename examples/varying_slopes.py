# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
Varying intercepts and slopes
=============================

Reaction times of 18 people over nine days without enough sleep: every person has an own intercept and an own slope,
which are correlated.

Run it with ``python examples/varying_slopes.py``.
"""

# sphinx_gallery_thumbnail_path = 'figures/varying_slopes.png'

from __future__ import annotations

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import NATURAL, beside_nuts, figure_path, nuts, plain, save, weighted_summary
from jax import Array, random
from matplotlib.figure import Figure
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_natgrad import NaturalGradient, Verdict, fit, verdict

SITES = ["mean", "sd", "correlation", "sigma"]

# %%
# Data
# ----
#
# Belenky et al. (2003), *Journal of Sleep Research* 12, 1-12; the table is ``sleepstudy`` of the R package lme4.

# Mean reaction time in ms on the days 0 to 9, one line for each person.
REACTION = jnp.array(
    [
        [249.6, 258.7, 250.8, 321.4, 356.9, 414.7, 382.2, 290.1, 430.6, 466.4],
        [222.7, 205.3, 203.0, 204.7, 207.7, 216.0, 213.6, 217.7, 224.3, 237.3],
        [199.1, 194.3, 234.3, 232.8, 229.3, 220.5, 235.4, 255.8, 261.0, 247.5],
        [321.5, 300.4, 283.9, 285.1, 285.8, 297.6, 280.2, 318.3, 305.3, 354.0],
        [287.6, 285.0, 301.8, 320.1, 316.3, 293.3, 290.1, 334.8, 293.7, 371.6],
        [234.9, 242.8, 273.0, 309.8, 317.5, 310.0, 454.2, 346.8, 330.3, 253.9],
        [283.8, 289.6, 276.8, 299.8, 297.2, 338.2, 332.0, 348.8, 333.4, 362.0],
        [265.5, 276.2, 243.4, 254.7, 279.0, 284.2, 305.5, 331.5, 335.7, 377.3],
        [241.6, 273.9, 254.5, 270.8, 251.5, 254.6, 245.5, 235.3, 235.8, 237.2],
        [312.4, 313.8, 291.6, 346.1, 365.7, 391.8, 404.3, 416.7, 455.9, 458.9],
        [236.1, 230.3, 238.9, 254.9, 250.7, 269.8, 281.6, 308.1, 336.3, 351.6],
        [256.3, 243.5, 256.2, 255.5, 268.9, 329.7, 379.4, 362.9, 394.5, 389.1],
        [250.5, 300.1, 269.9, 280.6, 271.8, 304.6, 287.7, 266.6, 321.5, 347.6],
        [221.7, 298.2, 326.9, 346.9, 348.7, 352.8, 354.4, 360.4, 375.6, 388.5],
        [271.9, 268.4, 257.2, 277.7, 314.8, 317.2, 298.1, 348.1, 340.3, 366.5],
        [225.3, 234.5, 238.9, 240.5, 267.5, 344.2, 281.1, 347.6, 365.2, 372.2],
        [269.9, 272.4, 277.9, 281.8, 279.2, 284.5, 259.3, 304.6, 350.8, 369.5],
        [269.4, 273.5, 297.6, 310.6, 287.2, 329.6, 334.5, 343.2, 369.1, 364.1],
    ]
)
DAYS = jnp.arange(10.0)


# %%
# The model
# ---------


def model(days: Array, reaction: Array) -> None:
    """Lines with a common distribution of intercept and slope. Ten days a person say enough for a centred hierarchy.

    :param days: shape `(t,)`.
    :param reaction: reaction times in ms, shape `(n, t)`.
    """
    mean = numpyro.sample("mean", dist.Normal(jnp.array([250.0, 10.0]), jnp.array([50.0, 10.0])).to_event(1))
    sd = numpyro.sample("sd", dist.HalfNormal(jnp.array([50.0, 10.0])).to_event(1))
    cholesky = numpyro.sample("cholesky", dist.LKJCholesky(2, concentration=2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(50.0))
    numpyro.deterministic("correlation", cholesky[1, 0])
    with numpyro.plate("person", len(reaction)):
        line = numpyro.sample("line", dist.MultivariateNormal(mean, scale_tril=sd[:, None] * cholesky))
        expected = line[:, :1] + line[:, 1:] * days
        numpyro.sample("reaction", dist.Normal(expected, sigma).to_event(1), obs=reaction)


# %%
# The fit
# -------


def run() -> Verdict:
    """Fit until less than 0.05 nats are to gain, and judge the fit."""
    svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(num_particles=8))
    result = fit(svi, random.key(0), DAYS, REACTION, tolerance=0.05, progress_bar=False)
    print(result.reason)
    return verdict(svi, result, random.key(1), DAYS, REACTION, sites=[*SITES, "line"], progress_bar=False)


# %%
# The figure
# ----------


def picture(judged: Verdict) -> Figure:
    """The line of each person by the hierarchy, and by least squares for that person alone.

    :param judged: the verdict on the fit.
    """
    figure, axes = plt.subplots(3, 6, figsize=(11, 6), sharex=True, sharey=True, layout="constrained")
    lines = judged.draws["line"][:500, :, :1] + judged.draws["line"][:500, :, 1:] * np.asarray(DAYS)
    low, high = np.quantile(lines, [0.05, 0.95], axis=0)
    for person, axis in enumerate(axes.flat):
        alone = np.polynomial.Polynomial.fit(DAYS, REACTION[person], 1)
        axis.fill_between(DAYS, low[person], high[person], color=NATURAL, alpha=0.3, lw=0, label="hierarchy, 90 %")
        axis.plot(DAYS, alone(np.asarray(DAYS)), color="0.4", ls="--", lw=1.2, label="least squares, alone")
        axis.plot(DAYS, REACTION[person], "o", color="black", ms=3)
        plain(axis)
    figure.supxlabel("day")
    figure.supylabel("reaction time (ms)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def main() -> None:
    """Fit, judge, compare with NUTS, draw."""
    path = figure_path("Varying intercepts and slopes.", "varying_slopes.png")
    judged = run()
    print(f"{judged}\n\n{weighted_summary(judged, SITES)}\n")
    print(beside_nuts(judged, nuts(model, DAYS, REACTION), SITES))
    save(picture(judged), path)


if __name__ == "__main__":
    main()
