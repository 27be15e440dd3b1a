# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The step size follows its rule and the trust-region radius, and the rule separates signal from noise."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gaussian_step import CASES, MARGIN

from numpyro_natgrad.blocks.base import NoiseTolerance, Scope, SquaredNorms, max_step_size
from numpyro_natgrad.distributions import gaussian
from numpyro_natgrad.distributions.gaussian import StepKL
from numpyro_natgrad.options import RuleConstants, checked
from numpyro_natgrad.step import step_size, trust_region
from numpyro_natgrad.step.state import NoiseStatistics, allocated
from numpyro_natgrad.step.step_size import NoiseEstimate
from numpyro_natgrad.step.trust_region import Acceptance

RADII = [1e-4, 1e-2, 0.5]
ADAPTIVE = checked(None, "adaptive", None, True)
CONSTANTS = RuleConstants()


@pytest.mark.parametrize("name", CASES)
def test_longest_step_has_the_kl_of_the_radius(name, dtype):
    """Bisection finds ρ to 1 %, and so KL to 2 % where it is quadratic."""
    tangent = CASES[name]().tangent

    @jax.jit
    def moved(radius):
        rho, nats = trust_region.longest(partial(gaussian.kl, tangent, margin=MARGIN), jnp.asarray(1.0), radius)
        return gaussian.kl(tangent, rho, MARGIN).forward, nats.forward

    for radius in RADII:
        for nats in moved(jnp.asarray(radius)):
            assert 0.975 * radius <= nats <= radius


@pytest.mark.parametrize("name", CASES)
def test_wide_radius_does_not_shorten_the_step(name, dtype):
    tangent = CASES[name]().tangent
    nats = partial(gaussian.kl, tangent, margin=MARGIN)
    for radius in (1e9, jnp.inf):
        assert trust_region.longest(nats, jnp.asarray(0.25), jnp.asarray(radius))[0] == 0.25


@pytest.mark.parametrize("name", CASES)
def test_quadratic_step_misses_the_radius_by_its_power_three_halves(name, x64):
    """ρ = √(2δ/‖v‖²) moves δ + O(δ^1.5) nats: the error falls by 10^1.5 where δ falls by 10."""
    tangent = CASES[name]().tangent
    radii = np.array([1e-6, 1e-7, 1e-8])
    rhos = np.sqrt(2 * radii / float(gaussian.squared_norm(tangent)))
    error = [abs(float(gaussian.kl(tangent, rho, MARGIN).forward) - d) for rho, d in zip(rhos, radii, strict=True)]
    np.testing.assert_allclose(np.log10(np.array(error[:-1]) / error[1:]), 1.5, atol=0.02)


def test_step_with_infinite_kl_is_shortened_until_kl_is_finite(dtype):
    nats = lambda rho: StepKL(jnp.where(rho > 1e-3, jnp.inf, rho), rho, rho)
    rho, _ = trust_region.longest(nats, jnp.asarray(1.0), jnp.asarray(1.0))
    assert 0.98e-3 <= rho <= 1e-3


@pytest.mark.parametrize("nats", [jnp.nan, jnp.inf])
def test_search_for_a_step_ends_where_no_step_has_a_finite_kl(nats, dtype):
    """A bisection of the product of both ends never ended in single precision, where that product underflows."""
    rho, kl = trust_region.longest(lambda rho: StepKL(rho + nats, rho, rho), jnp.asarray(1.0), jnp.asarray(1.0))
    assert 0 < rho < 1e-20
    assert kl.forward == 0


def fresh(blocks: int) -> NoiseStatistics:
    """The statistics of that many blocks before the first step."""
    return allocated(0, blocks, CONSTANTS, jnp.result_type(float))[1]


@jax.jit
def watch(samples):
    """Signal fractions and noise estimates when the rows are successive natural gradients in one frame."""

    def step(carry, v):
        statistics, mean = carry
        squares = jnp.sum(jnp.stack([mean, v - mean, v]) ** 2, axis=1)
        statistics, seen = step_size.observe(statistics, SquaredNorms(*squares[:, None]), CONSTANTS)
        return (statistics, mean + seen.weight * (v - mean)), (seen.signal[0], seen.noise[0])

    start = fresh(1), jnp.zeros(samples.shape[1])
    return jax.lax.scan(step, start, samples)[1]


def test_signal_fraction_of_pure_noise_falls_as_one_over_steps(dtype):
    """sₜ·t = O(1), which is what makes the iterate an average of all steps (Robbins & Monro)."""
    signal, _ = watch(jax.random.normal(jax.random.key(0), (1000, 20)))
    product = np.asarray(signal) * np.arange(1, 1001)
    assert 0.3 <= np.median(product[500:]) <= 3.0


def test_signal_fraction_of_a_constant_gradient_is_one(dtype):
    signal, noise = watch(jnp.tile(jnp.arange(1.0, 21.0), (50, 1)))
    np.testing.assert_allclose(signal, 1.0, rtol=np.sqrt(np.finfo(dtype).eps))
    assert noise.max() <= np.sqrt(np.finfo(dtype).eps) * np.sum(np.arange(1.0, 21.0) ** 2)


