# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Deterministic ADVI (Giordano, Ingram and Broderick 2024, JMLR 25(18), arXiv:2304.05527): the ELBO on M fixed draws.

    min over μ, L of  1/M Σ_m f(μ + L ε_m) − log |L|,        ε_m ~ N(0, I) once and for all

by SciPy's trust-region Newton method with conjugate gradients (``trust-ncg``), Hessians entering by their products
only, as the authors do. L is a diagonal e^ρ, with M = 30 (their setting on all models), or lower triangular with e^ρ on
its diagonal. The latter needs more draws: if M ≤ d, some w ∈ R^(d+1) is orthogonal to all (ε_m, 1). Multiples of w
added to the last row of (L, μ) widen q without moving a draw, so that there is no minimum (the authors' reason to avoid
large families). With M draws a Gaussian posterior is missed by d(d+3)/(4M) nats on average, 1/(2M) for each of the
d(d+3)/2 parameters: M = 5 d(d+3) leaves 0.05 nats.

One step is one iteration of Newton's method. A product costs two gradients of each draw (forward over reverse).
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize

from .path import Path
from .walk import timed_compile

#: Expected excess loss due to the fixed draws, nats, which sets the full Gaussian's number of draws.
LOSS = 0.05


class Block(NamedTuple):
    """How a Gaussian is parameterised. Every family has its mean and the logarithms ρ of L's diagonal.

    :ivar start: (loc, log scale) → parameters.
    :ivar factor: parameters → L (d, d), or its diagonal (d,).
    :ivar draws: d → M.
    """

    start: Callable[[jax.Array, jax.Array], Any]
    factor: Callable[[Any], jax.Array]
    draws: Callable[[int], int]


class _Over(Exception):  # noqa: N818
    """The budget is spent, or a value is not finite."""


