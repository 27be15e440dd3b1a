# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Parameters of the model beside a Gaussian guide end at the maximum of the marginal likelihood, wherever they start."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.handlers import block
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from scipy import optimize, stats

from benchmarks.starts.cases import PROBLEMS
from benchmarks.starts.fitting import Starts
from benchmarks.starts.judging import Judge
from benchmarks.starts.problems import SETTINGS
from numpyro_natgrad import NaturalGradient

Y = np.random.default_rng(3).normal(2.0, 1.2, (30, 3)) + np.random.default_rng(4).normal(0, 0.8, 30)[:, None]
GUIDES = [AutoNormal, AutoMultivariateNormal]


def run(model, guide, steps, *args, loss=None, key=0, **options):
    svi = SVI(model, guide, NaturalGradient(**options), loss or Trace_ELBO(num_particles=8))
    return svi.run(random.key(key), steps, *args, progress_bar=False)


def known_scales(y):
    """The complete data know θ a hundred times as well as y does: the slow rate of EM is 1 %."""
    theta = numpyro.param("theta", -5.0)
    with numpyro.plate("groups", len(y)):
        z = numpyro.sample("z", dist.Normal(theta, 0.1))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.mark.parametrize("guide", GUIDES)
def test_a_full_step_is_exact_where_the_loss_is_quadratic(guide, x64):
    """θ̂ is the mean of y, and z | θ̂ has the precision 1/0.1² + 1. Fisher scoring goes 1 % of the way."""
    y = jnp.array(Y[:, 0], float)
    params = run(known_scales, guide(known_scales), 1, y, step_size=1.0, max_kl=None).params
    np.testing.assert_allclose(params["theta"], y.mean(), atol=1e-8)
    loc = params["auto_loc" if guide is AutoMultivariateNormal else "z_auto_loc"]
    np.testing.assert_allclose(loc, (y.mean() / 0.1**2 + y) / (1 / 0.1**2 + 1), atol=1e-8)
    if guide is AutoNormal:
        np.testing.assert_allclose(params["z_auto_scale"], (1 / 0.1**2 + 1) ** -0.5, atol=1e-8)


def variance_components(y):
    mu = numpyro.param("mu", 0.0)
    tau, sigma = (numpyro.param(name, 3.0, constraint=dist.constraints.positive) for name in ("tau", "sigma"))
    with numpyro.plate("groups", len(y)):
        a = numpyro.sample("a", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(a[:, None], sigma).to_event(1), obs=y)


def marginal(x):
    """−log p(y) at (mu, log tau, log sigma): each row of y is Gaussian with a shared random effect."""
    covariance = np.exp(2 * x[1]) * np.ones((3, 3)) + np.exp(2 * x[2]) * np.eye(3)
    return -stats.multivariate_normal(np.full(3, x[0]), covariance).logpdf(Y).sum()


@pytest.mark.slow
@pytest.mark.parametrize("particles", [1, 8])
@pytest.mark.parametrize("guide", GUIDES)
def test_empirical_bayes_reaches_the_maximum_of_the_marginal_likelihood(guide, particles):
    """The posterior given the parameters is in both families, so that the ELBO's maximum is the likelihood's.

    BFGS on the marginal likelihood, integrated by hand, gives the maximum and its curvature. Tolerance: a tenth of the
    estimate's own standard deviation.
    """
    found = run(variance_components, guide(variance_components), 100, jnp.array(Y, float), loss=Trace_ELBO(particles))
    expected = optimize.minimize(marginal, np.zeros(3), method="BFGS")
    params = found.params
    reached = np.array([params["mu"], np.log(params["tau"]), np.log(params["sigma"])])
    assert (np.abs(reached - expected.x) < 0.1 * np.sqrt(np.diag(expected.hess_inv))).all()


def mixture(y):
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(2)))
    with numpyro.plate("components", 2):
        loc = numpyro.sample("loc", dist.Normal(0, 5))
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


@pytest.mark.parametrize("key", range(3))
def test_map_estimates_of_a_model_that_enumerates(key, x64):
    """Within 20 steps, without a warning, the gradient of the loss vanishes; BFGS from there gains nothing."""
    y = jnp.array(np.random.default_rng(0).normal(np.repeat([-3.0, 2.0], [30, 20]), 1.0), float)
    guide, loss = AutoDelta(block(mixture, hide=["z"])), TraceEnum_ELBO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(mixture, guide, 20, y, loss=loss, key=key)
    params = NaturalGradient().get_params(found.state.optim_state)
    flat, back = jax.flatten_util.ravel_pytree(params)
    svi = SVI(mixture, guide, NaturalGradient(), loss)
    svi.init(random.key(0), y)
    energy = jax.jit(lambda x: loss.loss(random.key(0), svi.constrain_fn(back(x)), mixture, guide, y))
    assert float(jnp.linalg.norm(jax.grad(energy)(flat))) < 1e-3
    better = optimize.minimize(lambda x: float(energy(x)), flat, jac=jax.grad(energy))
    assert better.fun > energy(flat) - 1e-5


def test_maximum_likelihood_of_a_factor(x64):
    """A ``numpyro.factor`` has no Fisher matrix; its Hessian gives Newton's steps within a trust region."""
    y = jnp.array(Y[:, 0], float)

    def model():
        scale = numpyro.param("scale", 20.0, constraint=dist.constraints.positive)
        numpyro.factor("density", dist.Normal(numpyro.param("loc", -30.0), scale).log_prob(y).sum())

    params = run(model, lambda: None, 40).params
    np.testing.assert_allclose([params["loc"], params["scale"]], [y.mean(), y.std()], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["full", "mean-field"])
@pytest.mark.parametrize("setting", ["1-f32", "8-f32"])
def test_no_start_of_a_learned_centring_stays_on_a_plateau(guide, setting):
    """The ELBOs of 20 random starts differ by less than 0.15 nats; a plateau of the logit costs 0.4 nats and more."""
    problem = PROBLEMS["learned_centring"]
    starts = Starts(problem, guide, SETTINGS[setting], 20)
    end = starts.walk(starts.states, 200, 200).states[-1]
    elbos = np.array(Judge(problem, guide, 20).elbos(starts.params(end)))
    assert elbos.max() - elbos.min() < 0.15
