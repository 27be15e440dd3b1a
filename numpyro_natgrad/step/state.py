# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The state that is carried from step to step, and the report of one step.

``SVI.init`` gives the optimizer the parameters before the loss is known, and ``lax.scan`` keeps all shapes fixed. The
carried arrays therefore have room for the largest partition that the parameters allow. :func:`unpack` cuts them to the
actual partition at the top of a step, :func:`pack` puts them back at its end, and between the two all shapes are exact.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_natgrad.blocks.base import JointMemory, Memory
from numpyro_natgrad.blocks.partition import Partition
from numpyro_natgrad.estimators import stein_regression
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.options import RuleConstants


class NoiseStatistics(NamedTuple):
    """Running statistics of the natural gradients of B blocks.

    :ivar noise: running mean of the noise, nats; ``(B,)``.
    :ivar recent: noise of each of the last steps, oldest first, nats; ``(recent_steps, B)``.
    :ivar window: effective number of steps in the running means; ``(B,)``.
    :ivar stationary: number of stationary steps, the averaging window; ``(B,)``.
    """

    noise: jax.Array
    recent: jax.Array
    window: jax.Array
    stationary: jax.Array


class DecrementState(NamedTuple):
    """What the Newton decrement of B blocks is computed from (:mod:`.newton_decrement`).

    :ivar covariance: C, of the noise in (x, z, a) for unit noise in the natural gradient; ``(3, 3, B)``.
    :ivar excess: averages, weighted as the iterates', of ‖m‖² minus its noise and of the absolute deviation from that
        average, nats; ``(2, B)``.
    :ivar visible: running mean of the fraction of the noise that is in the guide; ``(B,)``.
    """

    covariance: jax.Array
    excess: jax.Array
    visible: jax.Array


class StepInfo(NamedTuple):
    """One step in numbers; scalars. Read it with :meth:`.NaturalGradient.info`.

    :ivar jax.Array kl: KL(q ‖ q₊) of this step, nats, which ``max_kl`` bounds (0 if skipped); that of the
        full-covariance proxy where there is one and ``max_kl`` is not a number.
    :ivar jax.Array natural_gradient_norm: Fisher norm √(gᵀF⁻¹g) of the natural gradient, √nats.
    :ivar jax.Array step_size: ρ, the fraction of the way to the minimum of the local model; the root mean square over
        blocks, weighted by their squared natural gradients.
    :ivar jax.Array signal: signal fraction of the squared natural gradient, between 0 and 1.
    :ivar jax.Array radius: trust-region radius of this step, nats.
    :ivar jax.Array newton_decrement: expected remaining gain, nats, at what ``get_params`` returns
        (:mod:`.newton_decrement`), without parameters of the fallback optimizer.
    :ivar jax.Array newton_decrement_error: Monte-Carlo standard error of that, nats.
    :ivar jax.Array limited: whether the KL limit shortened this step, bool.
    :ivar jax.Array skipped: whether this step was not taken, bool.
    :ivar jax.Array skipped_total: number of steps not taken since the start, int32.
    """

    kl: jax.Array
    natural_gradient_norm: jax.Array
    step_size: jax.Array
    signal: jax.Array
    radius: jax.Array
    newton_decrement: jax.Array
    newton_decrement_error: jax.Array
    limited: jax.Array
    skipped: jax.Array
    skipped_total: jax.Array


class NaturalGradientState(NamedTuple):
    """All that :class:`.NaturalGradient` carries from step to step.

    :ivar dict params: the iterate, unconstrained.
    :ivar dict average: the averaged iterate, unconstrained; what ``get_params`` returns.
    :ivar jax.Array radius: trust-region radius, nats; zero before the first step.
    :ivar Any fallback: the state of the fallback optimizer.
    :ivar jax.Array seed: seed of the blocks' probes, set in the first step, uint32.
    """

    params: Params
    average: Params
    memory: Memory
    statistics: NoiseStatistics
    decrement: DecrementState
    radius: jax.Array
    fallback: Any
    seed: jax.Array
    info: StepInfo


