# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``fit`` takes the steps of ``svi.run``, estimates the remaining gain of the ELBO, and stops by its documented rules."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_natgrad import History, NaturalGradient, StructureError, fit
from numpyro_natgrad.blocks.base import SquaredNorms
from numpyro_natgrad.compilation import programs
from numpyro_natgrad.infer import convergence
from numpyro_natgrad.step import newton_decrement
from numpyro_natgrad.step.newton_decrement import StepWeights
from numpyro_natgrad.step.state import DecrementState

Y = jnp.array([1.0, 3.0, 2.0, 2.5])


def model(y, scale=1.0):
    z = numpyro.sample("z", dist.Normal(0, 10))
    with numpyro.plate("rows", 4, subsample_size=len(y)):
        numpyro.sample("y", dist.StudentT(3, z, scale), obs=y)


def make(optim=None):
    return SVI(model, AutoNormal(model), optim or NaturalGradient(), Trace_ELBO(4))


@pytest.fixture(scope="module")
def svi():
    return make()


@pytest.fixture(scope="module")
def whole(svi):
    return fit(svi, random.key(0), Y, max_steps=13, tolerance=0, progress_bar=False)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=np.sqrt(np.finfo(np.float32).eps))


def test_fit_takes_the_steps_of_svi_run(svi, whole):
    """13 steps are two chunks and a part of one; losses and parameters are equal while the tolerance is not reached."""
    run = svi.run(random.key(0), 13, Y, progress_bar=False)
    assert_same((whole.params, whole.losses), (run.params, run.losses))
    assert whole.state.optim_state[0] == 13
    assert not whole.converged
    assert whole.reason.startswith("`max_steps` was reached")


def test_resumed_fit_equals_one_fit_and_is_not_traced_again(svi, whole, monkeypatch):
    """Each part ends in a chunk that is not full; a count of the optimizer's calls shows that nothing is traced again."""
    calls = []
    traced = NaturalGradient.eval_and_update
    monkeypatch.setattr(NaturalGradient, "eval_and_update", lambda *a, **k: calls.append(1) or traced(*a, **k))
    begun = fit(svi, random.key(0), Y, max_steps=7, tolerance=0, progress_bar=False)
    rest = fit(svi, random.key(5), Y, max_steps=6, tolerance=0, resume=begun, progress_bar=False)
    assert_same((whole.params, whole.history._replace(seconds=0)), (rest.params, rest.history._replace(seconds=0)))
    assert (np.diff(rest.history.seconds) > 0).all()
    assert not calls


def test_unknown_compiler_options_are_not_used(monkeypatch):
    monkeypatch.setattr(programs, "QUICK_OPTIONS", {"xla_no_such_option": True})
    programs.are_known.cache_clear()
    try:
        assert programs.quick_jit(lambda x: 2 * x)(1.0) == 2.0
    finally:
        programs.are_known.cache_clear()


def test_fit_on_batches_takes_the_steps_of_svi_update(svi):
    """Batches of two shapes come from an iterator; the oracle is a loop over ``svi.update``."""
    batches = [(Y[:2],), (Y[2:],), (Y,), (Y,), (Y[1:3],)] * 2
    left = iter(batches)
    result = fit(svi, random.key(0), batches=left, tolerance=0, progress_bar=False)
    state, update = svi.init(random.key(0), *batches[0]), jax.jit(svi.update)
    losses = []
    for batch in batches:
        state, loss = update(state, *batch)
        losses.append(loss)
    assert_same((result.losses, result.params), (jnp.stack(losses), svi.get_params(state)))
    assert result.reason.startswith("`batches` is exhausted")


def test_fit_stops_when_the_remaining_gain_is_below_the_tolerance(svi, capsys):
    """Ten times as many steps gain at most twice the tolerance."""
    result = fit(svi, random.key(1), Y, tolerance=0.05)
    assert result.converged
    assert len(result.losses) <= 60
    assert "converged" in capsys.readouterr().err
    longer = fit(svi, random.key(1), Y, max_steps=600, tolerance=0, resume=result, progress_bar=False)
    score = lambda params: Trace_ELBO(4096).loss(random.key(2), params, model, svi.guide, Y)
    assert score(result.params) - score(longer.params) < 0.1


def test_fit_ends_when_the_loss_stays_nan(svi):
    result = fit(svi, random.key(0), jnp.full(4, jnp.nan), progress_bar=False)
    assert len(result.losses) == convergence.STOPPING.patience
    assert "init_params" in result.reason
    assert not result.converged


