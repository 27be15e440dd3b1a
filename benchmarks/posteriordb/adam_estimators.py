# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Adam on the mean μ and the factor L of a Gaussian, with two estimators of less variance than NumPyro's.

    z = μ + Lε,  ε ~ N(0, I):
    path gradient      s = ∇f(z) − L⁻ᵀε,        ∂μ = E[s],        ∂L = E[s εᵀ]
    Price's gradient                            ∂μ = E[∇f(z)],    ∂L = E[∇²f(z)] L − L⁻ᵀ

The path gradient is *sticking the landing* (Roeder, Wu and Duvenaud 2017, arXiv:1703.09194): log q is differentiated
through z alone, so that the gradient has no variance where q is the posterior. Price's theorem has the Hessian in the
place of s εᵀ. These rivals show which part of a gain is due to the estimator and which to the natural gradient.

L is lower triangular or diagonal, with e^ρ on its diagonal. Each rate has a cosine decay to zero over all steps. One
step costs a gradient of each draw, and with Price's gradient d Hessian-vector products, two gradients each, as well.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import solve_triangular

from .guides import INIT_SCALE
from .svi import PARTICLES, Attempt, Problem, start
from .walk import Walk, prepare

RATES = (0.3, 0.1, 0.03, 0.01, 0.003)

Potential = Callable[[jax.Array], jax.Array]
#: (f, μ, L, draws ε) → gradients of −ELBO with respect to μ and to all entries of L.
Estimator = Callable[[Potential, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def path_gradient(f: Potential, loc: jax.Array, L: jax.Array, eps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each draw the gradient of f(z) + log q(z) along the path of z."""
    score = jax.vmap(jax.grad(f))(loc + eps @ L.T) - solve_triangular(L, eps.T, trans="T", lower=True).T
    return score.mean(0), score.T @ eps / len(eps)


def price_gradient(f: Potential, loc: jax.Array, L: jax.Array, eps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradient and Hessian of f, and the entropy in closed form."""
    z = loc + eps @ L.T
    entropy = solve_triangular(L, jnp.eye(len(loc), dtype=loc.dtype), trans="T", lower=True)
    return jax.vmap(jax.grad(f))(z).mean(0), jax.vmap(jax.hessian(f))(z).mean(0) @ L - entropy


def runner(estimator: Estimator, products: bool) -> Callable[[Problem], Iterator[Attempt]]:
    """Fits of all rates and seeds; ``products``: whether a step needs the Hessian."""

    def run(problem: Problem) -> Iterator[Attempt]:
        full, size = problem.guide.family == "full", problem.target.size
        cost = PARTICLES * (1 + 2 * size * products)
        for rate in RATES:
            dtype = jnp.zeros(()).dtype
            walk = _walk(problem.target.potential, estimator, full, size, dtype, rate, problem.steps[1])
            for seed in range(len(problem.starts)):
                loc, key = start(problem, seed)
                yield Attempt(f"cosine {rate:g}", seed, walk(_initial(loc, full, rate, problem.steps[1]), key, cost))

    return run


def _initial(loc: jax.Array, full: bool, rate: float, steps: int) -> Any:
    rho = jnp.full_like(loc, jnp.log(INIT_SCALE))
    params = loc, rho, jnp.zeros((len(loc), len(loc)) if full else (0, 0), loc.dtype)
    return params, _adam(rate, steps).init(params)


def _adam(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def _factor(params: Any) -> jax.Array:
    _, rho, below = params
    diagonal = jnp.diag(jnp.exp(rho))
    return diagonal + jnp.tril(below, -1) if below.size else diagonal


@functools.cache
def _walk(f: Potential, estimator: Estimator, full: bool, size: int, dtype: Any, rate: float, steps: int) -> Walk:
    optimizer = _adam(rate, steps)

    def step(_: Any, state: Any, key: jax.Array) -> Any:
        params, moments = state
        eps = jax.random.normal(key, (PARTICLES, size), params[0].dtype)
        loc, factor = estimator(f, params[0], _factor(params), eps)
        gradient = loc, jnp.diag(factor) * jnp.exp(params[1]), jnp.tril(factor, -1) if full else params[2]
        change, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, change), moments

    def gaussian(state: Any) -> tuple[Any, Any]:
        params, _ = state
        return params[0], _factor(params) if full else jnp.exp(params[1])

    example = _initial(jnp.zeros(size, dtype), full, rate, steps)
    return prepare(step, gaussian, example, steps)
