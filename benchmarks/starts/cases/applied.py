# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Models of ordinary applied work, written after the step rule, to judge it on problems it was not made for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from ..problems import problem


@problem("errors in variables", 1000)
def errors_in_covariate(rng: np.random.Generator) -> tuple[Any, ...]:
    """A line through thirty points whose covariate is measured with a known error."""
    true = rng.normal(2, 1.5, size=30)
    x, y = true + 0.7 * rng.normal(size=30), 1 + 0.8 * true + 0.4 * rng.normal(size=30)

    def model(x: Any, y: Any) -> None:
        centre, spread = numpyro.sample("centre", dist.Normal(0, 5)), numpyro.sample("spread", dist.HalfNormal(3))
        a, b = numpyro.sample("a", dist.Normal(0, 5)), numpyro.sample("b", dist.Normal(0, 2))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1))
        with numpyro.plate("rows", len(x)):
            true = numpyro.sample("true", dist.Normal(centre, spread))
            numpyro.sample("x", dist.Normal(true, 0.7), obs=x)
            numpyro.sample("y", dist.Normal(a + b * true, sigma), obs=y)

    return model, x, y


@problem("proportions", 1001)
def beta_regression(rng: np.random.Generator) -> tuple[Any, ...]:
    """Forty proportions whose mean and precision depend on a covariate."""
    x = rng.normal(size=40)
    mean, precision = 1 / (1 + np.exp(-(0.5 + x))), np.exp(2.5 - 0.7 * x)
    y = np.clip(rng.beta(mean * precision, (1 - mean) * precision), 1e-4, 1 - 1e-4)

    def model(x: Any, y: Any) -> None:
        b = numpyro.sample("b", dist.Normal(0, 2).expand([2]).to_event(1))
        c = numpyro.sample("c", dist.Normal(0, 2).expand([2]).to_event(1))
        mean, precision = jax.nn.sigmoid(b[0] + b[1] * x), jnp.exp(c[0] + c[1] * x)
        numpyro.sample("y", dist.Beta(mean * precision, (1 - mean) * precision).to_event(1), obs=y)

    return model, x, y


@problem("hierarchy, correlated slopes", 1002)
def correlated_slopes(rng: np.random.Generator) -> tuple[Any, ...]:
    """Twelve people with eight measurements each, and a correlated intercept and slope for each of them."""
    person, t = np.repeat(np.arange(12), 8), np.tile(np.linspace(-1, 1, 8), 12)
    effects = rng.normal(size=(12, 2)) @ np.linalg.cholesky([[1.0, 0.4], [0.4, 0.5]]).T
    y = 3 + effects[person, 0] + (1 + effects[person, 1]) * t + 0.5 * rng.normal(size=96)

    def model(person: Any, t: Any, y: Any) -> None:
        mean = numpyro.sample("mean", dist.Normal(0, 5).expand([2]).to_event(1))
        sd = numpyro.sample("sd", dist.HalfNormal(2).expand([2]).to_event(1))
        root = numpyro.sample("root", dist.LKJCholesky(2, 2.0))
        sigma = numpyro.sample("sigma", dist.HalfNormal(2))
        with numpyro.plate("people", 12):
            effect = numpyro.sample("effect", dist.MultivariateNormal(mean, scale_tril=sd[:, None] * root))
        numpyro.sample("y", dist.Normal(effect[person, 0] + effect[person, 1] * t, sigma).to_event(1), obs=y)

    return model, person, t, y


