# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The fit of the count-regression example, whose rates are latent, agrees with the likelihood without latent rates.

With its rates summed out the model is a negative-binomial regression. SciPy maximises that likelihood together with the
priors, and the guide's means have to be near the maximum.
"""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from oracles import root_eps
from scipy import optimize, stats

from numpyro_natgrad import NaturalGradient


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "examples"))
        yield importlib.import_module("count_regression")


def negative_log_posterior(x, data):
    """Of β and log α. A Gamma mixture of Poissons of shape α and mean μ: size α, probability α/(α + μ)."""
    beta, alpha = x[:-1], np.exp(x[-1])
    mu = np.exp(data.design @ beta)
    likelihood = stats.nbinom.logpmf(data.visits, alpha, alpha / (alpha + mu)).sum()
    return -likelihood - stats.norm.logpdf(beta, 0, 10).sum() - stats.gamma.logpdf(alpha, 1) - x[-1]


def test_negative_binomial_oracle_equals_the_likelihood_of_the_model(example):
    data = example.read(100)
    fit = example.maximum_likelihood(data)
    x = np.append(fit.value[:-1], -np.log(fit.value[-1]))
    best = optimize.minimize(negative_log_posterior, x, args=(data,), tol=1e-6).x
    # Beside 200 rows the priors change little.
    assert np.all(np.abs(best[:-1] - fit.value[:-1]) < 0.05 * fit.error[:-1])
    assert abs(np.exp(-best[-1]) - fit.value[-1]) < 0.2 * fit.error[-1]


@pytest.mark.slow
def test_guide_means_equal_the_negative_binomial_mode(example, monkeypatch):
    monkeypatch.setattr(example, "DRAWS", 10)
    data = example.read(100)
    curve = example.follow("natural", NaturalGradient(), data, 60)
    mine, fit = example.estimates(curve.params), example.maximum_likelihood(data)
    apart = np.abs(mine.value - fit.value) / fit.error
    # Mean field shifts the coefficients by a part of their standard errors and narrows them; the dispersion shifts more.
    assert np.all(apart[:-1] < 0.4)
    assert apart[-1] < 1
    assert np.all((mine.error[:-1] > 0.75 * fit.error[:-1]) & (mine.error[:-1] < 1.05 * fit.error[:-1]))
    # Standard errors of a Poisson regression ignore overdispersion and are much shorter.
    assert np.all(mine.error[:-1] > 1.5 * example.poisson_errors(data))
    assert curve.elbo[-1] > curve.elbo[0] + 100


@pytest.mark.slow
def test_one_step_reaches_the_conditional_posterior_of_every_rate(example, x64):
    """Given β and α the posterior of a rate is Gamma(α + y, α exp(−xβ) + 1).

    There are enough draws to determine the natural gradient of each site without noise.
    """
    data, alpha = example.read(200), 0.8
    beta = np.linspace(-0.3, 0.5, data.design.shape[1])
    known = {"beta": jnp.asarray(beta), "alpha": jnp.asarray(alpha)}

    def rates(design, visits):
        with handlers.block(hide=list(known)), handlers.substitute(data=known):
            example.guide(design, visits)

    model = handlers.condition(example.model, known)
    svi = SVI(model, rates, NaturalGradient(1.0, max_kl=None), Trace_ELBO(num_particles=32))
    args = jnp.asarray(data.design), jnp.asarray(data.visits, float)
    state, _ = jax.jit(svi.update)(svi.init(random.key(0), *args), *args)
    params = svi.get_params(state)
    np.testing.assert_allclose(params["shape"], alpha + data.visits, rtol=root_eps("float64"))
    expected = 1 + alpha * np.exp(-data.design @ beta)
    np.testing.assert_allclose(params["rate_rate"], expected, rtol=root_eps("float64"))
