# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Rows of :mod:`numpyro_suite` that stand for ``test/infer/test_svi.py`` and ``test_infer_util.py``."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import lax, random
from numpy.testing import assert_allclose
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)

Optimizer = Any


class Fit(NamedTuple):
    svi: SVI
    params: dict[str, Any]
    losses: jax.Array
    state: Any


def fit(
    optimizer: Optimizer, model: Any, guide: Any, steps: int, *args: Any, loss: Any = None, seed: int = 0, **kwargs: Any
) -> Fit:
    svi = SVI(model, guide, optimizer, loss or Trace_ELBO())
    result = svi.run(random.PRNGKey(seed), steps, *args, progress_bar=False, **kwargs)
    return Fit(svi, result.params, result.losses, result.state)


# A coin, with a Beta guide.

COIN = np.array([1.0] * 8 + [0.0] * 2, np.float32)


def coin(data: Any) -> None:
    heads = numpyro.sample("beta", dist.Beta(1.0, 1.0))
    with numpyro.plate("N", 10):
        numpyro.deterministic("beta_sq", heads**2)
        numpyro.sample("obs", dist.Bernoulli(heads), obs=data)


def beta_guide(data: Any, random_start: bool = False) -> None:
    starts = (random.normal, random.exponential) if random_start else (1.0, 1.0)
    a, b = (
        numpyro.param(name, start, constraint=constraints.positive)
        for name, start in zip(("alpha_q", "beta_q"), starts, strict=True)
    )
    numpyro.sample("beta", dist.Beta(a, b))


def beta_mean(params: Any) -> Any:
    return params["alpha_q"] / (params["alpha_q"] + params["beta_q"])


def beta_bernoulli(loss: Any, optimizer: Optimizer) -> None:
    params = fit(optimizer, coin, beta_guide, 10_000, jnp.array(COIN), loss=loss, seed=1).params
    assert_allclose(beta_mean(params), 9 / 12, atol=0.03, rtol=0.03)


def run(optimizer: Optimizer) -> None:
    found = fit(optimizer, coin, partial(beta_guide, random_start=True), 1000, jnp.array(COIN), seed=1)
    assert found.losses.shape == (1000,)
    assert_allclose(beta_mean(found.params), 0.8, atol=0.05, rtol=0.05)


def vectorized_particle(optimizer: Optimizer) -> None:
    losses = [
        fit(optimizer, coin, beta_guide, 100, jnp.array(COIN), loss=Trace_ELBO(vectorize_particles=v)).losses
        for v in (True, False)
    ]
    assert_allclose(*losses, atol=1e-5)


def jitted_update(optimizer: Optimizer) -> None:
    svi = SVI(coin, beta_guide, optimizer, Trace_ELBO())
    state = svi.init(random.PRNGKey(1), jnp.array(COIN))
    plain, jitted = (update(state, jnp.array(COIN))[0] for update in (svi.update, jax.jit(svi.update)))
    jax.tree.map(partial(assert_allclose, atol=1e-5), svi.get_params(jitted), svi.get_params(plain))


def predictive_with_guide(optimizer: Optimizer) -> None:
    params = fit(optimizer, coin, beta_guide, 5000, jnp.array(COIN), seed=1).params
    draws = Predictive(coin, guide=beta_guide, params=params, num_samples=1000)(random.PRNGKey(2), data=None)
    assert draws["beta_sq"].shape == (1000,)
    assert_allclose(draws["obs"].astype(np.float32).mean(), 0.8, atol=0.05)


# Parameters without any latent.


def param_constraints(optimizer: Optimizer) -> None:
    starts = {"a": 2.5, "b": 0.7, "c": -1.3, "d": 0.4}

    def model() -> None:
        loc = numpyro.param("a", starts["a"], constraint=constraints.greater_than(1.0))
        scale = numpyro.param("b", starts["b"], constraint=constraints.positive)
        numpyro.sample("x", dist.Normal(loc, scale), obs=0.3)

    def guide() -> None:
        loc = numpyro.param("c", starts["c"], constraint=constraints.interval(-2.0, -1.0))
        scale = numpyro.param("d", starts["d"], constraint=constraints.unit_interval)
        numpyro.sample("y", dist.Normal(loc, scale), obs=0.3)

    svi = SVI(model, guide, optimizer, Trace_ELBO())
    state = svi.init(random.PRNGKey(0))
    for name, value in svi.get_params(state).items():
        assert_allclose(value, starts[name], rtol=1e-6)
    expected = dist.Normal(-1.3, 0.4).log_prob(0.3) - dist.Normal(2.5, 0.7).log_prob(0.3)
    assert_allclose(svi.evaluate(state), expected, rtol=1e-6)