MEAN_FIELD = Block(lambda loc, rho: (loc, rho), lambda p: jnp.exp(p[1]), lambda d: 30)
FULL = Block(
    lambda loc, rho: (loc, rho, jnp.zeros(loc.size * (loc.size - 1) // 2, loc.dtype)),
    lambda p: jnp.diag(jnp.exp(p[1])).at[jnp.tril_indices(p[0].size, -1)].set(p[2]),
    lambda d: max(30, int(np.ceil(d * (d + 3) / (4 * LOSS)))),
)


def mean_field(f: Callable[[jax.Array], jax.Array], loc: Any, scale: Any, key: jax.Array, **options: Any) -> Path:
    """:func:`fit` of a diagonal Gaussian."""
    return fit(f, loc, scale, key, family=MEAN_FIELD, **options)


def fit(
    f: Callable[[jax.Array], jax.Array], loc: Any, scale: Any, key: jax.Array, *, family: Block = FULL,
    draws: int | None = None, steps: int = 500, budget: float = 1e6, gtol: float = 1e-4,
) -> Path:  # fmt: skip
    """The Gaussians along the way, the start included.

    :param f: −log p, (d,) → scalar, nats.
    :param loc: where to start, (d,).
    :param scale: standard deviations to start with, a scalar or (d,).
    :param draws: M, by default the family's.
    :param steps: of Newton's method, at most.
    :param budget: gradients after which it is stopped.
    :param gtol: norm of the gradient at which it stops, SciPy's default.
    """
    loc = jnp.asarray(loc)
    epsilon = fixed_draws(key, draws or family.draws(loc.size), loc)
    rho = jnp.broadcast_to(jnp.log(jnp.asarray(scale, loc.dtype)), loc.shape)
    x, unravel = ravel_pytree(family.start(loc, rho))
    objective = _objective(f, family, loc.size, len(epsilon), loc.dtype)
    descent = _Descent(objective, x, epsilon, budget)
    descent.run(steps, gtol)
    means, factors = jax.device_get(jax.vmap(lambda x: _gaussian(family, unravel(x)))(jnp.stack(descent.points)))
    gradients, seconds = map(np.array, zip(*descent.costs, strict=True))
    return Path(means, factors, np.arange(len(means)), gradients, seconds, objective.compiling)


def fixed_draws(key: jax.Array, draws: int, loc: jax.Array) -> jax.Array:
    """ε (M, d)."""
    return jax.random.normal(key, (draws, loc.size), loc.dtype)


def _gaussian(family: Block, parameters: Any) -> tuple[jax.Array, jax.Array]:
    return parameters[0], family.factor(parameters)


class _Objective(NamedTuple):
    """Compiled functions of the parameters and ε, and the seconds that it took."""

    value_and_grad: Callable[[Any, Any], Any]
    product: Callable[[Any, Any, Any], Any]
    compiling: float


@functools.cache
def _objective(
    f: Callable[[jax.Array], jax.Array], family: Block, size: int, draws: int, dtype: Any
) -> _Objective:  # fmt: skip
    x, unravel = ravel_pytree(family.start(jnp.zeros(size, dtype), jnp.zeros(size, dtype)))

    def objective(x: jax.Array, epsilon: jax.Array) -> jax.Array:
        loc, factor = _gaussian(family, parameters := unravel(x))
        spread = epsilon * factor if factor.ndim == 1 else epsilon @ factor.T
        return jax.vmap(f)(loc + spread).mean() - parameters[1].sum()

    def product(x: jax.Array, v: jax.Array, epsilon: jax.Array) -> jax.Array:
        return jax.jvp(lambda x: jax.grad(objective)(x, epsilon), (x,), (v,))[1]

    epsilon = jnp.zeros((draws, size), dtype)
    first, seconds = timed_compile(jax.value_and_grad(objective), x, epsilon)
    second, more = timed_compile(product, x, x, epsilon)
    return _Objective(first, second, seconds + more)


class _Descent:
    """SciPy's minimisation with the costs of what it calls.

    :ivar points: parameters after each iteration.
    :ivar costs: (gradients, seconds) up to each of them.
    """

    def __init__(self, objective: _Objective, x: jax.Array, epsilon: jax.Array, budget: float) -> None:
        self._objective, self._epsilon, self._budget, self._dtype = objective, epsilon, budget, x.dtype
        self._gradients = 0
        self.points, self.costs = [x], [(0, 0.0)]

    def run(self, steps: int, gtol: float) -> None:
        self._begin = time.perf_counter()
        start = np.asarray(self.points[0], float)
        options = {"maxiter": steps, "gtol": gtol}
        try:
            minimize(self._value, start, jac=True, hessp=self._hessp, method="trust-ncg", callback=self._record,
                     options=options)  # fmt: skip
        except _Over:
            return

    def _value(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """A non-finite value becomes infinity: the trust region then shrinks, and the gradient is not used."""
        value, gradient = self._objective.value_and_grad(self._spend(x, 1), self._epsilon)
        finite, first = bool(np.isfinite(value)), self._gradients == len(self._epsilon)
        if not np.isfinite(gradient).all() and (finite or first):
            raise _Over
        return float(value) if finite else np.inf, np.asarray(gradient, float)

    def _hessp(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Stop if the product is not finite, because conjugate gradients would not end."""
        direction = np.asarray(v, self._dtype)
        product = np.asarray(self._objective.product(self._spend(x, 2), direction, self._epsilon), float)
        if not np.isfinite(product).all():
            raise _Over
        return product

    def _spend(self, x: np.ndarray, gradients: int) -> np.ndarray:
        if self._gradients >= self._budget or not np.isfinite(x).all():
            raise _Over
        self._gradients += gradients * len(self._epsilon)
        return np.asarray(x, self._dtype)

    def _record(self, x: np.ndarray) -> None:
        self.points.append(jnp.asarray(x, self._dtype))
        self.costs.append((self._gradients, time.perf_counter() - self._begin))
