# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Draws ``docs/figures/history.png``: the steps of one fit, by ``result.history.plot()``.

Run it with ``python docs/draw_history.py``.
"""

import pathlib

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_natgrad import NaturalGradient, fit

OUTPUT = pathlib.Path(__file__).parent / "figures" / "history.png"
TOLERANCE = 0.05


def model(time: jnp.ndarray, size: jnp.ndarray) -> None:
    """The logarithm of a line in time, with an unknown start, rate and error."""
    rate = numpyro.sample("rate", dist.Normal(1, 1))
    height = numpyro.sample("height", dist.Normal(1, 1))
    error = numpyro.sample("error", dist.HalfNormal(1))
    numpyro.sample("size", dist.Normal(height * jnp.log(1 + rate * time), error).to_event(1), obs=size)


def main() -> None:
    """Fit and draw."""
    time = np.linspace(0, 5, 100)
    size = 1.7 * np.log(1 + 0.8 * time) + 0.1 * np.random.default_rng(0).normal(size=100)
    svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(num_particles=2))
    result = fit(svi, random.key(3), jnp.array(time), jnp.array(size), tolerance=TOLERANCE, progress_bar=False)
    print(result, result.history.skipped.sum(), "skipped", result.history.limited.sum(), "shortened")
    result.history.plot(tolerance=TOLERANCE)[0].figure.savefig(OUTPUT, dpi=110)


if __name__ == "__main__":
    main()
