# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Occupancy, capture and recapture, ratings, choices, and other counts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from ..problems import problem


@problem("occupancy", 60, every_setting=True)
def occupancy(rng: np.random.Generator) -> tuple[Any, ...]:
    """Sites visited four times; whether a site is occupied depends on a covariate and is summed out."""
    x = rng.normal(size=60)
    occupied = rng.uniform(size=60) < 1 / (1 + np.exp(-(0.3 + 1.2 * x)))
    y = rng.binomial(4, 0.25 * occupied)

    def model(x: Any, y: Any) -> None:
        beta = numpyro.sample("beta", dist.Normal(0, 2).expand([2]).to_event(1))
        detection = numpyro.sample("detection", dist.Beta(1, 1))
        with numpyro.plate("sites", len(y)):
            visits = dist.Binomial(4, probs=detection)
            numpyro.sample("y", dist.ZeroInflatedDistribution(visits, gate_logits=-(beta[0] + beta[1] * x)), obs=y)

    return model, x, y


@problem("capture and recapture", 61, every_setting=True, tenth=True)
def capture_recapture(rng: np.random.Generator) -> tuple[Any, ...]:
    """Animals caught on seven occasions: survival and capture probabilities, some of which are confounded."""
    first, last = _captures(rng, 80, 7)

    def model(first: Any, last: Any) -> None:
        survival = numpyro.sample("survival", dist.Beta(1, 1))
        capture = numpyro.sample("capture", dist.Beta(1, 1).expand([6]).to_event(1))
        not_again = [jnp.ones(())]
        for p in capture[::-1]:
            not_again.append(1 - survival + survival * (1 - p) * not_again[-1])
        never = jnp.stack(not_again[::-1])
        with numpyro.plate("animals", len(first)):
            between = (last - first) * jnp.log(survival)
            numpyro.factor("history", between + jnp.log(never[last]) + _captured(capture, first, last))

    return model, first, last


def _captures(rng: np.random.Generator, animals: int, occasions: int) -> tuple[np.ndarray, np.ndarray]:
    first = rng.integers(0, occasions - 1, animals)
    last = first.copy()
    for i in range(animals):
        for t in range(first[i] + 1, occasions):
            if rng.uniform() > 0.7:
                break
            last[i] = t if rng.uniform() < 0.4 else last[i]
    return first, last


def _captured(capture: Any, first: Any, last: Any) -> Any:
    """Log probability of the last capture, and of being missed at every occasion between the first and the last."""
    occasion = jnp.arange(1, len(capture) + 1)
    between = (occasion > first[:, None]) & (occasion < last[:, None])
    at_last = (occasion == last[:, None]) & (last > first)[:, None]
    return jnp.sum(between * jnp.log1p(-capture) + at_last * jnp.log(capture), 1)


@problem("capture and recapture", 62)
def abundance(rng: np.random.Generator) -> tuple[Any, ...]:
    """Repeated counts at twenty places, of which the number of animals is summed out up to fifty."""
    y = rng.binomial(rng.poisson(9, 20)[:, None], 0.35, (20, 3))

    def model(y: Any) -> None:
        mean = numpyro.sample("mean", dist.LogNormal(2, 1))
        detection = numpyro.sample("detection", dist.Beta(1, 1))
        n = jnp.arange(51)
        seen = dist.Binomial(n, probs=detection).log_prob(jnp.minimum(y[..., None], n))
        seen = jnp.where(y[..., None] <= n, seen, -1e3)
        numpyro.factor("y", jax.nn.logsumexp(seen.sum(1) + dist.Poisson(mean).log_prob(n), axis=-1).sum())

    return model, y


@problem("ordinal", 63, every_setting=True)
def ratings(rng: np.random.Generator) -> tuple[Any, ...]:
    """Ratings from one to five, with unknown thresholds."""
    x = rng.normal(size=(90, 2))
    y = np.digitize(x @ [1.2, -0.6] + rng.logistic(size=90), [-2, -0.5, 1, 2.5])

    def model(x: Any, y: Any) -> None:
        beta = numpyro.sample("beta", dist.Normal(0, 2).expand([2]).to_event(1))
        ordered = dist.transforms.OrderedTransform()
        cuts = numpyro.sample("cuts", dist.TransformedDistribution(dist.Normal(0, 2).expand([4]).to_event(1), ordered))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.OrderedLogistic(x @ beta, cuts), obs=y)

    return model, x, y


