# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""A block of parameters with a Fisher matrix of its own: a metric says what F is, a solver how F⁻¹g is found.

Steps are taken in NumPyro's unconstrained parameters, φ₊ = φ − ρv, where KL is approximated by ½ρ²vᵀFv.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from numpyro_natgrad.blocks import base
from numpyro_natgrad.blocks.base import Memory, Randomness, SquaredNorms
from numpyro_natgrad.blocks.fisher.metrics import Metric
from numpyro_natgrad.blocks.fisher.solvers import FisherTangent, Solver
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.gaussian_sites import Params


@dataclass(frozen=True)
class FisherBlock(base.Block[FisherTangent]):
    """A connected component: its parameters' ``sizes``, and how many ``numbers`` its sites draw or observe in all."""

    metric: Metric
    solver: Solver
    sizes: Mapping[str, int]
    numbers: int

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @property
    def exact_on_conjugate(self) -> bool:
        return self.metric.exact_on_conjugate

    def noise_tolerance(self, scope: base.Scope) -> base.NoiseTolerance:
        tolerance = super().noise_tolerance(scope)
        threshold = self.solver.noise_threshold(scope, sum(self.sizes.values()), self.numbers)
        return tolerance if threshold is None else tolerance._replace(threshold=threshold)

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
        return self.solver.natural_gradient(operator, gradient, remembered)

    def squared_norm(self, v: FisherTangent) -> jax.Array:
        return v.norms.gradient

    def forward_kl(self, v: FisherTangent, rho: jax.Array) -> jax.Array:
        return 0.5 * rho**2 * v.norms.gradient

    def reverse_kl(self, v: FisherTangent, rho: jax.Array) -> jax.Array:
        return 0.5 * rho**2 * v.norms.gradient

    def compare(self, memory: Memory, v: FisherTangent) -> SquaredNorms:
        # A solver with momentum stops early, so that its solutions differ even where the gradient has no noise.
        if self.metric.is_compared or self.solver.has_momentum:
            return v.norms
        return SquaredNorms(v.norms.gradient, jnp.zeros_like(v.norms.gradient), v.norms.gradient)

    def update_memory(self, memory: Memory, v: FisherTangent, weight: jax.Array) -> Memory:
        old, unravel = self._ravel(memory.running_mean)
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

    def _ravel(self, tree: Params) -> tuple[jax.Array, Callable[[jax.Array], Params]]:
        """The block's part of a tree of all parameters, ``(P,)``, and the function that undoes it."""
        return ravel_pytree({p: tree[p] for p in self.sizes})
