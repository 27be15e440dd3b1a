# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The judge's expected gain is the exact one on Gaussian targets, and it refuses what only looks converged."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from numpyro.infer.initialization import init_to_value
from oracles import spd

from numpyro_natgrad import History, NaturalGradient, fit, verdict
from numpyro_natgrad.compilation.data import split
from numpyro_natgrad.infer.convergence import Judgement
from numpyro_natgrad.infer.judge import Judge
from numpyro_natgrad.infer.judge_rule import JUDGE, USUAL_DRAWS, combined
from numpyro_natgrad.infer.krylov import conjugate_gradients, flattest_direction
from numpyro_natgrad.infer.stop_check import StopCheck

D = 4
CENTRE, COVARIANCE = np.arange(1.0, D + 1), spd(3, D, low=0.5, high=8.0)
AWAY = np.array([0.5, -0.4, 0.3, 0.2])
TOLERANCE = 0.05


def gaussian():
    numpyro.sample("z", dist.MultivariateNormal(jnp.array(CENTRE, float), jnp.array(COVARIANCE, float)))


def judged(svi, params, *args, key=0, tolerance=TOLERANCE, **changed):
    """The judgement of parameters, constrained ones, of an SVI."""
    state = svi.init(random.key(0), *args)
    values = {**svi.get_params(state), **{name: jnp.asarray(x, float) for name, x in params.items()}}
    unconstrained = svi.constrain_fn(values, invert=True)
    return Judge(svi, None, unconstrained, split(svi, args, {}))(unconstrained, random.key(key), tolerance, **changed)


def started(model, guide, loss=None):
    return SVI(model, guide, NaturalGradient(), loss or Trace_ELBO())


@pytest.mark.parametrize("loss", [Trace_ELBO(), Trace_ELBO(8), TraceMeanField_ELBO()], ids=["1", "8", "analytic"])
def test_gain_of_a_displaced_mean_is_half_its_squared_distance(loss, dtype):
    """A full Gaussian has no noise at the right covariance, whatever the number of particles of the loss."""
    svi = started(gaussian, AutoMultivariateNormal(gaussian), loss)
    scale = np.linalg.cholesky(COVARIANCE)
    found = judged(svi, {"auto_loc": CENTRE + AWAY, "auto_scale_tril": scale})
    exact = 0.5 * AWAY @ np.linalg.solve(COVARIANCE, AWAY)
    assert abs(found.gain - exact) < 4 * found.error + 0.01 * exact
    assert found.error < 0.05 * exact


def test_gain_of_a_mean_field_guide_is_that_of_all_means_together():
    """The best mean-field guide, displaced: the curvature of its means is the joint precision, not their own."""
    precision = np.linalg.inv(COVARIANCE)
    svi, scale = started(gaussian, AutoNormal(gaussian)), np.diag(precision) ** -0.5
    exact = 0.5 * AWAY @ precision @ AWAY
    found = [judged(svi, {"z_auto_loc": CENTRE + AWAY, "z_auto_scale": scale}, key=key) for key in range(4)]
    for x in found:
        assert abs(x.gain - exact) < 4 * x.error + 0.01 * exact
    assert judged(svi, {"z_auto_loc": CENTRE, "z_auto_scale": scale}).grants(TOLERANCE)


def test_gain_of_a_low_rank_guide():
    def model():
        numpyro.sample("z", dist.Normal(jnp.array(CENTRE, float), 1.0).to_event(1))

    svi = started(model, AutoLowRankMultivariateNormal(model, rank=1))
    right = {"auto_cov_factor": np.zeros((D, 1)), "auto_scale": np.ones(D)}
    found = judged(svi, {"auto_loc": CENTRE + AWAY, **right})
    exact = 0.5 * AWAY @ AWAY
    assert abs(found.gain - exact) < 4 * found.error + 0.01 * exact


