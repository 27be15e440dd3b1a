# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Every estimator of the natural gradient is unbiased; those that should have no variance at a Gaussian have none.

The target is f(z) = Σ exp(aᵢᵀz) − yᵢ aᵢᵀz + ½|z|²/τ², for which E[∇f] and E[∇²f] are known under any Gaussian.
Velocities are taken in (m, Σ):  dm/dρ = −Σ E[∇f],  dΣ/dρ = Σ − Σ E[∇²f] Σ  (its diagonal, for a mean-field guide).
With A = 0 the posterior is N(0, τ²).
"""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from oracles import assert_close, captured_loss, root_eps
from tables import positive

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.blocks.base import Randomness
from numpyro_natgrad.blocks.gaussian.full import cosine_probes
from numpyro_natgrad.options import RuleConstants

D, KEYS = 2, 2000
A = np.array([[1.0, 0.3], [-0.5, 0.8], [0.2, -0.7]])
Y = np.array([2.0, 0.0, 1.0])
TAU = 1.3
MEAN, TRIL, SCALE = np.array([0.4, -0.3]), np.array([[0.5, 0.0], [0.3, 0.4]]), np.array([0.5, 0.6])


def model(a: Any, y: Any) -> None:
    z = numpyro.sample("z", dist.Normal(0, TAU).expand([D]).to_event(1))
    numpyro.factor("f", jnp.sum(y * (a @ z)) - jnp.sum(jnp.exp(a @ z)))


def full(a: Any, y: Any) -> None:
    loc = numpyro.param("loc", jnp.asarray(MEAN, float))
    tril = numpyro.param("cov", jnp.asarray(TRIL, float), constraint=constraints.lower_cholesky)
    numpyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))


def mean_field(a: Any, y: Any) -> None:
    loc, scale = numpyro.param("loc", jnp.asarray(MEAN, float)), positive("cov", jnp.asarray(SCALE, float))
    numpyro.sample("z", dist.Normal(loc, scale).to_event(1))


class Row(NamedTuple):
    """An estimator: its guide, loss and options; ``limit`` is the joint limit."""

    guide: Any
    loss: Any
    options: dict[str, Any]
    limit: int = 128


SECOND, FIRST = {"estimator": "second_order"}, {"estimator": "first_order"}
PLAIN = {"estimator": "first_order", "path_gradient": False}
ROWS = {
    "full, second order, 1 draw": Row(full, Trace_ELBO(), SECOND),
    "full, second order, 3 draws": Row(full, Trace_ELBO(num_particles=3), SECOND),
    "full, second order, graph": Row(full, TraceGraph_ELBO(num_particles=2), SECOND),
    "full, second order, mean field": Row(full, TraceMeanField_ELBO(num_particles=2), SECOND),
    "full, first order": Row(full, Trace_ELBO(num_particles=2), FIRST),
    "full, first order, plain": Row(full, Trace_ELBO(num_particles=2), PLAIN),
    "full, wide": Row(full, Trace_ELBO(num_particles=2), SECOND, limit=1),
    "independent, second order": Row(mean_field, Trace_ELBO(num_particles=2), SECOND),
    "independent, first order": Row(mean_field, Trace_ELBO(num_particles=2), FIRST),
    "independent, wide": Row(mean_field, Trace_ELBO(num_particles=2), SECOND, limit=1),
}
# Gradients with the score term keep its noise.
NOISY = {"full, first order, plain"}


class Sample(NamedTuple):
    """For each key: the velocity of the mean, of the covariance, and the norm of the natural gradient."""

    mean: np.ndarray
    cov: np.ndarray
    norm: np.ndarray


def moments(row: Row, params: Any) -> tuple[jax.Array, jax.Array]:
    """m and Σ of a guide."""
    if row.guide is mean_field:
        return params["loc"], jnp.diag(jnp.exp(2 * params["cov"]))
    k = dist.biject_to(constraints.lower_cholesky)(params["cov"])
    return params["loc"], k @ k.T


@cache
def sampler(name: str) -> Any:
    """(params, keys, a, y) → ``Sample``, compiled."""
    row = ROWS[name]
    at, start = captured_loss(model, row.guide, row.loss, jnp.asarray(A, float), jnp.asarray(Y, float))

    def one(key, params, a, y):
        fn = at(key, given=(a, y))

        def move(rho):
            optimizer = NaturalGradient(lambda step: rho, max_kl=None, **row.options)
            _, (_, state) = optimizer.eval_and_update(fn, optimizer.init(params))
            return (*moments(row, state.params), state.info.natural_gradient_norm)

        (_, _, norm), (mean, cov, _) = jax.jvp(move, (0.0,), (1.0,))
        return Sample(mean, cov, norm)

    many = jax.jit(lambda keys, params, a, y: jax.lax.map(lambda key: one(key, params, a, y), keys))
    return start, many


@pytest.fixture(params=ROWS)
def name(request, monkeypatch, x64):
    monkeypatch.setattr(
        "numpyro_natgrad.options.CONSTANTS",
        RuleConstants(joint_limit=(n := ROWS[request.param].limit), full_joint_limit=n),
    )
    return request.param


def test_mean_natural_gradient_equals_the_exact_one(name):
    """Within 4.5 standard errors of a mean over 2000 keys, in each of the five numbers."""
    start, many = sampler(name)
    seen = many(random.split(random.key(0), KEYS), start, jnp.asarray(A, float), jnp.asarray(Y, float))
    m, cov = (np.asarray(x) for x in moments(ROWS[name], start))
    rates = np.exp(A @ m + 0.5 * np.einsum("ni,ij,nj->n", A, cov, A))
    slope = A.T @ (rates - Y) + m / TAU**2
    hessian = (A.T * rates) @ A + np.eye(D) / TAU**2
    curvature = cov - cov @ hessian @ cov
    if ROWS[name].guide is mean_field:
        curvature = np.diag(np.diag(curvature))
    for sample, expected in [(seen.mean, -cov @ slope), (seen.cov, curvature)]:
        sample = np.asarray(sample)
        error = sample.std(0) / np.sqrt(KEYS)
        assert (np.abs(sample.mean(0) - expected) <= 4.5 * error + root_eps("float64")).all()


def test_natural_gradient_has_no_variance_at_a_gaussian_posterior(name):
    start, many = sampler(name)
    at_posterior = {"loc": jnp.zeros(D), "cov": jnp.full(D, jnp.log(TAU))}
    if ROWS[name].guide is full:
        at_posterior["cov"] = dist.biject_to(constraints.lower_cholesky).inv(TAU * jnp.eye(D))
    norm = many(random.split(random.key(1), KEYS), at_posterior, jnp.zeros((3, D)), jnp.asarray(Y, float)).norm
    if name in NOISY:
        assert np.median(norm) > 0.1
    else:
        assert norm.max() < root_eps("float64")


@pytest.mark.parametrize("name", ["full, second order, 1 draw", "full, second order, 3 draws"], indirect=True)
def test_hessian_of_the_loss_is_the_mean_over_draws(name):
    """dS/dρ = (1/n) Σ ∇²f(z_s) − S, over the draws of the loss, which NumPyro's handlers repeat, and their antitheses."""
    start, many = sampler(name)
    keys = random.split(random.key(2), KEYS)
    seen = many(keys, start, jnp.asarray(A, float), jnp.asarray(Y, float)).cov[:5]
    _, cov = moments(ROWS[name], start)
    n = ROWS[name].loss.num_particles
    for key, velocity in zip(keys[:5], seen, strict=True):
        step_key = random.split(key)[1]
        draws = np.stack([draw(k) for k in (random.split(step_key, n) if n > 1 else [step_key])])
        draws[n // 2 : n // 2 * 2] = 2 * MEAN - draws[: n // 2]
        hessian = sum((A.T * np.exp(A @ z)) @ A for z in draws) / n + np.eye(D) / TAU**2
        assert_close(velocity, cov - cov @ hessian @ cov, root_eps("float64"))


def draw(key: Any) -> np.ndarray:
    """What the guide draws for one particle of an ELBO with that key."""
    params = {"loc": jnp.asarray(MEAN, float), "cov": jnp.asarray(TRIL, float)}
    guide = handlers.seed(handlers.substitute(full, params), random.split(key)[1])
    return np.asarray(handlers.trace(guide).get_trace(A, Y)["z"]["value"])


def test_cosine_probes_of_one_run_cycle_through_an_orthonormal_basis_of_its_own(x64):
    d, k = 12, 4
    probes = lambda seed, step: cosine_probes(d, k, Randomness(random.key(seed), jnp.array(step)), jnp.float64)
    cycle = jnp.concatenate([probes(0, step) for step in range(d // k)], axis=1)
    np.testing.assert_allclose(cycle.T @ cycle, np.eye(d), atol=1e-12)
    np.testing.assert_array_equal(probes(0, d // k), probes(0, 0))
    assert float(jnp.abs(probes(0, 0) - probes(1, 0)).max()) > 0.1
