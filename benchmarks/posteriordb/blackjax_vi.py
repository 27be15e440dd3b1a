# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""BlackJAX's variational inference: ``fullrank_vi`` and ``meanfield_vi`` with Adam, and Pathfinder from several starts.

Adam's rate of 0.01 and 100 draws per step come from BlackJAX's book (``Variational_Inference``) and its tests. The
approximation starts where the other methods start, not at BlackJAX's N(0, I).

Pathfinder (Zhang, Carpenter, Gelman and Vehtari 2022, JMLR 23(306), arXiv:2108.03782) runs from 20 starts, as in the
paper, with the package's ``approximate`` and ``sample``. The package runs all starts as one batch, as long as the
slowest start, and holds all ELBOs in memory; here they run one after the other, which gives the same paths. The answer
is reported twice: as the Gaussian of the path with the highest ELBO, and as the mean and covariance under the
Pareto-smoothed importance weights of all draws, which resampling has on average. The paper's Gaussian has the mean
x − H∇f; the package, at release 1.7.1, uses x + H∇f, and is measured as it is. Its gradients are counted in a second,
untimed run. A value without a gradient counts as a third of a gradient.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from blackjax.vi import fullrank_vi as package_fullrank
from blackjax.vi import multipathfinder as package_multipath
from blackjax.vi import pathfinder as package_pathfinder
from jax import lax

from .path import Path
from .walk import Walk, prepare, timed_compile

Potential = Callable[[jax.Array], jax.Array]

#: Adam's rates: the documented one, and one to each side of it.
RATES = (0.1, 0.01, 0.001)
#: Iterations of L-BFGS for each start: the package's 30 are too few for hard posteriors.
ITERATIONS = 100
#: Draws for the ELBO of each point of a path (Stan's number), and for the weights of each path.
ELBO_DRAWS, DRAWS = 25, 100


