# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""How far: the step length ρ, and the KL radius that bounds it.

    ρ  =  the longest ρ ≤ cap with KL(q ‖ q₊) ≤ δ
    cap = c · max(s, min(1, τ/n), min(1, 10d/n) · min(1, 3/√N)) · o,   c = S/(S+2), or 1 of two mirrored pairs or more
    s  =  ‖m‖² / (‖m‖² + n),      m the running mean of natural gradients v, n their noise ‖v − m‖², nats

The share of signal is Ranganath et al.'s adaptive rate (2013) in the Fisher metric: 1 while steps agree, 1/t where
noise rules, so that the iterate becomes a running mean. A noise below τ needs no shortening: an iterate that takes
steps of length ρ stays ½nρ/(2−ρ) nats above the optimum. o < 1 pulls an outlier in: draws from heavy tails now and
then give a natural gradient a hundred times its usual length. The radius grows fourfold while a shortened step delivers
what it promises on its own draws, and shrinks fourfold while it does not; what was learned of signal and noise fades as
the guide gets away from where it was learned.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_natgrad.options import Options
from numpyro_natgrad.step.state import NoiseStatistics

#: Nats of noise in the natural gradient that are left alone, at least, and for each latent where steps do not last: see
#: :func:`quiet` and :func:`lasting`. Where a step of length 1 is exact on no model, noise comes back multiplied, and
#: less of it is let pass. Where the Fisher is sampled, most of what is measured as noise lies in directions that hardly
#: change the distribution, and damping keeps them short: half a nat.
QUIET, QUIET_LATENT, QUIET_INEXACT, QUIET_SCORES = 0.04, 0.005, 0.01, 0.5
#: Mirrored draws from which on steps are of length 1.
MIRRORED = 4
#: A step must deliver this share of its predicted gain, and this share to let the radius grow.
ACCEPT, GROW = 0.1, 0.5
#: Steps that the running means look back over at least. Little: far from the optimum the model changes with each step.
MEMORY_MIN = 1.1
#: Innovations beyond this many times their expected size are pulled in, unless they are below so many nats.
OUTLIER, HARMLESS = 2.0, 1.0
#: Newton's steps are this many over √N long at least, N steps after they have stopped to travel, while there is no more
#: noise than so many nats a latent; in batches of the data less.
LASTING, BORNE, BORNE_IN_BATCHES = 3.0, 10.0, 1.0
#: Travel is what the running mean shows beyond this many times the square that noise would show in it: squares scatter,
#: and one outlier, pulled in to ``OUTLIER`` times the expected size, must not end the average.
TRAVEL = 1 + OUTLIER**2
#: The running mean is believed to lag behind by this factor at most.
DRIFT_MAX = 10.0
#: Noise is what the last three steps show at most, and a little more, since the mean of three squares scatters by
#: √(2/3k) with k noisy directions: after a change of scale the mean over many is long out of date.
RECENT = 1.3
#: Nats a latent after which what was learned at a place is worth one step: the two guides hardly overlap there.
FAR = 10.0
#: Bounds of the adaptive radius: nats, and multiples of :func:`noise_floor`, to which it closes in by itself.
RADIUS_MAX, RADIUS_MIN = 1e12, 1e-3


class Tolerance(NamedTuple):
    """How much noise steps may have, of each family.

    :ivar most: how long steps are at most; :func:`most`.
    :ivar quiet: how much noise is left alone, nats.
    :ivar bearable: nats of noise in which steps stay long all the same; none where they are not Newton's.
    """

    most: Any
    quiet: Any
    bearable: Any


class Observation(NamedTuple):
    """What one natural gradient says, compared with those before; of each family.

    :ivar weight: its weight in the running mean.
    :ivar signal: share of signal in the natural gradient, between 0 and 1.
    :ivar noise: its variance, nats.
    :ivar trust: 1, or the factor that pulls an outlier in.
    :ivar settled: the steps in which noise alone moved the iterate.
    :ivar reach: the length that a family with a memory of its own asks for; zero where the rule decides.
    """

    weight: jax.Array
    signal: jax.Array
    noise: jax.Array
    trust: jax.Array
    settled: jax.Array
    reach: jax.Array | float = 0.0


