# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
Is the fit good? Diagnostics beside NUTS
========================================

Diagnostics of a mean-field fit: its standard deviations are too small, and two corrections are compared with NUTS.

Run it with ``python examples/verdict.py``; ``--help`` lists what can be changed.
"""

# sphinx_gallery_thumbnail_path = 'figures/verdict.png'

from __future__ import annotations

import argparse
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import FIGURES, NATURAL, OTHERS, plain, save
from jax import Array, random
from matplotlib.figure import Figure
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_natgrad import NaturalGradient, Verdict, verdict

OBSERVATIONS, COEFFICIENTS, CORRELATION = 60, 5, 0.85
SEEDS = {"data": 0, "fit": 1, "verdict": 2, "NUTS": 3}


# %%
# Model and data
# --------------


def model(design: Array, successes: Array) -> None:
    """Logistic regression with correlated columns.

    :param design: shape `(n, d)`.
    :param successes: successes out of ten trials in each row, shape `(n,)`.
    """
    with numpyro.plate("coefficient", design.shape[-1]):
        beta = numpyro.sample("beta", dist.Normal(0.0, 2.0))
    with numpyro.plate("row", len(successes)):
        numpyro.sample("successes", dist.Binomial(10, logits=design @ beta), obs=successes)


def simulated() -> tuple[Array, Array]:
    """A design whose columns have pairwise correlations of 0.85, and the successes."""
    keys = random.split(random.key(SEEDS["data"]), 3)
    common = random.normal(keys[0], (OBSERVATIONS, 1))
    own = random.normal(keys[1], (OBSERVATIONS, COEFFICIENTS))
    design = jnp.sqrt(CORRELATION) * common + jnp.sqrt(1 - CORRELATION) * own
    truth = jnp.linspace(-1.0, 1.0, COEFFICIENTS)
    return design, dist.Binomial(10, logits=design @ truth).sample(keys[2])


# %%
# The reference
# -------------


def chains(design: Array, successes: Array, samples: int) -> np.ndarray:
    """Draws of the coefficients by NUTS, shape `(samples, d)`."""
    sampler = MCMC(NUTS(model), num_warmup=500, num_samples=samples, progress_bar=False)
    sampler.run(random.key(SEEDS["NUTS"]), design, successes)
    return np.asarray(sampler.get_samples()["beta"])


# %%
# The figure
# ----------


def picture(judged: Verdict, reference: np.ndarray) -> Figure:
    """Standard deviations of each coefficient by three methods, relative to NUTS.

    :param judged: the verdict on the mean-field fit.
    :param reference: standard deviations by NUTS, shape `(d,)`.
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    rows = {
        "AutoNormal": (judged.guide["beta"].sd, "o", OTHERS[0]),
        "importance-weighted": (judged.importance_weighted["beta"].sd, "s", OTHERS[1]),
        "linear response": (judged.linear_response["beta"], "D", NATURAL),
    }
    place = np.arange(len(reference))
    axis.axhline(1.0, color="0.35", lw=1.2)
    axis.text(1.01, 1.0, "NUTS", transform=axis.get_yaxis_transform(), va="center", color="0.35")
    for shift, (label, (sd, marker, colour)) in zip((-0.18, 0.0, 0.18), rows.items(), strict=True):
        axis.plot(place + shift, sd / reference, marker, color=colour, ms=8, label=label)
    axis.set_xticks(place, [f"beta[{i}]" for i in place])
    axis.set(ylim=(0, 1.3), xlim=(-0.45, place[-1] + 0.45), ylabel="standard deviation / that by NUTS")
    axis.set_title(f"Correlated regression, mean-field guide, k-hat {judged.k_hat:.2f}")
    plain(axis)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


# %%
# All together
# ------------


def main() -> None:
    """Fit, judge, compare with NUTS, draw."""
    parser = argparse.ArgumentParser(description="Diagnostics of a mean-field fit.")
    parser.add_argument("--steps", type=int, default=200, help="natural-gradient steps")
    parser.add_argument("--draws", type=int, default=10_000, help="draws of the guide, and of NUTS")
    parser.add_argument("--output", type=Path, default=FIGURES / "verdict.png", help="path of the figure")
    chosen = parser.parse_args()
    data = simulated()
    svi = SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO(num_particles=8))
    result = svi.run(random.key(SEEDS["fit"]), chosen.steps, *data, progress_bar=False)
    judged = verdict(svi, result, random.key(SEEDS["verdict"]), *data, num_draws=chosen.draws)
    print(judged)
    reference = chains(*data, chosen.draws).std(axis=0)
    print("\nsd by NUTS  " + "  ".join(f"{sd:.3f}" for sd in reference))
    save(picture(judged, reference), chosen.output)


if __name__ == "__main__":
    main()
