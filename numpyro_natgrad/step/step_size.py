# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The adaptive step size ρ of each block, from the signal and the noise of its natural gradients.

    ρ = c · max(s, min(1, τ/n), floor) · h        s = ‖m‖² / (‖m‖² + n)
    floor = min(1, f/n) · min(1, 3/√N)

m is the running mean of natural gradients v, n their noise E‖v − m‖² in nats, c the largest step size, τ the noise
threshold, N the number of stationary steps, f the noise up to which the floor holds, and h ≤ 1 the Huber weight of an
outlier. The signal fraction s is the adaptive rate of Ranganath et al. (2013) in the Fisher metric: 1 while natural
gradients agree, and of order 1/t where noise dominates.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_natgrad.blocks.base import NoiseTolerance, SquaredNorms
from numpyro_natgrad.options import Options, RuleConstants
from numpyro_natgrad.step.state import NoiseStatistics


class NoiseEstimate(NamedTuple):
    """Signal and noise of one natural gradient, compared with earlier ones; an entry for each block.

    :ivar weight: of the natural gradient in the running mean.
    :ivar signal: signal fraction, between 0 and 1.
    :ivar noise: variance of a natural gradient, nats.
    :ivar huber: 1, or the factor that shortens an outlier.
    :ivar stationary: number of stationary steps.
    """

    weight: jax.Array
    signal: jax.Array
    noise: jax.Array
    huber: jax.Array
    stationary: jax.Array


def largest_step_size(
    options: Options, step: jax.Array, estimate: NoiseEstimate, tolerance: NoiseTolerance
) -> jax.Array:
    """ρ before the KL limit, for each block; ``step`` counts from 0."""
    if options.step_size is None:
        return adaptive(estimate, tolerance, options.constants)
    given = options.step_size(step) if callable(options.step_size) else options.step_size
    return jnp.full_like(estimate.signal, jnp.asarray(given, estimate.signal.dtype))


def adaptive(estimate: NoiseEstimate, tolerance: NoiseTolerance, constants: RuleConstants) -> jax.Array:
    """ρ by the formula at the head of this module."""
    dtype = estimate.signal.dtype
    tolerated = _tolerated(estimate.noise, tolerance.threshold)
    longest = jnp.maximum(jnp.maximum(estimate.signal, tolerated), step_size_floor(estimate, tolerance, constants))
    return jnp.asarray(tolerance.max_step_size, dtype) * longest * estimate.huber


def step_size_floor(estimate: NoiseEstimate, tolerance: NoiseTolerance, constants: RuleConstants) -> jax.Array:
    """A lower bound of the step size, of order 1/√N after N stationary steps.

    The signal fraction is the best size of a single step, and too small for many: T steps of size ρ along a slope of a
    nats gain Tρa, and their noise costs ½nρ/(2−ρ) only once. Along a bent valley (the scale of a hierarchy that starts
    far too large) the signal fraction alone takes a hundred times the steps. Averages of iterates are asymptotically
    optimal for any step size that falls slower than 1/N (Polyak & Juditsky 1992).
    """
    decay = jnp.minimum(1.0, constants.step_size_floor / jnp.sqrt(estimate.stationary))
    return _tolerated(estimate.noise, tolerance.floor_noise) * decay


def _tolerated(noise: jax.Array, nats: float | np.ndarray | jax.Array) -> jax.Array:
    """min(1, nats/noise)."""
    return jnp.minimum(1.0, jnp.asarray(nats, noise.dtype) / jnp.maximum(noise, jnp.finfo(noise.dtype).tiny))


def observe(
    statistics: NoiseStatistics, norms: SquaredNorms, constants: RuleConstants, visits: float | np.ndarray = 1.0
) -> tuple[NoiseStatistics, NoiseEstimate]:
    """Update the statistics by one natural gradient.

    The expected squared innovation is the variance of a natural gradient plus that of the running mean, whose newest
    term has the weight w: n (1 + w/(2−w)) = 2n/(2−w). Innovations longer than ``outlier`` standard deviations are
    shortened to that: otherwise one draw from a heavy tail would shorten the next fifty steps.

    :param visits: see :class:`.NoiseTolerance`; a window counts the natural gradients of each parameter.
    """
    tiny = jnp.finfo(norms.gradient.dtype).tiny
    first, weight = statistics.window < constants.window_min, 1 / statistics.window
    bound = constants.outlier**2 * (norms.running_mean + statistics.noise)
    bound = jnp.where(first, jnp.inf, jnp.maximum(bound, constants.outlier_floor))
    huber = jnp.minimum(1.0, jnp.sqrt(bound / jnp.maximum(norms.innovation, tiny)))
    square = huber**2 * norms.innovation
    sample = jnp.where(first, 0.0, jnp.minimum(square * (2 - weight) / 2, norms.gradient))
    # Where the running mean has less than two effective steps, the recent steps are forgotten too.
    recent = jnp.where(weight > 0.5, sample, jnp.concatenate([statistics.recent[1:], sample[None]]))
    statistics = statistics._replace(noise=statistics.noise + weight * (sample - statistics.noise), recent=recent)
    noise = current_noise(statistics, constants)
    # ‖m + w(v − m)‖² without another pass over the parameters: 2⟨m, v − m⟩ = ‖v‖² − ‖m‖² − ‖v − m‖².
    w = weight * huber
    mean = norms.running_mean + w * (norms.gradient - norms.running_mean - norms.innovation) + w**2 * norms.innovation
    mean = jnp.maximum(mean, 0.0)
    signal = jnp.clip(mean / jnp.maximum(mean + noise, tiny), constants.signal_floor, 1.0)
    share = jnp.asarray(visits, signal.dtype)
    window = jnp.maximum(statistics.window + share * (1 - signal * statistics.window), constants.window_min)
    statistics = statistics._replace(window=window)
    return statistics, NoiseEstimate(w, signal, noise, huber, statistics.stationary)