def cap(options: Options, step: jax.Array, seen: Observation, tolerance: Tolerance) -> jax.Array:
    """The longest step that the rule asks for, before the KL limit, for each family; ``step`` counts from 0."""
    if options.step_size is None:
        return adaptive(seen, tolerance)
    given = options.step_size(step) if callable(options.step_size) else options.step_size
    return jnp.full_like(seen.signal, jnp.asarray(given, seen.signal.dtype))


def adaptive(seen: Observation, tolerance: Tolerance) -> jax.Array:
    """The rule that needs no choice."""
    longest = jnp.maximum(jnp.maximum(seen.signal, _borne(seen.noise, tolerance.quiet)), lasting(seen, tolerance))
    ruled = jnp.asarray(tolerance.most, longest.dtype) * longest * seen.trust
    return jnp.where(seen.reach > 0, seen.reach, ruled)


def lasting(seen: Observation, tolerance: Tolerance) -> jax.Array:
    """The length that steps keep while they get somewhere, whatever the noise.

    The share of signal is the best *next* step, and a bad next hundred ones: T steps of length ρ up a slope of a nats
    gain Tρa, and their noise costs ½nρ/(2−ρ) once. Along a bent valley (the scale of a hierarchy far too large) it asks
    for a hundred times the steps that are needed. Lengths that fall as 1/√N, once nothing but noise moves the iterate,
    are slow enough for the average of the iterates to be as good as any estimate (Polyak & Juditsky 1992). Batches want
    optima of their own, and would drive the iterate to where everything is different: a nat of noise a latent leaves it
    within half a nat.
    """
    return _borne(seen.noise, tolerance.bearable) * jnp.minimum(1.0, LASTING / jnp.sqrt(seen.settled))


def _borne(noise: jax.Array, nats: Any) -> jax.Array:
    """1 up to so many nats of noise, and beyond the length that lets no more of it pass."""
    return jnp.minimum(1.0, jnp.asarray(nats, noise.dtype) / jnp.maximum(noise, jnp.finfo(noise.dtype).tiny))


class SquaredNorms(NamedTuple):
    """Squared Fisher norms, nats: of the mean of recent natural gradients, of (this one − that mean), of this one.

    Of one family, or of each: every family has a pace of its own. Rows of a subsampled plate see their own data alone,
    and move by whole steps, while what all the data is about has to average over batches.  ``reach``: the length that a
    family with a memory of its own asks for; zero where the rule decides.  ``visible``: the three squares of what the
    guide shows, where a family moves more than that; ``None`` where all of it counts.
    """

    running_mean2: jax.Array
    innovation2: jax.Array
    gradient2: jax.Array
    reach: jax.Array | float = 0.0
    visible: jax.Array | None = None

    def visible_squares(self) -> jax.Array:
        """``visible``, or the three squares of all that the family moves; ``(3, …)``."""
        return (
            jnp.stack([self.running_mean2, self.innovation2, self.gradient2]) if self.visible is None else self.visible
        )


def observe(statistics: NoiseStatistics, seen: SquaredNorms) -> tuple[NoiseStatistics, Observation]:
    """Compare one natural gradient with those before.

    The innovation's square has the variance of one natural gradient and of the running mean that foresaw it:
    n (1 + w/(2−w)) = 2n/(2−w) for a running mean with weight w on the newest. An innovation more than ``OUTLIER``
    times its expected size is pulled in to that size: one draw from a heavy tail must not decide about the next fifty
    steps.
    """
    n, tiny = seen.running_mean2.size, jnp.finfo(seen.running_mean2.dtype).tiny
    kept, old_noise = statistics.memory[:n], statistics.noise[:n]
    first, weight = kept < MEMORY_MIN, 1 / kept
    drift, seen = _followed(statistics.drift[:, :n], seen, weight)
    running_mean2, innovation2, gradient2, reach, _ = seen
    bound = jnp.where(first, jnp.inf, jnp.maximum(OUTLIER**2 * (running_mean2 + old_noise), HARMLESS))
    pull = jnp.minimum(1.0, jnp.sqrt(bound / jnp.maximum(innovation2, tiny)))
    seen2 = pull**2 * innovation2
    sample = jnp.where(first, 0.0, jnp.minimum(seen2 * (2 - weight) / 2, gradient2))
    latest = jnp.where(weight > 0.5, sample, jnp.concatenate([statistics.recent[1:, :n], sample[None]]))
    slow = old_noise + weight * (sample - old_noise)
    statistics = statistics._replace(
        noise=statistics.noise.at[:n].set(slow), recent=statistics.recent.at[:, :n].set(latest)
    )
    noise = noise_seen(statistics)[:n]
    # ‖trend + w news‖² without another pass over the parameters: 2⟨trend, news⟩ = ‖this‖² − ‖trend‖² − ‖news‖².
    w = weight * pull
    mean2 = jnp.maximum(running_mean2 + w * (gradient2 - running_mean2 - innovation2) + w**2 * innovation2, 0.0)
    signal = jnp.clip(mean2 / jnp.maximum(mean2 + noise, tiny), 1e-6, 1.0)
    memory = jnp.maximum(kept * (1 - signal) + 1, MEMORY_MIN)
    statistics = statistics._replace(
        memory=statistics.memory.at[:n].set(memory), drift=statistics.drift.at[:, :n].set(drift)
    )
    return statistics, Observation(w, signal, noise, pull, statistics.averaged[:n], reach)


