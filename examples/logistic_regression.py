# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
Logistic regression with correlated coefficients
================================================

The breast-cancer data: 31 coefficients, strongly correlated. NUTS starts from the fit and is
compared with it.

Run it with ``python examples/logistic_regression.py``; ``--help`` lists what can be changed.
"""

# sphinx_gallery_thumbnail_path = 'figures/logistic_regression.png'

from __future__ import annotations

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from _common import (
    Problem,
    follow,
    follow_adam,
    guide_beside_nuts,
    nuts_from_fit,
    options,
    picture,
    posterior,
    report,
    save,
    scoreboard,
    summary,
)
from jax import Array
from numpyro.infer.autoguide import AutoMultivariateNormal
from sklearn.datasets import load_breast_cancer

from numpyro_natgrad import NaturalGradient

# %%
# Model and data
# --------------
#
# Street, Wolberg and Mangasarian (1993), *Nuclear feature extraction for breast tumor diagnosis*, SPIE 1905; the table
# comes with scikit-learn.


def model(design: Array, benign: Array) -> None:
    """Logistic regression under wide normal priors.

    :param design: one row for each tumour, shape `(n, d)`.
    :param benign: 1 for a benign tumour, 0 for a malignant one, shape `(n,)`.
    """
    with numpyro.plate("coefficient", design.shape[-1]):
        beta = numpyro.sample("beta", dist.Normal(0.0, 10.0))
    with numpyro.plate("tumour", len(benign)):
        numpyro.sample("benign", dist.Bernoulli(logits=design @ beta), obs=benign)


def breast_cancer() -> tuple[Array, Array, list[str]]:
    """The standardised design with an intercept, the diagnoses, and the names of the columns."""
    data = load_breast_cancer()
    columns = (data.data - data.data.mean(0)) / data.data.std(0)
    design = jnp.column_stack([jnp.ones(len(columns)), columns])
    return design, jnp.asarray(data.target, dtype=float), ["intercept", *data.feature_names]


# %%
# Fits and figure
# ---------------


def main() -> None:
    """Fit, tabulate, compare, draw."""
    chosen = options("Logistic regression.", "logistic_regression.png", steps=200, adam_steps=20000)
    design, benign, names = breast_cancer()
    problem = Problem(model, AutoMultivariateNormal(model), (design, benign))
    natural = NaturalGradient()
    curve = follow("NaturalGradient()", problem, natural, chosen.steps)
    print(f"\n{report(problem, natural)}\n")
    draws = posterior(problem, curve)
    print(summary(draws, dims={"beta": ["column"]}, coords={"column": names}))
    print(f"\n{guide_beside_nuts(draws, nuts_from_fit(problem, curve), ['beta'])}")
    curves = [curve, *follow_adam(problem, chosen.adam_steps)]
    print(f"\n{scoreboard(curves)}")
    title = "Breast cancer, 31 coefficients, full-rank Gaussian guide, 8 draws a step"
    save(picture(curves, title, depth=60.0), chosen.output)


if __name__ == "__main__":
    main()
