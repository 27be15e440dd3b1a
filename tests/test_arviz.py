# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Groups for ArviZ: log likelihoods, predictions and leave-one-out densities of a conjugate model are the exact ones."""

import warnings

import arviz as az
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from scipy import stats

from numpyro_natgrad import NaturalGradient, StructureError, to_arviz, verdict
from numpyro_natgrad.diagnostics import arviz_compat, importance
from numpyro_natgrad.diagnostics.verdict import Source

ROWS, PRIOR = 20, 2.0
Y = np.random.default_rng(0).normal(1.0, 1.0, ROWS)
PRECISION = 1 / PRIOR**2 + ROWS
MEAN, SD = Y.sum() / PRECISION, PRECISION**-0.5
#: The prediction of each row from the others: Normal with these means and standard deviations.
OTHERS = PRECISION - 1
LOO = stats.norm.logpdf(Y, (Y.sum() - Y) / OTHERS, np.sqrt(1 + 1 / OTHERS)).sum()
DIMS = {"y": ["row"]}


def normal_mean(y, subsample_size=None):
    mean = numpyro.sample("mean", dist.Normal(0.0, PRIOR))
    numpyro.deterministic("twice", 2 * mean)
    numpyro.factor("constant", 1.0)
    with numpyro.plate("row", ROWS, subsample_size=subsample_size):
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def exact(spread, model=normal_mean):
    """The exact guide, with ``spread`` times its standard deviation."""
    svi, y = SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO()), jnp.array(Y, float)
    svi.init(random.key(0), y)
    params = {"mean_auto_loc": jnp.array(MEAN, float), "mean_auto_scale": jnp.array(spread * SD, float)}
    return svi, params, y


@pytest.fixture(scope="module")
def wide():
    """A guide that is too wide by half, and so is corrected by its weights."""
    svi, params, y = exact(1.5)
    return verdict(svi, params, random.key(1), y, num_draws=4000, progress_bar=False)


def unjudged(wide, model, sites=None):
    """200 draws of the exact guide without their verdict, which takes longer."""
    svi, params, y = exact(1.0, model)
    fitted = importance.fitted_guide(svi, params, (y,), {})
    drawn = importance.draw(fitted, random.key(1), 200, sites)
    draws = {name: drawn.values[name] for name in drawn.sites.tabulated}
    return wide._replace(
        draws=draws, log_weights=drawn.log_weights, weights=np.full(200, 1 / 200), source=Source(fitted, drawn)
    )


def values(data, group, name):
    return np.asarray(data[group][name])[0]


def test_log_likelihoods_and_data_are_those_of_the_model(wide):
    data = to_arviz(wide, dims=DIMS)
    expected = stats.norm.logpdf(Y, values(data, "posterior", "mean")[:, None], 1.0)
    np.testing.assert_allclose(values(data, "log_likelihood", "y"), expected, atol=1e-5)
    np.testing.assert_allclose(data["observed_data"]["y"], Y, rtol=1e-6)
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "row")
    assert "constant" not in data["log_likelihood"]
    assert "posterior_predictive" not in data  # there are no posterior draws without a key


def test_densities_of_the_draws_are_those_of_model_and_guide(wide):
    data = to_arviz(wide)
    mean = values(data, "posterior", "mean")
    log_p = stats.norm.logpdf(mean, 0, PRIOR) + stats.norm.logpdf(Y, mean[:, None], 1).sum(1) + 1.0
    np.testing.assert_allclose(values(data, "sample_stats", "log_p"), log_p, atol=1e-3)
    log_q = stats.norm.logpdf(mean, MEAN, 1.5 * SD)
    np.testing.assert_allclose(values(data, "sample_stats", "log_q"), log_q, atol=1e-3)


