# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Mixtures in the likelihood: outliers, zero inflation, lapses, and finite mixtures."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from ..problems import problem


@problem("mixture in the likelihood", 1, every_setting=True, tenth=True)
def line_with_outliers(rng: np.random.Generator) -> tuple[Any, ...]:
    """A straight line through 24 points, four of them from a wide background."""
    x = np.sort(rng.uniform(0, 1, 24))
    y = 1.5 * x - 0.4 + 0.08 * rng.normal(size=24)
    y[[3, 9, 14, 20]] += rng.normal(0, 1.5, 4)

    def model(x: Any, y: Any) -> None:
        slope = numpyro.sample("slope", dist.Normal(0, 2))
        intercept = numpyro.sample("intercept", dist.Normal(0, 2))
        sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
        spread = numpyro.sample("spread", dist.HalfNormal(3))
        fraction = numpyro.sample("fraction", dist.Beta(1, 4))
        line = slope * x + intercept
        parts = [dist.Normal(line, sigma), dist.Normal(line, sigma + spread)]
        weights = dist.Categorical(jnp.stack([1 - fraction, fraction]))
        with numpyro.plate("points", len(x)):
            numpyro.sample("y", dist.MixtureGeneral(weights, parts), obs=y)

    return model, x, y


@problem("mixture in the likelihood", 7, every_setting=True)
def points_from_background(rng: np.random.Generator) -> tuple[Any, ...]:
    """A line through 30 points with known errors, six of them from a background with a mean and scale of its own."""
    x = np.sort(rng.uniform(-3, 3, 30))
    errors = rng.uniform(0.1, 0.2, 30)
    y = 0.6 + 1.1 * x + errors * rng.normal(size=30)
    y[rng.choice(30, 6, replace=False)] = rng.normal(-0.5, 2, 6)

    def model(x: Any, errors: Any, y: Any) -> None:
        slope = numpyro.sample("slope", dist.Normal(0, 3))
        intercept = numpyro.sample("intercept", dist.Normal(0, 3))
        center = numpyro.sample("center", dist.Normal(0, 3))
        spread = numpyro.sample("spread", dist.HalfNormal(4))
        share = numpyro.sample("share", dist.Uniform(0, 1))
        line = dist.Normal(intercept + slope * x, errors).log_prob(y)
        background = dist.Normal(center, jnp.sqrt(spread**2 + errors**2)).log_prob(y)
        with numpyro.plate("points", len(x)):
            numpyro.factor("y", jnp.logaddexp(jnp.log(share) + line, jnp.log1p(-share) + background))

    return model, x, errors, y


@problem("mixture in the likelihood", 8)
def blunders_in_a_curve(rng: np.random.Generator) -> tuple[Any, ...]:
    """A decay with three blunders in twenty readings, by a mixture of a narrow and a wide Gaussian."""
    t = np.linspace(0, 5, 20)
    y = 4 * np.exp(-0.7 * t) + 0.05 * rng.normal(size=20)
    y[[2, 8, 15]] += [1.5, -1.0, 2.0]

    def model(t: Any, y: Any) -> None:
        start = numpyro.sample("start", dist.LogNormal(0, 1))
        rate = numpyro.sample("rate", dist.LogNormal(0, 1))
        sigma = numpyro.sample("sigma", dist.LogNormal(-3, 1))
        blunder = numpyro.sample("blunder", dist.Beta(1, 5))
        scales = jnp.stack([sigma, sigma + 2.0])
        with numpyro.plate("readings", len(t)):
            which = dist.Categorical(jnp.stack([1 - blunder, blunder]))
            mean = start * jnp.exp(-rate * t)
            numpyro.sample("y", dist.MixtureSameFamily(which, dist.Normal(mean[:, None], scales)), obs=y)

    return model, t, y


@problem("mixture in the likelihood", 2)
def zero_inflated_counts(rng: np.random.Generator) -> tuple[Any, ...]:
    """Counts with two covariates, of which 40 % are zero for another reason that depends on the first covariate."""
    x = rng.normal(size=(120, 2))
    zero = rng.uniform(size=120) < 1 / (1 + np.exp(0.4 - 0.8 * x[:, 0]))
    y = np.where(zero, 0, rng.poisson(np.exp(0.8 + x @ [0.5, -0.4])))

    def model(x: Any, y: Any) -> None:
        a = numpyro.sample("a", dist.Normal(0, 2))
        b = numpyro.sample("b", dist.Normal(0, 1).expand([2]).to_event(1))
        gate = numpyro.sample("gate", dist.Normal(0, 2).expand([2]).to_event(1))
        with numpyro.plate("rows", len(y)):
            gate_logits = gate[0] + gate[1] * x[:, 0]
            numpyro.sample(
                "y", dist.ZeroInflatedDistribution(dist.Poisson(jnp.exp(a + x @ b)), gate_logits=gate_logits), obs=y
            )

    return model, x, y


