# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The Fisher matrix F of P parameters as an operator, and five solvers of (F + damping) v = g.

    Cholesky                    F is formed
    RowCholesky                 the blocks of F are formed, one for each row of a subsampled plate
    ConjugateGradients          products with F, as many as the tolerance needs
    MomentumConjugateGradients  v ← μv + (F + λ)⁻¹ (g − (F + λ) μv), by a few products a step: networks
    Woodbury                    [g − U (λI + UᵀU)⁻¹ Uᵀ g] / λ for F = UUᵀ: scores

Operator and solver are separate, as in lineax: all solvers but Woodbury need products only, and go with any metric.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg

from numpyro_natgrad.blocks.base import Scope, SquaredNorms, statistical_threshold
from numpyro_natgrad.distributions.gaussian import scaled_cholesky_solve
from numpyro_natgrad.estimators.hessian_products import random_signs
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.options import RuleConstants

#: Random signs from which the length of each row of F is estimated, to about 1/√(2 · 4) = 35 % where F is dense.
ROW_PROBES = 4

Product = Callable[[jax.Array], jax.Array]
#: Arrays over the rows of a plate, one for each parameter of a row.
Rows = list[jax.Array]


class FisherTangent(NamedTuple):
    """A natural gradient v = F⁻¹g of one block, ``(P,)``, and the squared norms for its noise."""

    v: jax.Array
    norms: SquaredNorms


class FisherOperator(NamedTuple):
    """The Fisher matrix F of unconstrained parameters, symmetric and positive semi-definite, as an operator.

    :ivar params: the parameters at which F is evaluated, a tree with P entries in all.
    :ivar product: d ↦ Fd, ``(P,) -> (P,)``, in the order of ``jax.flatten_util.ravel_pytree(params)``.
    :ivar key: PRNG key of the probes that estimate the rows of F where it is not formed.
    :ivar owned: ``(P,)``, whether an entry is a parameter of a distribution. The others have zero rows.
    :ivar exact: whether F is in closed form rather than a mean over draws.
    :ivar scores: U, ``(P, S)``, where F = UUᵀ is made of scores.
    """

    params: Params
    product: Product
    key: jax.Array
    owned: jax.Array | bool = True
    exact: bool = False
    scores: jax.Array | None = None

    def matvec(self, tangent: Params) -> Params:
        """The product F d; ½ dᵀF d is the KL, in nats, between the guides at φ and φ + d for small d.

        :param tangent: d, a tree like ``params``.
        :return: F d, a tree like ``params``.
        """
        flat, unravel = ravel_pytree(tangent)
        return unravel(self.product(flat))

    def solve(
        self,
        gradient: Params,
        damping: float | None = None,
        *,
        dense_limit: int = 2048,
        tolerance: float = 1e-5,
        max_products: int = 1000,
    ) -> Params:
        """The natural gradient (F + damping · diag F)⁻¹ g. Entries without a Fisher matrix keep their gradient.

        F is formed up to ``dense_limit`` parameters. Beyond, conjugate gradients are used, and the lengths of the rows
        of F, from four Rademacher probes (Hutchinson 1990), take the place of diag F.

        :param gradient: g, a tree like ``params``.
        :param float damping: relative to diag F; the square root of the floating-point precision by default, which
            bounds the condition number by its inverse.
        :param int dense_limit: parameters. 2048² numbers are 32 MB in double precision, and their factorization takes
            about as long as tracing the loss.
        :param float tolerance: relative residual of conjugate gradients: five digits of the solution.
        :param int max_products: products with F, at most: a bound on the time if F is ill-conditioned.
        :return: a tree like ``params``.
        """
        flat, unravel = ravel_pytree(gradient)
        damping = float(jnp.finfo(flat.dtype).eps) ** 0.5 if damping is None else damping
        dense = flat.size <= dense_limit
        solver = Cholesky(damping) if dense else ConjugateGradients(damping, tolerance, max_products)
        return unravel(jnp.where(self.owned, solver.solve(self, jnp.where(self.owned, flat, 0.0)), flat))

    def dense(self) -> jax.Array:
        """F, shape ``(P, P)``, by P products."""
        flat, _ = ravel_pytree(self.params)
        columns = jax.vmap(self.product)(jnp.eye(flat.size, dtype=flat.dtype))
        return (columns + columns.T) / 2

    def diagonal(self) -> Params:
        """diag F, a tree like ``params``, by P products of which one is in memory at a time."""
        flat, unravel = ravel_pytree(self.params)
        entry = lambda i: self.product(jnp.zeros_like(flat).at[i].set(1.0))[i]
        return unravel(lax.map(entry, jnp.arange(flat.size)))


