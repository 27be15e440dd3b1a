# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
Ordinal regression
==================

Nine judges rated the bitterness of eight bottles of wine from 1 to 5. Bottles differ by temperature and by contact of
juice and skins, judges by how strictly they rate.

Run it with ``python examples/ordinal_regression.py``.
"""

# sphinx_gallery_thumbnail_path = 'figures/ordinal_regression.png'

from __future__ import annotations

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import NATURAL, OTHERS, beside_nuts, figure_path, nuts, plain, save, weighted_summary
from jax import Array, random
from jax.scipy.special import expit
from matplotlib.figure import Figure
from numpyro.distributions.transforms import OrderedTransform
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_natgrad import NaturalGradient, Verdict, fit, verdict

SITES = ["warm", "contact", "cutpoints", "judge_sd"]

# %%
# Data
# ----
#
# Randall (1989), *Biometrical Journal* 31, 781-793; ``wine`` of the R package ordinal.

# One line for each judge, one digit for each bottle.
JUDGES = ["23344455", "12132354", "23325544", "32323253", "23433333", "32322454", "11222323", "22233334", "12323244"]
RATING = jnp.array([[int(digit) - 1 for digit in line] for line in JUDGES])
WARM = jnp.array([0.0, 0, 0, 0, 1, 1, 1, 1])
CONTACT = jnp.array([0.0, 0, 1, 1, 0, 0, 1, 1])


# %%
# The model
# ---------


def model(warm: Array, contact: Array, rating: Array) -> None:
    """Cumulative logits with an effect for each judge.

    :param warm: 1 for bottles that were kept warm, shape `(b,)`.
    :param contact: 1 for juice that had contact with skins, shape `(b,)`.
    :param rating: 0 to 4, shape `(j, b)`.
    """
    effects = numpyro.sample("warm", dist.Normal(0.0, 3.0)), numpyro.sample("contact", dist.Normal(0.0, 3.0))
    ordered = dist.TransformedDistribution(dist.Normal(0.0, 3.0).expand([4]).to_event(1), OrderedTransform())
    cutpoints = numpyro.sample("cutpoints", ordered)
    judge_sd = numpyro.sample("judge_sd", dist.HalfNormal(2.0))
    with numpyro.plate("judge", len(rating)):
        mildness = numpyro.sample("mildness", dist.Normal(0.0, judge_sd))
    predictor = effects[0] * warm + effects[1] * contact + mildness[:, None]
    numpyro.sample("rating", dist.OrderedLogistic(predictor, cutpoints).to_event(2), obs=rating)


# %%
# The fit
# -------


def run() -> Verdict:
    """Fit until less than 0.05 nats are to gain, and judge the fit."""
    data = WARM, CONTACT, RATING
    svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(num_particles=8))
    result = fit(svi, random.key(0), *data, tolerance=0.05, progress_bar=False)
    print(result.reason)
    return verdict(svi, result, random.key(1), *data, sites=SITES, progress_bar=False)


# %%
# The figure
# ----------


def picture(judged: Verdict) -> Figure:
    """Shares of the ratings for each kind of bottle, and what an average judge gives.

    :param judged: the verdict on the fit.
    """
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.4), sharey=True, layout="constrained")
    draws, place = judged.draws, np.arange(1, 6)
    for kind, axis in enumerate(axes):
        warm, contact = divmod(kind, 2)
        shift = (draws["warm"] * warm + draws["contact"] * contact)[:, None]
        below = np.pad(np.asarray(expit(draws["cutpoints"] - shift)), ((0, 0), (1, 1)), constant_values=(0, 1))
        low, middle, high = np.quantile(np.diff(below, axis=1), [0.05, 0.5, 0.95], axis=0)
        share = np.bincount(np.ravel(RATING[:, 2 * kind : 2 * kind + 2]), minlength=5) / 18
        axis.bar(place, share, color=OTHERS[0], alpha=0.35, label="observed share")
        axis.errorbar(place, middle, [middle - low, high - middle], fmt="o", color=NATURAL, label="average judge, 90 %")
        axis.set(xlabel="bitterness", title=f"{'warm' if warm else 'cold'}, {'' if contact else 'no '}contact")
        axis.set_xticks(place)
        plain(axis)
    axes[0].set_ylabel("probability")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def main() -> None:
    """Fit, judge, compare with NUTS, draw."""
    path = figure_path("Ordinal regression.", "ordinal_regression.png")
    judged = run()
    print(f"{judged}\n\n{weighted_summary(judged, SITES)}\n")
    print(beside_nuts(judged, nuts(model, WARM, CONTACT, RATING), SITES))
    save(picture(judged), path)


if __name__ == "__main__":
    main()