def test_gain_counts_parameters_of_the_model_together_with_the_guide():
    """Empirical Bayes: z ~ N(μ, 1), y ~ N(z, 9). With q(z) the posterior at μ, the gain is that of log N(y | μ, 10).

    The Fisher matrix of μ given z is ten times the curvature of this profile.
    """
    y, mu = 2.0, 0.5

    def model():
        z = numpyro.sample("z", dist.Normal(numpyro.param("mu", 0.0), 1.0))
        numpyro.sample("y", dist.Normal(z, 3.0), obs=y)

    svi = started(model, AutoNormal(model))
    mean = 0.9 * mu + 0.1 * y
    found = judged(svi, {"mu": mu, "z_auto_loc": mean, "z_auto_scale": np.sqrt(0.9)})
    exact = (y - mu) ** 2 / 20
    assert abs(found.gain - exact) < 4 * found.error + 0.02 * exact


def test_standard_error_covers_the_truth():
    """The gain is 0 at the optimum of a correlated mean-field guide, whose draws are noisy: z-scores are of order 1."""
    precision = np.linalg.inv(COVARIANCE)
    svi = started(gaussian, AutoNormal(gaussian))
    right = {"z_auto_loc": CENTRE, "z_auto_scale": np.diag(precision) ** -0.5}
    found = [judged(svi, right, key=key) for key in range(8)]
    scores = np.array([x.gain / x.error for x in found])
    assert np.sqrt(np.mean(scores**2)) < 2
    assert np.abs(np.mean([x.gain for x in found])) < 0.01


def test_more_draws_are_taken_where_a_fit_has_paid_for_them():
    """The error, which is inversely proportional to the draws, falls below the tolerance; memory does not grow."""
    svi = started(gaussian, AutoNormal(gaussian))
    right = {"z_auto_loc": CENTRE, "z_auto_scale": np.diag(np.linalg.inv(COVARIANCE)) ** -0.5}
    usual = judged(svi, right, tolerance=0.0, key=1)  # where no chance makes it seem that there is something to gain
    assert usual.draws == USUAL_DRAWS
    tolerance = usual.error / 3
    refused = judged(svi, right, tolerance=tolerance, key=1)
    assert (refused.draws, refused.required, refused.grants(tolerance)) == (USUAL_DRAWS, 4 * USUAL_DRAWS, False)
    # What no draws at hand could decide is not begun.
    hopeless = judged(svi, right, tolerance=1e-9, key=1)
    assert hopeless.draws == usual.draws / JUDGE.kept_chunks * JUDGE.min_chunks
    assert hopeless.required > 1e3 * usual.draws
    paid = judged(svi, right, tolerance=tolerance, key=1, draws=16 * USUAL_DRAWS)
    assert 4 * USUAL_DRAWS <= paid.draws <= 16 * USUAL_DRAWS
    # The errors are those of 128 groups, 6 % each.
    assert paid.error < 1.3 * usual.error * USUAL_DRAWS / paid.draws
    assert abs(paid.gain) < 4 * paid.error


def test_a_full_gaussian_of_many_latents_needs_more_pairs_than_latents():
    """With 32 pairs the Hessian of 48 latents is singular, and its inverse makes a noise of eleven nats."""

    def rates() -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([48]).to_event(1))
        numpyro.sample("y", dist.Poisson(jnp.exp(z)).to_event(1), obs=jnp.arange(48.0) % 4)

    svi = started(rates, AutoMultivariateNormal(rates), Trace_ELBO(8))
    fitted = fit(svi, random.key(0), max_steps=50, tolerance=0, progress_bar=False)
    found = judged(svi, fitted.params)
    assert found.grants(TOLERANCE)
    assert found.draws <= 1024


def test_gradients_of_chunks_that_are_averaged_are_their_means():
    svi = started(gaussian, AutoNormal(gaussian))
    params = svi.optim.get_params(svi.init(random.key(0)).optim_state)
    judge = Judge(svi, None, params, split(svi, (), {}))
    judge.compile(params, random.key(1))
    pairs = judge._pairs(random.key(1), (), 0, 12)
    apart, averaged = (judge._evaluate(params, np.zeros(judge.size), 0.0, pairs, each) for each in (1, 3))
    np.testing.assert_array_equal(averaged[0], apart[0])
    expected = apart[1].reshape(4, 3, JUDGE.chunk, judge.size).mean(1).reshape(-1, judge.size)
    np.testing.assert_allclose(averaged[1], expected, rtol=1e-12)


