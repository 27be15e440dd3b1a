# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
Item response
=============

Five questions of a Law School Admission Test and 1000 candidates. Every question has a difficulty and a discrimination,
every candidate an ability, which is summed out over the nodes of a quadrature.

Run it with ``python examples/item_response.py``.
"""

# sphinx_gallery_thumbnail_path = 'figures/item_response.png'

from __future__ import annotations

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import NATURAL, OTHERS, beside_nuts, figure_path, nuts, plain, save, weighted_summary
from jax import Array, random
from jax.scipy.special import expit, logsumexp
from matplotlib.figure import Figure
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_natgrad import NaturalGradient, Verdict, fit, verdict

SITES = ["easiness", "discrimination"]
NODES, WEIGHTS = (jnp.asarray(x, float) for x in np.polynomial.hermite_e.hermegauss(21))

# %%
# Data
# ----
#
# Bock and Lieberman (1970), *Psychometrika* 35, 179-197, table 1, section 6 of the test; ``LSAT`` of the R package ltm.

# How many candidates gave these answers: right (1) or wrong (0) to each of the five questions.
COUNTS = {
    "00000": 3, "00001": 6, "00010": 2, "00011": 11, "00100": 1, "00101": 1, "00110": 3, "00111": 4,
    "01000": 1, "01001": 8, "01011": 16, "01101": 3, "01110": 2, "01111": 15, "10000": 10, "10001": 29,
    "10010": 14, "10011": 81, "10100": 3, "10101": 28, "10110": 15, "10111": 80, "11000": 16, "11001": 56,
    "11010": 21, "11011": 173, "11100": 11, "11101": 61, "11110": 28, "11111": 298,
}  # fmt: skip
RIGHT = jnp.array([[float(answer) for answer in pattern] for pattern in COUNTS])
CANDIDATES = jnp.array(list(COUNTS.values()), float)


# %%
# The model
# ---------


def log_joint(easiness: Array, discrimination: Array, right: Array) -> Array:
    """Log probability of each pattern and node of the ability, with the weight of the node, shape `(p, nodes)`.

    :param easiness: shape `(5,)`.
    :param discrimination: shape `(5,)`.
    :param right: shape `(p, 5)`.
    """
    logits = easiness + discrimination * NODES[:, None]
    answers = dist.Bernoulli(logits=logits).log_prob(right[:, None]).sum(-1)
    return answers + jnp.log(WEIGHTS / WEIGHTS.sum())


def model(right: Array, candidates: Array) -> None:
    """The two-parameter logistic model. Abilities are standard normal.

    Discriminations are positive by their prior, and not by a constraint: the posterior of their logarithms is skewed.

    :param right: 1 for a right answer, one row for each pattern of answers, shape `(p, 5)`.
    :param candidates: how many gave these answers, shape `(p,)`.
    """
    with numpyro.plate("question", right.shape[-1]):
        easiness = numpyro.sample("easiness", dist.Normal(0.0, 3.0))
        discrimination = numpyro.sample("discrimination", dist.Normal(1.0, 0.5))
    log_pattern = logsumexp(log_joint(easiness, discrimination, right), axis=-1)
    numpyro.factor("answers", jnp.sum(candidates * log_pattern))


# %%
# The fit
# -------


def run() -> Verdict:
    """Fit until less than 0.05 nats are to gain, and judge the fit."""
    svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(num_particles=8))
    result = fit(svi, random.key(0), RIGHT, CANDIDATES, tolerance=0.05, progress_bar=False)
    print(result.reason)
    return verdict(svi, result, random.key(1), RIGHT, CANDIDATES, sites=SITES, progress_bar=False)


# %%
# The figure
# ----------


def picture(judged: Verdict) -> Figure:
    """The curve of each question, and the ability that each number of right answers suggests.

    :param judged: the verdict on the fit.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    ability = np.linspace(-4, 3, 100)
    easiness, discrimination = (judged.draws[name][:500] for name in SITES)
    curves = np.asarray(expit(easiness[..., None] + discrimination[..., None] * ability))
    for question, colour in enumerate([NATURAL, *OTHERS, "0.4"]):
        axes[0].fill_between(ability, *np.quantile(curves[:, question], [0.05, 0.95], axis=0), color=colour, alpha=0.2)
        axes[0].plot(ability, curves[:, question].mean(0), color=colour, label=f"question {question + 1}")
    axes[0].set(
        xlabel="ability (standard normal)", ylabel="probability of a right answer", title="Five questions, 90 %"
    )
    axes[0].legend(frameon=False)

    means = [jnp.asarray(judged.importance_weighted[name].mean) for name in SITES]
    log_weight = log_joint(means[0], means[1], RIGHT)
    mean = np.asarray(jnp.exp(log_weight - logsumexp(log_weight, axis=-1, keepdims=True)) @ NODES)
    size = np.sqrt(np.asarray(CANDIDATES)) * 12
    axes[1].scatter(np.asarray(RIGHT.sum(-1)), mean, s=size, color=NATURAL, alpha=0.5, lw=0)
    axes[1].set(xlabel="right answers", ylabel="expected ability", title="30 patterns of answers, area: √candidates")
    for axis in axes:
        plain(axis)
    return figure


def main() -> None:
    """Fit, judge, compare with NUTS, draw."""
    path = figure_path("Item response.", "item_response.png")
    judged = run()
    print(f"{judged}\n\n{weighted_summary(judged, SITES)}\n")
    print(beside_nuts(judged, nuts(model, RIGHT, CANDIDATES), SITES))
    save(picture(judged), path)


if __name__ == "__main__":
    main()
