# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The models of ``python -m benchmarks``, each with its data, in the default dtype of the run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist


class Case(NamedTuple):
    """A model with its data; fits are compared at the distances ``gap`` and ``loose`` to the best ELBO, nats."""

    title: str
    model: Callable[..., Any]
    data: tuple[Any, ...]
    gap: float
    loose: float


def eight_schools() -> Case:
    """Rubin (1981), non-centred."""
    sigma = jnp.array([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model(y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("schools", 8):
            theta = numpyro.sample("theta_trans", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)

    return Case("eight schools (non-centred)", model, (jnp.array([28.0, 8, -3, 7, -1, 1, 18, 12]),), 0.1, 1.0)


def gaussian(d: int = 20, condition: float = 1e4) -> Case:
    """A Gaussian with random axes and log-spaced variances."""
    draw = np.random.default_rng(0)
    axes = np.linalg.qr(draw.normal(size=(d, d)))[0]
    precision = (axes * np.logspace(-0.5, 0.5, d) ** np.log10(condition)) @ axes.T
    center = 3 * draw.normal(size=d)

    def model(center: Any, precision: Any) -> None:
        z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), (d,)))
        numpyro.factor("log_density", -0.5 * (z - center) @ precision @ (z - center))

    return Case(
        f"{d}-dimensional Gaussian, condition {condition:.0e}",
        model,
        (jnp.array(center), jnp.array(precision)),
        0.1,
        1.0,
    )


def logistic_regression() -> Case:
    """Breast cancer (Wolberg et al. 1995) on standardised covariates, 31 coefficients, N(0, 10²) priors."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    x = np.column_stack([np.ones(len(x)), (x - x.mean(0)) / x.std(0)])

    def model(x: Any, y: Any) -> None:
        beta = numpyro.sample("beta", dist.Normal(0, 10).expand([x.shape[1]]).to_event(1))
        with numpyro.plate("patients", len(y)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)

    return Case("breast-cancer logistic regression", model, (jnp.array(x), jnp.array(y, float)), 1.0, 12.0)


def conjugate_regression() -> Case:
    """Gaussian linear regression with known noise: the posterior is Gaussian in closed form."""
    draw = np.random.default_rng(1)
    x = draw.normal(size=(50, 5))
    y = x @ draw.normal(size=5) + 0.5 * draw.normal(size=50)

    def model(x: Any, y: Any) -> None:
        beta = numpyro.sample("beta", dist.Normal(0, 3).expand([5]).to_event(1))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(x @ beta, 0.5), obs=y)

    return Case("conjugate Gaussian regression", model, (jnp.array(x), jnp.array(y)), 0.1, 1.0)


def conjugate_posterior(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of :func:`conjugate_regression`'s posterior."""
    x, y = (np.asarray(a, np.float64) for a in case.data)
    precision = x.T @ x / 0.25 + np.eye(x.shape[1]) / 9
    return np.linalg.solve(precision, x.T @ y / 0.25), np.linalg.inv(precision)


def cheap(d: int) -> Case:
    """d latents, each observed once: a likelihood that costs little beside the guide."""

    def model(y: Any) -> None:
        z = numpyro.sample("z", dist.Normal(0, 1).expand([d]).to_event(1))
        numpyro.sample("y", dist.Normal(z, 1).to_event(1), obs=y)

    return Case(f"{d} latents, cheap likelihood", model, (jnp.linspace(-2, 2, d),), 0.1, 1.0)


RACES = {"eight": eight_schools, "gaussian": gaussian, "logistic": logistic_regression}
