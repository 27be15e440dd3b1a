# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Three networks with their data: dense and convolutional on digits, and a regression of 100,000 rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.module import random_flax_module
from sklearn.datasets import load_digits

Rows = tuple[jax.Array, jax.Array]


class Dense(nn.Module):
    """Dense layers of tanh units."""

    widths: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths:
            x = jnp.tanh(nn.Dense(width)(x))
        return nn.Dense(self.outputs)(x)


class Convolutional(nn.Module):
    """Two convolutions of 3 × 3 pixels, each with a mean over 2 × 2, and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 8, 8, 1)
        for channels in (16, 32):
            x = nn.avg_pool(nn.relu(nn.Conv(channels, (3, 3))(x)), (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


class Task(NamedTuple):
    """A network, its likelihood, and its rows.

    :ivar likelihood: from the network's output to the distribution of a row.
    """

    net: Any
    likelihood: Callable[[jax.Array], dist.Distribution]
    train: Rows
    test: Rows
    batch: int

    @property
    def rows(self) -> int:
        """Rows of the training data."""
        return len(self.train[0])

    def model(self, x: jax.Array, y: jax.Array | None = None) -> None:
        """The model of a minibatch, with standard normal weights."""
        net: Any = random_flax_module("net", self.net, dist.Normal(0, 1), input_shape=(1, x.shape[1]))
        with numpyro.plate("rows", self.rows, subsample_size=len(x)):
            output = numpyro.deterministic("output", net(x))
            numpyro.sample("y", self.likelihood(output), obs=y)

    def epoch(self, key: jax.Array) -> Rows:
        """All training rows in random order as ``(batches, batch, ...)``, without a short last one."""
        order = jax.random.permutation(key, self.rows)[: self.rows // self.batch * self.batch]
        x, y = (each[order] for each in self.train)
        return x.reshape(-1, self.batch, *x.shape[1:]), y.reshape(-1, self.batch, *y.shape[1:])


def digits(net: nn.Module) -> Task:
    """Scikit-learn's digits, of which a fifth is held out."""
    data = load_digits()
    x, y = jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[360:], order[:360]
    return Task(net, lambda output: dist.Categorical(logits=output), (x[train], y[train]), (x[test], y[test]), 100)


def regression() -> Task:
    """A smooth function of 10 inputs with noise that grows along the first one; 10,000 more rows are held out."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(110_000, 10))
    y = np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.3 * np.exp(0.5 * x[:, 0]) * rng.normal(size=len(x))
    both = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def normal(output: jax.Array) -> dist.Distribution:
        return dist.Normal(output[..., 0], 1e-3 + jax.nn.softplus(output[..., 1]))

    train, test = (both[0][:100_000], both[1][:100_000]), (both[0][100_000:], both[1][100_000:])
    return Task(Dense((50, 50), 2), normal, train, test, 500)


TASKS: dict[str, Callable[[], Task]] = {
    "digits": lambda: digits(Dense((64,), 10)),
    "regression": regression,
    "convolution": lambda: digits(Convolutional()),
}