def test_noise_estimates_the_variance_of_one_natural_gradient(dtype):
    """d standard normals have E‖n‖² = d, and a mean of t of them a relative standard error of √(2/(d t))."""
    d, steps = 50, 2000
    _, noise = watch(jax.random.normal(jax.random.key(0), (steps, d)))
    # The running mean looks back over a few hundred steps by now; 100 is a safe count.
    assert abs(noise[-1] / d - 1) < 4 * np.sqrt(2 / (d * 100))


def test_noise_estimate_follows_a_decreasing_scale(dtype):
    """Forty steps forget twenty that were a thousand times longer, of which a plain mean would keep 10⁵."""
    scale = jnp.where(jnp.arange(60) < 20, 1e3, 1.0)[:, None]
    _, noise = watch(scale * jax.random.normal(jax.random.key(2), (60, 20)))
    # The mean of the last squares, each of relative variance 2/20, is known to 4 √(2/60); ``recent_factor`` of it bounds the noise.
    assert noise[-1] <= CONSTANTS.recent_factor * 20 * (1 + 4 * np.sqrt(2 / 60))


def test_statistics_are_forgotten_with_distance(dtype):
    statistics = fresh(2)._replace(
        noise=jnp.array([1.0, 2.0]), window=jnp.array([50.0, 3.0]), stationary=jnp.array([9.0, 2.0])
    )
    far = [step_size.forget(statistics, 50.0, jnp.asarray(kl)) for kl in (0.0, 1.0, 50.0, 500.0)]
    np.testing.assert_allclose(far[0].window, statistics.window)
    np.testing.assert_allclose(far[0].noise, statistics.noise)
    np.testing.assert_allclose(far[2].window, [2.0, 2.0])
    np.testing.assert_allclose(far[3].noise, statistics.noise / 10, rtol=1e-5)
    for nearer, farther in itertools.pairwise(far):
        assert (farther.window <= nearer.window).all()
        assert (farther.noise <= nearer.noise).all()
        assert (farther.stationary <= nearer.stationary).all()


def test_averaging_window_is_the_steps_dominated_by_noise(dtype):
    """Every step counts while ‖m‖² is as large as noise explains; where ‖m‖² is larger, two at most."""
    stationary, progress = jnp.array([0.5]), jnp.array([1e4])
    statistics = fresh(1)
    for steps in range(2, 12):
        statistics = step_size.count_stationary(statistics, jnp.array([0.5]), stationary, jnp.array([1.0]), CONSTANTS)
        np.testing.assert_allclose(statistics.stationary[0], steps)
    for _ in range(3):
        statistics = step_size.count_stationary(statistics, jnp.array([0.5]), progress, jnp.array([1.0]), CONSTANTS)
    assert statistics.stationary[0] < 2


def test_one_outlier_does_not_decide_the_noise_estimate(dtype):
    """A thousandfold outlier after 200 steps raises the noise estimate at most 2² + 1 times, doubled here for chance."""
    clean = jax.random.normal(jax.random.key(1), (201, 10))
    dirty = clean.at[200].multiply(1000.0)
    _, before = watch(clean)
    _, after = watch(dirty)
    assert after[-1] <= 10 * before[-2]


def test_blocks_keep_statistics_of_their_own(dtype):
    """Noise in one block shortens its own steps and not those of a block without noise."""
    statistics = fresh(2)
    observe = jax.jit(lambda statistics, norms: step_size.observe(statistics, norms, CONSTANTS))
    for n in range(50):
        norms, noisy = jnp.array([1.0, 1.0]), jnp.array([0.0, 1.0 if n else 0.0])
        statistics, seen = observe(statistics, SquaredNorms(jnp.array([1.0, 1e-3]), noisy, norms))
    assert seen.signal[0] > 0.999
    assert seen.signal[1] < 0.01


@pytest.mark.parametrize(
    "threshold", [CONSTANTS.noise_threshold, CONSTANTS.noise_threshold_inexact, CONSTANTS.noise_threshold_scores]
)
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("particles", [1, 2, 8, 100])
def test_default_step_size_stays_below_one(particles, antithetic, threshold, dtype):
    signal, noise = jnp.meshgrid(jnp.array([1e-6, 0.1, 1.0]), jnp.array([0.0, 1e-3, 1.0, 1e6]))
    estimate = NoiseEstimate(jnp.ones(()), signal, noise, huber=jnp.ones(()), stationary=jnp.ones(()))
    scope = Scope(
        latents=1, blocks=1, particles=particles, exact=True, full_data=True, batch_weight=1.0, constants=CONSTANTS
    )
    rho = step_size.adaptive(estimate, NoiseTolerance(max_step_size(scope, antithetic), threshold), CONSTANTS)
    assert (rho > 0).all()
    bound = 1.0 if antithetic else particles / (particles + 2)
    assert (rho <= bound + np.finfo(dtype).eps).all()
    np.testing.assert_allclose(rho[0, -1], bound, rtol=1e-5)
    # More signal never shortens a step, more noise never lengthens it.
    assert (jnp.diff(rho, axis=1) >= 0).all()
    assert (jnp.diff(rho, axis=0) <= 0).all()


