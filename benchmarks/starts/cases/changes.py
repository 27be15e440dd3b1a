# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Change points."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from ..problems import problem


@problem("change point", 10, every_setting=True)
def change_in_counts(rng: np.random.Generator) -> tuple[Any, ...]:
    """Yearly counts whose rate changes in an unknown year, which is summed out by hand."""
    y = np.concatenate([rng.poisson(4.0, 33), rng.poisson(1.5, 27)])

    def model(y: Any) -> None:
        rates = numpyro.sample("rates", dist.Gamma(1.5, 0.5).expand([2]).to_event(1))
        before = jnp.cumsum(dist.Poisson(rates[0]).log_prob(y))
        after = jnp.cumsum(dist.Poisson(rates[1]).log_prob(y)[::-1])[::-1]
        numpyro.factor("counts", jax.nn.logsumexp(before[:-1] + after[1:]) - jnp.log(len(y) - 1))

    return model, y


@problem("change point", 11)
def broken_line(rng: np.random.Generator) -> tuple[Any, ...]:
    """A line whose slope changes at an unknown place."""
    x = np.linspace(0, 10, 50)
    y = 1 + 0.8 * x - 1.6 * np.maximum(x - 6.5, 0) + 0.4 * rng.normal(size=50)

    def model(x: Any, y: Any) -> None:
        start = numpyro.sample("start", dist.Normal(0, 5))
        slopes = numpyro.sample("slopes", dist.Normal(0, 2).expand([2]).to_event(1))
        place = numpyro.sample("place", dist.Uniform(0, 10))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1))
        mean = start + slopes[0] * x + slopes[1] * jnp.maximum(x - place, 0)
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(mean, sigma), obs=y)

    return model, x, y


@problem("change point", 12)
def smooth_switch(rng: np.random.Generator) -> tuple[Any, ...]:
    """A level that switches to another one within an unknown time."""
    t = np.arange(60.0)
    y = 2 + 3 / (1 + np.exp(-(t - 38) / 1.5)) + 0.7 * rng.normal(size=60)

    def model(t: Any, y: Any) -> None:
        levels = numpyro.sample("levels", dist.Normal(0, 5).expand([2]).to_event(1))
        when = numpyro.sample("when", dist.Uniform(0, 60))
        width = numpyro.sample("width", dist.LogNormal(0, 1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(2))
        mean = levels[0] + (levels[1] - levels[0]) * jax.nn.sigmoid((t - when) / width)
        with numpyro.plate("months", len(t)):
            numpyro.sample("y", dist.Normal(mean, sigma), obs=y)

    return model, t, y
