# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
A line with outliers, as a mixture
==================================

Temperature and light of 47 stars of the cluster CYG OB1. Four giants do not belong to the main sequence and turn the
slope of least squares around. A mixture finds them.

Run it with ``python examples/outliers.py``.
"""

# sphinx_gallery_thumbnail_path = 'figures/outliers.png'

from __future__ import annotations

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import NATURAL, OTHERS, beside_nuts, figure_path, nuts, plain, save, weighted_summary
from jax import Array, random
from matplotlib.figure import Figure
from numpyro.infer import SVI, Trace_ELBO, init_to_value
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_natgrad import NaturalGradient, Verdict, fit, verdict

SITES = ["intercept", "slope", "sigma", "share"]

# %%
# Data
# ----
#
# Rousseeuw and Leroy (1987), *Robust regression and outlier detection*, table 3; ``starsCYG`` of the R package
# robustbase.

# Logarithms of the effective temperature at the surface, and of the light intensity.
TEMPERATURE = jnp.array([
    4.37, 4.56, 4.26, 4.56, 4.30, 4.46, 3.84, 4.57, 4.26, 4.37, 3.49, 4.43, 4.48, 4.01, 4.29, 4.42, 4.23, 4.42,
    4.23, 3.49, 4.29, 4.29, 4.42, 4.49, 4.38, 4.42, 4.29, 4.38, 4.22, 3.48, 4.38, 4.56, 4.45, 3.49, 4.23, 4.62,
    4.53, 4.45, 4.53, 4.43, 4.38, 4.45, 4.50, 4.45, 4.55, 4.45, 4.42,
])  # fmt: skip
LIGHT = jnp.array([
    5.23, 5.74, 4.93, 5.74, 5.19, 5.46, 4.65, 5.27, 5.57, 5.12, 5.73, 5.45, 5.42, 4.05, 4.26, 4.58, 3.94, 4.18,
    4.18, 5.89, 4.38, 4.22, 4.42, 4.85, 5.02, 4.66, 4.66, 4.90, 4.39, 6.05, 4.42, 5.10, 5.22, 6.29, 4.34, 5.62,
    5.10, 5.22, 5.18, 5.57, 4.62, 5.06, 5.34, 5.34, 5.54, 4.98, 4.50,
])  # fmt: skip
CENTRE = 4.4  # of the main sequence


# %%
# The model
# ---------


def model(temperature: Array, light: Array) -> None:
    """A star lies on the line, up to noise, or anywhere. Which it is has been summed out.

    :param temperature: shape `(n,)`.
    :param light: shape `(n,)`.
    """
    intercept = numpyro.sample("intercept", dist.Normal(5.0, 1.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 5.0))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 0.7))
    share = numpyro.sample("share", dist.Beta(2.0, 18.0))  # of outliers
    on_line = dist.Normal(intercept + slope * (temperature - CENTRE), sigma)
    anywhere = dist.Normal(5.0, 2.0)
    kinds = jnp.stack([on_line.log_prob(light) + jnp.log1p(-share), anywhere.log_prob(light) + jnp.log(share)])
    log_density = numpyro.deterministic("log_density", jnp.logaddexp(*kinds))
    numpyro.deterministic("is_outlier", jnp.exp(kinds[1] - log_density))
    with numpyro.plate("star", len(light)):
        numpyro.factor("light", log_density)


# %%
# The fit
# -------
#
# The posterior has two modes: a steep line with outliers, and a flat, noisy line through all stars. A Gaussian guide
# covers one of them, and no figure that is computed from its draws knows the other. So both are fitted, from a steep
# and from a flat line. Their evidences say how probable each one is.


def run(slope: float) -> Verdict:
    """Fit until less than 0.05 nats are to gain, and judge the fit.

    :param slope: where the fit starts.
    """
    start = {"intercept": 5.0, "slope": slope, "sigma": 0.5, "share": 0.1}
    guide = AutoMultivariateNormal(model, init_loc_fn=init_to_value(values=start))
    svi = SVI(model, guide, NaturalGradient(), Trace_ELBO(num_particles=8))
    result = fit(svi, random.key(0), TEMPERATURE, LIGHT, tolerance=0.05, progress_bar=False)
    print(result.reason)
    sites = [*SITES, "is_outlier"]
    return verdict(svi, result, random.key(1), TEMPERATURE, LIGHT, sites=sites, progress_bar=False)


# %%
# The figure
# ----------


def picture(steep: Verdict, flat: Verdict, shares: np.ndarray) -> Figure:
    """Stars, coloured by the probability that they are outliers of the steep line, and both lines.

    :param steep: the verdict on the fit of one mode.
    :param flat: the verdict on the fit of the other one.
    :param shares: probability of each mode.
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    x = np.linspace(3.4, 4.7, 50)
    for judged, share, colour, label in zip(
        (steep, flat), shares, (NATURAL, OTHERS[0]), ("steep", "flat"), strict=True
    ):
        lines = judged.draws["intercept"][:, None] + judged.draws["slope"][:, None] * (x - CENTRE)
        axis.fill_between(x, *np.quantile(lines, [0.05, 0.95], axis=0), color=colour, alpha=0.25, lw=0)
        axis.plot(x, lines.mean(0), color=colour, lw=2, label=f"{label} line, probability {share:.2f}")
    probability = steep.importance_weighted["is_outlier"].mean
    stars = axis.scatter(TEMPERATURE, LIGHT, c=probability, cmap="cividis", vmin=0, vmax=1, edgecolor="black", zorder=3)
    figure.colorbar(stars, label="probability of an outlier of the steep line")
    axis.set(xlabel="log temperature", ylabel="log light intensity", ylim=(3.6, 6.6), xlim=(4.7, 3.4))
    axis.legend(frameon=False)
    plain(axis)
    return figure


def main() -> None:
    """Fit both modes, judge, compare with NUTS, draw."""
    path = figure_path("A line with outliers.", "outliers.png")
    steep, flat = run(3.0), run(-0.5)
    print(f"\n{steep}\n\n{weighted_summary(steep, SITES)}\n\n{flat}\n\n{weighted_summary(flat, SITES)}\n")
    odds = np.exp([judged.log_evidence.value - steep.log_evidence.value for judged in (steep, flat)])
    reference = nuts(model, TEMPERATURE, LIGHT)
    is_steep = reference["slope"] > 1
    print(f"probability of the steep line: {odds[0] / odds.sum():.2f}; share of NUTS's draws: {is_steep.mean():.2f}")
    print(beside_nuts(steep, {name: draws[is_steep] for name, draws in reference.items()}, SITES))
    save(picture(steep, flat, odds / odds.sum()), path)


if __name__ == "__main__":
    main()
