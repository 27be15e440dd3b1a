# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""A step on B of N rows is a step on N/B copies of them, and changes no parameter of another row."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from numpyro import distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from numpyro_natgrad import NaturalGradient

N = 1000
Y = np.random.default_rng(0).normal(1.0, 2.0, N)


def located(y: Any) -> None:
    """Normal data with noise 2, whose minibatches are arguments."""
    mu = numpyro.sample("mu", dist.Normal(0, 10))
    with numpyro.plate("rows", N, subsample_size=len(y)):
        numpyro.sample("y", dist.Normal(mu, 2), obs=y)


def counted(y: Any) -> None:
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    with numpyro.plate("rows", N, subsample_size=len(y)):
        numpyro.sample("y", dist.Poisson(rate), obs=y)


def gamma(y: Any) -> None:
    positive = dist.constraints.positive
    a, b = numpyro.param("a", 3.0, constraint=positive), numpyro.param("b", 1.0, constraint=positive)
    numpyro.sample("rate", dist.Gamma(a, b))


def normal_posterior(y: np.ndarray) -> dict[str, float]:
    precision = 1 / 100 + N / 4
    return {"loc": N / len(y) * y.sum() / 4 / precision, "scale": precision**-0.5}


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_full_step_on_a_minibatch_is_exact_for_its_replicated_data(guide, x64):
    svi = SVI(located, guide(located), NaturalGradient(1.0, max_kl=None), Trace_ELBO(2))
    state, update = svi.init(random.key(0), jnp.asarray(Y[:10], float)), jax.jit(svi.update)
    for batch in (Y[:10], Y[10:20], Y[20:70]):
        state, _ = update(state, jnp.asarray(batch))
        loc, scale = (np.squeeze(x) for x in svi.get_params(state).values())
        expected = normal_posterior(batch)
        np.testing.assert_allclose([loc, scale], [expected["loc"], expected["scale"]], rtol=1e-8)


@pytest.mark.parametrize("weight", [20.0, np.float32(20.0), jnp.array(20.0), "argument"], ids=str)
def test_scaled_likelihood_is_treated_as_a_minibatch(weight):
    """Draws of a minibatch are not remembered, however the weight of its rows is computed."""

    def model(y: Any, scale: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 10))
        with numpyro.handlers.scale(scale=scale if weight == "argument" else weight):
            numpyro.sample("y", dist.Normal(mu, 2).expand([len(y)]).to_event(1), obs=y)

    svi = SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO(8))
    state = svi.init(random.key(0), jnp.asarray(Y[:10], float), 20.0)
    report = svi.optim.report(svi, state, jnp.asarray(Y[:10], float), 20.0)
    assert "Hessian-vector products" in report
    assert "regression" not in report


def test_conjugate_step_on_a_minibatch_is_exact_for_its_replicated_data(x64):
    y = np.random.default_rng(1).poisson(3.0, 30)
    svi = SVI(counted, gamma, NaturalGradient(1.0, max_kl=None), Trace_ELBO(4))
    state, update = svi.init(random.key(0), jnp.asarray(y[:10])), jax.jit(svi.update)
    for batch in (y[:10], y[10:]):
        state, _ = update(state, jnp.asarray(batch))
        params = svi.get_params(state)
        np.testing.assert_allclose(params["a"], 2 + N / len(batch) * batch.sum(), rtol=1e-8)
        np.testing.assert_allclose(params["b"], 1 + N, rtol=1e-8)


@pytest.mark.slow
def test_minibatches_of_one_percent_reach_the_fixed_point_of_all_data():
    """After T steps of B rows the mean's variance is N/(BT) of the posterior's; 4 standard errors are allowed."""
    svi = SVI(located, AutoNormal(located), NaturalGradient(), Trace_ELBO(4))
    batches = jnp.asarray(Y, jnp.float32)[random.randint(random.key(1), (1000, 10), 0, N)]

    @jax.jit
    def fit(state: Any) -> Any:
        return jax.lax.scan(lambda s, y: svi.update(s, y), state, batches)

    state, _ = fit(svi.init(random.key(0), batches[0]))
    params, expected = svi.get_params(state), normal_posterior(Y)
    # The running mean looks back over the later half of the steps at least.
    error = expected["scale"] * np.sqrt(N / (10 * 500))
    assert abs(params["mu_auto_loc"] - expected["loc"]) < 4 * error
    np.testing.assert_allclose(params["mu_auto_scale"], expected["scale"], rtol=0.05)


