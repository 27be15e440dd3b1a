# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""More random starts of a mixture arrive at its best optimum, because the covariance waits for the mean before it widens."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax, random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.options import RuleConstants

STARTS, STEPS = 32, 150


def model(x, y):
    """A straight line, and a broad background that a share of the points comes from."""
    slope = numpyro.sample("slope", dist.Normal(0, 2))
    level = numpyro.sample("level", dist.Normal(0, 2))
    mean = numpyro.sample("background", dist.Normal(0, 2))
    sd = numpyro.sample("sd", dist.HalfNormal(3))
    share = numpyro.sample("share", dist.Beta(1, 1))
    line = jnp.log1p(-share) + dist.Normal(level + slope * x, 0.1).log_prob(y)
    numpyro.factor("y", jnp.sum(jnp.logaddexp(line, jnp.log(share) + dist.Normal(mean, sd).log_prob(y))))


def data():
    rng = np.random.default_rng(7)
    x = rng.uniform(-2, 2, 24)
    y = 0.3 + 0.9 * x + 0.1 * rng.normal(size=24)
    y[:5] += rng.normal(size=5) * 2
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def elbos():
    """The ELBO at common draws after the fit of every start."""
    args, states = data(), []
    for key in random.split(random.key(0), STARTS):
        svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(num_particles=8))
        states.append(svi.init(key, *args))
    step = jax.vmap(lambda state: svi.update(state, *args)[0])
    judge = Trace_ELBO(num_particles=1000)

    @jax.jit
    def run(state):
        state = lax.fori_loop(0, STEPS, lambda _, state: step(state), state)
        value = lambda params: -judge.loss(random.key(1), params, model, svi.guide, *args)
        return jax.vmap(value)(jax.vmap(svi.get_params)(state))

    return np.asarray(run(jax.tree.map(lambda *xs: jnp.stack(xs), *states)))


@pytest.mark.slow
def test_more_random_starts_of_a_line_with_outliers_arrive_if_the_covariance_waits(monkeypatch):
    """More than 70 % of the starts end within 0.3 nats of the best; less than half do if the covariance widens at once.

    Of 64 starts 54 and 16 do. 70 % and a half are two and a half standard errors of 32 starts away from those.
    """
    waiting = elbos()
    constants = RuleConstants(widening_decrement=np.inf)
    monkeypatch.setattr("numpyro_natgrad.options.CONSTANTS", constants)
    at_once = elbos()
    best = np.nanmax([waiting, at_once])
    assert np.mean(waiting > best - 0.3) > 0.7
    assert np.mean(at_once > best - 0.3) < 0.5