def test_predictions_are_distributed_as_new_data(wide):
    """In each row; rows of one draw share its mean, so that only one is tested."""
    predicted = values(to_arviz(wide, random.key(2)), "posterior_predictive", "y")
    assert predicted.shape == (4000, ROWS)
    assert stats.kstest(predicted[:, 3], stats.norm(MEAN, np.sqrt(1 + SD**2)).cdf).pvalue > 0.01
    assert not np.allclose(predicted[0], Y)


def test_groups_do_not_depend_on_the_chunks(wide):
    whole = to_arviz(wide, random.key(2))
    parts = to_arviz(wide, random.key(2), draws_per_chunk=300)
    for group in ("log_likelihood", "posterior_predictive"):
        np.testing.assert_allclose(values(parts, group, "y"), values(whole, group, "y"), rtol=1e-5, atol=1e-5)


def elpd(found):
    return float(getattr(found, "elpd", None) or found.elpd_loo)


def test_leave_one_out_densities_of_resampled_draws_are_exact(wide):
    """They are off by more than half a nat with the guide's own draws, which are too wide."""
    assert abs(elpd(az.loo(to_arviz(wide, random.key(2)))) - LOO) < 0.1
    assert elpd(az.loo(to_arviz(wide))) < LOO - 0.4


def test_leave_one_out_densities_corrected_by_importance_are_exact(wide):
    arviz_stats = pytest.importorskip("arviz_stats")
    data = to_arviz(wide)
    densities = data["sample_stats"]
    found = arviz_stats.loo_approximate_posterior(data, densities["log_p"], densities["log_q"])
    assert abs(elpd(found) - LOO) < 0.1


def test_latents_that_are_not_tabulated_are_used_all_the_same(wide):
    data = to_arviz(unjudged(wide, normal_mean, "twice"))
    expected = stats.norm.logpdf(Y, values(data, "posterior", "twice")[:, None] / 2, 1.0)
    np.testing.assert_allclose(values(data, "log_likelihood", "y"), expected, atol=1e-5)


def test_large_groups_are_left_out_unless_they_are_named(wide, monkeypatch):
    monkeypatch.setattr(arviz_compat, "LARGEST_GROUP", 1000)
    with pytest.warns(UserWarning, match=r"`log_likelihood` has 20 entries for each of 4000 draws.*`groups`"):
        assert "log_likelihood" not in to_arviz(wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "log_likelihood" in to_arviz(wide, groups=["log_likelihood"])


def test_a_minibatch_has_no_groups(wide):
    judged = unjudged(wide, lambda y: normal_mean(y[:5], 5))
    assert "log_likelihood" not in to_arviz(judged)
    with pytest.raises(StructureError, match=r"\['row'\] see a minibatch"):
        to_arviz(judged, groups=["log_likelihood"])


def test_a_likelihood_that_cannot_be_sampled_has_no_predictions(wide):
    class Unsampled(dist.Normal):
        def sample(self, key, sample_shape=()):
            raise NotImplementedError("this distribution has no sampler")

    def model(y):
        mean = numpyro.sample("mean", dist.Normal(0.0, PRIOR))
        numpyro.sample("y", Unsampled(mean, 1.0).expand([ROWS]).to_event(1), obs=y)

    judged = unjudged(wide, model)
    data = to_arviz(judged, random.key(2))
    assert "posterior_predictive" not in data
    assert "log_likelihood" in data
    with pytest.raises(NotImplementedError, match="no sampler"):
        to_arviz(judged, random.key(2), groups=["posterior_predictive"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groups": "log_likelihood"}, ValueError, "expected a list of some of"),
        ({"groups": ["loo"]}, ValueError, r"`groups` has \['loo'\]: expected"),
        ({"groups": ["posterior_predictive"]}, ValueError, "there is no `rng_key`"),
        ({"draws_per_chunk": 0}, ValueError, "`draws_per_chunk=0`"),
        ({"draws_per_chunk": 1.5}, TypeError, "`draws_per_chunk=1.5`"),
    ],
)
def test_wrong_options_are_named(wide, options, error, message):
    with pytest.raises(error, match=message):
        to_arviz(wide, **options)
