# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Discrete sites that the loss sums out, and local latents in minibatches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.funsor import config_enumerate

from ..problems import problem


@problem("discrete sites", 90, every_setting=True, enumerated=True)
def assigned_components(rng: np.random.Generator) -> tuple[Any, ...]:
    """Counts from two groups of machines; the group of each machine is a discrete site."""
    y = np.concatenate([rng.poisson(2, 30), rng.poisson(9, 20)])

    @config_enumerate
    def model(y: Any) -> None:
        weight = numpyro.sample("weight", dist.Beta(1, 1))
        rates = numpyro.sample("rates", dist.LogNormal(1, 1).expand([2]).to_event(1))
        with numpyro.plate("machines", len(y)):
            group = numpyro.sample("group", dist.Bernoulli(weight))
            numpyro.sample("y", dist.Poisson(rates[group.astype(int)]), obs=y)

    return model, y


@problem("discrete sites", 91, enumerated=True)
def annotators(rng: np.random.Generator) -> tuple[Any, ...]:
    """Four annotators of unknown accuracy label forty items whose classes are discrete sites."""
    truth = rng.integers(0, 2, 40)
    accuracy = np.array([0.95, 0.8, 0.7, 0.4])
    labels = np.where(rng.uniform(size=(40, 4)) < accuracy, truth[:, None], 1 - truth[:, None])

    @config_enumerate
    def model(labels: Any) -> None:
        share = numpyro.sample("share", dist.Beta(2, 2))
        right = numpyro.sample("right", dist.Normal(0, 1.5).expand([4]).to_event(1))
        with numpyro.plate("items", len(labels)):
            truth = numpyro.sample("truth", dist.Bernoulli(share))
            p = jax.nn.sigmoid(jnp.where(truth[..., None] == 1, right, -right))
            numpyro.sample("labels", dist.Bernoulli(p).to_event(1), obs=labels)

    return model, labels


@problem("minibatches", 92, every_setting=True, guides=("mean-field",), training={"rows": 10})
def local_rates(rng: np.random.Generator) -> tuple[Any, ...]:
    """Forty accident rates, each with a latent of its own, in minibatches of ten."""
    exposure = rng.uniform(1, 20, 40)
    y = rng.poisson(exposure * np.exp(-0.5 + 0.7 * rng.normal(size=40)))

    def model(exposure: Any, y: Any, rows: int | None = None) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 2))
        tau = numpyro.sample("tau", dist.HalfNormal(1))
        with numpyro.plate("roads", len(y), subsample_size=rows) as some:
            effect = numpyro.sample("effect", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Poisson(exposure[some] * jnp.exp(effect)), obs=y[some])

    return model, exposure, y


@problem("minibatches", 93, training={"rows": 20})
def subsampled_regression(rng: np.random.Generator) -> tuple[Any, ...]:
    """A logistic regression on 200 rows in minibatches of twenty."""
    x = rng.normal(size=(200, 4))
    y = (rng.uniform(size=200) < 1 / (1 + np.exp(-x @ [1.0, -0.5, 0.0, 2.0]))).astype(float)

    def model(x: Any, y: Any, rows: int | None = None) -> None:
        beta = numpyro.sample("beta", dist.Normal(0, 3).expand([4]).to_event(1))
        with numpyro.plate("rows", len(y), subsample_size=rows) as some:
            numpyro.sample("y", dist.Bernoulli(logits=x[some] @ beta), obs=y[some])

    return model, x, y
