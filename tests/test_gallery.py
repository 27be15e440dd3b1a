# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The fits of the gallery agree with exact answers, and with what has been published about the same data and models.

Published estimates are maxima of the likelihood, or posterior means under the same priors. Estimates are compared in
posterior standard deviations: priors and skewness move a mean by some tenths of these.
"""

import importlib
import itertools
import pathlib

import numpy as np
import pytest
import statsmodels.api as sm
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from oracles import best_logistic_gaussian, logistic_bound
from scipy import optimize, stats
from scipy.special import betaln, logsumexp, softmax

from numpyro_natgrad import NaturalGradient, fit, verdict

pytestmark = pytest.mark.slow


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "examples"))
    return importlib.import_module


#: Example, published values of some sites, largest difference in posterior standard deviations.
PUBLISHED = {
    # lme4's documentation: REML estimates of `Reaction ~ Days + (Days | Subject)`.
    "varying_slopes": ({"mean": [251.405, 10.467], "sd": [24.74, 5.92], "sigma": 25.59}, 0.5),
    # Reference draws of posteriordb, `hudson_lynx_hare-lotka_volterra`: means of 10,000 draws by Stan.
    "lynx_and_hare": ({"theta": [0.5469, 0.02775, 0.8001, 0.02409], "sigma": [0.2481, 0.2510]}, 0.3),
    # R's ordinal, `clmm(rating ~ temp + contact + (1 | judge))`, in its documentation.
    "ordinal_regression": ({"warm": 3.063, "contact": 1.835, "cutpoints": [-1.624, 1.513, 4.229, 6.089]}, 0.4),
    # R's ltm, `ltm(LSAT ~ z1, IRT.param = FALSE)`, by 21 nodes of quadrature.
    "item_response": (
        {"easiness": [2.773, 0.990, 0.249, 1.285, 2.053], "discrimination": [0.825, 0.723, 0.890, 0.688, 0.657]},
        0.5,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_fit_of_an_example_agrees_with_what_was_published(example, name):
    published, tolerance = PUBLISHED[name]
    judged = example(name).run()
    answer = getattr(judged, judged.answer)
    for site, expected in published.items():
        moments = answer[site]
        np.testing.assert_array_less(np.abs((moments.mean - np.array(expected)) / moments.sd), tolerance, site)


def test_survival_agrees_with_the_maximum_of_the_likelihood(example):
    """Log times have an extreme-value distribution: density of a relapse, probability of more for a censored time."""
    survival = example("survival")
    log_time, treated, relapsed = (
        np.asarray(x) for x in (np.log(survival.TIME), survival.TREATMENT, survival.IS_EVENT)
    )

    def negative_log_likelihood(x):
        w = (log_time - x[0] - x[1] * treated) * np.exp(x[2])
        return -np.sum(relapsed * (x[2] + w) - np.exp(w))

    intercept, effect, log_shape = optimize.minimize(negative_log_likelihood, [2.0, 1.0, 0.0]).x
    moments = survival.run().importance_weighted
    for site, maximum in {"intercept": intercept, "effect": effect, "shape": np.exp(log_shape)}.items():
        assert abs(moments[site].mean - maximum) < 0.5 * moments[site].sd, site


def test_eight_schools_have_the_moments_of_the_reference(example):
    """Means of posteriordb's reference draws, `eight_schools-eight_schools_noncentered`."""
    schools = example("eight_schools")
    svi = SVI(schools.model, AutoMultivariateNormal(schools.model), NaturalGradient(), Trace_ELBO(num_particles=8))
    data = schools.ERROR, schools.EFFECT
    result = fit(svi, random.key(0), *data, tolerance=0.05, progress_bar=False)
    sites = ["mu", "tau", "theta"]
    judged = verdict(svi, result, random.key(1), *data, sites=sites, num_draws=4000, progress_bar=False)
    moments = judged.importance_weighted
    theta = [6.151, 4.940, 3.906, 4.796, 3.614, 4.051, 6.317, 4.884]
    for site, expected in {"mu": 4.411, "tau": 3.602, "theta": theta}.items():
        np.testing.assert_array_less(np.abs(moments[site].mean - expected) / moments[site].sd, 0.15, site)


