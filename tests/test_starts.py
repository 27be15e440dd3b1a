# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of random starts fits, judges, stores and counts correctly, and its tenth shows what is promised."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from scipy import stats

from benchmarks.starts import run, stops, table
from benchmarks.starts.cases import PROBLEMS
from benchmarks.starts.fitting import Starts, Walk, gathered
from benchmarks.starts.judging import Judge
from benchmarks.starts.problems import COMMON, GUIDES, SETTINGS, Problem, Setting
from benchmarks.starts.results import Cell, Store
from numpyro_natgrad import NaturalGradient, fit
from numpyro_natgrad.infer.convergence import converged
from numpyro_natgrad.step.state import StepInfo

ROOT = Path(__file__).parent.parent
CELL = Cell("funnel", "full", COMMON)


def known_mean(rng):
    """Three measurements of a mean with a known error: the posterior is N(1, 1/4)."""

    def model(y):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z, 1).expand([3]).to_event(1), obs=y)

    return model, np.array([0.5, 1.5, 2.0])


TOY = Problem("toy", "conjugate", known_mean, 3, True, False, False, tuple(GUIDES), {})
EVIDENCE = stats.multivariate_normal(np.zeros(3), np.eye(3) + 1).logpdf([0.5, 1.5, 2.0])


@pytest.fixture(scope="module")
def toy():
    """Starts of the conjugate problem, and a walk of fifteen steps."""
    starts = Starts(TOY, "full", Setting(4, False), 3)
    return starts, starts.walk(starts.states, 15)


def test_problems_cover_their_kinds_and_data_are_reproduced():
    assert len(PROBLEMS) >= 40
    assert len({p.seed for p in PROBLEMS.values()}) == len(PROBLEMS)
    assert sum(p.every_setting for p in PROBLEMS.values()) >= len(PROBLEMS) / 3
    assert all(p.every_setting for p in PROBLEMS.values() if p.tenth)
    assert sum(p.tenth for p in PROBLEMS.values()) >= len(PROBLEMS) / 10
    for p in PROBLEMS.values():
        first, second = (p.make()[1] for _ in range(2))
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(np.isfinite(a).all() and a.shape[0] <= 200 for a in first)
        assert p.build.__doc__.endswith(".")


def test_a_new_process_knows_the_problems():
    """As those of ``--jobs`` do, which import no more than the function that they call."""
    program = "from benchmarks.starts.run import run_cell, PROBLEMS; assert PROBLEMS"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_each_start_is_the_first_of_a_guide_of_its_own(toy):
    starts, _ = toy
    model, args = TOY.make()
    for i, key in enumerate(jax.random.split(jax.random.key(TOY.seed), 3)):
        svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO())
        alone = svi.optim.get_params(svi.init(key, *args).optim_state)
        for name, x in starts.params(starts.states).items():
            np.testing.assert_allclose(x[i], alone[name], rtol=1e-6)
    assert len(np.unique(starts.params(starts.states)["auto_loc"])) == 3


def test_the_elbo_of_the_exact_posterior_is_the_evidence():
    judge = Judge(TOY, "full", 2)
    with jax.enable_x64(True):
        svi = SVI(TOY.make()[0], AutoMultivariateNormal(TOY.make()[0]), NaturalGradient(), Trace_ELBO())
        svi.init(jax.random.key(0), *TOY.make()[1])
        exact = {"auto_loc": jnp.array([1.0]), "auto_scale_tril": jnp.array([[0.5]])}
        unconstrained = jax.device_get(
            svi.optim.get_params(svi.init(jax.random.key(0), *TOY.make()[1], init_params=exact).optim_state)
        )
    elbos = judge.elbos(jax.tree.map(lambda x: np.stack([x, x, x + 1]), unconstrained))
    np.testing.assert_allclose(elbos[:2], EVIDENCE, rtol=1e-12)
    assert elbos[2] < EVIDENCE - 0.1