@problem("mixture in the likelihood", 3, every_setting=True)
def psychometric_lapses(rng: np.random.Generator) -> tuple[Any, ...]:
    """Correct answers at nine contrasts, with a guess rate and a lapse rate."""
    contrast = np.linspace(-2, 2, 9)
    trials = np.full(9, 30)
    correct = rng.binomial(30, 0.1 + 0.82 / (1 + np.exp(-4 * (contrast - 0.3))))

    def model(contrast: Any, trials: Any, correct: Any) -> None:
        threshold = numpyro.sample("threshold", dist.Normal(0, 1))
        slope = numpyro.sample("slope", dist.LogNormal(1, 1))
        guess = numpyro.sample("guess", dist.Beta(1, 5))
        lapse = numpyro.sample("lapse", dist.Beta(1, 5))
        p = guess + (1 - guess - lapse) * jax.nn.sigmoid(slope * (contrast - threshold))
        with numpyro.plate("levels", 9):
            numpyro.sample("correct", dist.Binomial(trials, probs=jnp.clip(p, 1e-4, 1 - 1e-4)), obs=correct)

    return model, contrast, trials, correct


@problem("finite mixture", 4, every_setting=True)
def ordered_mixture(rng: np.random.Generator) -> tuple[Any, ...]:
    """Three Gaussians with ordered means; weights and scales are unknown."""
    y = np.concatenate([rng.normal(m, s, n) for m, s, n in ((-3, 0.7, 40), (0, 1.0, 50), (4, 0.6, 30))])

    def model(y: Any) -> None:
        weights = numpyro.sample("weights", dist.Dirichlet(2 * jnp.ones(3)))
        means = numpyro.sample(
            "means",
            dist.TransformedDistribution(dist.Normal(0, 4).expand([3]).to_event(1), dist.transforms.OrderedTransform()),
        )
        scales = numpyro.sample("scales", dist.LogNormal(0, 0.5).expand([3]).to_event(1))
        with numpyro.plate("rows", len(y)):
            mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(means, scales))
            numpyro.sample("y", mixture, obs=y)

    return model, y


@problem("finite mixture", 5)
def unordered_mixture(rng: np.random.Generator) -> tuple[Any, ...]:
    """Two Gaussians whose labels may be exchanged: every posterior mode is as good as its mirror image."""
    y = np.concatenate([rng.normal(-1.5, 0.6, 35), rng.normal(1.2, 0.6, 45)])

    def model(y: Any) -> None:
        weight = numpyro.sample("weight", dist.Beta(2, 2))
        means = numpyro.sample("means", dist.Normal(0, 3).expand([2]).to_event(1))
        scale = numpyro.sample("scale", dist.HalfNormal(1))
        with numpyro.plate("rows", len(y)):
            which = dist.Categorical(jnp.stack([weight, 1 - weight]))
            numpyro.sample("y", dist.MixtureSameFamily(which, dist.Normal(means, scale)), obs=y)

    return model, y


@problem("finite mixture", 6)
def mixture_of_regressions(rng: np.random.Generator) -> tuple[Any, ...]:
    """Two lines, and each point is from one of them."""
    x = rng.uniform(-1, 1, 80)
    y = np.where(rng.uniform(size=80) < 0.6, 1 + 2 * x, -1 - x) + 0.3 * rng.normal(size=80)

    def model(x: Any, y: Any) -> None:
        weight = numpyro.sample("weight", dist.Beta(2, 2))
        intercepts = numpyro.sample("intercepts", dist.Normal(0, 2).expand([2]).to_event(1))
        slopes = numpyro.sample("slopes", dist.Normal(0, 2).expand([2]).to_event(1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1))
        lines = intercepts + slopes * x[:, None]
        with numpyro.plate("rows", len(y)):
            which = dist.Categorical(jnp.stack([weight, 1 - weight]))
            numpyro.sample("y", dist.MixtureSameFamily(which, dist.Normal(lines, sigma)), obs=y)

    return model, x, y
