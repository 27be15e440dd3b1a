# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What is carried from step to step, and what is reported of one step: two different types, arrays only.

The state is made before any loss has been heard (``SVI.init`` hands over the parameters alone), and its structure may
not change afterwards (``lax.scan``). So everything in it has the shape of the parameters, but for :class:`Joint`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_natgrad.estimators import stein_regression
from numpyro_natgrad.guide.gaussian_sites import Params

#: Latent dimensions up to which all Gaussian sites share one dense joint step.
JOINT_LIMIT = 128
#: Steps whose noise is remembered one by one.
LAST = 3


class Joint(NamedTuple):
    """Memory of the joint Gaussian step over D latents, in the leading D rows and columns of n × n arrays.

    n = min(half of the number of parameters, 128): a Gaussian site has at least two parameters for a latent.

    :ivar factor: K of the lifted covariance (n, n); used where the guide's family is smaller than the full Gaussian.
    :ivar slope: running mean of the natural gradient, mean part, whitened (n,).
    :ivar curvature: the same, precision part (n, n).
    :ivar sums: over draws, of the regression of gradients on them.
    """

    factor: jax.Array
    slope: jax.Array
    curvature: jax.Array
    sums: stein_regression.Sums


class Memory(NamedTuple):
    """What the families remember: ``trend`` is a running mean of natural gradients, shaped like the parameters."""

    running_mean: Params
    joint: Joint


class NoiseStatistics(NamedTuple):
    """What the length rule carries. There are no more families than parameters, so that n of those suffice.

    :ivar noise: per family, running variance of the natural gradient in the Fisher norm, nats; ``(n,)``.
    :ivar recent: that of each of the last ``LAST`` steps; ``(LAST, n)``.
    :ivar memory: per family, number of steps that the running means look back over; ``(n,)``.
    :ivar averaged: per family, number of steps that the average of the iterates looks back over; ``(n,)``.
    :ivar drift: per family, running means of ⟨v − m, m⟩ and ⟨m, m⟩ as shares of ⟨v, v⟩ + ⟨m, m⟩, for natural gradients
        v and the running mean m that foresaw them; ``(2, n)``.
    :ivar radius: KL in nats that a step may move; set in the first step, when the guide has been heard; scalar.
    """

    noise: jax.Array
    recent: jax.Array
    memory: jax.Array
    averaged: jax.Array
    drift: jax.Array
    radius: jax.Array


class DecrementState(NamedTuple):
    """What the estimate of the nats still to gain carries (:mod:`.newton_decrement`); n as in :class:`NoiseStatistics`.

    :ivar covariance: C, of the noise in the iterate, in the running mean beyond it, and in the average, of unit noise
        in the natural gradient; ``(3, 3, n)``.
    :ivar excess: averages, as ``get_params`` averages, of ‖m‖² beyond its noise and of how much that deviates from its
        average, nats; ``(2, n)``.
    :ivar visible: running share of the noise that the guide shows; ``(n,)``.
    """

    covariance: jax.Array
    excess: jax.Array
    visible: jax.Array


class StepInfo(NamedTuple):
    """One step in numbers; scalars. Read it with :meth:`.NaturalGradient.info`.

    :ivar kl_moved: KL(q ‖ q₊) of this step, nats (0 if it was skipped); what ``max_kl`` bounds. Of the lifted Gaussian
        where steps are lifted and ``max_kl`` is no number.
    :ivar natural_gradient_norm: Fisher norm √(gᵀF⁻¹g) of the natural gradient, √nats: half its square estimates the
        nats still to gain, plus noise.
    :ivar step_length: ρ: the share of the way to the minimum of the local model, 1 for all of it. Families have one
        each: their root mean square, weighted by the squared natural gradient.
    :ivar signal: share of signal in the squared natural gradient, between 0 and 1.
    :ivar radius: KL that the step was allowed to move, nats.
    :ivar decrement: nats still to gain, in expectation, from what ``get_params`` returns after this step
        (:mod:`.newton_decrement`). Parameters that the ordinary optimizer moves are not in it.
    :ivar decrement_error: its Monte-Carlo standard error, nats.
    :ivar limited: the KL limit shortened this step.
    :ivar skipped: this step was not taken.
    :ivar skipped_total: steps not taken since the start, int32.
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


class State(NamedTuple):
    """All that :class:`.NaturalGradient` carries.

    :ivar params: the iterate, unconstrained.
    :ivar average: the averaged iterate, unconstrained; what ``get_params`` returns.
    :ivar memory: running means of the natural gradient.
    :ivar pace: what the length rule carries.
    :ivar certificate: what the estimate of the nats still to gain carries.
    :ivar point: the state of the ordinary optimizer of parameters without a Fisher.
    :ivar info: the last step in numbers.
    """

    params: Params
    average: Params
    memory: Memory
    statistics: NoiseStatistics
    certificate: DecrementState
    point: Any
    info: StepInfo


def initial(params: Params, point: Any) -> State:
    """The state before the first step."""
    leaves = jax.tree.leaves(params)
    dtype = jnp.result_type(*leaves)
    n = min(sum(jnp.size(x) for x in leaves) // 2, JOINT_LIMIT)
    zero = jnp.zeros((), dtype)
    joint = Joint(
        jnp.zeros((n, n), dtype), jnp.zeros(n, dtype), jnp.zeros((n, n), dtype), stein_regression.nothing(n, dtype)
    )
    memory = Memory(jax.tree.map(jnp.zeros_like, params), joint)
    info = StepInfo(
        zero, zero, zero, zero, zero, zero, zero, jnp.array(False), jnp.array(False), jnp.array(0, jnp.int32)
    )
    each = jnp.zeros(len(params), dtype)
    statistics = NoiseStatistics(
        each, jnp.stack([each] * LAST), jnp.ones_like(each), jnp.ones_like(each), jnp.stack([each, each]), zero
    )
    nothing = jnp.zeros((3, 3, each.size), dtype), jnp.zeros((2, each.size), dtype)
    certificate = DecrementState(*nothing, jnp.ones_like(each))
    return State(params, params, memory, statistics, certificate, point, info)