ROWS, BATCH, PARTICLES = 100, 5, 4
NOISY = np.random.default_rng(2).normal(1.0, np.sqrt(1.25), ROWS)


def hierarchy(y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 10))
    with numpyro.plate("rows", ROWS, subsample_size=BATCH) as rows:
        theta = numpyro.sample("theta", dist.Normal(mu, 1))
        numpyro.sample("y", dist.Normal(theta, 0.5), obs=y[rows])


@cache
def local() -> tuple[SVI, Any]:
    guide = AutoNormal(hierarchy, create_plates=lambda y: numpyro.plate("rows", ROWS, subsample_size=BATCH))
    svi = SVI(hierarchy, guide, NaturalGradient(), Trace_ELBO(PARTICLES))
    return svi, svi.init(random.key(0), jnp.asarray(NOISY, jnp.float32))


@cache
def fitted() -> list[dict[str, np.ndarray]]:
    svi, state = local()
    update, y = jax.jit(svi.update), jnp.asarray(NOISY, jnp.float32)
    walk = [state.optim_state[1].params]
    for _ in range(400):
        state, _ = update(state, y)
        walk.append(state.optim_state[1].params)
    return [*jax.tree.map(np.asarray, walk), jax.tree.map(np.asarray, svi.get_params(state))]


def test_only_gathered_rows_change():
    for before, after in zip(fitted()[:5], fitted()[1:6], strict=True):
        for name in ("theta_auto_loc", "theta_auto_scale"):
            assert 1 <= np.sum(before[name] != after[name]) <= PARTICLES * BATCH  # every particle has rows of its own


@pytest.mark.slow
def test_no_local_scale_collapses_from_a_wide_start():
    """A scale that is far too wide narrows by one nat at most, so that its mean can still move; others change alike."""
    plates = lambda y: numpyro.plate("rows", ROWS, subsample_size=BATCH)
    svi = SVI(hierarchy, AutoNormal(hierarchy, init_scale=10.0, create_plates=plates), NaturalGradient(), Trace_ELBO(8))
    y = jnp.asarray(NOISY, jnp.float32)
    state, narrowest = svi.init(random.key(0), y), []
    update = jax.jit(svi.update)
    for _ in range(40):
        state, _ = update(state, y)
        narrowest.append(float(jnp.min(svi.optim.get_params(state.optim_state)["theta_auto_scale"])))
    assert min(narrowest) > np.log(np.expm1(0.1 * 5**-0.5))  # unconstrained; a tenth of the exact scale
    assert int(svi.optim.info(state).skipped_total) <= 4


@pytest.mark.slow
def test_local_latents_reach_the_mean_field_of_all_rows():
    """Local latents reach the exact mean field; the global mean is within a posterior standard deviation."""
    params = fitted()[-1]
    precision = np.diag(np.r_[1 / 100 + ROWS, np.full(ROWS, 5.0)])
    precision[0, 1:] = precision[1:, 0] = -1
    mean = np.linalg.solve(precision, np.r_[0, 4 * NOISY])
    assert abs(params["mu_auto_loc"] - mean[0]) < 4 * np.linalg.inv(precision)[0, 0] ** 0.5 * np.sqrt(0.1)
    error = np.sqrt(np.mean((params["theta_auto_loc"] - mean[1:]) ** 2))
    assert error < 0.25 * 5**-0.5
    np.testing.assert_allclose(np.mean(params["theta_auto_scale"]), 5**-0.5, rtol=0.1)
