# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Discrete sites take natural steps, whether the loss samples them (score-function gradients) or enumerates them."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from numpyro import distributions as dist
from numpyro.contrib.funsor import config_enumerate
from numpyro.infer import SVI, TraceEnum_ELBO, TraceGraph_ELBO
from numpyro.optim import Adam
from tables import positive

from numpyro_natgrad import NaturalGradient

# Losses of discrete sites are not affine in log q, about which the optimizer warns.
pytestmark = pytest.mark.filterwarnings("ignore:NaturalGradient. the loss is not affine")

SPINS, COUPLING = 6, 0.3
FIELD = np.linspace(-1, 1, SPINS)


def ising() -> None:
    """A chain of spins ±1 with energy −J Σ s_i s_{i+1} − Σ h_i s_i."""
    with numpyro.plate("spins", SPINS):
        z = numpyro.sample("z", dist.Bernoulli(logits=jnp.zeros(SPINS)))
    s = 2 * z - 1
    numpyro.factor("energy", COUPLING * jnp.sum(s[1:] * s[:-1]) + jnp.sum(FIELD * s))


def in_logits() -> None:
    # Not at 0, where ``dist.Bernoulli`` has a kink: ∂ log p / ∂ logit is off by a half there and nowhere else.
    logits = numpyro.param("logits", jnp.full(SPINS, 0.1))
    with numpyro.plate("spins", SPINS):
        numpyro.sample("z", dist.Bernoulli(logits=logits))


def in_probs() -> None:
    probs = numpyro.param("probs", jnp.full(SPINS, 0.5), constraint=dist.constraints.unit_interval)
    with numpyro.plate("spins", SPINS):
        numpyro.sample("z", dist.Bernoulli(probs=probs))


@cache
def mean_field() -> np.ndarray:
    """The fixed point of m_i = tanh(h_i + J (m_{i−1} + m_{i+1})), the textbook's iteration."""
    m = np.zeros(SPINS)
    for _ in range(500):
        padded = np.pad(m, 1)
        m = np.tanh(FIELD + COUPLING * (padded[:-2] + padded[2:]))
    return m


def magnetisation(params: Any) -> np.ndarray:
    return np.asarray(jnp.tanh(params["logits"] / 2) if "logits" in params else 2 * params["probs"] - 1)


def ising_one_by_one() -> None:
    """The same energy; spins that are coupled to each other may not share a plate where they are summed over."""
    s = [2 * numpyro.sample(f"z{i}", dist.Bernoulli(logits=0.0)) - 1 for i in range(SPINS)]
    for i in range(SPINS):
        numpyro.factor(f"energy{i}", FIELD[i] * s[i] + (COUPLING * s[i] * s[i - 1] if i else 0.0))


@config_enumerate
def one_by_one() -> None:
    for i, logit in enumerate(numpyro.param("logits", jnp.full(SPINS, 0.1))):
        numpyro.sample(f"z{i}", dist.Bernoulli(logits=logit))


@pytest.mark.slow
def test_enumerated_ising_chain_reaches_the_mean_field_fixed_point():
    """Nothing is drawn, so that the fit is limited by rounding alone."""
    svi = SVI(ising_one_by_one, one_by_one, NaturalGradient(), TraceEnum_ELBO())
    result = svi.run(random.key(0), 30, progress_bar=False)
    np.testing.assert_allclose(magnetisation(result.params), mean_field(), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("guide", [in_logits, in_probs])
def test_sampled_ising_chain_is_nearer_to_mean_field_than_with_adam(guide):
    """The gradients are score functions of 64 draws; the error is a root mean square, Adam's rate the better of two."""

    def error(optimizer: Any) -> float:
        result = SVI(ising, guide, optimizer, TraceGraph_ELBO(64)).run(random.key(0), 100, progress_bar=False)
        return float(np.sqrt(np.mean((magnetisation(result.params) - mean_field()) ** 2)))

    natural = error(NaturalGradient())
    assert natural < 0.1
    assert natural < min(error(Adam(rate)) for rate in (0.02, 0.1))


POINTS = np.concatenate([np.linspace(-3, -2, 10), np.linspace(1, 3, 15)])


def mixture(y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 5).expand([2]).to_event(1))
    with numpyro.plate("n", len(y)):
        z = numpyro.sample("z", dist.Categorical(jnp.array([0.4, 0.6])))
        numpyro.sample("y", dist.Normal(mu[z], 1), obs=y)