def test_draws_outside_of_a_support_are_never_converged():
    def model():
        numpyro.sample("share", dist.Uniform(0.0, 1.0))

    def guide():
        # One draw in ten lies outside: none of 128 pairs with a probability of 2e-6.
        loc, scale = numpyro.param("m", 0.5), numpyro.param("s", 0.3, constraint=constraints.positive)
        numpyro.sample("share", dist.Normal(loc, scale))

    found = judged(started(model, guide), {})
    assert not found.grants(np.inf)
    assert found.nonfinite > 0
    assert "`share` lie outside of its support" in str(found)


def test_data_outside_of_a_support_are_named():
    def model():
        rate = numpyro.sample("rate", dist.Gamma(1.0, 1.0))
        numpyro.sample("counts", dist.Poisson(rate), obs=jnp.array([1.0, jnp.nan]))

    with warnings.catch_warnings(action="ignore"):  # NumPyro's own, of the same data
        found = judged(started(model, lambda: numpyro.sample("rate", dist.Gamma(numpyro.param("a", 2.0), 1.0))), {})
    assert "data of `counts`" in str(found)


def wells():
    z = numpyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
    numpyro.factor("wells", -8 * (z**2 - 1) ** 2)


def test_a_saddle_is_refused_and_a_well_is_granted(dtype):
    """Between two wells the loss has no slope in the mean, by symmetry."""
    svi = started(wells, AutoNormal(wells))
    between = judged(svi, {"z_auto_loc": 0.0, "z_auto_scale": 0.15})
    assert between.saddle
    assert not between.grants(0.1)
    assert "negative curvature" in str(between)
    result = fit(
        started(wells, AutoNormal(wells, init_loc_fn=init_to_value(values={"z": 1.0}))),
        random.key(0),
        progress_bar=False,
    )
    assert result.converged


def test_a_collapsed_scale_is_refused():
    """The entropy of a collapsed row has a slope of one nat, whatever the Fisher matrix of other rows."""
    scale = np.array([1e-5, 1.0, 1.0, 1.0])
    model = lambda: numpyro.sample("z", dist.Normal(jnp.zeros(D), 1.0).to_event(1))
    found = judged(started(model, AutoNormal(model)), {"z_auto_loc": np.zeros(D), "z_auto_scale": scale})
    assert found.gain - 2 * found.error > 0.4


def test_local_rows_of_a_minibatch_are_all_judged():
    """Forty rows, four of them in a batch, and one that is three standard deviations off: 4.5 nats."""
    y = jnp.linspace(-1.0, 1.0, 40)

    def model():
        with numpyro.plate("rows", 40, subsample_size=4):
            data = numpyro.subsample(y, event_dim=0)
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=data)

    svi = started(model, AutoNormal(model, create_plates=lambda: numpyro.plate("rows", 40, subsample_size=4)))
    right = {"z_auto_loc": y / 2, "z_auto_scale": np.full(40, np.sqrt(0.5))}
    off = {**right, "z_auto_loc": (y / 2).at[7].add(3 * np.sqrt(0.5))}
    assert judged(svi, right).grants(TOLERANCE)
    found = judged(svi, off)
    assert not found.grants(1.0)
    assert abs(found.gain - 4.5) < 4 * found.error


def test_batches_are_judged_by_their_mean():
    """Two halves of the data contradict each other, and their common optimum is granted at no batch alone."""

    def model(y):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", 16, subsample_size=8):
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    svi = started(model, AutoNormal(model))
    svi.init(random.key(0), jnp.zeros(8))
    values = svi.constrain_fn({"z_auto_loc": jnp.array(0.3), "z_auto_scale": jnp.array(17**-0.5)}, invert=True)
    judge = Judge(svi, None, values, split(svi, (), {}), (jnp.zeros(8),))
    held = jnp.asarray(np.tile(np.array([-1.0, -1.0, 1.0, 1.0]), 4))[:, None] * jnp.ones(8)
    found = judge(values, random.key(1), TOLERANCE, (held,))
    assert abs(found.gain - 0.5 * 17 * 0.3**2) < 4 * found.error + 0.02
    assert found.error > 0.1


