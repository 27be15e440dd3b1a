# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Posteriors with several modes, ridges, or directions that the data hardly determine."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from ..problems import problem


@problem("multimodal", 20, every_setting=True, tenth=True)
def product_of_slopes(rng: np.random.Generator) -> tuple[Any, ...]:
    """A slope that is a product: only a·b is determined by the data, up to the sign of both."""
    x = rng.normal(size=40)
    y = 1.5 * x + 0.3 * rng.normal(size=40)

    def model(x: Any, y: Any) -> None:
        a = numpyro.sample("a", dist.Normal(0, 1))
        b = numpyro.sample("b", dist.Normal(0, 1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(a * b * x, sigma), obs=y)

    return model, x, y


@problem("multimodal", 21)
def one_factor(rng: np.random.Generator) -> tuple[Any, ...]:
    """Five variables and one factor, whose sign is not determined; the scores are integrated out."""
    loadings = np.array([1.2, -0.8, 0.9, 0.5, -1.1])
    y = rng.normal(size=(60, 1)) * loadings + 0.6 * rng.normal(size=(60, 5))

    def model(y: Any) -> None:
        loadings = numpyro.sample("loadings", dist.Normal(0, 1).expand([5]).to_event(1))
        noise = numpyro.sample("noise", dist.HalfNormal(1).expand([5]).to_event(1))
        with numpyro.plate("rows", len(y)):
            covariance = jnp.outer(loadings, loadings) + jnp.diag(noise**2 + 1e-4)
            numpyro.sample("y", dist.MultivariateNormal(0, covariance), obs=y)

    return model, y


@problem("nearly unidentified", 22, every_setting=True)
def collinear_regression(rng: np.random.Generator) -> tuple[Any, ...]:
    """Five covariates of which three are nearly copies of each other, on scales of their own."""
    x = rng.normal(size=(80, 5))
    x[:, 1] = x[:, 0] + 0.01 * x[:, 1]
    x[:, 2] = x[:, 0] + 0.03 * x[:, 2]
    y = 10 + x @ [1.0, 1.0, -1.0, 0.5, 0.0] + 0.5 * rng.normal(size=80)

    def model(x: Any, y: Any) -> None:
        intercept = numpyro.sample("intercept", dist.Normal(0, 10))
        beta = numpyro.sample("beta", dist.Normal(0, 2).expand([5]).to_event(1))
        sigma = numpyro.sample("sigma", dist.HalfCauchy(1))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(intercept + x @ beta, sigma), obs=y)

    return model, x, y


@problem("multimodal", 23)
def squared_effect(rng: np.random.Generator) -> tuple[Any, ...]:
    """Measurements of a square, one at each dose: the effect may have either sign."""
    dose = np.linspace(0.5, 2, 15)
    y = (1.3 * dose) ** 2 + 0.5 * rng.normal(size=15)

    def model(dose: Any, y: Any) -> None:
        effect = numpyro.sample("effect", dist.Normal(0, 2))
        offset = numpyro.sample("offset", dist.Normal(0, 1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1))
        with numpyro.plate("doses", len(dose)):
            numpyro.sample("y", dist.Normal(offset + (effect * dose) ** 2, sigma), obs=y)

    return model, dose, y


@problem("curved", 24, every_setting=True)
def banana(rng: np.random.Generator) -> tuple[Any, ...]:
    """Two coefficients of which the data determine a + b²."""
    y = 1 + 0.5 * rng.normal(size=30)

    def model(y: Any) -> None:
        a = numpyro.sample("a", dist.Normal(0, 1))
        b = numpyro.sample("b", dist.Normal(0, 1))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(a + b**2, 0.5), obs=y)

    return model, y
