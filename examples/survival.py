# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
Survival with censored times
============================

Weeks of remission of 42 leukaemia patients, with 6-mercaptopurine and without. Twelve were still in remission when the
study ended: of their times only a lower bound is known.

Run it with ``python examples/survival.py``.
"""

# sphinx_gallery_thumbnail_path = 'figures/survival.png'

from __future__ import annotations

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

from numpyro_natgrad import NaturalGradient, Verdict, fit, verdict

SITES = ["intercept", "effect", "shape", "hazard_ratio"]

# %%
# Data
# ----
#
# Gehan (1965), *Biometrika* 52, 203-223, table 1; ``gehan`` of the R package MASS.

PLACEBO = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]
TREATED = [6, 6, 6, 7, 10, 13, 16, 22, 23]
CENSORED = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]  # treated, and still in remission
TIME = jnp.array(PLACEBO + TREATED + CENSORED, float)
TREATMENT = jnp.repeat(jnp.array([0.0, 1.0]), 21, total_repeat_length=42)
IS_EVENT = jnp.arange(42) < 30


# %%
# The model
# ---------


def model(treatment: Array, time: Array, is_event: Array) -> None:
    """Weibull times. A relapse has the density of its time, a censored one the probability of a longer time.

    :param treatment: 1 for treated patients, shape `(n,)`.
    :param time: weeks to the relapse or to the end of the study, shape `(n,)`.
    :param is_event: false where the study ended before a relapse, shape `(n,)`.
    """
    intercept = numpyro.sample("intercept", dist.Normal(2.0, 2.0))
    effect = numpyro.sample("effect", dist.Normal(0.0, 2.0))
    shape = numpyro.sample("shape", dist.LogNormal(0.0, 1.0))
    numpyro.deterministic("hazard_ratio", jnp.exp(shape * effect))  # of placebo to treatment
    weibull = dist.Weibull(jnp.exp(intercept + effect * treatment), shape)
    log_survival = -((time / weibull.scale) ** shape)
    with numpyro.plate("patient", len(time)):
        numpyro.factor("time", jnp.where(is_event, weibull.log_prob(time), log_survival))


# %%
# The fit
# -------


def run() -> Verdict:
    """Fit until less than 0.05 nats are to gain, and judge the fit."""
    data = TREATMENT, TIME, IS_EVENT
    svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(num_particles=8))
    result = fit(svi, random.key(0), *data, tolerance=0.05, progress_bar=False)
    print(result.reason)
    return verdict(svi, result, random.key(1), *data, sites=SITES, progress_bar=False)


# %%
# The figure
# ----------


def kaplan_meier(time: Array, is_event: Array) -> tuple[np.ndarray, np.ndarray]:
    """Weeks of relapses, and the estimated share still in remission after each.

    :param time: shape `(n,)`.
    :param is_event: shape `(n,)`.
    """
    weeks = np.unique(time[is_event])
    at_risk = np.array([np.sum(time >= week) for week in weeks])
    relapses = np.array([np.sum((time == week) & is_event) for week in weeks])
    return np.append(0, weeks), np.append(1, np.cumprod(1 - relapses / at_risk))


def picture(judged: Verdict) -> Figure:
    """Survival functions with 90 % intervals over the estimates of Kaplan and Meier.

    :param judged: the verdict on the fit.
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    weeks, draws = np.linspace(0, 36, 100), judged.draws
    for group, (label, colour) in enumerate([("placebo", OTHERS[0]), ("6-mercaptopurine", NATURAL)]):
        scale = np.exp(draws["intercept"] + group * draws["effect"])[:, None]
        curves = np.exp(-((weeks / scale) ** draws["shape"][:, None]))
        axis.fill_between(weeks, *np.quantile(curves, [0.05, 0.95], axis=0), color=colour, alpha=0.25, lw=0)
        axis.plot(weeks, curves.mean(0), color=colour, lw=2, label=f"{label}, Weibull")
        own = np.asarray(TREATMENT) == group
        axis.step(
            *kaplan_meier(np.asarray(TIME)[own], np.asarray(IS_EVENT)[own]),
            where="post",
            color=colour,
            ls=":",
            label=f"{label}, Kaplan–Meier",
        )
    axis.set(xlabel="weeks", ylabel="share in remission", xlim=(0, 36), ylim=(0, 1))
    axis.legend(frameon=False)
    plain(axis)
    return figure


def main() -> None:
    """Fit, judge, compare with NUTS, draw."""
    path = figure_path("Survival with censored times.", "survival.png")
    judged = run()
    print(f"{judged}\n\n{weighted_summary(judged, SITES)}\n")
    print(beside_nuts(judged, nuts(model, TREATMENT, TIME, IS_EVENT), SITES))
    save(picture(judged), path)


if __name__ == "__main__":
    main()