def test_logistic_regression_is_the_best_gaussian(example):
    """By the fixed point of the mean Hessian, with one-dimensional quadrature."""
    regression = example("logistic_regression")
    design, benign, _ = regression.breast_cancer()
    guide = AutoMultivariateNormal(regression.model)
    svi = SVI(regression.model, guide, NaturalGradient(), Trace_ELBO(num_particles=8))
    params = svi.run(random.key(0), 200, design, benign, progress_bar=False).params
    # Coefficients in units of the standard deviation of their prior.
    x, y = 10 * np.asarray(design, np.float64), np.asarray(benign, np.float64)
    loc, tril = (np.asarray(params[name], np.float64) / 10 for name in ("auto_loc", "auto_scale_tril"))
    best, *_ = best_logistic_gaussian(x, 0.0, y)
    assert -1e-3 < best - logistic_bound(x, 0.0, y, loc, tril @ tril.T)[0] < 0.2


def test_level_of_the_nile_and_cycles_of_the_sun(example):
    series = example("local_level")
    level = series.run(series.local_level, series.flow()[1], ["noise", "drift", "level"]).importance_weighted
    # Durbin and Koopman (2012), section 2.10: maxima of the likelihood of both variances.
    for site, variance in {"noise": 15099.0, "drift": 1469.1}.items():
        assert abs(level[site].mean - variance**0.5) < 0.4 * level[site].sd
    assert level["level"].mean[:28].mean() - level["level"].mean[28:].mean() > 200

    # Given the noise the posterior of a linear regression is Gaussian: Normal(0, 3) and Normal(0, 0.5) priors.
    _, y = series.roots_of_sunspots()
    cycles = series.run(series.autoregression, y, ["intercept", "phi", "sigma"]).importance_weighted
    past = np.stack([np.ones(len(y) - 9), *(y[9 - lag : len(y) - lag] for lag in range(1, 10))], axis=-1)
    precision = past.T @ past + cycles["sigma"].mean ** 2 * np.diag([1 / 9] + 9 * [4])
    expected = np.linalg.solve(precision, past.T @ np.asarray(y[9:]))
    mean, sd = (np.append(getattr(cycles["intercept"], x), getattr(cycles["phi"], x)) for x in ("mean", "sd"))
    np.testing.assert_array_less(np.abs(mean - expected) / sd, 0.15)


def exact_modes(stars):
    """The probability of the steep mode, and its mean slope, on a grid of the four latents.

    Three times as many points change the probability by 0.004.
    """
    box = {"intercept": (3.5, 6.5, 20), "slope": (-9, 9, 36), "sigma": (0.15, 1.6, 16), "share": (0, 0.5, 12)}
    middles = (low + (high - low) / count * (np.arange(count) + 0.5) for low, high, count in box.values())
    intercept, slope, sigma, share = np.ix_(*middles)
    log = (
        stats.norm.logpdf(intercept, 5, 1)
        + stats.norm.logpdf(slope, 0, 5)
        + stats.lognorm.logpdf(sigma, 0.7, scale=np.exp(-1))
        + stats.beta.logpdf(share, 2, 18)
    )
    for temperature, light in zip(np.asarray(stars.TEMPERATURE), np.asarray(stars.LIGHT), strict=True):
        line = stats.norm.pdf(light, intercept + slope * (temperature - stars.CENTRE), sigma)
        log += np.log((1 - share) * line + share * stats.norm.pdf(light, 5, 2))
    weights = np.exp(log - log.max()).sum((0, 2, 3))
    steep = np.where(slope.ravel() > 1, weights, 0)
    return steep.sum() / weights.sum(), steep @ slope.ravel() / steep.sum()


def test_both_modes_of_the_line_with_outliers(example):
    stars = example("outliers")
    steep, flat = stars.run(3.0), stars.run(-0.5)
    giants = np.asarray(stars.TEMPERATURE < 3.6)
    assert giants.sum() == 4
    assert steep.importance_weighted["is_outlier"].mean[giants].min() > 0.95
    assert flat.importance_weighted["is_outlier"].mean[giants].max() < 0.5
    probability, mean = exact_modes(stars)
    odds = np.exp(steep.log_evidence.value - flat.log_evidence.value)
    assert abs(odds / (1 + odds) - probability) < 0.05
    slope = steep.importance_weighted["slope"]
    assert abs(slope.mean - mean) < 0.3 * slope.sd


