# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
Overdispersed counts: a Gamma–Poisson hierarchy
===============================================

Visits to physicians: a Gamma–Poisson hierarchy with a Gamma site for each of 2019 person-years.

Counts of visits vary far more than a Poisson regression allows, because persons differ in ways that no covariate
records. Each person-year therefore has its own rate, with the mean of the regression::

    rate_i ~ Gamma(α, α exp(−x_iᵀβ)),    visits_i ~ Poisson(rate_i)

With the rates integrated out this is negative-binomial regression, which NUTS samples, and which statsmodels fits by
maximum likelihood: the coefficients and the dispersion 1/α are compared with both. In the guide, the rates are
independent of β. With rate_i = λ_i exp(x_iᵀβ) and λ_i independent of β, its standard deviations would be those of a
Poisson regression, a third to a half of the correct ones.

Data: RAND Health Insurance Experiment (Manning et al. 1987), from statsmodels; every tenth row, so that few persons
appear in more than one year. Covariates are standardized.

Run it with ``python examples/count_regression.py``; ``--help`` lists what can be changed.
"""

# sphinx_gallery_thumbnail_path = 'figures/count_regression.png'

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import statsmodels.api as sm
from _common import NATURAL, OTHERS, PARTICLES, nuts, options, plain, save, summary
from jax import Array, random
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from numpyro.optim import Adam, _NumPyroOptim
from statsmodels.datasets import randhie
from tqdm import tqdm

from numpyro_natgrad import NaturalGradient

EVERY = 10  # rows: one of so many is taken
DRAWS = 50  # for the ELBO that fits are compared by


class Data(NamedTuple):
    """One row for each person-year.

    :param design: intercept and standardised covariates, shape `(n, k)`.
    :param visits: counts, shape `(n,)`.
    :param names: names of the columns.
    """

    design: np.ndarray
    visits: np.ndarray
    names: list[str]


def read(every: int = EVERY) -> Data:
    """The data set.

    :param every: take every such row.
    """
    table = randhie.load_pandas().data.iloc[::every]
    covariates = table.drop(columns="mdvis")
    columns = ((covariates - covariates.mean()) / covariates.std()).to_numpy()
    return Data(np.column_stack([np.ones(len(table)), columns]), table["mdvis"].to_numpy(), ["intercept", *covariates])


# %%
# Model and guide
# ---------------


def model(design: Array, visits: Array) -> None:
    """Negative-binomial regression, with an explicit rate for each person-year.

    :param design: shape `(n, k)`.
    :param visits: shape `(n,)`.
    """
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([design.shape[1]]).to_event(1))
    alpha = numpyro.sample("alpha", dist.Gamma(1.0, 1.0))
    with numpyro.plate("person-year", len(visits)):
        rate = numpyro.sample("rate", dist.Gamma(alpha, alpha * jnp.exp(-design @ beta)))
        numpyro.sample("visits", dist.Poisson(rate), obs=visits)


def marginal(design: Array, visits: Array) -> None:
    """The model with its rates integrated out.

    :param design: as for the model.
    :param visits: as for the model.
    """
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([design.shape[1]]).to_event(1))
    alpha = numpyro.sample("alpha", dist.Gamma(1.0, 1.0))
    numpyro.deterministic("dispersion", 1 / alpha)
    with numpyro.plate("person-year", len(visits)):
        numpyro.sample("visits", dist.GammaPoisson(alpha, alpha * jnp.exp(-design @ beta)), obs=visits)


def guide(design: Array, visits: Array) -> None:
    """A full Gaussian for β, and Gammas for α and for every rate.

    :param design: as for the model.
    :param visits: as for the model.
    """
    n, k = design.shape
    positive = lambda name, start: numpyro.param(name, start, constraint=dist.constraints.positive)
    tril = numpyro.param("scale_tril", 0.1 * jnp.eye(k), constraint=dist.constraints.lower_cholesky)
    numpyro.sample("beta", dist.MultivariateNormal(numpyro.param("loc", jnp.zeros(k)), scale_tril=tril))
    numpyro.sample("alpha", dist.Gamma(positive("alpha_shape", 10.0), positive("alpha_rate", 10.0)))
    with numpyro.plate("person-year", n):
        numpyro.sample("rate", dist.Gamma(positive("shape", jnp.ones(n)), positive("rate_rate", jnp.ones(n))))


# %%
# Fits
# ----


class Curve(NamedTuple):
    """One fit, scored at checkpoints.

    :param label: the optimizer.
    :param steps: taken at each checkpoint, shape `(n,)`.
    :param seconds: seconds of the fastest update, times the steps, shape `(n,)`.
    :param elbo: ELBO at each checkpoint, nats, on draws common to all fits, shape `(n,)`.
    :param error: standard error of the last one, nats.
    :param params: at the last checkpoint.
    """

    label: str
    steps: np.ndarray
    seconds: np.ndarray
    elbo: np.ndarray
    error: float
    params: dict[str, Array]


@jax.jit
def elbo(params: dict[str, Array], *args: Array) -> Array:
    """The ELBO by one draw of β and α, for each of `DRAWS` draws that are common to all fits, nats.

    The KL between Gammas has a closed form, so that only β, α and the likelihood use draws.

    :param params: of the guide.
    :param args: of model and guide.
    """
    one = lambda key: -TraceMeanField_ELBO().loss(key, params, model, guide, *args)
    return jax.lax.map(one, random.split(random.key(1), DRAWS))


def follow(label: str, optimizer: _NumPyroOptim, data: Data, steps: int) -> Curve:
    """Take `steps` steps from the common start.

    :param label: name of the fit.
    :param optimizer: the optimizer.
    :param data: the data.
    :param steps: number of steps.
    """
    args = jnp.asarray(data.design), jnp.asarray(data.visits)
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=PARTICLES))
    state, update = svi.init(random.key(0), *args), jax.jit(svi.update)
    jax.block_until_ready(update(state, *args))  # compiles
    marks, taken = set(np.geomspace(1, steps, 15).round().astype(int)), []
    fastest, reached = np.inf, []
    for step in tqdm(range(1, steps + 1), desc=label, unit="step"):
        before = time.perf_counter()
        state, _ = jax.block_until_ready(update(state, *args))
        fastest = min(fastest, time.perf_counter() - before)
        if step in marks:
            taken.append(step)
            reached.append(np.asarray(elbo(svi.get_params(state), *args)))
            if not np.isfinite(reached[-1]).all():
                break  # the fit has diverged
    error = float(reached[-1].std() / np.sqrt(DRAWS))
    means = np.array([x.mean() for x in reached])
    return Curve(label, np.array(taken), fastest * np.array(taken), means, error, svi.get_params(state))


# %%
# Comparison with NUTS and with maximum likelihood
# ------------------------------------------------


class Estimates(NamedTuple):
    """Coefficients, then the dispersion 1/α, with their standard deviations or errors; each of shape `(k + 1,)`."""

    value: np.ndarray
    error: np.ndarray


def estimates(params: dict[str, Array]) -> Estimates:
    """Posterior means and standard deviations.

    :param params: of the guide.
    """
    # 1/α of a Gamma is inverse-Gamma distributed.
    shape, rate = float(params["alpha_shape"]), float(params["alpha_rate"])
    mean = rate / (shape - 1)
    scales = np.linalg.norm(np.asarray(params["scale_tril"]), axis=1)
    return Estimates(np.append(params["loc"], mean), np.append(scales, mean / np.sqrt(shape - 2)))


def maximum_likelihood(data: Data) -> Estimates:
    """The negative-binomial regression of statsmodels.

    :param data: the data.
    """
    fit = sm.NegativeBinomial(data.visits, data.design).fit(disp=0)
    return Estimates(np.asarray(fit.params), np.asarray(fit.bse))


def poisson_errors(data: Data) -> np.ndarray:
    """Standard errors of a Poisson regression, which ignores that persons differ, shape `(k,)`.

    :param data: the data.
    """
    return np.asarray(sm.GLM(data.visits, data.design, family=sm.families.Poisson()).fit().bse)


def draws(params: dict[str, Array]) -> dict[str, Array]:
    """Coefficients and dispersion by the guide.

    :param params: of the guide.
    """
    alpha = dist.Gamma(params["alpha_shape"], params["alpha_rate"]).sample(random.key(2), (4000,))
    beta = dist.MultivariateNormal(params["loc"], scale_tril=params["scale_tril"]).sample(random.key(3), (4000,))
    return {"beta": beta, "dispersion": 1 / alpha}


def by_nuts(data: Data) -> Estimates:
    """Posterior means and standard deviations of the model with its rates integrated out.

    :param data: the data.
    """
    chains = nuts(marginal, jnp.asarray(data.design), jnp.asarray(data.visits))
    both = np.column_stack([chains["beta"], chains["dispersion"]])
    return Estimates(both.mean(0), both.std(0))


def table(names: list[str], *columns: Estimates) -> str:
    """One line for each estimate.

    :param names: of the coefficients.
    :param columns: estimates by the guide, by NUTS and by maximum likelihood.
    """
    lines = [f"{'':<12}" + "".join(f"{head:>20}" for head in ("guide ± sd", "NUTS ± sd", "statsmodels ± s.e."))]
    for row, name in enumerate([*names, "1/alpha"]):
        cells = (f"{column.value[row]:.3f} ± {column.error[row]:.3f}" for column in columns)
        lines.append(f"{name:<12}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


# %%
# The figure
# ----------


def draw_estimates(axis: Axes, names: list[str], guide_: Estimates, likelihood: Estimates, narrow: np.ndarray) -> None:
    """Coefficients with two standard errors on each side.

    :param axis: where to draw.
    :param names: of the coefficients.
    :param guide_: estimates by variational inference.
    :param likelihood: estimates by maximum likelihood.
    :param narrow: standard errors of the Poisson regression.
    """
    place = np.arange(1, len(names))  # the intercept is far off
    rows = [
        ("natural gradient, mean-field", guide_.value, guide_.error, NATURAL, -0.2),
        ("negative binomial, statsmodels", likelihood.value, likelihood.error, "black", 0.0),
        ("… Poisson's standard errors", likelihood.value, np.append(narrow, 0), "0.6", 0.2),
    ]
    for label, value, error, colour, shift in rows:
        look: dict[str, Any] = {"color": colour, "label": label, "fmt": "o", "ms": 4, "lw": 1.6}
        axis.errorbar(value[place], place + shift, xerr=2 * error[place], **look)
    axis.axvline(0, color="0.7", lw=0.8, zorder=0)
    axis.set_yticks(place, names[1:])
    axis.invert_yaxis()
    axis.set(xlabel="log rate of visits per sd of the covariate, ± 2 s.e.", title="2019 Gamma sites, one a person-year")
    axis.legend(frameon=False, fontsize=8)


def draw_elbo(axis: Axes, curves: list[Curve]) -> None:
    """How far every fit has come.

    :param axis: where to draw.
    :param curves: the fits, the natural gradient's first.
    """
    for curve, colour in reversed(list(zip(curves, (NATURAL, *OTHERS), strict=False))):
        axis.plot(curve.steps, curve.elbo, color=colour, label=curve.label, marker="o", ms=3.5, lw=1.8)
    best = max(np.nanmax(curve.elbo) for curve in curves)
    axis.set(
        xscale="log", xlabel="steps", ylabel="ELBO (nats)", ylim=(best - 1500, best + 60), title="on the way there"
    )
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8)


def picture(data: Data, curves: list[Curve], likelihood: Estimates) -> Figure:
    """Coefficients, and ELBO against steps.

    :param data: the data.
    :param curves: the fits.
    :param likelihood: by maximum likelihood.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    draw_estimates(axes[0], data.names, estimates(curves[0].params), likelihood, poisson_errors(data))
    draw_elbo(axes[1], curves)
    for axis in axes:
        plain(axis)
    return figure