def test_keyboard_interrupt_returns_the_steps_taken(svi):
    def batches():
        yield from [(Y,)] * 5
        raise KeyboardInterrupt

    result = fit(svi, random.key(0), batches=batches(), progress_bar=False)
    assert result.reason.startswith("interrupted")
    assert result.history.steps == len(result.losses) == 5


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (TypeError, "max_steps='9'", (Y,), {"max_steps": "9"}),
        (ValueError, "max_steps=0", (Y,), {"max_steps": 0}),
        (TypeError, "tolerance=None", (Y,), {"tolerance": None}),
        (ValueError, "tolerance=-1", (Y,), {"tolerance": -1}),
        (ValueError, "beside `batches`", (Y,), {"batches": [(Y,)]}),
        (TypeError, "batches=3", (), {"batches": 3}),
        (ValueError, "`batches` is empty", (), {"batches": []}),
        (ValueError, "`init_state` and `init_params` were given", (Y,), {"init_state": 1, "init_params": {}}),
    ],
)
def test_unusable_arguments_of_fit_are_quoted_in_the_error(svi, error, match, args, options):
    with pytest.raises(error, match=match):
        fit(svi, random.key(0), *args, **options)


def test_batch_may_be_a_list_or_a_tuple(svi):
    """What a ``DataLoader`` yields."""
    ways = ([kind([Y, jnp.array(2.0)])] * 3 for kind in (tuple, list))
    a, b = (fit(svi, random.key(0), batches=batches, progress_bar=False) for batches in ways)
    assert_same(a.losses, b.losses)


def test_exchanged_optimizer_of_an_svi_takes_the_next_steps():
    """The program compiled for the first optimizer is not used for the second one."""
    svi = make()
    fit(svi, random.key(0), Y, max_steps=2, tolerance=0, progress_bar=False)
    svi.optim = NaturalGradient(max_kl=1e-4)
    result = fit(svi, random.key(0), Y, max_steps=2, tolerance=0, progress_bar=False)
    assert 0 < result.history.kl.max() <= 1e-4


def test_fit_reports_unknown_gain_without_fisher_parameters():
    model = lambda: numpyro.factor("f", -jnp.sum(numpyro.param("x", jnp.ones(200)) ** 2))
    svi = SVI(model, lambda: None, NaturalGradient(), Trace_ELBO())
    with pytest.warns(UserWarning, match="have no Fisher matrix"):
        result = fit(svi, random.key(0), max_steps=3, progress_bar=False)
    assert "unknown number of nats" in result.reason
    assert result.reason.endswith("`tolerance=0.01`")
    assert repr(result) == f"FitResult(converged=False, steps=3, reason={result.reason!r})"


@pytest.mark.filterwarnings("ignore:NaturalGradient. no distribution that it can read owns the parameters ..p")
def test_one_optimizer_in_two_svis_reports_on_the_one_that_is_fitted():
    """A, B, A: the third fit is compiled already, so that the last loss that was traced is that of B."""
    optimizer = NaturalGradient()

    def bent():
        y = numpyro.sample("y", dist.Normal(0, 1))
        numpyro.factor("f", jnp.sin(numpyro.param("p", 0.5) * jax.lax.stop_gradient(y)))

    bend = SVI(bent, AutoNormal(bent), optimizer, Trace_ELBO())
    first, second = make(optimizer), bend
    fits = [fit(first, random.key(0), Y, max_steps=1, progress_bar=False)]
    fits += [fit(second, random.key(0), max_steps=1, progress_bar=False)]
    fits += [fit(first, random.key(0), Y, max_steps=1, progress_bar=False)]
    a, b, again = fits
    assert "'p', moved by the fallback optimizer" in b.reason
    assert again.reason == a.reason
    assert again.report == a.report == optimizer.report(first, again.state, Y)
    assert b.report == optimizer.report(second, b.state)
    assert "z_auto_loc" in a.report
    assert "z_auto_loc" not in b.report


def test_the_report_is_of_the_last_batches():
    """All rows are regressed, a part of them is not; the second fit of all rows is compiled already."""
    svi = make()
    reports = [fit(svi, random.key(0), batches=[(y,)] * 2, progress_bar=False).report for y in (Y, Y[:2], Y)]
    assert reports[0] == reports[2] != reports[1]
    assert "regression" in reports[0]