def test_both_methods_arrive_and_a_walk_can_be_resumed_from_its_states(toy):
    starts, walk = toy
    judge = Judge(TOY, "full", 3)
    np.testing.assert_allclose(judge.elbos(starts.params(walk.states[-1])), EVIDENCE, atol=1e-3)
    np.testing.assert_allclose(judge.elbos(starts.adam(0.1, starts.params(starts.states))[-1]), EVIDENCE, atol=0.01)
    resumed = starts.walk(gathered(walk, np.full(3, 10)), 5)
    for x, y in zip(*map(jax.tree.leaves, (resumed.states[-1], walk.states[-1])), strict=True):
        np.testing.assert_array_equal(x, y)


def records(decrement):
    """Steps of two starts, with this decrement at each of forty steps."""
    x = np.broadcast_to(decrement, (2, 40))
    zero = np.zeros_like(x)
    info = StepInfo(zero, zero, zero, zero, zero, x, zero, zero > 0, zero > 0, zero)
    return zero, info


def test_a_stop_is_proposed_at_the_chunks_where_the_rule_of_fit_holds():
    decrement = np.where(np.arange(40) < 17, 1.0, 0.01)
    found = list(stops.proposals(Walk([], records(decrement)), 1))
    zero, no = np.zeros(40), np.zeros(40) > 0
    history = stops.History(zero, zero, zero, decrement, zero, no, no, zero)
    steps = [past.steps for past in found]
    assert steps == list(range(steps[0], 41, 5))
    assert steps[0] > 17
    assert converged(found[0], stops.TOLERANCE)
    assert not converged(stops.History(*(x[: steps[0] - 5] for x in history)), stops.TOLERANCE)
    assert not list(stops.proposals(Walk([], records(np.ones(40))), 0))


def test_stops_are_those_of_fit(toy):
    """From the same state, which fixes all draws."""
    starts, _ = toy
    walk = starts.walk(starts.states, 60)
    granted = stops.granted_stops(starts, walk)
    svi, _ = starts.begin(jax.random.key(0), starts.args)
    for i, step in enumerate(granted):
        state = jax.tree.map(lambda x, i=i: x[i], starts.states)
        result = fit(svi, None, *starts.args, init_state=state, tolerance=stops.TOLERANCE, progress_bar=False)
        assert result.converged
        assert len(result.losses) == step or (step == 0 and len(result.losses) > 60)


def test_a_gain_beyond_a_barrier_is_another_basin():
    def stop(gain, barrier):
        return {
            "elbo": -5.0,
            "continued": {"ours": -5.0, "adam": -5.0 + gain},
            "barriers": {"ours": 0, "adam": barrier},
        }

    assert stops.is_false(stop(0.4, 0.1))
    assert not stops.is_false(stop(0.2, 0.1))
    assert not stops.is_false(stop(9.0, 3.0))
    assert stops.is_other_basin(stop(9.0, 3.0))
    assert stops.is_false({"elbo": -np.inf, "continued": {"ours": -5.0}, "barriers": {"ours": np.nan}})
    judge = SimpleNamespace(elbos=lambda p: -((np.sum(p["x"] ** 2, 1) - 1) ** 2))  # a ring, and a hill inside of it
    way = lambda *points: [{"x": np.array([[0.0, 0.0], point])} for point in points]
    assert stops._barrier(judge, way((-1.0, 0.0), *[(0.0, 0.0)] * 7, (1.0, 0.0)), 1) == pytest.approx(1.0)
    around = [(-np.cos(t), np.sin(t)) for t in np.linspace(0, np.pi, 9)]
    assert stops._barrier(judge, way(*around), 1) == pytest.approx(0.0, abs=1e-9)  # a curved valley
    rough = [(-1.0, 0.0), *[(9.0, 0.0)] * 7, (-0.9, 0.0)]
    assert stops._barrier(judge, way(*rough), 1) == pytest.approx(0.0, abs=0.05)  # a rough way