def test_forecast_of_carbon_dioxide_is_near_what_was_measured(example):
    series = example("forecast")
    y, truth = series.read()
    judged = series.run(y)
    drawn = series.forecast(judged, y)
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    assert np.sum((np.asarray(truth) > low) & (np.asarray(truth) < high)) >= 20
    # The months of the last year and its growth are 0.68 ppm off.
    assert np.sqrt(np.mean((drawn.mean(0) - np.asarray(truth)) ** 2)) < 0.5
    # Least squares for the rest, with a straight line in each year, gives the season.
    year, month = np.divmod(np.arange(len(y)), 12)
    ramps = np.clip(np.arange(len(y))[:, None] - 12 * np.arange(year[-1] + 1), 0, 12)
    angle = 2 * np.pi * month[:, None] / 12 * np.arange(1, 4)
    design = np.column_stack([np.cos(angle), np.sin(angle), np.ones(len(y)), ramps])
    season = np.linalg.lstsq(design, np.asarray(y), rcond=None)[0][:6]
    moments = judged.importance_weighted["season"]
    np.testing.assert_array_less(np.abs(moments.mean - season) / moments.sd, 1.0)


def test_quickstart_of_numpyro_forecast_ends_ahead_of_adam(example):
    """By at least 20 nats after as many steps of one particle; noise of both ELBOs is a few nats."""
    pytest.importorskip("numpyro_forecast", reason="it needs Python 3.12, and a jax before 0.11.3")
    adam, natural, full, nuts = example("forecast_quickstart").run()
    assert natural.elbo > adam.elbo + 20
    assert full.elbo > natural.elbo + 200
    assert natural.crps < adam.crps
    assert max(full.crps, nuts.crps) < natural.crps


def test_tables_of_the_bayesian_network_have_the_exact_posterior(example):
    network = example("bayesian_network")
    known, hidden = network.read()
    del hidden["lipids"]
    fitted, exact = network.run(known, hidden), network.exact(known, hidden)
    for name, mean in exact.mean.items():
        draws = np.asarray(fitted.draws[name])
        np.testing.assert_array_less(np.abs(draws.mean(0) - mean) / exact.sd[name], 0.1, name)
        np.testing.assert_allclose(draws.std(0), exact.sd[name], rtol=0.06, err_msg=name)
    assert -0.01 < exact.log_evidence - fitted.log_weights.mean() < 0.05
    # Hidden entries by Bayes' rule at the mean tables, which are narrow.
    smoking, physical, pressure = (np.asarray(hidden[name]) for name in ("smoking", "physical", "pressure"))
    yes, no = (
        np.where(lipids, tables := exact.mean["p_lipids"][smoking, physical], 1 - tables)
        * np.where(pressure, high := exact.mean["p_pressure"][smoking, lipids], 1 - high)
        for lipids in (1, 0)
    )
    np.testing.assert_allclose(fitted.probability, yes / (yes + no), atol=0.1)


def test_sum_over_hidden_entries_of_the_bayesian_network_is_that_over_all_completions(example):
    network = example("bayesian_network")
    known, hidden = ({name: np.asarray(x[::150]) for name, x in men.items()} for men in network.read())
    number = len(hidden.pop("lipids"))
    assert number > 3
    logs, means = [], []
    for completion in itertools.product((0, 1), repeat=number):
        men = {name: np.append(known[name], (hidden | {"lipids": np.array(completion)})[name]) for name in known}
        log, mean = 0.0, {}
        for name, parents in network.PARENTS.items():
            counts = network.count(men, (*parents, name))
            log += betaln(1 + counts[..., 1], 1 + counts[..., 0]).sum()
            mean[f"p_{name}"] = (1 + counts[..., 1]) / (2 + counts.sum(-1))
        logs.append(log)
        means.append(mean)
    exact = network.exact(known, hidden)
    np.testing.assert_allclose(exact.log_evidence, logsumexp(logs))
    for name, mean in exact.mean.items():
        np.testing.assert_allclose(mean, np.tensordot(softmax(logs), [x[name] for x in means], 1), err_msg=name)


def test_maximum_likelihood_and_its_standard_errors(example):
    regression = example("maximum_likelihood")
    data = regression.read()
    counts = np.column_stack([data.above, data.pupils - data.above])
    expected = sm.GLM(counts, np.asarray(data.design, np.float64), family=sm.families.Binomial()).fit()
    found = regression.run(data)
    np.testing.assert_array_less(np.abs(found.beta - expected.params) / expected.bse, 0.01)
    np.testing.assert_allclose(found.error, expected.bse, rtol=0.01)
    # The maximum is a few steps of Fisher scoring away.
    assert abs(found.losses[9] + expected.llf) < 0.1