def test_too_few_batches_are_no_convergence():
    """The running estimate proposes a stop after the last batch but three; with more batches it is granted."""

    def model(y):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    svi, batch = started(model, AutoNormal(model), Trace_ELBO(8)), (jnp.array(1.0),)
    enough = fit(svi, random.key(0), batches=[batch] * 100, tolerance=0.1, progress_bar=False)
    assert enough.converged
    short = fit(svi, random.key(0), batches=[batch] * len(enough.losses), tolerance=0.1, progress_bar=False)
    assert not short.converged
    assert "fewer than 4 batches are left for an independent check" in short.reason


def discrete():
    z = numpyro.sample("z", dist.Bernoulli(0.3))
    numpyro.sample("y", dist.Normal(z * 1.0, 1.0), obs=0.5)


def discrete_guide():
    numpyro.sample("z", dist.Bernoulli(numpyro.param("p", 0.4, constraint=constraints.unit_interval)))


def test_discrete_draws_have_no_hessian():
    found = judged(started(discrete, discrete_guide, TraceGraph_ELBO()), {})
    assert found.abstains
    assert "draws of `z` are not differentiable" in str(found)


@pytest.mark.parametrize(("error", "granted"), [(0.0, True), (0.03, True), (0.05, False)])
def test_a_stop_without_a_check_needs_the_running_estimate_beyond_its_error(error, granted):
    svi = started(discrete, discrete_guide, TraceGraph_ELBO())
    state, zero, no = svi.init(random.key(0)), np.zeros(8), np.zeros(8, bool)
    history = History(zero, zero, zero, zero + 0.01, zero + error, no, no, zero)
    check = StopCheck(svi)
    assert check.grants(history, state, split(svi, (), {}), 10, 1.0, None, TOLERANCE) is granted
    assert check.last.abstains


def test_conjugate_gradients_solve_and_find_negative_curvature():
    matrix, right, limits = spd(1, 6), np.arange(6.0), (JUDGE.products, JUDGE.residual, JUDGE.flat)
    x, _, least = conjugate_gradients(lambda v: matrix @ v, right, np.ones(6), *limits)
    assert least > 0
    np.testing.assert_allclose(x, np.linalg.solve(matrix, right), rtol=0.05, atol=0.05)
    saddle = np.diag([1.0, 1.0, 1.0, 1.0, 1.0, -1.0])
    _, direction, least = conjugate_gradients(lambda v: saddle @ v, right, np.ones(6), *limits)
    assert least <= 0
    assert direction @ saddle @ direction < 0


@pytest.mark.parametrize("least", [-0.3, 0.0, 0.02])
def test_flattest_direction_is_the_eigenvector_of_the_least_eigenvalue(least):
    """In the metric of the scale, in half as many products as there are dimensions; all products agree with eigh."""
    rng = np.random.default_rng(0)
    basis, scale = np.linalg.qr(rng.normal(size=(20, 20)))[0], rng.uniform(0.5, 2, 20)
    matrix = np.sqrt(scale)[:, None] * (basis * np.r_[least, rng.uniform(0.8, 4, 19)]) @ basis.T * np.sqrt(scale)
    direction, curvature = flattest_direction(lambda v: matrix @ v, rng.normal(size=20), scale, 10)
    assert curvature == pytest.approx(least, abs=2e-3)
    assert direction @ (scale * direction) == pytest.approx(1)
    assert direction @ matrix @ direction == pytest.approx(curvature)
    assert abs(basis[:, 0] @ (np.sqrt(scale) * direction)) > 0.999
    assert flattest_direction(lambda v: matrix @ v, rng.normal(size=20), scale, 30)[1] == pytest.approx(least, abs=1e-6)


@pytest.mark.parametrize("after", [0, 2])
def test_flattest_direction_says_that_a_product_is_not_finite(after):
    done = []

    def product(v):
        done.append(v)
        return np.full(6, np.nan) if len(done) > after else spd(1, 6) @ v

    assert np.isnan(flattest_direction(product, np.arange(1.0, 7), np.ones(6), 4)[1])