def test_a_report_needs_no_step():
    svi = make()
    state = svi.init(random.key(0), Y)
    report = svi.optim.report(svi, state, Y)
    result = svi.run(random.key(0), 1, Y, progress_bar=False)
    assert report == svi.optim.report(svi, result.state, Y)
    assert {line.split()[0] for line in report.splitlines()[2:]} == set(result.params)


def counting(y):
    count = numpyro.primitives.mutable("count", {"n": jnp.array(0.0)})
    z = numpyro.sample("z", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(z, 1).expand(y.shape).to_event(1), obs=y)
    count["n"] = count["n"] + 1


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_mutable_state_is_updated_with_one_particle(loss):
    """Once in `svi.init`, and once a step."""
    svi = SVI(counting, AutoNormal(counting), NaturalGradient(), loss())
    result = fit(svi, random.key(0), Y, max_steps=2, progress_bar=False)
    assert result.state.mutable_state["count"]["n"] == 3.0


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Trace_ELBO(2), r"\['count'\].*`Trace_ELBO\(num_particles=2\)` drops.*Use `Trace_ELBO\(num_particles=1\)`"),
        (TraceMeanField_ELBO(2), r"\['count'\].*`TraceMeanField_ELBO\(num_particles=2\)` drops"),
        (TraceGraph_ELBO(), r"\['count'\].*`TraceGraph_ELBO` does not support.*`Trace_ELBO\(num_particles=1\)`"),
        (TraceEnum_ELBO(), r"\['count'\].*`TraceEnum_ELBO` does not support"),
        (RenyiELBO(), r"\['count'\].*`RenyiELBO` does not support"),
    ],
)
def test_a_loss_that_drops_mutable_state_is_refused(loss, message):
    svi = SVI(counting, AutoNormal(counting), NaturalGradient(), loss)
    with pytest.raises(StructureError, match=message):
        fit(svi, random.key(0), Y)


def test_fit_refuses_other_optimizers():
    with pytest.raises(TypeError, match="`Adam`.*NaturalGradient"):
        fit(make(numpyro.optim.Adam(0.1)), random.key(0), Y)


def followed(key, rho, steps=60, d=40, noise=0.5):
    """Noisy steps towards the optimum of a Gaussian target: the estimated Newton decrement, and the true ½‖a‖²."""

    def step(carry, inputs):
        x, m, a, seen = carry
        t, draw = inputs
        n = jnp.sqrt(noise / d) * draw
        v, r, mean = x + n, rho(t), 1 / (t + 1)
        compared = SquaredNorms(*(jnp.sum(u**2)[None] for u in (m, v - m, v)))
        weights = StepWeights(*(jnp.asarray(w, float)[None] for w in (r, mean, 9 / (t + 9))))
        seen = newton_decrement.observe(seen, compared, jnp.full(1, noise), weights)
        m, x = m + mean * (v - m) - r * v, x - r * v
        return (x, m, a + weights.average * (x - a), seen), None

    start = (
        jnp.full(d, 1.0),
        jnp.zeros(d),
        jnp.full(d, 1.0),
        DecrementState(jnp.zeros((3, 3, 1)), jnp.zeros((2, 1)), jnp.ones(1)),
    )
    draws = jnp.arange(steps, dtype=float), random.normal(key, (steps, d))
    (_, _, a, seen), _ = jax.lax.scan(step, start, draws)
    return newton_decrement.newton_decrement(seen, jnp.full(1, noise), jnp.full(1, float(steps)))[0], jnp.sum(a**2) / 2


@pytest.mark.parametrize("rho", [lambda t: 0.3 + 0 * t, lambda t: 0.8 / (t / 5 + 1)], ids=["constant", "decaying"])
def test_newton_decrement_estimates_the_gap_of_the_average(rho, x64):
    """The mean over 400 repetitions is not below the truth by more than noise; Jensen's inequality allows half above."""
    claimed, true = jax.jit(jax.vmap(lambda k: followed(k, rho)))(random.split(random.key(0), 400))
    error = 4 * jnp.sqrt((jnp.var(claimed) + jnp.var(true)) / 400)
    assert true.mean() - error <= claimed.mean() <= 1.5 * true.mean() + error