def fullrank_vi(
    f: Potential, loc: Any, scale: Any, key: jax.Array, *, rate: float = 0.01, draws: int = 100, steps: int = 1000
) -> Path:
    """Gaussians with a full covariance along the way.

    :param f: −log p, (d,) → scalar, nats.
    :param loc: where to start, (d,).
    :param scale: standard deviations to start with, a scalar or (d,).
    :param rate: of Adam.
    :param draws: of a step, each of which costs one gradient.
    """
    loc = jnp.asarray(loc)
    state = blackjax.fullrank_vi.init(loc, optax.adam(rate))
    below = jnp.zeros(loc.size * (loc.size - 1) // 2, loc.dtype)
    start = state._replace(mu=loc, chol_params=jnp.concatenate([_log_scale(loc, scale), below]))
    return _walk(f, True, loc.size, loc.dtype, rate, draws, steps)(start, key, draws)


def meanfield_vi(
    f: Potential, loc: Any, scale: Any, key: jax.Array, *, rate: float = 0.01, draws: int = 100, steps: int = 1000
) -> Path:
    """Diagonal Gaussians along the way; arguments as :func:`fullrank_vi`."""
    loc = jnp.asarray(loc)
    start = blackjax.meanfield_vi.init(loc, optax.adam(rate))._replace(mu=loc, rho=_log_scale(loc, scale))
    return _walk(f, False, loc.size, loc.dtype, rate, draws, steps)(start, key, draws)


@functools.cache
def _walk(f: Potential, full: bool, size: int, dtype: Any, rate: float, draws: int, steps: int) -> Walk:
    package = blackjax.fullrank_vi if full else blackjax.meanfield_vi
    method = package(lambda z: -f(z), optax.adam(rate), draws)

    def gaussian(state: Any) -> tuple[Any, Any]:
        if full:
            return state.mu, package_fullrank._unflatten_cholesky(state.chol_params, size)
        return state.mu, jnp.exp(state.rho)

    return prepare(
        lambda _, state, key: method.step(key, state)[0], gaussian, method.init(jnp.zeros(size, dtype)), steps
    )


class Found(NamedTuple):
    """Pathfinder's paths.

    :ivar paths: the package's state of each, with draws and their log densities.
    :ivar visited: points on each path, (paths,).
    """

    paths: package_multipath.MultipathfinderState
    visited: jax.Array


def pathfinder(f: Potential, loc: Any, scale: Any, key: jax.Array, *, paths: int = 20) -> Path:
    """The Gaussian of the best path, with the cost of all.

    :param f: −log p, (d,) → scalar, nats.
    :param loc: where the first path starts, (d,); the others start uniformly in (−2, 2).
    :param scale: unused, because a path consists of points.
    """
    return _path(f, jnp.asarray(loc), key, paths, lambda found: _best(found.path_states), 0)


def pathfinder_resampled(f: Potential, loc: Any, scale: Any, key: jax.Array, *, paths: int = 20) -> Path:
    """The Gaussian with the moments of the weighted draws; arguments as :func:`pathfinder`."""
    return _path(f, jnp.asarray(loc), key, paths, _weighted, DRAWS)


def _path(f: Potential, loc: jax.Array, key: jax.Array, paths: int, gaussian: Callable[[Any], Any], draws: int) -> Path:
    start_key, key = jax.random.split(key)
    others = jax.random.uniform(start_key, (paths - 1, loc.size), loc.dtype, -2, 2)
    starts = jnp.concatenate([loc[None], others])
    search = _compiled_search(f, starts.shape, loc.dtype)
    begin = time.perf_counter()
    found = jax.device_get(jax.block_until_ready(search.run(starts, key)))
    seconds = time.perf_counter() - begin
    visited = int(found.visited.sum())
    gradients = search.gradients(starts, key) + (ELBO_DRAWS * visited + draws * paths) / 3
    with jax.enable_x64(True):
        mean, factor = jax.device_get(gaussian(found.paths))
    steps, cost, taken = (np.array([x]) for x in (visited, gradients, seconds))
    return Path(mean[None], factor[None], steps, cost, taken, search.compiling)


def _log_scale(loc: jax.Array, scale: Any) -> jax.Array:
    return jnp.broadcast_to(jnp.log(jnp.asarray(scale, loc.dtype)), loc.shape)


class Search(NamedTuple):
    """The compiled search over all paths, a count of its gradient evaluations, and the seconds of compilation."""

    run: Callable[[jax.Array, jax.Array], Found]
    gradients: Callable[[jax.Array, jax.Array], int]
    compiling: float


@functools.cache
def _compiled_search(f: Potential, shape: tuple[int, int], dtype: Any) -> Search:
    starts, key = jnp.zeros(shape, dtype), jax.random.key(0)
    run, seconds = timed_compile(lambda z, key: _search(f, z, key), starts, key)
    return Search(run, _counter(f), seconds)


def _search(f: Potential, starts: jax.Array, key: jax.Array) -> Found:
    def one(start: tuple[jax.Array, jax.Array]) -> Any:
        search_key, draw_key = jax.random.split(start[1])
        state, info = package_pathfinder.approximate(
            search_key, lambda z: -f(z), start[0], ELBO_DRAWS, maxiter=ITERATIONS
        )
        z, logq = package_pathfinder.sample(draw_key, state, DRAWS)
        return state, z, -jax.vmap(f)(z), logq, jnp.isfinite(info.path.elbo).sum()

    *found, visited = lax.map(one, (starts, jax.random.split(key, len(starts))))
    return Found(package_multipath.MultipathfinderState(*found), visited)


def _best(states: package_pathfinder.PathfinderState) -> tuple[Any, Any]:
    """The Gaussian that ``sample`` draws from, of the path with the highest ELBO."""
    best = jax.tree.map(lambda x: jnp.asarray(x[np.argmax(states.elbo)], float), states)
    covariance = jnp.diag(best.alpha) + best.beta @ best.gamma @ best.beta.T
    return best.position + covariance @ best.grad_position, jnp.linalg.cholesky(covariance)


def _weighted(paths: package_multipath.MultipathfinderState) -> tuple[Any, Any]:
    """Mean and covariance of all draws, by their Pareto-smoothed weights."""
    weights = jnp.exp(package_multipath.psis_weights(jax.tree.map(lambda x: jnp.asarray(x, float), paths))[0])
    z = jnp.asarray(paths.samples, float).reshape(len(weights), -1)
    mean = weights @ z
    return mean, jnp.linalg.cholesky((weights[:, None] * (z - mean)).T @ (z - mean))


def _counter(f: Potential) -> Callable[[jax.Array, jax.Array], int]:
    """Count the gradient evaluations of the search, whose line searches take a varying number."""
    calls: list[None] = []
    counted = jax.custom_vjp(f)

    def backward(z: jax.Array, tangent: jax.Array) -> tuple[jax.Array]:
        jax.debug.callback(lambda _: calls.append(None), tangent)
        return (tangent * jax.grad(f)(z),)

    counted.defvjp(lambda z: (f(z), z), backward)
    run = jax.jit(lambda z, key: _search(counted, z, key))

    def count(starts: jax.Array, key: jax.Array) -> int:
        before = len(calls)
        jax.block_until_ready(run(starts, key))
        jax.effects_barrier()
        return len(calls) - before

    return count
