# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The protocol of a block: one group of parameters with the geometry in which it moves.

    natural_gradient   g     ->  v = F⁻¹g, a tangent in the block's own coordinates
    squared_norm       v     ->  vᵀFv, nats
    kl                 v, ρ  ->  KL(q ‖ q₊) of the step −ρv, nats, and KL(q₊ ‖ q)
    retract            v, ρ  ->  the parameters after that step, always valid

A block is static; its running means are in :class:`Memory`, which ``lax.scan`` carries.
"""

from typing import Generic, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_natgrad.distributions.gaussian import StepKL
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.estimators.stein_regression import RegressionSums
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import DensityMode
from numpyro_natgrad.options import RuleConstants

Tangent = TypeVar("Tangent")
ReportRow = tuple[str, str, str, str, str]


class JointMemory(NamedTuple):
    """What the joint Gaussian block over D latents remembers.

    :ivar factor: K of the full-covariance proxy ``(D, D)``, where there is one; zero before the first step.
    :ivar slope: running mean of the natural gradient, mean part, whitened ``(D,)``.
    :ivar curvature: the same, precision part ``(D, D)``.
    :ivar coupling: what the guide's precision has beyond the proxy's, by local rows ``(D, D)``.
    :ivar sums: sums over draws of the Stein regression.
    """

    factor: jax.Array
    slope: jax.Array
    curvature: jax.Array
    coupling: jax.Array
    sums: RegressionSums


class Memory(NamedTuple):
    """What all blocks remember.

    :ivar running_mean: of natural gradients, shaped like the parameters.
    :ivar joint: what the joint block remembers.
    :ivar coupling: running means of how far elementwise blocks are from contracting (:class:`.DiagonalTangent`), in the
        row of the first parameter of each, by name; ``(P, 2)`` for P parameters.
    """

    running_mean: Params
    joint: JointMemory
    coupling: jax.Array

    def with_running_means(self, new: Params) -> "Memory":
        old = self.running_mean
        shaped = {p: x if x.shape == jnp.shape(old[p]) else x.reshape(jnp.shape(old[p])) for p, x in new.items()}
        return self._replace(running_mean={**old, **shaped})


class SquaredNorms(NamedTuple):
    """Squared Fisher norms, nats, from which the noise is estimated; scalars, or one for each block.

    :ivar running_mean: of the running mean m of earlier natural gradients.
    :ivar innovation: of v − m.
    :ivar gradient: of the natural gradient v.
    :ivar visible: the three of the guide's part, ``(3, …)``, where a block also moves a proxy; else ``None``.
    """

    running_mean: jax.Array
    innovation: jax.Array
    gradient: jax.Array
    visible: jax.Array | None = None

    def visible_norms(self) -> jax.Array:
        """``visible``, or by default the other three; ``(3, …)``."""
        return jnp.stack(self[:3]) if self.visible is None else self.visible


def conjugate_kl(forward: jax.Array, reverse: jax.Array, rho: jax.Array) -> StepKL:
    """The KL of a step of size ρ, whose predicted reduction is KL(q ‖ q₊)/ρ."""
    return StepKL(forward, reverse, forward / jnp.maximum(rho, jnp.finfo(rho.dtype).tiny))


class Scope(NamedTuple):
    """The properties of the whole fit on which the noise tolerance of a block depends.

    :ivar latents: latent dimensions of the guide, for the whole data set.
    :ivar blocks: number of blocks, of which one with several step sizes counts as several.
    :ivar particles: draws a step; infinity where nothing is drawn.
    :ivar exact: a step of size 1 is exact on conjugate models, in all blocks.
    :ivar full_data: every step sees all of the data.
    :ivar paired: draws follow the parameters (:class:`.Partition`).
    :ivar batch_weight: how many rows of the whole data set a row of a step stands for, N/B.
    """

    latents: int
    blocks: int
    particles: float
    exact: bool
    full_data: bool
    constants: RuleConstants
    paired: bool = True
    batch_weight: float = 1.0


class NoiseTolerance(NamedTuple):
    """How much noise the steps of a block may have.

    :ivar max_step_size: the largest ρ.
    :ivar threshold: τ, nats; below it noise does not shorten steps.
    :ivar floor_noise: nats of noise up to which the O(1/√N) floor of the step size holds; 0 for no floor.
    :ivar visits: the fraction of steps in which each parameter of the block takes part: B/N for rows of a minibatch.
    """

    max_step_size: float | np.ndarray
    threshold: float | np.ndarray
    floor_noise: float | np.ndarray = 0.0
    visits: float | np.ndarray = 1.0


class Randomness(NamedTuple):
    """The source of a block's probes: a key of the run, and the number of the step."""

    run_key: jax.Array
    step: jax.Array

    @property
    def key(self) -> jax.Array:
        return jax.random.fold_in(self.run_key, self.step)