def initial(params: Params, fallback: Any, constants: RuleConstants) -> NaturalGradientState:
    """The state before the first step, with room for every partition: of a block for each parameter, and a joint block.

    A latent has at least one entry, and a full Gaussian over d latents ½d(d + 3). No two arrays share memory, so that a
    program may reuse that of each (``donate_argnums``).
    """
    leaves = jax.tree.leaves(params)
    dtype, entries = jnp.result_type(*leaves or [float]), sum(jnp.size(x) for x in leaves)
    full = min((math.isqrt(8 * entries + 9) - 3) // 2, constants.full_joint_limit)
    latents = max(full, min(entries, constants.joint_limit))
    joint, statistics, decrement = allocated(latents, len(params), constants, dtype)
    zeros = [jnp.zeros((), dtype) for _ in range(8)]
    flags = jnp.array(False), jnp.array(False), jnp.array(0, jnp.int32)
    info = StepInfo._make([*zeros[:7], *flags])
    coupling, seed = jnp.zeros((len(params), 2), dtype), jnp.array(0, jnp.uint32)
    memory = Memory(jax.tree.map(jnp.zeros_like, params), joint, coupling)
    average = jax.tree.map(jnp.copy, params)
    return NaturalGradientState(params, average, memory, statistics, decrement, zeros[7], fallback, seed, info)


def allocated(
    latents: int, blocks: int, constants: RuleConstants, dtype: jnp.dtype
) -> tuple[JointMemory, NoiseStatistics, DecrementState]:
    """Memory and statistics before the first step."""
    zeros, ones = (lambda *shape: jnp.zeros(shape, dtype)), (lambda: jnp.ones(blocks, dtype))
    square = partial(zeros, latents, latents)
    sums = stein_regression.empty_sums(latents, dtype)
    joint = JointMemory(square(), zeros(latents), square(), square(), sums)
    statistics = NoiseStatistics(zeros(blocks), zeros(constants.recent_steps, blocks), ones(), ones())
    return joint, statistics, DecrementState(zeros(3, 3, blocks), zeros(2, blocks), ones())


def fresh(state: NaturalGradientState, partition: Partition, constants: RuleConstants) -> NaturalGradientState:
    """The state with the radius, memory and statistics of a new one, for the partition of the loss."""
    sizes = partition.joint_latents, partition.step_sizes
    joint, statistics, decrement = allocated(*sizes, constants, state.radius.dtype)
    running_mean, coupling = jax.tree.map(jnp.zeros_like, (state.memory.running_mean, state.memory.coupling))
    memory = Memory(running_mean, joint, coupling)
    radius = jnp.zeros_like(state.radius)
    return state._replace(memory=memory, statistics=statistics, decrement=decrement, radius=radius)


def unpack(state: NaturalGradientState, partition: Partition, constants: RuleConstants) -> NaturalGradientState:
    """The state with every array cut to the partition of the loss."""
    sizes = partial(allocated, partition.joint_latents, partition.step_sizes, constants, state.radius.dtype)
    joint, statistics, decrement = jax.tree.map(_cut, _sized(state), jax.eval_shape(sizes))
    memory = state.memory._replace(joint=joint)
    return state._replace(memory=memory, statistics=statistics, decrement=decrement)


def pack(new: NaturalGradientState, old: NaturalGradientState) -> NaturalGradientState:
    """The new state in arrays of the size of the old ones."""
    joint, statistics, decrement = jax.tree.map(_placed, _sized(old), _sized(new))
    memory = new.memory._replace(joint=joint)
    return new._replace(memory=memory, statistics=statistics, decrement=decrement)


def _sized(state: NaturalGradientState) -> tuple[JointMemory, NoiseStatistics, DecrementState]:
    """The parts of the state whose arrays are larger than the partition needs."""
    return state.memory.joint, state.statistics, state.decrement


def _cut(room: jax.Array, exact: jax.ShapeDtypeStruct) -> jax.Array:
    return room[tuple(slice(n) for n in exact.shape)]


def _placed(room: jax.Array, exact: jax.Array) -> jax.Array:
    return room.at[tuple(slice(n) for n in exact.shape)].set(exact)
