# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Starts of NUTS: the mass matrix of a Gaussian posterior is exact, and initial points are draws of the posterior."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from scipy import stats

from numpyro_natgrad import NaturalGradient, StructureError, to_nuts

X = np.random.default_rng(0).normal(size=(30, 3)) @ np.array([[1.0, 0.7, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 0.3]])
Y = X @ np.array([1.0, -0.5, 2.0]) + np.random.default_rng(1).normal(size=30)
#: Posterior of (slope, logs) below: a prior of N(0, 1) and errors of N(0, 1).
COVARIANCE = np.linalg.inv(np.eye(3) + X.T @ X)
MEAN = COVARIANCE @ X.T @ Y


def regression(x, y):
    """Unconstrained latents (slope, log weight), whose posterior is Gaussian; the names sort the other way round."""
    slope = numpyro.sample("z_slope", dist.Normal(0, 1))
    weights = numpyro.sample("a_weights", dist.LogNormal(0, 1).expand([2]).to_event(1))
    mean = x[:, 0] * slope + x[:, 1:] @ jnp.log(weights)
    numpyro.sample("y", dist.Normal(mean, 1), obs=y)


ORDER = [1, 2, 0]  # the sites sorted by name


def exact(guide_class, spread=1.0):
    """The ``SVI`` and parameters of the guide at the optimum, times ``spread``."""
    data = jnp.array(X, float), jnp.array(Y, float)
    guide = guide_class(regression)
    svi = SVI(regression, guide, NaturalGradient(), Trace_ELBO())
    svi.init(random.key(0), *data)
    if guide_class is AutoNormal:
        scale = np.diag(np.linalg.inv(COVARIANCE)) ** -0.5
        params = {
            "z_slope_auto_loc": MEAN[0],
            "z_slope_auto_scale": scale[0],
            "a_weights_auto_loc": MEAN[1:],
            "a_weights_auto_scale": scale[1:],
        }
    else:
        params = {"auto_loc": MEAN, "auto_scale_tril": spread * np.linalg.cholesky(COVARIANCE)}
    return svi, {name: jnp.array(x, float) for name, x in params.items()}, data


@pytest.mark.parametrize("guide_class", [AutoMultivariateNormal, AutoNormal])
def test_mass_matrix_of_a_gaussian_posterior_is_its_covariance(guide_class):
    """Of a mean-field guide too, whose own variances are too small."""
    svi, params, data = exact(guide_class)
    start = to_nuts(svi, params, random.key(1), *data)
    expected = COVARIANCE[np.ix_(ORDER, ORDER)]
    np.testing.assert_allclose(start.inverse_mass_matrix, expected, atol=2e-4 * expected.max())


def test_initial_points_are_draws_of_the_posterior():
    """The guide is a third too wide, and the weights correct it."""
    svi, params, data = exact(AutoMultivariateNormal, spread=4 / 3)
    count = 400
    start = to_nuts(svi, params, random.key(1), *data, num_chains=count)
    points = np.concatenate([np.asarray(x).reshape(count, -1) for _, x in sorted(start.init_params.items())], axis=1)
    whitened = np.linalg.solve(np.linalg.cholesky(COVARIANCE), (points[:, np.argsort(ORDER)] - MEAN).T)
    assert len(np.unique(points[:, 0])) == count
    assert stats.kstest(whitened.ravel(), "norm").pvalue > 0.01
    assert stats.kstest(whitened.ravel() * 4 / 3, "norm").pvalue < 1e-4


def test_points_of_one_chain_have_the_shapes_of_the_sites():
    svi, params, data = exact(AutoMultivariateNormal)
    start = to_nuts(svi, params, random.key(1), *data, num_chains=1)
    assert {name: x.shape for name, x in start.init_params.items()} == {"z_slope": (), "a_weights": (2,)}


@pytest.mark.slow
def test_chains_start_at_the_posterior():
    """Without further adaptation, 50 steps of warm-up give independent draws."""
    svi, params, data = exact(AutoNormal)
    start = to_nuts(svi, params, random.key(1), *data)
    mcmc = MCMC(
        start.kernel,
        num_warmup=start.num_warmup,
        num_samples=500,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(random.key(2), *data, init_params=start.init_params)
    draws = mcmc.get_samples()
    z = np.concatenate([np.asarray(draws["z_slope"])[:, None], np.log(draws["a_weights"])], axis=1)
    # The mean of 2000 draws, at least 1000 of them effective, is off by less than four standard errors.
    assert np.all(np.abs(z.mean(0) - MEAN) < 4 * np.sqrt(np.diag(COVARIANCE) / 1000))
    np.testing.assert_allclose(z.std(0), np.sqrt(np.diag(COVARIANCE)), rtol=0.1)


def test_parameters_of_the_model_and_static_arguments_are_the_fitted_ones():
    """Beside a flat prior, which cannot be sampled."""

    def model(y, scale):
        prior = numpyro.param("prior_mean", 0.0)
        z = numpyro.sample("z", dist.Normal(prior, scale))
        flat = numpyro.sample("flat", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(z + flat, 1), obs=y)

    y = jnp.array(2.0)
    svi = SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO(), scale=3.0)
    state = svi.init(random.key(0), y)
    start = to_nuts(svi, svi.get_params(state) | {"prior_mean": jnp.array(5.0)}, random.key(1), y)
    sites = trace(substitute(seed(start.model, random.key(0)), data={"flat": 0.0})).get_trace(y)
    assert sites["prior_mean"]["value"] == 5.0
    assert sites["z"]["fn"].scale == 3.0


def _with(model, guide=None):
    guide = guide or AutoNormal(model)
    svi = SVI(model, guide, NaturalGradient(), Trace_ELBO())
    return svi, svi.init(random.key(0))


def _binary():
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(z, 1), obs=0.3)


def _binary_guide():
    numpyro.sample("z", dist.Bernoulli(numpyro.param("p", 0.5)))


def _two():
    numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("b", dist.Normal(0, 1))


def _one_guide():
    numpyro.sample("a", dist.Normal(numpyro.param("m", 0.0), 1))


def _minibatch():
    z = numpyro.sample("z", dist.Normal(0, 1))
    with numpyro.plate("rows", 10, subsample_size=5):
        numpyro.sample("y", dist.Normal(z, 1), obs=jnp.zeros(5))


@pytest.mark.filterwarnings("ignore:Currently, SVI with Trace_ELBO loss does not support models with discrete")
@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (_binary, _binary_guide, r"\['z'\] are discrete.*Sum over"),
        (_two, _one_guide, r"does not draw \['b'\]"),
        (_two, AutoDelta(_two), r"all draws of \['a', 'b'\] are the same"),
        (_minibatch, None, r"\['rows'\] see a minibatch"),
    ],
    ids=["discrete", "missing", "point", "minibatch"],
)
def test_what_cannot_work_is_refused(model, guide, message):
    with pytest.raises(StructureError, match=message):
        to_nuts(*_with(model, guide), random.key(1))


@pytest.mark.parametrize(("num_chains", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_number_of_chains_is_checked(num_chains, error):
    with pytest.raises(error, match="num_chains"):
        to_nuts(*_with(_two), random.key(1), num_chains=num_chains)


def test_a_guide_outside_of_the_support_is_refused():
    def model():
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.factor("nowhere", jnp.where(jnp.isfinite(z), -jnp.inf, 0.0))

    guide = lambda: numpyro.sample("z", dist.Normal(numpyro.param("m", 0.0), 1))
    with pytest.raises(ValueError, match=r"0 of 500 draws .* `print\(verdict"):
        to_nuts(*_with(model, guide), random.key(1))