# %%
# All together
# ------------


def main() -> None:
    """Fit, compare with NUTS, statsmodels and Adam, draw."""
    chosen = options("Visits to physicians.", "count_regression.png", steps=100, adam_steps=200)
    data, natural = read(), NaturalGradient()
    curves = [follow("NaturalGradient()", natural, data, chosen.steps)]
    curves += [follow(f"Adam({rate})", Adam(rate), data, chosen.adam_steps) for rate in (0.1, 0.01)]
    mine, exact, likelihood = estimates(curves[0].params), by_nuts(data), maximum_likelihood(data)
    args = jnp.asarray(data.design), jnp.asarray(data.visits)
    svi = SVI(model, guide, natural, Trace_ELBO(num_particles=PARTICLES))
    print(f"\n{natural.report(svi, svi.init(random.key(0), *args), *args)}\n")
    print(summary(draws(curves[0].params), dims={"beta": ["covariate"]}, coords={"covariate": data.names}))
    print(f"\n{table(data.names, mine, exact, likelihood)}\n")
    apart, ratio = np.abs(mine.value - exact.value) / exact.error, mine.error / exact.error
    print(f"Coefficients are within {apart[:-1].max():.2f} posterior sds of NUTS, 1/alpha is within {apart[-1]:.2f};")
    print(
        f"sds are {ratio[:-1].min():.2f} to {ratio[:-1].max():.2f} of those by NUTS, that of 1/alpha {ratio[-1]:.2f}."
    )
    print(f"\n{'optimizer':<26}{'steps':>6}{'seconds':>9}{'ELBO ± s.e. (nats)':>21}")
    for curve in curves:
        cost = f"{curve.label:<26}{curve.steps[-1]:>6}{curve.seconds[-1]:>9.1f}"
        print(f"{cost}{curve.elbo[-1]:>13.1f} ± {curve.error:.1f}")
    save(picture(data, curves, likelihood), chosen.output)


if __name__ == "__main__":
    main()
