# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Hierarchies, centred and not, and parameters of the model beside a guide."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import reparam
from numpyro.infer.reparam import LocScaleReparam

from ..problems import problem


@problem("hierarchy, centred", 30, every_setting=True)
def centred_effects(rng: np.random.Generator) -> tuple[Any, ...]:
    """Ten estimates with known errors and effects around a common mean."""
    errors = rng.uniform(3, 12, 10)
    y = 5 + 6 * rng.normal(size=10) + errors * rng.normal(size=10)

    def model(errors: Any, y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 10))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("studies", len(y)):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, errors), obs=y)

    return model, errors, y


@problem("hierarchy, non-centred", 31, every_setting=True, tenth=True)
def group_intercepts(rng: np.random.Generator) -> tuple[Any, ...]:
    """Twelve groups of four to ten rows with intercepts of their own, and a common slope."""
    group = np.repeat(np.arange(12), rng.integers(4, 11, 12))
    x = rng.normal(size=len(group))
    y = 2 + 0.9 * rng.normal(size=12)[group] + 0.7 * x + 0.5 * rng.normal(size=len(group))

    def model(group: Any, x: Any, y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfNormal(2))
        slope = numpyro.sample("slope", dist.Normal(0, 2))
        sigma = numpyro.sample("sigma", dist.HalfNormal(2))
        with numpyro.plate("groups", 12):
            z = numpyro.sample("z", dist.Normal(0, 1))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(mu + tau * z[group] + slope * x, sigma), obs=y)

    return model, group, x, y


@problem("hierarchy, centred", 32)
def counts_by_region(rng: np.random.Generator) -> tuple[Any, ...]:
    """Cases in ten regions of very different populations, with log rates around a common one."""
    exposure = np.round(10 ** rng.uniform(0, 3, 10))
    y = rng.poisson(exposure * np.exp(-2 + 0.6 * rng.normal(size=10)))

    def model(exposure: Any, y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 3))
        tau = numpyro.sample("tau", dist.HalfNormal(1))
        with numpyro.plate("regions", len(y)):
            log_rate = numpyro.sample("log_rate", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Poisson(exposure * jnp.exp(log_rate)), obs=y)

    return model, exposure, y


@problem("parameters of the model", 33, every_setting=True, tenth=True)
def learned_centring(rng: np.random.Generator) -> tuple[Any, ...]:
    """Batting averages of eight players, where each player's centring is learned beside the guide."""
    at_bats = np.array([10, 20, 45, 80, 150, 300, 400, 450])
    hits = rng.binomial(at_bats, 1 / (1 + np.exp(1.2 - 0.3 * rng.normal(size=8))))

    @reparam(config={"skill": LocScaleReparam(None)})
    def model(at_bats: Any, hits: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(-1, 1))
        tau = numpyro.sample("tau", dist.HalfCauchy(1))
        with numpyro.plate("players", len(hits)):
            skill = numpyro.sample("skill", dist.Normal(mu, tau))
            numpyro.sample("hits", dist.Binomial(at_bats, logits=skill), obs=hits)

    return model, at_bats, hits


@problem("parameters of the model", 34)
def empirical_bayes(rng: np.random.Generator) -> tuple[Any, ...]:
    """Twelve means whose common location and scale are parameters of the model."""
    y = (3 + 2 * rng.normal(size=12))[:, None] + 1.5 * rng.normal(size=(12, 4))

    def model(y: Any) -> None:
        mu = numpyro.param("mu", 0.0)
        tau = numpyro.param("tau", 1.0, constraint=dist.constraints.positive)
        sigma = numpyro.sample("sigma", dist.HalfNormal(3))
        with numpyro.plate("groups", len(y)):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta[:, None], sigma).to_event(1), obs=y)

    return model, y


@problem("funnel", 35, every_setting=True)
def funnel(rng: np.random.Generator) -> tuple[Any, ...]:
    """Neal's funnel with six scales and one weak measurement."""
    y = rng.normal(size=1)

    def model(y: Any) -> None:
        v = numpyro.sample("v", dist.Normal(0, 3))
        with numpyro.plate("neck", 6):
            z = numpyro.sample("z", dist.Normal(0, jnp.exp(v / 2)))
        numpyro.sample("y", dist.Normal(z[:1], 5).to_event(1), obs=y)

    return model, y


@problem("hierarchy, non-centred", 36)
def item_response(rng: np.random.Generator) -> tuple[Any, ...]:
    """Eight people answer six questions, which differ in difficulty and in discrimination."""
    ability, difficulty = rng.normal(size=8), rng.normal(size=6)
    y = (rng.uniform(size=(8, 6)) < 1 / (1 + np.exp(-1.3 * (ability[:, None] - difficulty)))).astype(float)

    def model(y: Any) -> None:
        spread = numpyro.sample("spread", dist.HalfNormal(2))
        with numpyro.plate("items", 6):
            difficulty = numpyro.sample("difficulty", dist.Normal(0, 1.5))
        with numpyro.plate("people", 8):
            ability = numpyro.sample("ability", dist.Normal(0, 1))
        logits = spread * (ability[:, None] - difficulty)
        numpyro.sample("y", dist.Bernoulli(logits=logits).to_event(2), obs=y)

    return model, y


@problem("hierarchy, heavy tails", 37)
def robust_meta_analysis(rng: np.random.Generator) -> tuple[Any, ...]:
    """Nine studies, one of which disagrees, with effects from a Student distribution."""
    errors = rng.uniform(0.1, 0.4, 9)
    y = 0.4 + 0.2 * rng.normal(size=9) + errors * rng.normal(size=9)
    y[5] += 3

    def model(errors: Any, y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        tau = numpyro.sample("tau", dist.HalfNormal(0.5))
        with numpyro.plate("studies", len(y)):
            theta = numpyro.sample("theta", dist.StudentT(3, mu, tau))
            numpyro.sample("y", dist.Normal(theta, errors), obs=y)

    return model, errors, y
