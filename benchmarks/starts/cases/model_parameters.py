# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Parameters of the model beside the guide: hyper-parameters, variance components, learned centring, weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.handlers import reparam
from numpyro.infer.reparam import LocScaleReparam

from ..problems import problem


def positive(name: str, value: Any) -> Any:
    """A positive parameter."""
    return numpyro.param(name, value, constraint=constraints.positive)


@problem("parameters of the model", 900)
def gp_of_counts(rng: np.random.Generator) -> tuple[Any, ...]:
    """Thirty counts along a curve, by a Gaussian process whose mean, variance and length are parameters."""
    x = np.linspace(0, 1, 30)
    y = rng.poisson(np.exp(1 + np.sin(6 * x)))

    def model(x: Any, y: Any) -> None:
        variance, length, mean = positive("variance", 1.0), positive("length", 0.5), numpyro.param("mean", 0.0)
        kernel = variance * jnp.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + 1e-3 * jnp.eye(len(x))
        z = numpyro.sample("z", dist.Normal(0, 1).expand([len(x)]).to_event(1))
        rate = jnp.exp(mean + jnp.linalg.cholesky(kernel) @ z)
        numpyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)

    return model, x, y


@problem("parameters of the model", 901)
def variance_components(rng: np.random.Generator) -> tuple[Any, ...]:
    """Fifteen groups of four, far from the start, with a mean and two standard deviations as parameters."""
    effect, group = 0.3 * rng.normal(size=15), np.repeat(np.arange(15), 4)
    y = 50 + 10 * (effect[group] + rng.normal(size=60))

    def model(group: Any, y: Any) -> None:
        mu, tau, sigma = numpyro.param("mu", 0.0), positive("tau", 1.0), positive("sigma", 1.0)
        with numpyro.plate("groups", 15):
            a = numpyro.sample("a", dist.Normal(0, tau))
        numpyro.sample("y", dist.Normal(mu + a[group], sigma).to_event(1), obs=y)

    return model, group, y


@problem("parameters of the model", 902)
def schools_learned_centring(rng: np.random.Generator) -> tuple[Any, ...]:
    """Eight schools with a learned centring."""
    y = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])
    errors = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])

    @reparam(config={"theta": LocScaleReparam(None)})
    def model(errors: Any, y: Any) -> None:
        mu, tau = numpyro.sample("mu", dist.Normal(0, 5)), numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("schools", 8):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, errors), obs=y)

    return model, errors, y


@problem("parameters of the model", 903)
def counts_learned_centring(rng: np.random.Generator) -> tuple[Any, ...]:
    """Ten log-rates with three counts each and a learned centring, which should be near one."""
    y = rng.poisson(np.exp(2 + 0.7 * rng.normal(size=10))[:, None], (10, 3))

    @reparam(config={"eta": LocScaleReparam(None)})
    def model(y: Any) -> None:
        mu, tau = numpyro.sample("mu", dist.Normal(0, 5)), numpyro.sample("tau", dist.HalfNormal(2))
        with numpyro.plate("rates", 10):
            eta = numpyro.sample("eta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Poisson(jnp.exp(eta)[:, None]).to_event(1), obs=y)

    return model, y


@problem("parameters of the model", 904)
def factor_loadings(rng: np.random.Generator) -> tuple[Any, ...]:
    """Twenty rows of six measurements of one factor, whose loadings and errors are parameters."""
    y = rng.normal(size=(20, 1)) @ rng.normal(size=(1, 6)) + 0.5 * rng.normal(size=(20, 6))

    def model(y: Any) -> None:
        loadings, sigma = numpyro.param("loadings", 0.3 * jnp.ones(6)), positive("sigma", jnp.ones(6))
        with numpyro.plate("rows", 20):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z[:, None] * loadings, sigma).to_event(1), obs=y)

    return model, y


@problem("parameters of the model", 905)
def relevance_of_covariates(rng: np.random.Generator) -> tuple[Any, ...]:
    """A logistic regression with a prior scale for each of six covariates, of which three do not matter."""
    x = rng.normal(size=(80, 6))
    y = rng.binomial(1, 1 / (1 + np.exp(-x @ np.array([2.0, -1.5, 0.7, 0, 0, 0]))))

    def model(x: Any, y: Any) -> None:
        beta = numpyro.sample("beta", dist.Normal(0, positive("scale", jnp.ones(6))).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=x @ beta).to_event(1), obs=y)

    return model, x, y


@problem("parameters of the model", 906)
def overdispersed_counts(rng: np.random.Generator) -> tuple[Any, ...]:
    """Forty counts with errors of their own; level, slope and the errors' scale are parameters."""
    x = rng.normal(size=40)
    y = rng.poisson(np.exp(1 + 0.5 * x + 0.8 * rng.normal(size=40)))

    def model(x: Any, y: Any) -> None:
        level, slope, scale = numpyro.param("level", 0.0), numpyro.param("slope", 0.0), positive("scale", 1.0)
        errors = numpyro.sample("errors", dist.Normal(0, scale).expand([40]).to_event(1))
        numpyro.sample("y", dist.Poisson(jnp.exp(level + slope * x + errors)).to_event(1), obs=y)

    return model, x, y


@problem("parameters of the model", 907)
def mixture_weights(rng: np.random.Generator) -> tuple[Any, ...]:
    """Two Gaussians with latent means; weights and common scale are parameters."""
    y = np.concatenate([rng.normal(-2, 1, 30), rng.normal(3, 1, 15)])

    def model(y: Any) -> None:
        weights = numpyro.param("weights", jnp.array([0.5, 0.5]), constraint=constraints.simplex)
        means = numpyro.sample("means", dist.Normal(jnp.array([-1.0, 1.0]), 5).to_event(1))
        parts = dist.Normal(means, positive("scale", 1.0))
        mixture = dist.MixtureSameFamily(dist.Categorical(probs=weights), parts)
        numpyro.sample("y", mixture.expand([45]).to_event(1), obs=y)

    return model, y


@problem("parameters of the model", 908)
def lapse_rate(rng: np.random.Generator) -> tuple[Any, ...]:
    """A psychometric curve whose rate of lapses is a parameter between zero and one."""
    x = np.linspace(-3, 3, 40)
    y = rng.binomial(10, 0.05 + 0.9 / (1 + np.exp(-2 * x)))

    def model(x: Any, y: Any) -> None:
        lapses = numpyro.param("lapses", 0.1, constraint=constraints.unit_interval)
        level, slope = numpyro.sample("level", dist.Normal(0, 2)), numpyro.sample("slope", dist.Normal(0, 2))
        p = lapses / 2 + (1 - lapses) * jax.nn.sigmoid(level + slope * x)
        numpyro.sample("y", dist.Binomial(10, p).to_event(1), obs=y)

    return model, x, y