@problem("survival with censoring", 1003, every_setting=True, tenth=True)
def shared_frailty(rng: np.random.Generator) -> tuple[Any, ...]:
    """Times of sixty patients of ten clinics, a third of them censored, with a gamma frailty of each clinic."""
    clinic, x = np.repeat(np.arange(10), 6), rng.normal(size=60)
    times = rng.exponential(1 / (0.3 * rng.gamma(2, 0.5, 10)[clinic] * np.exp(0.6 * x)))
    limit = np.quantile(times, 0.66)

    def model(clinic: Any, x: Any, time: Any, died: Any) -> None:
        rate, slope = numpyro.sample("rate", dist.LogNormal(0, 1)), numpyro.sample("slope", dist.Normal(0, 1))
        shape = numpyro.sample("shape", dist.Gamma(2, 1))
        with numpyro.plate("clinics", 10):
            frailty = numpyro.sample("frailty", dist.Gamma(shape, shape))
        hazard = rate * frailty[clinic] * jnp.exp(slope * x)
        numpyro.factor("times", jnp.sum(died * jnp.log(hazard) - hazard * time))

    return model, clinic, x, np.minimum(times, limit), (times < limit).astype(float)


@problem("hierarchy of curves", 1004)
def growth_of_trees(rng: np.random.Generator) -> tuple[Any, ...]:
    """Five trees, seven ages: logistic curves with an asymptote of each tree, in millimetres."""
    age = np.array([118.0, 484, 664, 1004, 1231, 1372, 1582])
    asymptote = 190 + 30 * rng.normal(size=5)
    y = asymptote[:, None] / (1 + np.exp(-(age - 720) / 350)) + 8 * rng.normal(size=(5, 7))

    def model(age: Any, y: Any) -> None:
        mean, sd = numpyro.sample("mean", dist.LogNormal(5, 0.5)), numpyro.sample("sd", dist.HalfNormal(0.5))
        middle = numpyro.sample("middle", dist.Normal(700, 200))
        scale = numpyro.sample("scale", dist.LogNormal(6, 0.5))
        sigma = numpyro.sample("sigma", dist.HalfNormal(20))
        with numpyro.plate("trees", 5):
            asymptote = numpyro.sample("asymptote", dist.LogNormal(jnp.log(mean), sd))
        curve = asymptote[:, None] * jax.nn.sigmoid((age - middle) / scale)
        numpyro.sample("y", dist.Normal(curve, sigma).to_event(2), obs=y)

    return model, age, y


@problem("item response", 1005)
def two_parameter_items(rng: np.random.Generator) -> tuple[Any, ...]:
    """Forty people and ten items with difficulties and positive discriminations."""
    ability, difficulty, slope = rng.normal(size=40), rng.normal(size=10), np.exp(0.4 * rng.normal(size=10))
    y = rng.uniform(size=(40, 10)) < 1 / (1 + np.exp(-slope * (ability[:, None] - difficulty)))

    def model(y: Any) -> None:
        spread = numpyro.sample("spread", dist.HalfNormal(1))
        with numpyro.plate("items", 10):
            difficulty = numpyro.sample("difficulty", dist.Normal(0, 2))
            slope = numpyro.sample("slope", dist.LogNormal(0, spread))
        with numpyro.plate("people", 40):
            ability = numpyro.sample("ability", dist.Normal(0, 1))
        numpyro.sample("y", dist.Bernoulli(logits=slope * (ability[:, None] - difficulty)).to_event(2), obs=y)

    return model, y.astype(float)


@problem("multinomial", 1006)
def shares_of_regions(rng: np.random.Generator) -> tuple[Any, ...]:
    """Votes for four parties in eight regions, with shares that scatter around common ones."""
    shares = rng.dirichlet(15 * np.array([0.4, 0.3, 0.2, 0.1]), size=8)
    y = np.array([rng.multinomial(60, p) for p in shares])

    def model(y: Any) -> None:
        common = numpyro.sample("common", dist.Dirichlet(jnp.ones(4)))
        concentration = numpyro.sample("concentration", dist.LogNormal(2, 1))
        with numpyro.plate("regions", 8):
            shares = numpyro.sample("shares", dist.Dirichlet(concentration * common))
            numpyro.sample("y", dist.Multinomial(60, shares), obs=y)

    return model, y


