# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The tables that the laws range over: forms of a Gaussian site."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro.distributions import biject_to, constraints
from oracles import spd


class GaussianForm(NamedTuple):
    """One way to write a Gaussian guide in NumPyro.

    :ivar build: the distribution from its mean and its covariance argument.
    :ivar constraint: of the covariance argument.
    :ivar value: that argument, from a lower triangular K with Σ = KKᵀ.
    :ivar shape: of a draw.
    :ivar diagonal: whether the family has independent components.
    """

    build: Callable[[Any, Any], Any]
    constraint: Any
    value: Callable[[np.ndarray], np.ndarray]
    shape: tuple[int, ...] = (3,)
    diagonal: bool = False

    @property
    def factor(self) -> np.ndarray:
        """The K that every form starts from."""
        d = self.shape[-1]
        if self.diagonal:
            return np.linspace(0.4, 1.5, int(np.prod(self.shape))).reshape(self.shape)
        k = np.stack([np.linalg.cholesky(spd(seed, d)) for seed in range(int(np.prod(self.shape[:-1])))])
        return k.reshape(*self.shape, d)

    @property
    def loc(self) -> np.ndarray:
        return np.linspace(-1, 1.5, int(np.prod(self.shape))).reshape(self.shape)

    def at(self, loc: jax.Array, cov: jax.Array) -> Any:
        """The distribution at unconstrained parameters."""
        return self.build(loc, biject_to(self.constraint)(cov))

    def sample(self, name: str) -> jax.Array:
        """The guide's statements: parameters ``name_loc`` and ``name_cov``, and a draw."""
        loc = numpyro.param(f"{name}_loc", jnp.asarray(self.loc))
        cov = numpyro.param(f"{name}_cov", jnp.asarray(self.value(self.factor)), constraint=self.constraint)
        return numpyro.sample(name, self.build(loc, cov))


def gram(k: np.ndarray) -> np.ndarray:
    return k @ np.swapaxes(k, -1, -2)


def normal(loc: Any, scale: Any) -> Any:
    return dist.Normal(loc, scale).to_event(np.ndim(loc))


def tril(loc: Any, value: Any) -> Any:
    return dist.MultivariateNormal(loc, scale_tril=value).to_event(np.ndim(loc) - 1)


def covariance(loc: Any, value: Any) -> Any:
    return dist.MultivariateNormal(loc, covariance_matrix=value)


def precision(loc: Any, value: Any) -> Any:
    return dist.MultivariateNormal(loc, precision_matrix=value)


def same(k: np.ndarray) -> np.ndarray:
    return k


FORMS = {
    "scale, softplus": GaussianForm(normal, constraints.softplus_positive, same, (2, 2), diagonal=True),
    "scale, exp": GaussianForm(normal, constraints.positive, same, (2, 2), diagonal=True),
    "scale_tril, scaled unit": GaussianForm(tril, constraints.scaled_unit_lower_cholesky, same),
    "scale_tril, softplus": GaussianForm(tril, constraints.softplus_lower_cholesky, same),
    "scale_tril, batch": GaussianForm(tril, constraints.lower_cholesky, same, (2, 2)),
    "covariance_matrix": GaussianForm(covariance, constraints.positive_definite, gram),
    "precision_matrix": GaussianForm(precision, constraints.positive_definite, lambda k: np.linalg.inv(gram(k))),
}