@config_enumerate
def assignments(y: Any) -> None:
    numpyro.sample(
        "mu", dist.Normal(numpyro.param("loc", jnp.array([-1.0, 1.0])), positive("s", jnp.ones(2))).to_event(1)
    )
    logits = numpyro.param("logits", jnp.zeros((len(y), 2)))
    with numpyro.plate("n", len(y)):
        numpyro.sample("z", dist.Categorical(logits=logits))


def variational_em(y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinate ascent (Bishop 2006, 10.2): means, scales, and the probability of the first component."""
    m, s = np.array([-1.0, 1.0]), np.ones(2)
    for _ in range(200):
        log = np.log([0.4, 0.6]) - 0.5 * ((y[:, None] - m) ** 2 + s**2)
        r = np.exp(log - np.logaddexp(*log.T)[:, None])
        precision = 1 / 25 + r.sum(0)
        m, s = r.T @ y / precision, precision**-0.5
    return m, s, r[:, 0]


def test_enumerated_mixture_reaches_variational_em():
    svi = SVI(mixture, assignments, NaturalGradient(), TraceEnum_ELBO(8))
    y = jnp.asarray(POINTS, jnp.float32)
    state, update = svi.init(random.key(0), y), jax.jit(svi.update)
    for _ in range(40):
        state, _ = update(state, y)
    params = svi.get_params(state)
    m, s, first = variational_em(POINTS)
    np.testing.assert_allclose(params["loc"], m, atol=0.1 * s.min())
    np.testing.assert_allclose(params["s"], s, rtol=0.1)
    np.testing.assert_allclose(jax.nn.softmax(params["logits"])[:, 0], first, atol=0.02)
    assert "Categorical" in svi.optim.report(svi, state, y)


def hidden_markov(y: Any) -> None:
    """Two states with known transitions; the emission means are latent."""
    mu = numpyro.sample("mu", dist.Normal(jnp.array([-1.0, 1.0]), 2.0).to_event(1))
    stay, z = jnp.array([[0.9, 0.1], [0.1, 0.9]]), 0
    for t in range(5):
        z = numpyro.sample(f"z{t}", dist.Categorical(stay[z]), infer={"enumerate": "parallel"})
        numpyro.sample(f"y{t}", dist.Normal(mu[z], 0.5), obs=y[t])


def emissions(y: Any) -> None:
    numpyro.sample(
        "mu", dist.Normal(numpyro.param("loc", jnp.array([-0.5, 0.5])), positive("s", jnp.ones(2))).to_event(1)
    )


@pytest.mark.slow
def test_enumerated_hidden_markov_model_reaches_the_posterior_mean():
    """The posterior mean of the emission means, by quadrature over the forward algorithm; q is nearly exact here."""
    y = np.array([-1.2, -0.8, 1.1, 0.9, 1.3])
    svi = SVI(hidden_markov, emissions, NaturalGradient(), TraceEnum_ELBO(8))
    result = svi.run(random.key(0), 60, jnp.asarray(y), progress_bar=False)
    grid = np.linspace(-3, 3, 121)
    mu = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1)
    log = -0.5 * ((mu - [-1.0, 1.0]) ** 2).sum(-1) / 4
    forward = np.array([0.9, 0.1]) * np.ones_like(mu)
    for t in range(5):
        forward = forward @ np.array([[0.9, 0.1], [0.1, 0.9]]) if t else forward
        forward = forward * np.exp(-0.5 * ((y[t] - mu) / 0.5) ** 2)
    weights = np.exp(log) * forward.sum(-1)
    mean = (weights[..., None] * mu).sum((0, 1)) / weights.sum()
    np.testing.assert_allclose(result.params["loc"], mean, atol=0.1)