class Block(Protocol, Generic[Tangent]):
    """The geometry of one block of parameters. Members that return something are defaults."""

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters that it moves."""

    @property
    def count(self) -> int:
        """How many step sizes it has. With more than one, norms, KL and step sizes have the shape ``(count,)``."""
        return 1

    @property
    def step_size_params(self) -> tuple[tuple[str, ...], ...]:
        """The parameters that each step size moves."""
        return (self.params,)

    @property
    def exact_on_conjugate(self) -> bool:
        """Whether a step of size 1 is exact on conjugate models."""
        return True

    @property
    def density_modes(self) -> dict[str, DensityMode]:
        """How the densities of its sites are differentiated (:class:`.PathGradient`)."""
        return {}

    @property
    def hessian_params(self) -> tuple[str, ...]:
        """The means along which it needs products with the Hessian of the loss."""
        return ()

    def noise_tolerance(self, scope: Scope) -> NoiseTolerance:
        """How much noise its steps may have."""
        return default_noise_tolerance(scope)

    def report_rows(self) -> list[ReportRow]:
        """Rows of the report: parameter, site, distribution, Fisher matrix, size."""

    def natural_gradient(self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness) -> Tangent:
        """v = F⁻¹g."""

    def squared_norm(self, v: Tangent) -> jax.Array:
        """vᵀFv, nats."""

    def kl(self, v: Tangent, rho: jax.Array) -> StepKL:
        """How far a step of size ρ goes, nats."""

    def compare(self, memory: Memory, v: Tangent) -> SquaredNorms:
        """Compare ``v`` with the running mean of earlier natural gradients."""

    def own_step_size(self, v: Tangent) -> jax.Array | None:
        """ρ, if the block's estimator prescribes one; ``None`` if the rule chooses it from the noise."""
        return None

    def restrained(self, v: Tangent, rho: jax.Array) -> Tangent:
        """The step that is taken along ``v``, for the step size ρ before the KL limit."""
        return v

    def update_memory(self, memory: Memory, v: Tangent, weight: jax.Array) -> Memory:
        """Average ``v`` into the running mean: m ← m + weight (v − m)."""

    def retract(self, params: Params, memory: Memory, v: Tangent, rho: jax.Array) -> tuple[Params, Memory]:
        """The parameters after the step −ρv, and the memory transported there."""


def default_noise_tolerance(scope: Scope, *, antithetic: bool = False) -> NoiseTolerance:
    """The default: a threshold that is shared between the blocks, and is per latent in wide guides."""
    c = scope.constants
    exact = max(c.noise_threshold, c.noise_threshold_per_latent * scope.latents)
    threshold = exact if scope.exact else c.noise_threshold_inexact
    return NoiseTolerance(max_step_size(scope, antithetic), threshold / scope.blocks)


def max_step_size(scope: Scope, antithetic: bool) -> float:
    """The largest step size: S/(S + 2) with S independent draws, 1 with antithetic pairs.

    At a distance x from the optimum of a conjugate model, a natural gradient whose curvature comes from S draws has the
    noise 2‖x‖²/S, and (1−ρ)²‖x‖² + 2ρ²‖x‖²/S is least at ρ = S/(S + 2). Antithetic draws have no such noise.
    """
    return 1.0 if antithetic else 1 / (1 + 2 / scope.particles)


def statistical_threshold(parameters: int, numbers: int) -> float:
    """τ, nats, of a large block: half of the uncertainty that its data leave.

    An estimate of P parameters is ½P nats from that of infinite data; P counts up to twice the observed numbers, since
    data determine no more. Step sizes equal to the signal fraction are too short where the Fisher matrix is not the
    Hessian of the loss ("short-horizon bias", Wu et al. 2018); averaging removes the noise of longer ones (Polyak &
    Juditsky 1992).
    """
    return 0.25 * min(parameters, 2 * numbers)