def test_newton_steps_stay_long_until_noise_dominates_for_the_patience(dtype):
    """After N noisy steps the step size is at least 3/√N of its largest value, 0.8, while noise is within its tolerance."""

    def rho(stationary: float, noise: float, signal: float = 1e-6, floor_noise: float = 2.0) -> jax.Array:
        estimate = NoiseEstimate(jnp.ones(()), *(jnp.array(x) for x in (signal, noise, 1.0, stationary)))
        return step_size.adaptive(estimate, NoiseTolerance(0.8, 1e-9, floor_noise), CONSTANTS)

    for stationary, expected in ((1.0, 1.0), (9.0, 1.0), (36.0, 0.5), (900.0, 0.1)):
        np.testing.assert_allclose(rho(stationary, 2.0), 0.8 * expected, rtol=1e-6)
        np.testing.assert_allclose(rho(stationary, 20.0), 0.08 * expected, rtol=1e-6)
    assert rho(1.0, 2.0, floor_noise=0.0) < 1e-5
    np.testing.assert_allclose(rho(36.0, 1e9, floor_noise=np.inf), 0.4, rtol=1e-6)
    np.testing.assert_allclose(rho(900.0, 2.0, signal=0.7), 0.8 * 0.7, rtol=1e-6)


@pytest.mark.parametrize("directions", [6, 1000])
def test_stationary_steps_are_not_taken_for_progress(directions, dtype):
    """Squares of ``directions`` independent normals scatter about their expectation, and every step counts.

    A drift of δ times the noise holds the count n at 1/n = (0.2 + δ − 0.2 c)/(1.2 + δ), the share of movement.
    """
    count = lambda drift: (1.2 + drift) / (0.2 + drift - 0.2 * CONSTANTS.nonstationarity)
    statistics, slope, steep = fresh(1), fresh(1), fresh(1)
    step = jax.jit(lambda *arguments: step_size.count_stationary(*arguments, CONSTANTS))
    for x in np.random.default_rng(0).chisquare(directions, 500) / directions:
        running_mean2 = jnp.array([0.2 * x])
        statistics = step(statistics, jnp.array([0.2]), running_mean2, jnp.array([1.0]))
        slope = step(slope, jnp.array([0.2]), running_mean2 + 1.0, jnp.array([1.0]))
        steep = step(steep, jnp.array([0.2]), running_mean2 + 3.0, jnp.array([1.0]))
    np.testing.assert_allclose(statistics.stationary, 501)
    np.testing.assert_allclose(slope.stationary, count(1.0), rtol=0.1)
    np.testing.assert_allclose(steep.stationary, count(3.0), rtol=0.1)


@pytest.mark.parametrize("latents", [1, 10, 1000])
def test_trust_region_radius_changes_fourfold_between_its_bounds(latents, dtype):
    start, floor = 10.0 * latents, trust_region.comparison_floor(latents, CONSTANTS)

    def resized(radius, kl, *, good, limited, grows):
        result = Acceptance(jnp.array(good), jnp.array(grows), jnp.zeros(()))
        radius, kl, limited = jnp.asarray(radius), jnp.asarray(kl), jnp.array(limited)
        return float(trust_region.resize(radius, result, kl=kl, limited=limited, floor=floor, constants=CONSTANTS))

    assert resized(start, start, good=True, limited=True, grows=True) == 4 * start
    assert resized(start, start, good=True, limited=True, grows=False) == start
    assert resized(start, start, good=False, limited=True, grows=False) == start / 4
    assert resized(start, 0.0, good=False, limited=False, grows=False) == start / 4
    # An unlimited step shows how much was needed.
    np.testing.assert_allclose(
        resized(start, start / 100, good=True, limited=False, grows=False), start / 25, rtol=1e-6
    )
    np.testing.assert_allclose(resized(start, 0.0, good=True, limited=False, grows=False), floor, rtol=1e-6)
    # Failures shrink the radius below the noise, down to a bound; there every success enlarges it.
    least = CONSTANTS.radius_min * floor
    np.testing.assert_allclose(resized(least, least, good=True, limited=True, grows=False), 4 * least, rtol=1e-6)
    np.testing.assert_allclose(resized(floor / 2, floor, good=True, limited=True, grows=False), floor, rtol=1e-6)
    np.testing.assert_allclose(resized(least, 0.0, good=False, limited=True, grows=False), least, rtol=1e-6)
    np.testing.assert_allclose(resized(least, least, good=True, limited=True, grows=True), 4 * least, rtol=1e-6)
    most = float(jnp.asarray(CONSTANTS.radius_max))  # as the precision has it
    assert resized(CONSTANTS.radius_max, 1.0, good=True, limited=True, grows=True) == most