def test_newton_decrement_forgets_the_noise_of_early_steps(dtype):
    """Twenty steps after errors of 10¹⁵ nats, unit noise alone does not explain ‖m‖² = 1."""
    state, far = DecrementState(jnp.zeros((3, 3, 1)), jnp.zeros((2, 1)), jnp.ones(1)), [1e15, 1e12, 1e8, 1e4]
    observe = jax.jit(newton_decrement.observe)
    for t, noise in enumerate(far + 20 * [1.0], 1):
        weights = StepWeights(*(jnp.full(1, w) for w in (0.1, max(0.1, 1 / t), 9 / (t + 8))))
        seen = SquaredNorms(*(jnp.full(1, x) for x in (1.0, noise, 1.0 + noise)))
        state = observe(state, seen, jnp.full(1, noise), weights)
    assert 0 < newton_decrement.predicted_mean(state, jnp.ones(1)) < 1
    np.testing.assert_array_equal(
        newton_decrement.predicted_mean(state, jnp.full(1, 2.0)),
        2 * newton_decrement.predicted_mean(state, jnp.ones(1)),
    )


def test_newton_decrement_is_nan_without_fisher_parameters():
    state = DecrementState(jnp.zeros((3, 3, 2)), jnp.zeros((2, 2)), jnp.ones(2))
    assert np.isnan(newton_decrement.newton_decrement(state, jnp.zeros(0), jnp.zeros(0))).all()


def flat(**changes):
    """A history of forty converged steps, but for the changes."""
    loss = 5 + np.random.default_rng(0).normal(size=40)
    done = dict.fromkeys(History._fields, np.zeros(40)) | {"loss": loss, "newton_decrement": np.full(40, 0.004)}
    return History(**done | {"limited": np.zeros(40, bool), "skipped": np.zeros(40, bool)} | changes)


def last(value, count, dtype=float):
    return np.r_[np.zeros(40 - count), np.full(count, value)].astype(dtype)


@pytest.mark.parametrize(
    ("changes", "proposed", "alone"),
    [
        ({}, True, True),
        ({"newton_decrement": last(0.02, 1)}, False, False),
        ({"newton_decrement": np.r_[np.zeros(37), 0.02, np.zeros(2)]}, False, False),
        ({"newton_decrement": np.r_[np.zeros(36), 0.02, np.zeros(3)]}, True, False),
        ({"newton_decrement": np.r_[np.zeros(31), 0.02, np.zeros(8)]}, True, True),
        ({"newton_decrement_error": last(0.007, 40)}, True, False),  # the check knows the noise
        ({"limited": last(1, 2, bool), "kl": np.full(40, 0.01)}, False, False),
        ({"limited": last(1, 2, bool), "kl": np.full(40, 0.009)}, True, True),
        ({"skipped": last(1, 2, bool)}, False, False),
        ({"loss": np.linspace(30, 5, 40)}, False, False),
        ({"newton_decrement": last(np.nan, 40)}, False, False),
    ],
)
def test_a_stop_is_proposed_over_a_window_which_is_longer_without_a_check(changes, proposed, alone):
    assert convergence.converged(flat(**changes), 0.01) is proposed
    assert convergence.converged(flat(**changes), 0.01, is_judged=False) is alone


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(0.0312, 0.004, "0.031 ± 0.004"), (12.3, 2.1, "12 ± 2"), (0.5, 0.0, "0.500 ± 0.000"), (np.nan, 1.0, "unknown")],
)
def test_interval_prints_one_digit_of_the_error(value, error, text):
    assert text in convergence.format_interval(value, error)


def test_outlook_names_the_steps_or_particles_that_reach_the_tolerance():
    """Noise falls as one over steps: from 0.04 to 0.01 nats needs four times the steps or the particles."""
    history = flat(newton_decrement=np.full(40, 0.04))
    assert "about 120 further steps, or 4 times the particles" in convergence.remaining_effort(
        history, 0.01, 0.04, 20.0
    )
    assert "still moving" in convergence.remaining_effort(history, 0.01, 0.001, 20.0)


@pytest.mark.filterwarnings("ignore:(Site|Out-of-support)")
@pytest.mark.parametrize(
    ("y", "note"),
    [
        (jnp.array([1.0, jnp.nan, 2.0, jnp.inf]), r"`args\[0\]` has 2 of 4 entries that are not finite"),
        (jnp.zeros(0), r"`args\[0\]` has the shape \(0,\), and so no entries"),
    ],
)
def test_data_that_numpyro_cannot_start_from_are_named(y, note):
    def observed(y, scale=1.0):
        z = numpyro.sample("z", dist.Normal(0, 10))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(z, scale), obs=y)

    new = SVI(observed, AutoNormal(observed), NaturalGradient(), Trace_ELBO(4))
    with pytest.raises((RuntimeError, AssertionError)) as raised:
        fit(new, random.key(0), y, progress_bar=False)
    assert any(re.match(note, text) for text in raised.value.__notes__)
