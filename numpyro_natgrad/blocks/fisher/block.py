# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""A block of parameters with a Fisher matrix of its own: a metric says what F is, a solver how F⁻¹g is found.

Steps are taken in NumPyro's unconstrained parameters, φ₊ = φ − ρv, where KL is approximated by ½ρ²vᵀFv.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from numpyro_natgrad.blocks import base
from numpyro_natgrad.blocks.base import Memory, Randomness, SquaredNorms
from numpyro_natgrad.blocks.fisher.metrics import Metric
from numpyro_natgrad.blocks.fisher.solvers import FisherTangent, Solver, compared
from numpyro_natgrad.distributions.gaussian import StepKL
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.gaussian_sites import Params


@dataclass(frozen=True)
class FisherBlock(base.Block[FisherTangent]):
    """A connected component: its parameters' ``sizes``, and how many ``numbers`` its sites draw or observe in all.

    :ivar row_axes: of each parameter the axis of the rows, where all have an entry for each row of a subsampled plate.
    :ivar row_kl: the most nats per latent of one row in a unit step.
    """

    metric: Metric
    solver: Solver
    sizes: Mapping[str, int]
    numbers: int
    row_axes: Mapping[str, int] = field(default_factory=dict)
    row_kl: float = math.inf

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @property
    def exact_on_conjugate(self) -> bool:
        return self.metric.exact_on_conjugate

    def noise_tolerance(self, scope: base.Scope) -> base.NoiseTolerance:
        tolerance = super().noise_tolerance(scope)
        threshold = self.solver.noise_threshold(scope, sum(self.sizes.values()), self.numbers)
        tolerance = tolerance if threshold is None else tolerance._replace(threshold=threshold)
        return tolerance._replace(visits=1 / scope.batch_weight) if self.row_axes else tolerance

    def report_rows(self) -> list[base.ReportRow]:
        names = ", ".join(site.name for site in self.metric.sites)
        families = ", ".join(dict.fromkeys(site.family for site in self.metric.sites))
        how = f"{self.metric.description}, {self.solver.description}"
        return [(p, names, families, how, str(size)) for p, size in self.sizes.items()]

    def natural_gradient(
        self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness
    ) -> FisherTangent:
        operator = self.metric.operator(loss_info, params, self.params, randomness.key)
        gradient, remembered = self._ravel(loss_info.gradient)[0], self._ravel(memory.running_mean)[0]
        v = self.solver.natural_gradient(operator, gradient, remembered)
        if not self.row_axes:
            return v
        fraction = self._row_fractions(v.v, loss_info.gradient)
        # F is zero in rows that the batch lacks, so that norms are over the rows of the batch.
        return compared(fraction * v.v, fraction * gradient, remembered, operator.product(remembered))

    def squared_norm(self, v: FisherTangent) -> jax.Array:
        return v.norms.gradient

    def kl(self, v: FisherTangent, rho: jax.Array) -> StepKL:
        quadratic = 0.5 * rho**2 * v.norms.gradient
        return base.conjugate_kl(quadratic, quadratic, rho)

    def compare(self, memory: Memory, v: FisherTangent) -> SquaredNorms:
        # A solver with momentum stops early, so that its solutions differ even where the gradient has no noise.
        if self.metric.is_compared or self.solver.has_momentum:
            return v.norms
        return SquaredNorms(v.norms.gradient, jnp.zeros_like(v.norms.gradient), v.norms.gradient)

    def update_memory(self, memory: Memory, v: FisherTangent, weight: jax.Array) -> Memory:
        old, unravel = self._ravel(memory.running_mean)
        weight = jnp.where(v.v == 0, 0.0, weight) if self.row_axes else weight  # zero in rows that the batch lacks
        new = v.v if self.solver.has_momentum else old + weight * (v.v - old)
        return memory._replace(running_mean={**memory.running_mean, **unravel(new)})

    def retract(self, params: Params, memory: Memory, v: FisherTangent, rho: jax.Array) -> tuple[Params, Memory]:
        flat, unravel = self._ravel(params)
        params = {**params, **unravel(flat - rho * v.v)}
        if self.solver.has_momentum:
            return params, memory
        # As natural gradients are differences from the optimum, the step is subtracted from their running mean.
        old, unravel = self._ravel(memory.running_mean)
        return params, memory._replace(running_mean={**memory.running_mean, **unravel(old - rho * v.v)})

    def _row_fractions(self, v: jax.Array, gradient: Params) -> jax.Array:
        """Shorten the step of each row to ``row_kl`` nats per latent; factors, ``(P,)``.

        The trust region is shared by all rows. If one row may spend it, a scale that starts too wide, whose natural
        gradient ½(σ²H − 1) has no bound, collapses in a single step, and its mean can move no more.
        """
        tangent = self._ravel(gradient)[1](v)
        rows_first = {p: jnp.moveaxis(x * gradient[p], self.row_axes[p], 0) for p, x in tangent.items()}
        square = jnp.sum(jnp.stack([jnp.sum(x.reshape(len(x), -1), axis=1) for x in rows_first.values()]), axis=0)
        limit = 2 * self.row_kl * self.numbers / len(square)
        fraction = jnp.minimum(1.0, jnp.sqrt(limit / jnp.maximum(square, jnp.finfo(v.dtype).tiny)))

        def spread(x: jax.Array, axis: int) -> jax.Array:
            return jnp.broadcast_to(jnp.expand_dims(fraction, [k for k in range(x.ndim) if k != axis]), x.shape)

        return self._ravel({p: spread(x, self.row_axes[p]) for p, x in tangent.items()})[0]

    def _ravel(self, tree: Params) -> tuple[jax.Array, Callable[[jax.Array], Params]]:
        """The block's part of a tree of all parameters, ``(P,)``, and the function that undoes it."""
        return ravel_pytree({p: tree[p] for p in self.sizes})