def test_a_flat_valley_is_not_called_converged(dtype):
    """The neck of a funnel, from which exactly centre²/18 nats remain, with a guide that is the best there.

    The covariance follows the mean, so that the curvature along the valley is a fiftieth of the Fisher matrix. Draws
    that happen to have no gradient there are frequent, and tell nothing.
    """

    def funnel():
        v = numpyro.sample("v", dist.Normal(0, 3))
        numpyro.sample("z", dist.Normal(0, jnp.exp(v / 2)).expand([6]).to_event(1))

    svi, centre, square = started(funnel, AutoNormal(funnel), Trace_ELBO(8)), -2.0, 1 / (3 + 1 / 9)
    scales = {"v_auto_scale": np.sqrt(square), "z_auto_scale": np.full(6, np.exp(centre / 2 - square / 4))}
    params = {"v_auto_loc": centre, "z_auto_loc": np.zeros(6), **scales}
    svi.init(random.key(0))
    values = svi.constrain_fn({name: jnp.asarray(x, float) for name, x in params.items()}, invert=True)
    judge = Judge(svi, None, values, split(svi, (), {}))
    granted = sum(judge(values, random.key(key), TOLERANCE, draws=3200).grants(TOLERANCE) for key in range(60))
    assert granted <= 2


def test_a_judge_is_compiled_once_for_several_fits_and_the_verdict(monkeypatch):
    made = []
    monkeypatch.setattr(Judge, "__init__", lambda self, *a, made_=Judge.__init__: made.append(1) or made_(self, *a))
    svi = started(gaussian, AutoNormal(gaussian), Trace_ELBO(8))
    results = [fit(svi, random.key(seed), tolerance=0.05, progress_bar=False) for seed in range(2)]
    found = verdict(svi, results[1], random.key(2), num_draws=200, num_chains=0, progress_bar=False)
    assert len(made) == 1
    assert (found.newton_decrement, found.newton_decrement_error) == results[1].judgement[:2]


def test_another_data_set_is_judged_anew():
    """A verdict repeats the number of its fit for the same arrays only, and an array of NumPy can be written to."""

    def model(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 10.0)), 1.0), obs=y)

    y = np.float32([1.0, 2.0, 3.0])
    svi = started(model, AutoNormal(model), Trace_ELBO(8))
    result = fit(svi, random.key(0), y, tolerance=0.05, progress_bar=False)
    gain = lambda: (
        verdict(svi, result, random.key(2), y, num_draws=200, num_chains=0, progress_bar=False).newton_decrement
    )
    assert gain() == result.judgement.gain
    y += 2.0
    shift = 2.0 * 3 / (3 + 0.01)
    assert gain() == pytest.approx(0.5 * shift**2 * (3 + 0.01), rel=0.05)


def test_a_fall_of_the_loss_behind_a_rise_is_no_gain():
    """The loss of a step that is much too long can overflow to any number, or lie in another basin."""
    noise = 1e-3 * np.random.default_rng(0).standard_normal((8, 8))
    lengths = np.array([-170.0, -180.0, -1e3, -1e3, -1e4, -1e4, 7e17, np.nan])
    model = Judgement(gain=0.02, error=0.01, saddle=False, draws=256, nonfinite=0, cause="")
    found = combined(model, noise + lengths, np.zeros(8, bool))
    assert (found.gain, found.error) == (0.02, 0.01)
    falling = np.array([0.1, -0.1, 0.3, -0.4, 0.8, -2.0, -1e3, 1e6])
    assert combined(model, noise + falling, np.zeros(8, bool)).gain == pytest.approx(0.8, abs=0.01)


def test_a_stop_costs_few_draws_and_is_reproducible():
    svi = started(gaussian, AutoNormal(gaussian), Trace_ELBO(8))
    first, second = (fit(svi, random.key(3), tolerance=0.05, progress_bar=False) for _ in range(2))
    assert first.converged
    assert first.reason == second.reason
    assert first.judgement.draws <= max(2 * JUDGE.chunk_pairs * JUDGE.min_chunks, JUDGE.draws * 8 * len(first.losses))
    assert first.judge_seconds > 0
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), first.params, second.params))