class Solver(ABC):
    """How a block solves for v; with ``has_momentum`` from the last v, kept in place of a running mean."""

    description: ClassVar[str]
    has_momentum: ClassVar[bool] = False

    @abstractmethod
    def natural_gradient(self, operator: FisherOperator, gradient: jax.Array, memory: jax.Array) -> FisherTangent:
        """Solve F v = ``gradient`` and compare v with the running mean ``memory``; all ``(P,)``."""

    def noise_threshold(self, scope: Scope, parameters: int, numbers: int) -> float | None:
        """The noise threshold τ, nats, or ``None`` for the default (:class:`.NoiseTolerance`)."""
        return None


@dataclass(frozen=True)
class Cholesky(Solver):
    """Form F, and solve (F + damping · diag F) v = g with F scaled to a unit diagonal.

    :ivar damping: relative; ``None`` for rounding errors only: with F in closed form undamped steps converge like
        Newton's.
    :ivar by_array: add to each entry of diag F the mean of its array, or of the block if that mean is zero (a factor
        that starts at zero), so that entries of a noisy F that happen to vanish are damped like the others.
    """

    damping: float | None = None
    by_array: bool = False
    description = "dense"

    def natural_gradient(self, operator: FisherOperator, gradient: jax.Array, memory: jax.Array) -> FisherTangent:
        return compared(self.solve(operator, gradient), gradient, memory, operator.product(memory))

    def solve(self, operator: FisherOperator, gradient: jax.Array) -> jax.Array:
        """v, ``(P,)``; the gradient itself where the row of F is zero."""
        matrix = operator.dense()
        diagonal = jnp.diagonal(matrix)
        damping = gradient.size * float(jnp.finfo(gradient.dtype).eps) if self.damping is None else self.damping
        if self.by_array:
            scale = _scale_of_arrays(diagonal, ravel_pytree(operator.params)[1])
            return scaled_cholesky_solve(matrix, gradient, damping=damping, scale=scale)
        seen = diagonal > 0
        return scaled_cholesky_solve(
            matrix, gradient, damping=jnp.where(seen, damping, 1.0), scale=jnp.where(seen, diagonal, 1.0)
        )


