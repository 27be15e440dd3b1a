# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Survival with censoring, Gaussian processes, time series, hidden states and directions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro.handlers import reparam
from numpyro.infer.reparam import CircularReparam

from ..problems import problem


@problem("survival with censoring", 70, every_setting=True)
def weibull_censored(rng: np.random.Generator) -> tuple[Any, ...]:
    """Times to failure, half of them censored, with two covariates."""
    x = rng.normal(size=(80, 2))
    time = rng.weibull(1.6, 80) * np.exp(1 + x @ [0.5, -0.4])
    censored = rng.uniform(0, 5, 80)
    y, failed = np.minimum(time, censored), (time < censored).astype(float)

    def model(x: Any, y: Any, failed: Any) -> None:
        intercept = numpyro.sample("intercept", dist.Normal(0, 3))
        beta = numpyro.sample("beta", dist.Normal(0, 2).expand([2]).to_event(1))
        shape = numpyro.sample("shape", dist.HalfNormal(3))
        z = (jnp.log(y) - intercept - x @ beta) * shape
        with numpyro.plate("rows", len(y)):
            numpyro.factor("y", failed * (jnp.log(shape) - jnp.log(y) + z) - jnp.exp(z))

    return model, x, y, failed


@problem("survival with censoring", 71)
def cure_fraction(rng: np.random.Generator) -> tuple[Any, ...]:
    """Relapse of patients some of whom are cured; who is, is not known."""
    cured = rng.uniform(size=100) < 0.35
    time = np.where(cured, np.inf, rng.lognormal(0.5, 0.8, 100))
    follow_up = rng.uniform(1, 6, 100)
    y, relapsed = np.minimum(time, follow_up), (time < follow_up).astype(float)

    def model(y: Any, relapsed: Any) -> None:
        cured = numpyro.sample("cured", dist.Beta(1, 1))
        mean = numpyro.sample("mean", dist.Normal(0, 2))
        spread = numpyro.sample("spread", dist.HalfNormal(2))
        time = dist.LogNormal(mean, spread)
        free = jnp.log(cured + (1 - cured) * jax.scipy.special.ndtr((mean - jnp.log(y)) / spread))
        with numpyro.plate("patients", len(y)):
            numpyro.factor("y", jnp.where(relapsed > 0, jnp.log1p(-cured) + time.log_prob(y), free))

    return model, y, relapsed


def _kernel(x: Any, amplitude: Any, length: Any) -> Any:
    return amplitude**2 * jnp.exp(-0.5 * ((x[:, None] - x) / length) ** 2)


@problem("Gaussian process", 72, every_setting=True)
def gp_regression(rng: np.random.Generator) -> tuple[Any, ...]:
    """Amplitude, length and noise of a Gaussian process: all signal or all noise are both plausible."""
    x = np.sort(rng.uniform(0, 10, 25))
    y = np.sin(1.3 * x) + 0.5 * rng.normal(size=25)

    def model(x: Any, y: Any) -> None:
        amplitude = numpyro.sample("amplitude", dist.LogNormal(0, 1))
        length = numpyro.sample("length", dist.LogNormal(0, 1))
        noise = numpyro.sample("noise", dist.LogNormal(-1, 1))
        covariance = _kernel(x, amplitude, length) + (noise**2 + 1e-5) * jnp.eye(len(x))
        numpyro.sample("y", dist.MultivariateNormal(0, covariance_matrix=covariance), obs=y)

    return model, x, y