def test_results_of_a_problem_that_has_changed_are_not_used(tmp_path):
    store = Store(tmp_path)
    plan = run.Plan(store, "a", ("adam", "ours"), 2, 300)
    assert plan.missing([CELL]) == [CELL]
    store.write(CELL, "adam", {"elbos": {"0.1": [-3.0, float("nan")]}})
    store.write(CELL, "ours-a", {"elbos": {"300": [-2.0, float("inf")]}, "stops": []})
    assert plan.missing([CELL]) == []
    assert plan._replace(label="b").missing([CELL]) == [CELL]
    assert store.best(CELL) == -2.0
    path = store.path(CELL, "ours-a")
    path.write_text(path.read_text().replace(PROBLEMS["funnel"].fingerprint, "0"))
    assert store.best(CELL) == -3.0
    assert plan.missing([CELL]) == [CELL]


def test_the_table_counts_starts_and_stops(tmp_path):
    store = Store(tmp_path)
    adam = {"0.1": [-1.0, -1.1, -1.2, -9.0], "0.03": [-1.0, -9.0, float("nan"), -1.0]}
    store.write(CELL, "adam", {"elbos": adam})
    stop = {"elbo": -3.0, "continued": {"ours": -1.0}, "barriers": {"ours": 0.0}}
    infinite = {"elbo": float("-inf"), "continued": {}, "barriers": {}}
    ours = {"100": [-9.0, -9.0, -9.0, -9.0], "300": [-1.0, -3.0, -3.0, float("nan")]}
    store.write(CELL, "ours-main", {"elbos": ours, "stops": [stop, infinite]})
    (row,) = table.rows(store, "main", [CELL, CELL._replace(guide="mean-field")])
    assert [table.arrived(x) for x in row.ours] == [0, 1]
    assert (row.best_rate, row.any_rate, row.false_stops, row.non_finite) == ("0.1", 4, 1, 1)
    assert table.is_behind(row)
    text = table.table([row])
    assert "| 0 | **1** | 3 | 2 |" in text
    assert "brings 4 home: 25.0%" in text
    assert "False stops: 1 of 2" in text


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_share_of_sets_whose_best_start_arrives(count):
    """Against a count of all sets; the start that leads after a third of the steps does not arrive."""
    third, last = np.array([3.0, 0.5, 1.0, 9.0, 2.0]), np.array([0.1, 4.0, 0.2, 0.0, 7.0])
    row = table.Row(CELL, np.stack([third, last]), {}, [])
    sets = [list(x) for x in itertools.combinations(range(5), count)]
    expected = np.mean([last[x][np.argmin(third[x])] <= 0.3 for x in sets])
    assert table.best_of(row, count) == pytest.approx(expected)


def test_the_common_setting_comes_first_and_the_tenth_has_no_other():
    every = list(run.cells((), GUIDES, SETTINGS, tenth=False))
    common = [cell.setting == COMMON for cell in every]
    assert common == sorted(common, reverse=True)
    assert len({*every}) == len(every)
    assert {c.setting for c in run.cells((), GUIDES, SETTINGS, tenth=True)} == {COMMON}
    assert {c.guide for c in run.cells(["local_rates"], GUIDES, SETTINGS, tenth=False)} == {"mean-field"}


@pytest.mark.slow
def test_a_tenth_of_the_starts_arrives_and_stops_rightly(tmp_path):
    """The rows of the representative tenth, run by the command with XLA's own options.

    ``learned_centring`` has parameters of the model that move together with the guide, and is known to be slow.
    """
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "benchmarks.starts", "--tenth", "--jobs", "1", "--cache", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True, timeout=2700)
    rows = table.rows(Store(tmp_path), "main", run.cells((), GUIDES, SETTINGS, tenth=True))
    assert len(rows) == 2 * sum(p.tenth for p in PROBLEMS.values())
    assert {row.cell.problem for row in rows if table.is_behind(row)} <= {"learned_centring"}
    assert not [row.cell for row in rows if row.false_stops > 1 or row.non_finite]