@problem("misclassification", 1007)
def test_without_standard(rng: np.random.Generator) -> tuple[Any, ...]:
    """Results of two tests in three populations, with unknown sensitivities, specificities and prevalences."""
    first, second = (0.85, 0.1), (0.7, 0.05)  # the chance of a positive result of the sick, and of the healthy
    cells = lambda a, b: np.array([a * b, a * (1 - b), (1 - a) * b, (1 - a) * (1 - b)])
    shares = [p * cells(first[0], second[0]) + (1 - p) * cells(first[1], second[1]) for p in (0.1, 0.3, 0.6)]
    y = np.array([rng.multinomial(80, p) for p in shares])

    def model(y: Any) -> None:
        sensitivity = numpyro.sample("sensitivity", dist.Beta(1, 1).expand([2]).to_event(1))
        specificity = numpyro.sample("specificity", dist.Beta(1, 1).expand([2]).to_event(1))
        prevalence = numpyro.sample("prevalence", dist.Beta(1, 1).expand([3]).to_event(1))
        both = lambda p: jnp.outer(jnp.stack([p[0], 1 - p[0]]), jnp.stack([p[1], 1 - p[1]])).ravel()
        cells = prevalence[:, None] * both(sensitivity) + (1 - prevalence[:, None]) * both(1 - specificity)
        numpyro.sample("y", dist.Multinomial(80, cells).to_event(1), obs=y)

    return model, y


@problem("time series of counts", 1008)
def counts_that_remember(rng: np.random.Generator) -> tuple[Any, ...]:
    """Sixty days of counts whose rate remembers yesterday's count and rate."""
    y, rate = [5], 5.0
    for _ in range(59):
        rate = 1 + 0.4 * rate + 0.4 * y[-1]
        y.append(rng.poisson(rate))

    def model(y: Any) -> None:
        base = numpyro.sample("base", dist.LogNormal(0, 1))
        weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
        first = numpyro.sample("first", dist.LogNormal(1, 1))
        follow = lambda rate, count: (base + weights[0] * rate + weights[1] * count,) * 2
        _, rates = jax.lax.scan(follow, first, y[:-1])
        numpyro.sample("y", dist.Poisson(rates).to_event(1), obs=y[1:])

    return model, np.array(y, float)


@problem("mixture in the likelihood", 1009)
def costs_with_zeros(rng: np.random.Generator) -> tuple[Any, ...]:
    """Costs of sixty patients: whether there are any, and how high, with a covariate in both."""
    x = rng.normal(size=60)
    y = np.where(rng.uniform(size=60) < 1 / (1 + np.exp(-x)), np.exp(4 + 0.5 * x + 0.8 * rng.normal(size=60)), 0.0)

    def model(x: Any, y: Any) -> None:
        a = numpyro.sample("a", dist.Normal(0, 2).expand([2]).to_event(1))
        b = numpyro.sample("b", dist.Normal(0, 5).expand([2]).to_event(1))
        sigma = numpyro.sample("sigma", dist.HalfCauchy(1))
        some, logit = y > 0, a[0] + a[1] * x
        cost = dist.LogNormal(b[0] + b[1] * x, sigma).log_prob(jnp.where(some, y, 1.0))
        numpyro.factor("y", jnp.sum(jnp.where(some, jax.nn.log_sigmoid(logit) + cost, jax.nn.log_sigmoid(-logit))))

    return model, x, y


@problem("spatial", 1010)
def map_of_counts(rng: np.random.Generator) -> tuple[Any, ...]:
    """Counts on a grid of five by five, with smooth and with independent log rates."""
    row, column = np.divmod(np.arange(25), 5)
    adjacent = (np.abs(row[:, None] - row) + np.abs(column[:, None] - column) == 1).astype(float)
    y = rng.poisson(np.exp(1.5 + 0.2 * (row + column - 4) + 0.3 * rng.normal(size=25)))

    def model(adjacent: Any, y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 2))
        smooth, rough = (numpyro.sample(name, dist.HalfNormal(1)) for name in ("smooth", "rough"))
        dependence = numpyro.sample("dependence", dist.Beta(2, 1))
        precision = jnp.diag(adjacent.sum(1)) - 0.99 * dependence * adjacent
        field = numpyro.sample("field", dist.MultivariateNormal(jnp.zeros(25), precision_matrix=precision))
        with numpyro.plate("cells", 25):
            z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Poisson(jnp.exp(mu + smooth * field + rough * z)).to_event(1), obs=y)

    return model, adjacent, y


