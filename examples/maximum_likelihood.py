# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
Maximum likelihood by natural gradients
=======================================

Without latent variables the loss is the negative log-likelihood, and a natural gradient step is Fisher scoring. Here
the results of 303 Californian school districts in a test of mathematics are regressed on 20 correlated covariates. The
standard errors are compared with those of statsmodels, and with the posterior under a flat prior by NUTS.

Run it with ``python examples/maximum_likelihood.py``.
"""

# sphinx_gallery_thumbnail_path = 'figures/maximum_likelihood.png'

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import statsmodels.api as sm
from _common import NATURAL, OTHERS, figure_path, nuts, plain, save, summary
from jax import Array, random
from matplotlib.figure import Figure
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.initialization import init_to_value
from numpyro.optim import Adam, _NumPyroOptim
from statsmodels.datasets import star98

from numpyro_natgrad import NaturalGradient, fisher, fit

ADAM_STEPS = 5000

# %%
# Data
# ----
#
# Gill (2000), *Generalized linear models: a unified approach*; ``star98`` of statsmodels. Some of the covariates are
# products of others, and the correlation matrix has the condition number 10⁵.


class Data(NamedTuple):
    """One row for each district.

    :param design: intercept and standardised covariates, shape `(n, k)`.
    :param above: pupils above the national median, shape `(n,)`.
    :param pupils: all pupils, shape `(n,)`.
    :param names: names of the columns.
    """

    design: Array
    above: Array
    pupils: Array
    names: list[str]


def read() -> Data:
    """The data set."""
    data = star98.load_pandas()
    columns = (data.exog - data.exog.mean()) / data.exog.std()
    design = jnp.asarray(np.column_stack([np.ones(len(columns)), columns]), float)
    above, below = (jnp.asarray(data.endog[name].to_numpy(), float) for name in ("NABOVE", "NBELOW"))
    return Data(design, above, above + below, ["intercept", *data.exog])


# %%
# The model
# ---------


def model(design: Array, above: Array, pupils: Array) -> None:
    """Logistic regression whose coefficients are parameters, and not latent.

    :param design: shape `(n, k)`.
    :param above: shape `(n,)`.
    :param pupils: shape `(n,)`.
    """
    beta = numpyro.param("beta", jnp.zeros(design.shape[1]))
    with numpyro.plate("district", len(above)):
        numpyro.sample("above", dist.Binomial(pupils, logits=design @ beta), obs=above)


def guide(design: Array, above: Array, pupils: Array) -> None:
    """Nothing is latent."""


# %%
# Fits
# ----


class Estimate(NamedTuple):
    """A maximum of the likelihood.

    :param beta: the maximum, shape `(k,)`.
    :param covariance: the inverse of the Fisher matrix there, shape `(k, k)`.
    :param losses: the loss after every step, nats.
    """

    beta: np.ndarray
    covariance: np.ndarray
    losses: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """Standard errors, shape `(k,)`."""
        return np.asarray(np.sqrt(np.diag(self.covariance)))


def run(data: Data) -> Estimate:
    """Fisher scoring. The inverse of the Fisher matrix at the maximum has the squares of the standard errors.

    :param data: the data.
    """
    args = data.design, data.above, data.pupils
    svi = SVI(model, guide, NaturalGradient(), Trace_ELBO())
    result = fit(svi, random.key(0), *args, progress_bar=False)
    print(f"{result.reason}\n\n{result.report}\n")
    inverse = np.linalg.inv(np.asarray(fisher(svi, result.state, *args).dense(), float))
    return Estimate(np.asarray(result.params["beta"]), inverse, np.asarray(result.losses))


def flat(design: Array, above: Array, pupils: Array) -> None:
    """The same regression, whose coefficients are latent and have a flat prior.

    :param design: shape `(n, k)`.
    :param above: shape `(n,)`.
    :param pupils: shape `(n,)`.
    """
    prior = dist.ImproperUniform(dist.constraints.real_vector, (), (design.shape[1],))
    beta = numpyro.sample("beta", prior)
    with numpyro.plate("district", len(above)):
        numpyro.sample("above", dist.Binomial(pupils, logits=design @ beta), obs=above)


def by_nuts(data: Data, found: Estimate) -> np.ndarray:
    """Draws of the coefficients, shape `(draws, k)`. The inverse of the Fisher matrix is NUTS's inverse mass matrix.

    :param data: the data.
    :param found: where the chains start.
    """
    settings: dict[str, Any] = {
        "dense_mass": True,
        "inverse_mass_matrix": jnp.asarray(found.covariance, float),
        "adapt_mass_matrix": False,
        "init_strategy": init_to_value(values={"beta": jnp.asarray(found.beta)}),
    }
    return nuts(flat, data.design, data.above, data.pupils, **settings)["beta"]


def losses(optimizer: _NumPyroOptim, data: Data) -> np.ndarray:
    """The loss after every step of another optimizer, nats.

    :param optimizer: the optimizer.
    :param data: the data.
    """
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    args = data.design, data.above, data.pupils
    return np.asarray(svi.run(random.key(0), ADAM_STEPS, *args, progress_bar=False).losses)


# %%
# The figure
# ----------


def picture(curves: dict[str, np.ndarray], least: float) -> Figure:
    """How far each fit is from the maximum of the likelihood.

    :param curves: losses by label.
    :param least: the loss at the maximum, nats.
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for (label, curve), colour in zip(curves.items(), (NATURAL, *OTHERS), strict=False):
        axis.plot(np.arange(1, len(curve) + 1), np.maximum(curve - least, 1e-3), color=colour, lw=2, label=label)
    axis.set(xscale="log", yscale="log", xlabel="steps", ylabel="nats below the maximum likelihood")
    axis.legend(frameon=False)
    plain(axis)
    return figure


def main() -> None:
    """Fit, compare with statsmodels, NUTS and Adam, draw."""
    path = figure_path("Maximum likelihood.", "maximum_likelihood.png")
    data = read()
    mine = run(data)
    counts = np.column_stack([data.above, data.pupils - data.above])
    reference = sm.GLM(counts, np.asarray(data.design, np.float64), family=sm.families.Binomial()).fit()
    draws = by_nuts(data, mine)
    columns = mine.beta, mine.error, reference.params, reference.bse, draws.mean(0), draws.std(0)
    print(f"{'':<16}{'natural gradient ± s.e.':>26}{'statsmodels ± s.e.':>24}{'NUTS ± sd':>22}")
    for name, *row in zip(data.names, *columns, strict=True):
        cells = [f"{value:.4f} ± {error:.4f}" for value, error in zip(row[::2], row[1::2], strict=True)]
        print(f"{name:<16}{cells[0]:>26}{cells[1]:>24}{cells[2]:>22}")
    print(f"\nDraws by NUTS:\n{summary({'beta': draws}, dims={'beta': ['column']}, coords={'column': data.names})}")
    curves = {f"Adam({rate})": losses(Adam(rate), data) for rate in (0.1, 0.01)}
    least = -reference.llf
    print(f"\n{'':<20}{'steps':>8}{'nats below the maximum':>25}")
    for label, curve in (all_curves := {"NaturalGradient()": mine.losses, **curves}).items():
        print(f"{label:<20}{len(curve):>8}{curve[-1] - least:>25.2f}")
    save(picture(all_curves, least), path)


if __name__ == "__main__":
    main()