@problem("multinomial", 64)
def choices(rng: np.random.Generator) -> tuple[Any, ...]:
    """Choices among three, with a coefficient for each alternative, so that one of them is superfluous."""
    x = np.column_stack([np.ones(90), rng.normal(size=90)])
    utility = x @ rng.normal(size=(2, 3)) + rng.gumbel(size=(90, 3))
    y = utility.argmax(1)

    def model(x: Any, y: Any) -> None:
        beta = numpyro.sample("beta", dist.Normal(0, 3).expand([2, 3]).to_event(2))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Categorical(logits=x @ beta), obs=y)

    return model, x, y


@problem("multinomial", 65)
def bradley_terry(rng: np.random.Generator) -> tuple[Any, ...]:
    """Games of seven players, one of whom has never lost."""
    first, second = np.array([(i, j) for i in range(7) for j in range(i)]).T
    skill = np.array([5.0, 1, 0.5, 0, -0.3, -0.8, -1.5])
    wins = rng.binomial(3, 1 / (1 + np.exp(skill[second] - skill[first])))

    def model(first: Any, second: Any, wins: Any) -> None:
        spread = numpyro.sample("spread", dist.HalfNormal(3))
        with numpyro.plate("players", 7):
            skill = numpyro.sample("skill", dist.Normal(0, spread))
        with numpyro.plate("pairs", len(wins)):
            numpyro.sample("wins", dist.Binomial(3, logits=skill[first] - skill[second]), obs=wins)

    return model, first, second, wins


@problem("overdispersed counts", 66)
def negative_binomial(rng: np.random.Generator) -> tuple[Any, ...]:
    """Overdispersed counts with an offset and two covariates."""
    x, offset = rng.normal(size=(80, 2)), rng.uniform(0, 2, 80)
    y = rng.negative_binomial(1.5, 1.5 / (1.5 + np.exp(offset + 0.5 + x @ [0.7, -0.3])))

    def model(x: Any, offset: Any, y: Any) -> None:
        intercept = numpyro.sample("intercept", dist.Normal(0, 3))
        beta = numpyro.sample("beta", dist.Normal(0, 2).expand([2]).to_event(1))
        shape = numpyro.sample("shape", dist.Gamma(2, 0.5))
        with numpyro.plate("rows", len(y)):
            mean = jnp.exp(offset + intercept + x @ beta)
            numpyro.sample("y", dist.NegativeBinomial2(mean, shape), obs=y)

    return model, x, offset, y


@problem("overdispersed counts", 67)
def beta_binomial(rng: np.random.Generator) -> tuple[Any, ...]:
    """Germination of seeds on thirty plates under two treatments, overdispersed."""
    treatment = np.repeat([0.0, 1.0], 15)
    y = rng.binomial(20, rng.beta(4 * (0.4 + 0.3 * treatment), 4 * (0.6 - 0.3 * treatment)))

    def model(treatment: Any, y: Any) -> None:
        a = numpyro.sample("a", dist.Normal(0, 2))
        b = numpyro.sample("b", dist.Normal(0, 2))
        total = numpyro.sample("total", dist.HalfCauchy(10))
        p = jax.nn.sigmoid(a + b * treatment)
        with numpyro.plate("plates", len(y)):
            numpyro.sample("y", dist.BetaBinomial(total * p + 1e-4, total * (1 - p) + 1e-4, 20), obs=y)

    return model, treatment, y


@problem("overdispersed counts", 68)
def gamma_costs(rng: np.random.Generator) -> tuple[Any, ...]:
    """Costs by a gamma regression with a logarithmic link."""
    x = rng.normal(size=(70, 3))
    y = rng.gamma(1.5, np.exp(2 + x @ [0.5, -0.8, 0.1]) / 1.5)

    def model(x: Any, y: Any) -> None:
        intercept = numpyro.sample("intercept", dist.Normal(0, 5))
        beta = numpyro.sample("beta", dist.Normal(0, 2).expand([3]).to_event(1))
        shape = numpyro.sample("shape", dist.HalfNormal(5))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Gamma(shape, shape * jnp.exp(-intercept - x @ beta)), obs=y)

    return model, x, y


@problem("separation", 69)
def separated_classes(rng: np.random.Generator) -> tuple[Any, ...]:
    """A logistic regression whose classes a plane separates, with wide priors."""
    x = rng.normal(size=(40, 3))
    y = (x @ [1.0, 1.0, -0.5] > 0.2).astype(float)

    def model(x: Any, y: Any) -> None:
        intercept = numpyro.sample("intercept", dist.Normal(0, 10))
        beta = numpyro.sample("beta", dist.Normal(0, 10).expand([3]).to_event(1))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Bernoulli(logits=intercept + x @ beta), obs=y)

    return model, x, y