def noise_seen(statistics: NoiseStatistics) -> jax.Array:
    """Nats of noise in one natural gradient of each family; no more than the last few show."""
    return jnp.minimum(statistics.noise, RECENT * statistics.recent.mean(0))


def _followed(drift: jax.Array, seen: SquaredNorms, weight: jax.Array) -> tuple[jax.Array, SquaredNorms]:
    """The comparison with as much of the running mean as has foreseen natural gradients lately.

    The running mean m loses ρv with every step, as if the optimum stood still. Where it moves on (a guide beside
    parameters of the model that move as well, a model far from quadratic) what comes is βm with β > 1, and v − m is no
    noise but drift. β − 1 = ⟨v − m, m⟩/⟨m, m⟩, both averaged; noise alone makes it negative.
    """
    running_mean2, innovation2, gradient2, reach, _ = seen
    bound = jnp.sqrt(innovation2) * jnp.sqrt(running_mean2)  # Cauchy & Schwarz: what is beyond is rounding
    missed = jnp.clip((gradient2 - running_mean2 - innovation2) / 2, -bound, bound)  # ⟨v − m, m⟩
    share = jnp.stack([missed, running_mean2]) / jnp.maximum(
        gradient2 + running_mean2, jnp.finfo(running_mean2.dtype).tiny
    )
    drift = drift + weight * (share - drift)
    more = jnp.clip(drift[0] / jnp.maximum(drift[1], jnp.finfo(running_mean2.dtype).tiny), 0.0, DRIFT_MAX - 1)  # β − 1
    left = jnp.maximum(innovation2 - 2 * more * missed + more**2 * running_mean2, 0.0)
    return drift, SquaredNorms((1 + more) ** 2 * running_mean2, left, gradient2, reach)


def forgotten(statistics: NoiseStatistics, latents: int, kl: jax.Array) -> NoiseStatistics:
    """What is left of the running means after a step of ``kl`` nats.

    Natural gradients far apart differ because the model does, and by orders of magnitude where a fit starts far from
    its posterior: taken for noise, that would shorten the next steps to nothing. So they are remembered for as many
    steps as the guide needs at this pace to get ``FAR`` nats a latent away; below one step, with that share of their
    variance.
    """
    steps = (FAR * latents / jnp.maximum(kl, jnp.finfo(kl.dtype).tiny)).astype(statistics.radius.dtype)
    share = jnp.minimum(steps, 1.0)
    return statistics._replace(
        noise=statistics.noise * share,
        recent=statistics.recent * share,
        memory=jnp.minimum(statistics.memory, 1 + steps),
        averaged=jnp.minimum(statistics.averaged, 1 + steps),
        drift=statistics.drift * share,
    )


def averaged(
    statistics: NoiseStatistics, foreseen: jax.Array, running_mean2: jax.Array, noise: jax.Array
) -> NoiseStatistics:
    """How many steps the average looks back over: all in which the guide did not move more than noise moves it.

    Squares scatter about what is foreseen, and one that counted as travel whenever it is above would end the average
    every fifty steps.
    """
    n, tiny = foreseen.size, jnp.finfo(foreseen.dtype).tiny
    travelled = jnp.maximum(running_mean2 - TRAVEL * foreseen, 0.0) / jnp.maximum(running_mean2 + noise, tiny)
    steps = statistics.averaged[:n] * (1 - travelled) + 1
    return statistics._replace(averaged=statistics.averaged.at[:n].set(steps))