def shared_param_init(optimizer: Optimizer) -> None:
    svi = SVI(lambda: numpyro.param("shared"), lambda: numpyro.param("shared", lambda _: 1.0), optimizer, Trace_ELBO())
    assert_allclose(svi.get_params(svi.init(random.PRNGKey(0)))["shared"], 1.0)


def shared_param(optimizer: Optimizer) -> None:
    def model() -> None:
        numpyro.factor("neg_loss", -((numpyro.param("shared") - 5.0) ** 2))

    found = fit(optimizer, model, lambda: numpyro.param("shared", 1.0), 1000)
    assert_allclose(found.params["shared"], 5.0, atol=0.1)


def init_params(optimizer: Optimizer) -> None:
    def model() -> None:
        numpyro.param("a", 0.0)
        numpyro.param("b")

    svi = SVI(model, lambda: numpyro.param("c"), optimizer, Trace_ELBO())
    params = svi.get_params(svi.init(random.PRNGKey(0), init_params={"b": 1.0, "c": 2.0}))
    assert {name: float(x) for name, x in params.items()} == {"a": 0.0, "b": 1.0, "c": 2.0}


def small_num_steps(optimizer: Optimizer) -> None:
    for steps in (10, 30, 50):
        fit(optimizer, lambda: None, lambda: None, steps)


def stable_run(optimizer: Optimizer) -> None:
    def model() -> None:
        variance = numpyro.sample("var", dist.Exponential(1))
        numpyro.sample("obs", dist.Normal(0, jnp.sqrt(variance)), obs=0.0)

    def guide() -> None:
        numpyro.sample("var", dist.Normal(numpyro.param("loc", 0.0), 10))

    assert jnp.isfinite(fit(optimizer, model, guide, 1000, stable_update=True).params["loc"])