@dataclass(frozen=True)
class RowCholesky(Solver):
    """Form the block of F of each row, and solve (F + damping · diag F) v = g row by row.

    F couples parameters of one row only. A product with a vector that is 1 in the k-th parameter of every row is
    therefore the k-th column of all blocks: p products for p parameters a row, however many rows there are. Rows that
    the batch lacks have zero blocks, and stay.

    :ivar row_axes: of each parameter the axis of the rows.
    """

    damping: float
    row_axes: Mapping[str, int]
    description = "dense in each row"

    def natural_gradient(self, operator: FisherOperator, gradient: jax.Array, memory: jax.Array) -> FisherTangent:
        return compared(self.solve(operator, gradient), gradient, memory, operator.product(memory))

    def solve(self, operator: FisherOperator, gradient: jax.Array) -> jax.Array:
        g, from_rows = self._rows(operator.params, gradient)
        one, zero = jnp.ones_like(g[0]), jnp.zeros_like(g[0])
        units = [from_rows([one if k == i else zero for i in range(len(g))]) for k in range(len(g))]
        columns = [self._rows(operator.params, operator.product(unit))[0] for unit in units]
        return from_rows(_solve_each(columns, g, self.damping))

    def _rows(self, params: Params, flat: jax.Array) -> tuple[Rows, Callable[[Rows], jax.Array]]:
        """The p parameters of a row, each an array over the rows, and the function that undoes it."""
        tree = ravel_pytree(params)[1](flat)
        moved = {name: jnp.moveaxis(x, self.row_axes[name], -1) for name, x in tree.items()}
        rows = [row for x in moved.values() for row in x.reshape(-1, x.shape[-1])]

        def undo(rows: Rows) -> jax.Array:
            left, back = iter(rows), {}
            for name, x in moved.items():
                mine = jnp.stack([next(left) for _ in range(x.size // x.shape[-1])]).reshape(x.shape)
                back[name] = jnp.moveaxis(mine, -1, self.row_axes[name])
            return ravel_pytree(back)[0]

        return rows, undo


def _solve_each(columns: list[Rows], right: Rows, damping: float) -> Rows:
    """Solve (A + damping · diag A) v = b for each row by LDLᵀ; zero where a pivot is not positive."""
    size, tiny = len(right), jnp.finfo(right[0].dtype).tiny
    lower: dict[tuple[int, int], jax.Array] = {}
    inverse: Rows = []
    pivots: Rows = []
    v = list(right)
    for j in range(size):
        pivot = (1 + damping) * columns[j][j] - sum(lower[j, k] ** 2 * pivots[k] for k in range(j))
        pivots.append(pivot)
        inverse.append(jnp.where(pivot > tiny, 1 / jnp.where(pivot > tiny, pivot, 1.0), 0.0))
        for i in range(j + 1, size):
            rest = columns[j][i] - sum(lower[i, k] * lower[j, k] * pivots[k] for k in range(j))
            lower[i, j] = rest * inverse[j]
            v[i] = v[i] - lower[i, j] * v[j]
    v = [x * d for x, d in zip(v, inverse, strict=True)]
    for j in reversed(range(size)):
        v[j] = v[j] - sum(lower[i, j] * v[i] for i in range(j + 1, size))
    return v


@dataclass(frozen=True)
class ConjugateGradients(Solver):
    """Solve (F + damping · D) v = g by products with D^(−½) F D^(−½), D the length of each row of F.

    Each parameter is damped, and its residual measured, in its own scale: of many local rows one may have collapsed,
    with an entry of F that is 1e10 times the others. E[(Fω)ᵢ²] over random signs ω is the squared length of row i
    (Hutchinson 1990). It is at least Fᵢᵢ², and equal to it where F is diagonal.
    """

    damping: float
    tolerance: float
    steps: int
    description = "conjugate gradients"

    def natural_gradient(self, operator: FisherOperator, gradient: jax.Array, memory: jax.Array) -> FisherTangent:
        return compared(self.solve(operator, gradient), gradient, memory, operator.product(memory))

    def solve(self, operator: FisherOperator, gradient: jax.Array) -> jax.Array:
        signs = random_signs(operator.key, (ROW_PROBES, gradient.size), gradient.dtype)
        rows = jnp.linalg.norm(jax.vmap(operator.product)(signs), axis=0) / ROW_PROBES**0.5
        root = jnp.sqrt(jnp.where(rows > 0, rows, 1.0))
        scaled = lambda x: operator.product(x / root) / root + self.damping * x
        return cg(scaled, gradient / root, tol=self.tolerance, maxiter=self.steps)[0] / root


@dataclass(frozen=True)
class MomentumConjugateGradients(Solver):
    """A few steps of conjugate gradients from μ times the last natural gradient.

    A minibatch determines few of a network's directions. In these k steps solve for v; in the others v keeps the value
    of earlier minibatches (Martens & Sutskever 2012; in the space of samples "SPRING", Goldshlager, Abrahamsen & Lin
    2024). The damping is not adapted by Levenberg–Marquardt: on its own minibatch it tends to zero and overfits.

    :ivar damping: λ relative to vᵀFv/vᵀv, the curvature of F along the last natural gradient v.
    :ivar momentum: μ.
    :ivar steps: k.
    """

    damping: float
    momentum: float
    steps: int
    description = "conjugate gradients"
    has_momentum = True

    def natural_gradient(self, operator: FisherOperator, gradient: jax.Array, memory: jax.Array) -> FisherTangent:
        start = self.momentum * memory
        nonzero, tiny = jnp.any(start != 0), jnp.finfo(gradient.dtype).tiny
        along = jnp.where(nonzero, start, gradient)
        image = operator.product(along)
        damping = self.damping * jnp.maximum(along @ image, tiny) / jnp.maximum(along @ along, tiny)
        residual = gradient - jnp.where(nonzero, image + damping * along, 0.0)
        damped = lambda v: operator.product(v) + damping * v
        correction, residual = conjugate_gradients(damped, residual, self.steps)
        v = start + correction
        # Along v the quadratic model of this minibatch is least at gᵀv / vᵀ(F + λ)v. That is below 1 where F has grown,
        # because the momentum is then too long.
        fraction = jnp.clip(gradient @ v / jnp.maximum((gradient - residual) @ v, tiny), 0.0, 1.0)
        # The part of the norm on which this and earlier minibatches agree: the gradient along the momentum.
        squared_norm = jnp.maximum(fraction * (gradient @ v), 0.0)
        agreed = jnp.clip(fraction * (start @ gradient), 0.0, squared_norm)
        return FisherTangent(fraction * v, SquaredNorms(agreed, squared_norm - agreed, squared_norm))

    def noise_threshold(self, scope: Scope, parameters: int, numbers: int) -> float | None:
        return statistical_threshold(parameters, numbers)


@dataclass(frozen=True)
class Woodbury(Solver):
    """Solve (λI + UUᵀ) v = g in the smaller of the spaces of parameters and of scores ("minSR", Chen & Heyl 2024).

    P parameters and S scores cost S²P. The Fisher matrix of a network is nearly singular, so that λ is not small.

    :ivar damping: λ relative to tr F, the mean of ‖score‖².
    :ivar norm_max: nats. A longer natural gradient is shortened to that, because KL is not its quadratic model there.
    """

    damping: float
    norm_max: float
    description = "Woodbury"

    def natural_gradient(self, operator: FisherOperator, gradient: jax.Array, memory: jax.Array) -> FisherTangent:
        assert operator.scores is not None
        trace = jnp.sum(operator.scores**2)
        damping = jnp.where(trace > 0, self.damping * trace, 1.0)
        v = woodbury_solve(operator.scores, damping, gradient)
        squared_norm = jnp.maximum(gradient @ v, jnp.finfo(gradient.dtype).tiny)
        fraction = jnp.minimum(1.0, jnp.sqrt(self.norm_max / squared_norm))
        image = operator.product(memory) + damping * memory
        return compared(fraction * v, fraction * gradient, memory, image)

    def noise_threshold(self, scope: Scope, parameters: int, numbers: int) -> float | None:
        return scope.constants.noise_threshold_scores / scope.blocks if scope.paired else None


def damped_solver(parameters: int, constants: RuleConstants) -> Solver:
    """The solver of a Fisher matrix that varies from step to step."""
    c = constants
    if parameters <= c.dense_limit:
        return Cholesky(c.fisher_damping, by_array=True)
    return MomentumConjugateGradients(c.network_damping, c.network_momentum, c.network_cg_steps)


def row_solver(parameters: int, rows: int, row_axes: Mapping[str, int], constants: RuleConstants) -> Solver:
    """The solver for the local rows of a subsampled plate.

    One of many rows may have collapsed, with an entry of F that is 1e10 times the others: each is damped by its own.
    """
    c = constants
    if parameters <= c.row_limit * rows:
        return RowCholesky(c.fisher_damping, row_axes)
    if parameters <= c.dense_limit:
        return Cholesky(c.fisher_damping)
    return ConjugateGradients(c.fisher_damping, c.fisher_cg_tolerance, c.fisher_cg_steps)


def conjugate_gradients(product: Product, gradient: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """F⁻¹g by ``steps`` products with F, and the residual; unrolled, so that two networks can run in parallel."""
    tiny = jnp.finfo(gradient.dtype).tiny
    v, residual, direction, square = jnp.zeros_like(gradient), gradient, gradient, gradient @ gradient
    for _ in range(steps):
        image = product(direction)
        length = square / jnp.maximum(direction @ image, tiny)
        v, residual = v + length * direction, residual - length * image
        previous, square = square, residual @ residual
        direction = residual + square / jnp.maximum(previous, tiny) * direction
    return v, residual


def woodbury_solve(scores: jax.Array, damping: jax.Array, gradient: jax.Array) -> jax.Array:
    """(λI + UUᵀ)⁻¹ g for U of shape ``(P, S)``."""
    p, s = scores.shape
    ones = jnp.ones(min(p, s), scores.dtype)
    if p <= s:
        return scaled_cholesky_solve(scores @ scores.T, gradient, damping=damping, scale=ones)
    inner = scaled_cholesky_solve(scores.T @ scores, gradient @ scores, damping=damping, scale=ones)
    return (gradient - scores @ inner) / damping


def compared(v: jax.Array, image: jax.Array, mean: jax.Array, mean_image: jax.Array) -> FisherTangent:
    """The tangent of v from F v, the running mean and F times that."""
    squares = mean @ mean_image, (v - mean) @ (image - mean_image), v @ image
    return FisherTangent(v, SquaredNorms(*(jnp.maximum(x, 0.0) for x in squares)))


def _scale_of_arrays(diagonal: jax.Array, unravel: Callable[[jax.Array], Params]) -> jax.Array:
    """diag F plus its mean over each array, or over the block where an array's mean is zero to single precision."""
    overall = jnp.mean(diagonal)
    overall = jnp.where(overall > 0, overall, 1.0)

    def scale(x: jax.Array) -> jax.Array:
        mean = jnp.mean(x)
        return x + jnp.where(mean > 1e-6 * overall, mean, overall)

    return ravel_pytree(jax.tree.map(scale, unravel(diagonal)))[0]