def longest(kl: Callable[[jax.Array], jax.Array], cap: jax.Array, radius: jax.Array) -> jax.Array:
    """The longest ρ ≤ cap with kl(ρ) ≤ radius, by bisection of log ρ to 1 %; no work where cap will do."""

    def open_(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        return bounds[1] > 1.01 * bounds[0]

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = jnp.sqrt(low * high)
        fits = kl(middle) <= radius
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    # KL is of order ρ² near 0: so far below, any step of a finite natural gradient is free.
    fits = kl(cap) <= radius
    low, _ = lax.while_loop(open_, halve, (jnp.where(fits, cap, cap * 1e-24), cap))
    return low


def noise_floor(latents: int) -> float:
    """Nats below which a step is not judged on its own draws: noise would decide."""
    return max(0.1, 0.02 * latents)


def most(particles: float, mirrored: bool) -> float:
    """The longest step: S/(S+2) of the way that S draws show.

    At a distance x from the optimum of a conjugate model, a natural gradient whose curvature comes from draws has the
    noise 2‖x‖²/S, and (1−ρ)²‖x‖² + 2ρ²‖x‖²/S is least there. Mirrored draws have none: all of the way. (A step of 1
    makes the precision of this step's Hessians alone: a single pair is too few for that where they vary.)
    """
    return 1.0 if mirrored and particles >= MIRRORED else 1 / (1 + 2 / particles)


def quiet(latents: int) -> float:
    """Nats of noise that are left alone: the average takes them out.

    Steps that shrink with the share of signal settle early where the loss is flatter than the Fisher says (a scale of a
    hierarchy, say): long steps and an average arrive (Polyak & Juditsky 1992). The last iterate is then ½nρ/(2−ρ) nats
    off, n what this lets pass: at most two hundredths of a nat, or a four-hundredth a latent.
    """
    return max(QUIET, QUIET_LATENT * latents)


def bearable(latents: int, whole: bool) -> float:
    """Nats of noise in which Newton's steps stay long all the same.

    Batches want optima of their own. Noise of ``whole`` data's gradients, far off, is mostly the model that changes: as
    much of it is borne as leaves guides that overlap. (Where one draw of a hundred sees a rate of e^40, steps that stay
    long whatever the noise go to and fro for ever.)
    """
    return (BORNE if whole else BORNE_IN_BATCHES) * latents


def statistical(parameters: int, numbers: int) -> float:
    """Nats of noise that a large family leaves alone: half of what its data leaves uncertain of it.

    An estimate of P parameters is ½P nats away from what all data in the world would say; half of that, of no more
    parameters than two for each number that they explain. Steps that shrink with the share of signal are the best next
    step and a bad next hundred ones, where the Fisher is not the Hessian of the loss (Wu et al. 2018, "short-horizon
    bias"): the noise that longer ones leave is the average's to take out (Polyak & Juditsky 1992).
    """
    return 0.25 * min(parameters, 2 * numbers)


def initial_radius(options: Options, latents: int) -> float:
    """Nats of the first step: one a latent dimension, or what the user allows."""
    if options.max_kl is None:
        return float("inf")
    return float(latents) if options.max_kl == "adaptive" else float(options.max_kl)


def resized(
    statistics: NoiseStatistics, latents: int, kl: jax.Array, *, good: jax.Array, limited: jax.Array, grows: jax.Array
) -> NoiseStatistics:
    """The radius after a step of ``kl`` nats was judged; where it was not needed it closes in on what was.

    Below the noise floor, where the verdict that brought it there may have been noise, it recovers with every step.
    """
    floor = noise_floor(latents)
    recovered = jnp.maximum(statistics.radius, jnp.minimum(4 * statistics.radius, floor))
    kept = jnp.where(limited, recovered, jnp.maximum(jnp.minimum(statistics.radius, 4 * kl), floor))
    radius = jnp.where(
        good, jnp.where(grows, grown(statistics.radius), kept), jnp.maximum(statistics.radius / 4, RADIUS_MIN * floor)
    )
    return statistics._replace(radius=radius.astype(statistics.radius.dtype))


def grown(radius: jax.Array) -> jax.Array:
    """The next larger radius."""
    return jnp.minimum(4 * radius, RADIUS_MAX)