@problem("ordinal", 1011)
def monotone_effect(rng: np.random.Generator) -> tuple[Any, ...]:
    """A dose of five levels whose effect is monotone, with steps that are shares of the whole."""
    level = rng.integers(0, 5, 50)
    y = 1 + 2 * np.array([0, 0.1, 0.6, 0.9, 1.0])[level] + 0.6 * rng.normal(size=50)

    def model(level: Any, y: Any) -> None:
        a, whole = numpyro.sample("a", dist.Normal(0, 5)), numpyro.sample("whole", dist.Normal(0, 5))
        steps = numpyro.sample("steps", dist.Dirichlet(jnp.ones(4)))
        sigma = numpyro.sample("sigma", dist.HalfNormal(2))
        height = jnp.concatenate([jnp.zeros(1), jnp.cumsum(steps)])
        numpyro.sample("y", dist.Normal(a + whole * height[level], sigma).to_event(1), obs=y)

    return model, level, y


@problem("skewed errors", 1012)
def skewed_regression(rng: np.random.Generator) -> tuple[Any, ...]:
    """A line with skew-normal errors of unknown skewness."""
    x = rng.normal(size=60)
    error = 0.9 * np.abs(rng.normal(size=60)) + 0.3 * rng.normal(size=60)
    y = 1 + 2 * x + error

    def model(x: Any, y: Any) -> None:
        a, b = numpyro.sample("a", dist.Normal(0, 5)), numpyro.sample("b", dist.Normal(0, 5))
        scale, skew = numpyro.sample("scale", dist.HalfNormal(2)), numpyro.sample("skew", dist.Normal(0, 4))
        z = (y - a - b * x) / scale
        log_density = dist.Normal(0, 1).log_prob(z) + jax.scipy.special.log_ndtr(skew * z) - jnp.log(scale / 2)
        numpyro.factor("y", jnp.sum(log_density))

    return model, x, y


@problem("reliability", 1013)
def learning_rates(rng: np.random.Generator) -> tuple[Any, ...]:
    """Fifteen learners of thirty trials: choices between two arms by a hierarchy of learning rates and temperatures."""
    rate, slope = 1 / (1 + np.exp(-rng.normal(-0.5, 0.6, 15))), np.exp(rng.normal(1, 0.4, 15))
    choice, reward = np.zeros((15, 30), int), rng.uniform(size=(15, 30, 2)) < np.array([0.7, 0.35])
    for i in range(15):
        value = np.zeros(2)
        for t in range(30):
            c = int(rng.uniform() < 1 / (1 + np.exp(slope[i] * (value[0] - value[1]))))
            choice[i, t], value[c] = c, value[c] + rate[i] * (reward[i, t, c] - value[c])
    reward = np.take_along_axis(reward, choice[..., None], 2)[..., 0].astype(float)

    def model(choice: Any, reward: Any) -> None:
        mean = numpyro.sample("mean", dist.Normal(0, 1).expand([2]).to_event(1))
        sd = numpyro.sample("sd", dist.HalfNormal(1).expand([2]).to_event(1))
        with numpyro.plate("learners", 15):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        rate, slope = jax.nn.sigmoid(mean[0] + sd[0] * z[:, 0]), jnp.exp(mean[1] + sd[1] * z[:, 1])

        def trial(value: Any, now: Any) -> tuple[Any, Any]:
            c, r = now
            logit, one = slope * (value[:, 1] - value[:, 0]), jax.nn.one_hot(c, 2)
            return value + rate[:, None] * one * (r[:, None] - value), logit

        _, logits = jax.lax.scan(trial, jnp.zeros((15, 2)), (choice.T, reward.T))
        numpyro.sample("choice", dist.Bernoulli(logits=logits).to_event(2), obs=choice.T.astype(float))

    return model, choice, reward
