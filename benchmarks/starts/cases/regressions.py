# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Heavy tails, shrinkage, and small networks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from ..problems import problem


@problem("heavy tails", 40, every_setting=True, tenth=True)
def student_regression(rng: np.random.Generator) -> tuple[Any, ...]:
    """A regression on two covariates whose errors have an unknown number of degrees of freedom."""
    x = rng.normal(size=(70, 2))
    y = 1 + x @ [0.8, -0.5] + 0.4 * rng.standard_t(2.5, 70)

    def model(x: Any, y: Any) -> None:
        intercept = numpyro.sample("intercept", dist.Normal(0, 5))
        beta = numpyro.sample("beta", dist.Normal(0, 2).expand([2]).to_event(1))
        scale = numpyro.sample("scale", dist.HalfNormal(2))
        df = numpyro.sample("df", dist.Gamma(2, 0.1))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.StudentT(df, intercept + x @ beta, scale), obs=y)

    return model, x, y


@problem("heavy tails", 41)
def cauchy_location(rng: np.random.Generator) -> tuple[Any, ...]:
    """Location and scale of eleven measurements in two clusters, with Cauchy errors."""
    y = np.concatenate([rng.normal(-4, 0.5, 5), rng.normal(3, 0.5, 6)])

    def model(y: Any) -> None:
        location = numpyro.sample("location", dist.Normal(0, 10))
        scale = numpyro.sample("scale", dist.HalfCauchy(1))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Cauchy(location, scale), obs=y)

    return model, y


@problem("horseshoe", 42, every_setting=True)
def horseshoe(rng: np.random.Generator) -> tuple[Any, ...]:
    """Six covariates of which two matter, with the horseshoe in non-centred form."""
    x = rng.normal(size=(50, 6))
    y = x @ [2.0, 0, 0, -1.5, 0, 0] + 0.8 * rng.normal(size=50)

    def model(x: Any, y: Any) -> None:
        tau = numpyro.sample("tau", dist.HalfCauchy(0.5))
        sigma = numpyro.sample("sigma", dist.HalfNormal(2))
        with numpyro.plate("covariates", 6):
            local = numpyro.sample("local", dist.HalfCauchy(1))
            z = numpyro.sample("z", dist.Normal(0, 1))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(x @ (tau * local * z), sigma), obs=y)

    return model, x, y


@problem("horseshoe", 43)
def laplace_shrinkage(rng: np.random.Generator) -> tuple[Any, ...]:
    """A logistic regression with more shrinkage than data: 40 rows, eight covariates, a Laplace prior."""
    x = rng.normal(size=(40, 8))
    y = (rng.uniform(size=40) < 1 / (1 + np.exp(-2.5 * x[:, 0]))).astype(float)

    def model(x: Any, y: Any) -> None:
        scale = numpyro.sample("scale", dist.HalfCauchy(1))
        beta = numpyro.sample("beta", dist.Laplace(0, scale).expand([8]).to_event(1))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)

    return model, x, y


@problem("small network", 44, every_setting=True)
def network_regression(rng: np.random.Generator) -> tuple[Any, ...]:
    """A curve by a network of three hidden units."""
    x = np.linspace(-2, 2, 40)
    y = np.sin(2 * x) + 0.15 * rng.normal(size=40)

    def model(x: Any, y: Any) -> None:
        w1 = numpyro.sample("w1", dist.Normal(0, 2).expand([3]).to_event(1))
        b1 = numpyro.sample("b1", dist.Normal(0, 2).expand([3]).to_event(1))
        w2 = numpyro.sample("w2", dist.Normal(0, 2).expand([3]).to_event(1))
        b2 = numpyro.sample("b2", dist.Normal(0, 1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
        mean = jnp.tanh(x[:, None] * w1 + b1) @ w2 + b2
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(mean, sigma), obs=y)

    return model, x, y


@problem("small network", 45)
def network_classifier(rng: np.random.Generator) -> tuple[Any, ...]:
    """Two interleaved classes by a network of two hidden units."""
    x = rng.normal(size=(80, 2))
    y = (x[:, 0] * x[:, 1] + 0.2 * rng.normal(size=80) > 0).astype(float)

    def model(x: Any, y: Any) -> None:
        w1 = numpyro.sample("w1", dist.Normal(0, 2).expand([2, 2]).to_event(2))
        b1 = numpyro.sample("b1", dist.Normal(0, 1).expand([2]).to_event(1))
        w2 = numpyro.sample("w2", dist.Normal(0, 3).expand([2]).to_event(1))
        b2 = numpyro.sample("b2", dist.Normal(0, 1))
        logits = jax.nn.softplus(x @ w1 + b1) @ w2 + b2
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    return model, x, y


@problem("scales", 46)
def unscaled_regression(rng: np.random.Generator) -> tuple[Any, ...]:
    """Covariates as they come: an age, an income in thousands, and a share; nothing is standardised."""
    x = np.column_stack([rng.uniform(20, 70, 90), rng.lognormal(3.5, 0.5, 90), rng.uniform(0, 0.1, 90)])
    y = 120 + x @ [0.4, -0.2, 150.0] + 6 * rng.normal(size=90)

    def model(x: Any, y: Any) -> None:
        intercept = numpyro.sample("intercept", dist.Normal(100, 100))
        beta = numpyro.sample("beta", dist.Normal(0, jnp.array([5.0, 5.0, 500.0])).to_event(1))
        sigma = numpyro.sample("sigma", dist.HalfCauchy(10))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(intercept + x @ beta, sigma), obs=y)

    return model, x, y