def foreseen(
    statistics: NoiseStatistics,
    running_mean: jax.Array,
    predicted: jax.Array,
    estimate: NoiseEstimate,
    step: jax.Array,
    delay: float,
    constants: RuleConstants,
) -> NoiseEstimate:
    """Signal and noise by earlier natural gradients alone, for a step size that does not depend on the present one.

    If ρ depends on v, E[ρv] ≠ 0 where E[v] = 0. A signal fraction that contains v is larger for a v along m, the
    steps of the past: minibatches of two rows then drive the iterate away from the optimum without end.

    The signal is at least 1/(window + delay). With a delay of one the iterate is the mean of the estimates of the
    optimum in the window and of the present one.

    :param statistics: before :func:`observe`; their noise is known after ``recent_steps`` steps.
    :param running_mean: ‖m‖² before :func:`observe`, nats.
    :param predicted: ‖m‖² expected of noise alone, nats: the signal is what exceeds ``nonstationarity`` times that.
    :param estimate: by :func:`observe`.
    """
    noise, tiny = statistics.noise, jnp.finfo(running_mean.dtype).tiny
    excess = jnp.maximum(running_mean - constants.nonstationarity * predicted, 0.0)
    signal = jnp.clip(excess / jnp.maximum(running_mean + noise, tiny), 1 / (statistics.window + delay), 1.0)
    known = step >= constants.recent_steps
    return estimate._replace(
        signal=jnp.where(known, signal, estimate.signal), noise=jnp.where(known, noise, estimate.noise)
    )


def current_noise(statistics: NoiseStatistics, constants: RuleConstants) -> jax.Array:
    """Noise of each block, nats: the running mean, bounded by the latest steps because it lags behind."""
    return jnp.minimum(statistics.noise, constants.recent_factor * statistics.recent.mean(0))


def forget(statistics: NoiseStatistics, distant: float, kl: jax.Array) -> NoiseStatistics:
    """Shorten the windows after a step of ``kl`` nats.

    Far from the posterior natural gradients change by orders of magnitude between distant guides. Counted as noise,
    this would shorten the next steps to nothing. A window is therefore limited to the number of such steps that amount
    to ``distant`` nats; if that is less than one, variances are scaled by it.

    :param distant: nats between guides that hardly overlap, as seen by one step's data. The optimum of a minibatch of
        B of N rows lies √(N/B) posterior standard deviations away, ½N/B nats per latent: so far is not far for it.
    """
    steps = distant / jnp.maximum(kl, jnp.finfo(kl.dtype).tiny)
    steps = steps.astype(statistics.noise.dtype)
    fraction = jnp.minimum(steps, 1.0)
    return statistics._replace(
        noise=statistics.noise * fraction,
        recent=statistics.recent * fraction,
        window=jnp.minimum(statistics.window, 1 + steps),
        stationary=jnp.minimum(statistics.stationary, 1 + steps),
    )


def count_stationary(
    statistics: NoiseStatistics,
    predicted: jax.Array,
    running_mean: jax.Array,
    noise: jax.Array,
    constants: RuleConstants,
) -> NoiseStatistics:
    """Count this step as stationary unless the running mean shows more movement than noise explains.

    ``nonstationarity`` allows for the scatter of squares; without it the average would restart every fifty steps.

    :param predicted: ‖m‖² expected of noise alone, nats.
    :param running_mean: ‖m‖², nats.
    :param noise: of one natural gradient, nats.
    """
    tiny = jnp.finfo(predicted.dtype).tiny
    movement = jnp.maximum(running_mean - constants.nonstationarity * predicted, 0.0)
    steps = statistics.stationary * (1 - movement / jnp.maximum(running_mean + noise, tiny)) + 1
    return statistics._replace(stationary=steps)


def average_weight(options: Options, statistics: NoiseStatistics) -> jax.Array:
    """The newest iterate's weight in the average, for each block; 1 (no average) with a step size of the user's."""
    steps, decay = statistics.stationary, options.constants.average_decay
    return jnp.ones_like(steps) if options.step_size is not None else (decay + 1) / (steps + decay)
