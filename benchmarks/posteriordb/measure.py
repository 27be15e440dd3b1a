# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Score a Gaussian q = N(loc, LLᵀ) against a posterior, in double precision, on one set of draws ε for all methods.

    ELBO = mean log w,     log w = −f(loc + Lε) − log q(loc + Lε)

The draws are antithetic and whitened to have covariance I. ELBOs of a quadratic f therefore have no Monte-Carlo noise,
and differences between nearby Gaussians have none to second order. Standard errors come from antithetic pairs, with the
lower tail of log w replaced by a fitted generalized Pareto distribution (Vehtari et al. 2024, arXiv:1507.02646): the
few draws of a heavy tail underestimate it. They ignore the whitening and are upper bounds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_natgrad.diagnostics import importance

from .models import Data
from .target import Target

#: Draws evaluated at a time: a few megabytes for thousands of observations.
CHUNK = 100
#: Gaussians scored at a time: with a fixed number, paths of all lengths share one compilation.
BLOCK = 15
#: Draws for a first score, and the distance from the best score so far (nats) within which all draws are used.
ROUGH, NEAR = 400, 3.0
#: Entries of the data × draws per score. Posteriors with much data are nearly Gaussian, and need few draws.
WORK = 2_000_000


class Score(NamedTuple):
    """One Gaussian against the posterior: ELBO and its standard error, nats, and k̂ of the weights."""

    elbo: float
    error: float
    khat: float


class Moments(NamedTuple):
    """Errors of q's moments against reference draws, over all parameters.

    Means are compared in units of the reference standard deviation, standard deviations by their ratio to it.
    """

    mean_worst: float
    mean_median: float
    sd_least: float
    sd_median: float
    sd_most: float