@problem("Gaussian process", 73)
def gp_counts(rng: np.random.Generator) -> tuple[Any, ...]:
    """Counts at eleven places whose log rate is a Gaussian process with unknown amplitude and length."""
    x = np.linspace(-2, 2, 11)
    y = rng.poisson(np.exp(1 + np.sin(2 * x)))

    def model(x: Any, y: Any) -> None:
        amplitude = numpyro.sample("amplitude", dist.HalfNormal(2))
        length = numpyro.sample("length", dist.InverseGamma(5, 5))
        mean = numpyro.sample("mean", dist.Normal(0, 2))
        z = numpyro.sample("z", dist.Normal(0, 1).expand([len(x)]).to_event(1))
        factor = jnp.linalg.cholesky(_kernel(x, 1.0, length) + 1e-4 * jnp.eye(len(x)))
        with numpyro.plate("places", len(x)):
            numpyro.sample("y", dist.Poisson(jnp.exp(mean + amplitude * factor @ z)), obs=y)

    return model, x, y


@problem("state space", 74, every_setting=True)
def local_level(rng: np.random.Generator) -> tuple[Any, ...]:
    """A level that wanders, measured with noise; the Kalman filter leaves two scales and the first level."""
    y = 5 + np.cumsum(0.5 * rng.normal(size=60)) + rng.normal(size=60)

    def model(y: Any) -> None:
        wander = numpyro.sample("wander", dist.HalfNormal(2))
        noise = numpyro.sample("noise", dist.HalfNormal(2))
        first = numpyro.sample("first", dist.Normal(0, 10))

        def step(state: Any, y: Any) -> Any:
            mean, variance = state
            total = variance + noise**2 + 1e-6
            gain = variance / total
            log_p = dist.Normal(mean, jnp.sqrt(total)).log_prob(y)
            return (mean + gain * (y - mean), variance * (1 - gain) + wander**2), log_p

        numpyro.factor("y", lax.scan(step, (first, wander**2), y)[1].sum())

    return model, y


@problem("state space", 75)
def stochastic_volatility(rng: np.random.Generator) -> tuple[Any, ...]:
    """Fourteen returns whose log volatility is an autoregression, in non-centred form."""
    h = np.zeros(14)
    for t in range(1, 14):
        h[t] = 0.9 * h[t - 1] + 0.6 * rng.normal()
    y = np.exp(h / 2) * rng.normal(size=14)

    def model(y: Any) -> None:
        level = numpyro.sample("level", dist.Normal(0, 2))
        persistence = numpyro.sample("persistence", dist.Uniform(-1, 1))
        spread = numpyro.sample("spread", dist.HalfNormal(1))
        z = numpyro.sample("z", dist.Normal(0, 1).expand([len(y)]).to_event(1))
        step = lambda h, z: (persistence * h + spread * z,) * 2
        h = level + lax.scan(step, jnp.zeros(()), z)[1]
        with numpyro.plate("days", len(y)):
            numpyro.sample("y", dist.Normal(0, jnp.exp(h / 2)), obs=y)

    return model, y


@problem("time series", 76)
def second_order_autoregression(rng: np.random.Generator) -> tuple[Any, ...]:
    """A cycle by an autoregression of second order around a mean."""
    y = np.zeros(82)
    for t in range(2, 82):
        y[t] = 1.4 * y[t - 1] - 0.8 * y[t - 2] + rng.normal()
    y = 10 + y[2:]

    def model(y: Any) -> None:
        mean = numpyro.sample("mean", dist.Normal(0, 20))
        phi = numpyro.sample("phi", dist.Normal(0, 1).expand([2]).to_event(1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(3))
        x = y - mean
        with numpyro.plate("times", len(y) - 2):
            numpyro.sample("y", dist.Normal(mean + phi[0] * x[1:-1] + phi[1] * x[:-2], sigma), obs=y[2:])

    return model, y


@problem("time series", 77, every_setting=True)
def garch(rng: np.random.Generator) -> tuple[Any, ...]:
    """Returns with clusters of volatility."""
    y, variance = np.zeros(120), 1.0
    for t in range(120):
        y[t] = 0.1 + np.sqrt(variance) * rng.normal()
        variance = 0.2 + 0.3 * (y[t] - 0.1) ** 2 + 0.55 * variance

    def model(y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        base = numpyro.sample("base", dist.HalfNormal(1))
        shock = numpyro.sample("shock", dist.Uniform(0, 1))
        memory = (1 - shock) * numpyro.sample("share", dist.Uniform(0, 1))
        step = lambda v, e: (base + shock * e**2 + memory * v, v)
        variances = lax.scan(step, jnp.var(y), y - mu)[1]
        with numpyro.plate("days", len(y)):
            numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variances)), obs=y)

    return model, y


