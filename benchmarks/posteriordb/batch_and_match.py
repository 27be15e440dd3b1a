# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Batch and match (Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei and Saul 2024, arXiv:2402.14758), full Gaussian.

A step draws z_b from q = N(μ, Σ), takes their scores g_b = ∇log p(z_b), and solves for the Gaussian whose own scores
match them, with λ weighing the batch against KL to q (their Algorithm 1; bars are means over the batch):

    U = λ Γ + λ/(1+λ) ḡḡᵀ            V = Σ + λ C + λ/(1+λ) (μ − z̄)(μ − z̄)ᵀ
    Σ' U Σ' + Σ' = V                 μ' = μ/(1+λ) + λ/(1+λ) (Σ'ḡ + z̄)

with C and Γ the batch's covariances of z and g. Batch sizes 8 and 32 and λ = B d/(t+1), t from 0, are what the authors
use on posteriordb (Section 5.2). Their code adds 10⁻⁶ to the diagonal and undoes a step if Σ' is not positive definite.
Solved with matrix roots, as below, Σ' stays positive definite and narrow posteriors keep their width. Non-finite steps
are undone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .path import Path
from .walk import Walk, prepare


class Gaussian(NamedTuple):
    """N(loc, factor factorᵀ): (d,), and lower triangular (d, d)."""

    loc: jax.Array
    factor: jax.Array


def fit(
    f: Callable[[jax.Array], jax.Array], loc: Any, scale: Any, key: jax.Array, *, batch: int = 32, steps: int = 1250
) -> Path:
    """The Gaussians along the way.

    :param f: −log p, (d,) → scalar, nats.
    :param loc: where to start, (d,).
    :param scale: standard deviations to start with, a scalar or (d,).
    :param batch: B, draws of a step, each of which costs one gradient.
    """
    start = _start(jnp.asarray(loc), scale)
    return _walk(f, start.loc.size, start.loc.dtype, batch, steps)(start, key, batch)


def _start(loc: jax.Array, scale: Any) -> Gaussian:
    return Gaussian(loc, jnp.diag(jnp.broadcast_to(jnp.asarray(scale, loc.dtype), loc.shape)))


@functools.cache
def _walk(f: Callable[[jax.Array], jax.Array], size: int, dtype: Any, batch: int, steps: int) -> Walk:
    scores = jax.vmap(lambda z: -jax.grad(f)(z))

    def step(t: Any, q: Gaussian, key: jax.Array) -> Gaussian:
        z = q.loc + jax.random.normal(key, (batch, size), dtype) @ q.factor.T
        new = match(q, z, scores(z), batch * size / (t + 1.0))
        good = jnp.isfinite(new.loc).all() & jnp.isfinite(new.factor).all()
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, q)

    return prepare(step, tuple, _start(jnp.zeros(size, dtype), 1.0), steps)


def match(q: Gaussian, z: jax.Array, g: jax.Array, rate: Any) -> Gaussian:
    """The Gaussian that matches the scores ``g`` (B, d) at ``z`` (B, d), with the weight λ = ``rate`` on the batch.

    With V = LLᵀ and Σ' = LXLᵀ the equation is XAX + X = I for A = LᵀUL. If U = GᵀG, and GL has the singular values s
    and right singular vectors W, then X = I − W (1 − x) Wᵀ with x = 2/(1 + √(1 + 4s²)). Its root is I − W (1 − √x) Wᵀ.
    """
    share = rate / (1 + rate)
    mean_z, mean_g = z.mean(0), g.mean(0)
    L = _lower(jnp.vstack([q.factor.T, _rows(z - mean_z, rate), jnp.sqrt(share) * (q.loc - mean_z)]))
    G = jnp.vstack([_rows(g - mean_g, rate), jnp.sqrt(share) * mean_g])
    _, s, Wt = jnp.linalg.svd(G @ L, full_matrices=False)
    x = 2 / (1 + jnp.hypot(1.0, 2 * s))
    factor = _lower((L - (L @ Wt.T) * (1 - jnp.sqrt(x)) @ Wt).T)
    return Gaussian(q.loc + share * (mean_z - q.loc + factor @ (factor.T @ mean_g)), factor)


def _rows(deviations: jax.Array, rate: Any) -> jax.Array:
    """R with RᵀR = λ times the batch's covariance."""
    return jnp.sqrt(rate / len(deviations)) * deviations


def _lower(R: jax.Array) -> jax.Array:
    """The lower Cholesky factor of RᵀR, of R (n, d) with n ≥ d."""
    lower = jnp.linalg.qr(R, mode="r").T
    return lower * jnp.where(jnp.diagonal(lower) < 0, -1, 1).astype(lower.dtype)