def base_draws(size: int, draws: int) -> np.ndarray:
    """ε (draws, size): antithetic; second moments are exactly I if there are more pairs than dimensions."""
    half = np.random.default_rng(2026).standard_normal((draws // 2, size))
    if draws // 2 > size:
        root = np.linalg.cholesky(half.T @ half / len(half))
        half = np.linalg.solve(root, half.T).T
    return np.concatenate([half, -half])


def enough(arguments: Data, most: int) -> int:
    """Number of draws to score a posterior on: at least 1000, in whole chunks of pairs, and at most ``most``."""
    numbers = max(np.size(x) for x in arguments.values())
    return min(max(WORK // numbers // (2 * CHUNK), 5) * 2 * CHUNK, most)


def spread(factor: Any, epsilon: Any) -> jax.Array:
    """Lε for each ε, with L a matrix (d, d) or standard deviations (d,)."""
    return epsilon * factor if jnp.ndim(factor) == 1 else epsilon @ factor.T


def log_weights(target: Target, loc: Any, factor: Any, epsilon: Any) -> jax.Array:
    """log w of each draw, nats."""
    z = loc + spread(factor, epsilon)
    chunk = next(c for c in range(CHUNK, 0, -1) if len(z) % c == 0)
    f = lax.map(jax.vmap(target.potential), z.reshape(-1, chunk, z.shape[1])).ravel()
    scales = factor if jnp.ndim(factor) == 1 else jnp.diagonal(factor)
    log_q = -0.5 * jnp.sum(epsilon**2, 1) - jnp.sum(jnp.log(jnp.abs(scales))) - 0.5 * z.shape[1] * jnp.log(2 * jnp.pi)
    return -f - log_q


class Judge:
    """Scores Gaussians on one posterior."""

    def __init__(self, target: Target, epsilon: np.ndarray) -> None:
        """:param Target target: made in double precision, as all that is done with it here."""
        self._target, self._epsilon = target, epsilon

        self._fine = _mean_weights(target, epsilon)
        self._rough = _mean_weights(target, base_draws(target.size, min(ROUGH, len(epsilon))))
        self._best = -np.inf
        self._weights = jax.jit(lambda loc, factor: log_weights(target, loc, factor, epsilon))
        self._constrained = jax.jit(lambda loc, factor: self._constrain(loc, factor))

    def elbos(self, locs: Any, factors: Any) -> np.ndarray:
        """ELBO (n,) of n Gaussians, nats; NaN where one is not finite."""
        scored = _in_blocks(self._rough, locs, factors)
        self._best = max(self._best, np.max(scored[np.isfinite(scored)], initial=-np.inf))
        near = np.flatnonzero(scored > self._best - NEAR)
        scored[near] = _in_blocks(self._fine, locs[near], factors[near])
        return scored

    def score(self, loc: Any, factor: Any) -> Score:
        """ELBO with its standard error and the k̂ of importance sampling from q."""
        with jax.enable_x64(True):
            return summary(np.asarray(self._weights(_double(loc), _double(factor))))

    def moments(self, loc: Any, factor: Any, reference: dict[str, np.ndarray]) -> Moments:
        """Errors of mean and standard deviation of every parameter that the reference has draws of."""
        with jax.enable_x64(True):
            draws = scalars(self._constrained(_double(loc), _double(factor)))
        return compare(draws, reference)

    def _constrain(self, loc: jax.Array, factor: jax.Array) -> dict[str, jax.Array]:
        return lax.map(self._target.constrain, loc + spread(factor, self._epsilon), batch_size=CHUNK)


def _mean_weights(target: Target, epsilon: np.ndarray) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """ELBOs of a block of Gaussians."""
    return jax.jit(lambda *block: lax.map(lambda q: jnp.mean(log_weights(target, q[0], q[1], epsilon)), block))


def _in_blocks(score: Callable[[jax.Array, jax.Array], jax.Array], locs: Any, factors: Any) -> np.ndarray:
    """Score in blocks of one size; the last block is padded with copies of the last Gaussian."""
    n = len(locs)
    padded = np.minimum(np.arange(-(-n // BLOCK) * BLOCK), n - 1).reshape(-1, BLOCK)
    with jax.enable_x64(True):
        blocks = [np.asarray(score(_double(locs[i]), _double(factors[i]))) for i in padded]
    return np.concatenate([np.zeros(0), *blocks])[:n]


def summary(log_w: np.ndarray) -> Score:
    """Score from the log weights of antithetic draws (the second half mirrors the first)."""
    if not np.isfinite(log_w).all():
        return Score(float("nan"), float("nan"), float("nan"))
    pairs = log_w.reshape(2, -1).mean(0)
    short = np.max(pairs) - pairs  # positive, with the heavy tail upwards
    tiny = np.finfo(float).eps * (1.0 + np.abs(log_w).max())
    if np.std(log_w) <= 1e3 * tiny:  # an exact fit has constant weights
        return Score(float(pairs.mean()), 0.0, float("-inf"))
    smoothed = np.exp(psis(np.log(short + tiny))[0]) * short.sum()
    return Score(float(pairs.mean()), float(smoothed.std() / np.sqrt(pairs.size)), float(psis(log_w)[1]))


def psis(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Pareto-smoothed, normalised log weights and k̂.

    If the tail is constant or too short to fit, the weights stay as they are and k̂ is infinite, as in ArviZ 0.23
    (ArviZ 1 raises).
    """
    try:
        smoothed, khat = importance.psis(log_weights)
    except ValueError:
        smoothed, khat = log_weights, np.inf
    return smoothed - np.logaddexp.reduce(smoothed), khat


def scalars(values: dict[str, Any]) -> dict[str, np.ndarray]:
    """Draws (n, …) of sites as draws (n,) of scalars, named as Stan does: ``theta[1]`` counts from 1."""
    out: dict[str, np.ndarray] = {}
    for name, x in values.items():
        flat = np.asarray(x, float).reshape(len(x), -1)
        names = [name] if np.ndim(x) == 1 else [f"{name}[{i + 1}]" for i in range(flat.shape[1])]
        out.update(zip(names, flat.T, strict=True))
    return out


def compare(draws: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> Moments:
    """Errors of the draws' means and standard deviations.

    :raises KeyError: if a parameter of the reference is not among the draws.
    """
    mean, sd = (np.array([moment(draws[name]) for name in reference]) for moment in (np.mean, np.std))
    true_mean, true_sd = (np.array([moment(x) for x in reference.values()]) for moment in (np.mean, np.std))
    error, ratio = np.abs(mean - true_mean) / true_sd, sd / true_sd
    return Moments(
        *(float(x) for x in (error.max(), np.median(error), ratio.min(), np.median(ratio), ratio.max()))
    )  # fmt: skip


def _double(x: Any) -> jax.Array:
    return jnp.asarray(np.asarray(x, np.float64))