def discrete_latent(optimizer: Optimizer) -> None:
    def guide() -> None:
        numpyro.sample("x", dist.Bernoulli(numpyro.param("probs", 0.2)))

    for loss in (RenyiELBO(), Trace_ELBO(), TraceMeanField_ELBO()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(optimizer, lambda: numpyro.sample("x", dist.Bernoulli(0.5)), guide, 10, loss=loss)
        text = f"SVI with {type(loss).__name__} loss does not support models with discrete latent variables"
        assert any(text in str(w.message) for w in caught)


def mutable_state(loss: Any, optimizer: Optimizer) -> None:
    def model() -> None:
        numpyro.primitives.mutable("x1p", numpyro.sample("x", dist.Normal(-1, 1)) + 1)

    def guide() -> None:
        loc = numpyro.param("loc", 0.0)
        numpyro.primitives.mutable("loc1p", {"value": None})["value"] = loc + 2
        numpyro.sample("x", dist.Normal(loc, 0.1))

    for stable in (True, False):
        found = fit(optimizer, model, guide, 1000, loss=loss(), stable_update=stable)
        kept = found.state.mutable_state
        assert set(kept) == {"x1p", "loc1p"}
        assert_allclose(kept["loc1p"]["value"], found.params["loc"] + 2, atol=0.1)
        assert_allclose(kept["x1p"], 1.0, atol=0.2)


def forward_mode(optimizer: Optimizer) -> None:
    """A model that reverse mode cannot differentiate."""

    def model() -> None:
        x = numpyro.sample("x", dist.Normal(0, 5))
        y = lax.while_loop(lambda y: y < 10, lambda y: y + 1, x)
        numpyro.sample("obs", dist.Normal(y, 1), obs=1.0)

    def guide() -> None:
        loc, scale = numpyro.param("loc", 0.0), numpyro.param("scale", 1.0, constraint=constraints.positive)
        numpyro.sample("x", dist.Normal(loc, scale))

    try:
        fit(optimizer, model, guide, 1000)
    except ValueError as error:
        assert "everse-mode" in str(error)  # noqa: PT017
    else:
        raise AssertionError("expected a ValueError about reverse mode")
    fit(optimizer, model, guide, 1000, forward_mode_differentiation=True)


# Score functions, one particle: distributions that claim not to be reparameterised, and known posteriors.


class ScoreNormal(dist.Normal):
    reparametrized_params = []


class ScoreBeta(dist.Beta):
    reparametrized_params = []


class ScoreGamma(dist.Gamma):
    reparametrized_params = []


def graph_normal_normal(optimizer: Optimizer) -> None:
    prior, noise = np.array([0.1, 0.1]), np.array([6.0, 4.0])
    rows = np.array([[-0.1, 0.3], [0.0, 0.4], [0.2, 0.5], [0.1, 0.7]], np.float32)
    precision = prior + 4 * noise
    loc = (rows.sum(0) * noise + np.array([0.0, 0.5]) * prior) / precision
    log_scale = -0.5 * np.log(precision)

    def model() -> None:
        with numpyro.plate("plate", 2):
            z = numpyro.sample("loc_latent", ScoreNormal(jnp.array([0.0, 0.5]), jnp.array(prior, float) ** -0.5))
            for i, row in enumerate(rows):
                numpyro.sample(f"obs_{i}", dist.Normal(z, jnp.array(noise, float) ** -0.5), obs=jnp.array(row))

    def guide() -> None:
        m = numpyro.param("loc_q", jnp.array(loc + 0.334, float))
        s = numpyro.param("log_sig_q", jnp.array(log_scale - 0.29, float))
        with numpyro.plate("plate", 2):
            numpyro.sample("loc_latent", ScoreNormal(m, jnp.exp(s)))

    params = fit(optimizer, model, guide, 5000, loss=TraceGraph_ELBO()).params
    assert_allclose(np.sum((params["loc_q"] - loc) ** 2), 0, atol=0.05)
    assert_allclose(np.sum((params["log_sig_q"] - log_scale) ** 2), 0, atol=0.05)


def graph_conjugate(
    prior: Callable[[Any, Any], Any],
    likelihood: Callable[[Any], Any],
    data: list[float],
    exact: tuple[float, float],
    steps: int,
    tolerances: tuple[float, float],
    optimizer: Optimizer,
) -> None:
    """Both parameters of the posterior in logarithms, from starts 0.17 above and 0.143 below."""

    def model() -> None:
        z = numpyro.sample("latent", prior(1.0, 1.0))
        with numpyro.plate("data", len(data)):
            numpyro.sample("obs", likelihood(z), obs=jnp.array(data))

    def guide() -> None:
        a = numpyro.param("a", jnp.array(np.log(exact[0]) + 0.17, float))
        b = numpyro.param("b", jnp.array(np.log(exact[1]) - 0.143, float))
        numpyro.sample("latent", prior(jnp.exp(a), jnp.exp(b)))

    params = fit(optimizer, model, guide, steps, loss=TraceGraph_ELBO()).params
    for name, value, atol in zip("ab", exact, tolerances, strict=True):
        assert_allclose((params[name] - np.log(value)) ** 2, 0, atol=atol)


def graph_gaussian_chain(n: int, steps: int, optimizer: Optimizer) -> None:
    """z_1 → ... → z_n → four rows; the guide draws backwards, each site given the one after it."""
    start, data = 0.2, np.array([-0.1, 0.03, 0.2, 0.1], np.float32)
    precision = [1.5 * (k + 1) / n for k in range(n + 1)]
    marginal = [precision[0]]
    for k in range(1, n):
        marginal.append(precision[k] * marginal[k - 1] / (precision[k] + marginal[k - 1]))
    posterior = [precision[k] + marginal[k - 1] for k in range(1, n)] + [4 * precision[n] + marginal[-1]]
    slope = [precision[k] / posterior[k - 1] for k in range(1, n)]
    loc = [start * marginal[k - 1] / posterior[k - 1] for k in range(1, n)]
    loc.append((data.sum() * precision[n] + start * marginal[-1]) / posterior[-1])
    rng = np.random.RandomState(0)
    pathwise = rng.binomial(1, 0.3, n)
    while not 0.5 < pathwise.sum() < 0.4 * n:
        pathwise = rng.binomial(1, 0.3, n)

    def model() -> None:
        z = start
        for k in range(n):
            z = numpyro.sample(f"z_{k}", dist.Normal(z, precision[k] ** -0.5))
        with numpyro.plate("data", 4):
            numpyro.sample("obs", dist.Normal(z, precision[n] ** -0.5), obs=jnp.array(data))

    def near(name: str, value: float) -> Any:
        return numpyro.param(name, lambda key: value + 0.6 * (0.1 * random.normal(key) - 0.53))

    def guide() -> None:
        z = None
        for k in reversed(range(n)):
            m, s = near(f"loc_{k}", loc[k]), near(f"log_sig_{k}", -0.5 * np.log(posterior[k]))
            mean = m if z is None else near(f"slope_{k}", slope[k]) * z + m
            z = numpyro.sample(f"z_{k}", (dist.Normal if pathwise[k] else ScoreNormal)(mean, jnp.exp(s)))

    params = fit(optimizer, model, guide, steps, loss=TraceGraph_ELBO()).params
    for k in range(n):
        assert_allclose((params[f"loc_{k}"] - loc[k]) ** 2, 0, atol=0.05)
        assert_allclose((params[f"log_sig_{k}"] + 0.5 * np.log(posterior[k])) ** 2, 0, atol=0.05)
        if k < n - 1:
            assert_allclose((params[f"slope_{k}"] - slope[k]) ** 2, 0, atol=0.05)


# Autoguides.