@problem("hidden states", 78)
def hidden_markov(rng: np.random.Generator) -> tuple[Any, ...]:
    """A hidden Markov chain of two states with unknown means, by the forward algorithm."""
    state, states = 0, []
    for _ in range(80):
        state = 1 - state if rng.uniform() < 0.15 else state
        states.append(state)
    y = np.array([-1.0, 1.5])[states] + 0.8 * rng.normal(size=80)

    def model(y: Any) -> None:
        stay = numpyro.sample("stay", dist.Beta(3, 1).expand([2]).to_event(1))
        means = numpyro.sample("means", dist.Normal(0, 2).expand([2]).to_event(1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1))
        transition = jnp.log(jnp.stack([jnp.stack([stay[0], 1 - stay[0]]), jnp.stack([1 - stay[1], stay[1]])]))
        emitted = dist.Normal(means, sigma).log_prob(y[:, None])
        step = lambda a, e: (jax.nn.logsumexp(a[:, None] + transition, axis=0) + e, None)
        alpha = lax.scan(step, emitted[0] - jnp.log(2), emitted[1:])[0]
        numpyro.factor("y", jax.nn.logsumexp(alpha))

    return model, y


@problem("circular", 79, every_setting=True, tenth=True)
def circular_mean(rng: np.random.Generator) -> tuple[Any, ...]:
    """The mean direction of 25 bearings, near the cut at ±π."""
    y = (np.pi + rng.vonmises(0, 3, 25)) % (2 * np.pi) - np.pi

    @reparam(config={"direction": CircularReparam()})
    def model(y: Any) -> None:
        direction = numpyro.sample("direction", dist.VonMises(0, 0.1))
        concentration = numpyro.sample("concentration", dist.Gamma(2, 0.5))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.VonMises(direction, concentration), obs=y)

    return model, y


@problem("circular", 80)
def circular_regression(rng: np.random.Generator) -> tuple[Any, ...]:
    """Bearings that turn with a covariate, by the link 2·arctan."""
    x = rng.normal(size=50)
    y = (0.8 + 2 * np.arctan(0.9 * x) + rng.vonmises(0, 4, 50) + np.pi) % (2 * np.pi) - np.pi

    def model(x: Any, y: Any) -> None:
        origin = numpyro.sample("origin", dist.Normal(0, 1.5))
        slope = numpyro.sample("slope", dist.Normal(0, 2))
        concentration = numpyro.sample("concentration", dist.HalfNormal(5))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.VonMises(origin + 2 * jnp.arctan(slope * x), concentration), obs=y)

    return model, x, y


@problem("correlations", 81)
def correlated_outcomes(rng: np.random.Generator) -> tuple[Any, ...]:
    """Means, scales and correlations of four outcomes, with the prior of Lewandowski, Kurowicka and Joe."""
    mixing = rng.normal(size=(4, 4))
    y = rng.normal(size=(50, 4)) @ mixing + [1.0, 0, -1, 2]

    def model(y: Any) -> None:
        mean = numpyro.sample("mean", dist.Normal(0, 5).expand([4]).to_event(1))
        scales = numpyro.sample("scales", dist.HalfCauchy(2).expand([4]).to_event(1))
        correlations = numpyro.sample("correlations", dist.LKJCholesky(4, 1.0))
        factor = scales[:, None] * correlations
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.MultivariateNormal(mean, scale_tril=factor), obs=y)

    return model, y
