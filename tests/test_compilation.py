# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""One program for the start, data as inputs of programs, and programs kept on disk for the next process."""

import gc
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from jax.experimental.compilation_cache import compilation_cache
from numpyro.infer import SVI, Trace_ELBO, autoguide, init_to_median
from numpyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal
from tables import tiers

from numpyro_natgrad import NaturalGradient, fit, fit_many, linear_response, to_nuts, verdict
from numpyro_natgrad.compilation import initial
from numpyro_natgrad.compilation.data import Data, split
from numpyro_natgrad.compilation.disk_cache import VARIABLE, ProgramFolder, cache_path, disk_cache, program_folder
from numpyro_natgrad.compilation.initial import initial_state, tracers_of
from numpyro_natgrad.compilation.program_key import UnkeyedError, program_key

X, Y = np.linspace(-1, 1, 12), np.array([0.1, 1.2, 0.9, 2.0, 1.1, 2.2, 2.8, 2.4, 3.9, 3.1, 4.4, 4.0])


def line(x, y):
    slope = numpyro.sample("slope", dist.Normal(0.0, 5.0))
    level = numpyro.sample("level", dist.Normal(0.0, 5.0))
    noise = numpyro.sample("noise", dist.HalfNormal(2.0))
    with numpyro.plate("rows", len(x)):
        shift = numpyro.sample("shift", dist.Normal(0.0, 0.1))
        numpyro.sample("y", dist.Normal(level + slope * x + shift, noise), obs=y)


def by_hand(x, y):
    start = lambda key: random.normal(key)
    for name in ("slope", "level"):
        numpyro.sample(name, dist.Normal(numpyro.param(f"{name}_loc", start), 0.3))
    numpyro.sample("noise", dist.Gamma(numpyro.param("a", jnp.array(2.0), constraint=dist.constraints.positive), 2.0))
    numpyro.sample("shift", dist.Normal(numpyro.param("shift_loc", lambda key: random.normal(key, (12,))), 0.1))


def several():
    parts = AutoGuideList(line)
    parts.append(AutoNormal(numpyro.handlers.block(line, hide=["noise"])))
    parts.append(AutoNormal(numpyro.handlers.block(line, expose=["noise"])))
    return parts


GUIDES = {
    "AutoNormal": lambda: AutoNormal(line),
    "median": lambda: AutoNormal(line, init_loc_fn=init_to_median),
    "by hand": lambda: by_hand,
    "list": several,
    **{
        name: lambda name=name: getattr(autoguide, name)(line)
        for name in (
            "AutoMultivariateNormal",
            "AutoDiagonalNormal",
            "AutoLowRankMultivariateNormal",
            "AutoDelta",
            "AutoLaplaceApproximation",
            "AutoBNAFNormal",
            "AutoIAFNormal",
            "AutoDAIS",
        )
    },
}


def started(guide, model=line):
    return SVI(model, guide, NaturalGradient(), Trace_ELBO(num_particles=4))


@contextmanager
def compilations():
    """The number of programs that XLA compiles or JAX loads meanwhile, in a list of one number."""
    count, is_open = [0], [True]

    def listen(name, seconds, **_):
        count[0] += is_open[0] and name.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    is_open[0] = False


# ---- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiers(GUIDES, "AutoNormal", "AutoMultivariateNormal", "by hand", "list"))
def test_start_by_one_program_is_numpyros(name, dtype):
    ours, theirs = started(GUIDES[name]()), started(GUIDES[name]())
    state, expected = initial_state(ours, random.key(3), (X, Y), {}), theirs.init(random.key(3), X, Y)
    assert (state.rng_key == expected.rng_key).all()
    found, known = ours.get_params(state), theirs.get_params(expected)
    assert found.keys() == known.keys()
    close = 1e-5 if dtype == "float32" else 1e-10
    same = lambda a, b: np.allclose(a, b, rtol=close, atol=close) and a.dtype == b.dtype
    assert jax.tree.all(jax.tree.map(same, found, known))


@pytest.mark.parametrize("name", tiers(GUIDES, "AutoNormal", "AutoMultivariateNormal", "list"))
def test_guide_keeps_values_and_no_tracers(name):
    svi = started(GUIDES[name]())
    state = initial_state(svi, random.key(3), (X, Y), {})
    assert not tracers_of(svi)
    if name in ("by hand", "AutoDAIS"):
        return
    draws = svi.guide.sample_posterior(random.key(1), svi.get_params(state), sample_shape=(5,))
    assert {x.shape[0] for x in draws.values()} == {5}
    assert draws["shift"].shape == (5, 12)


@pytest.mark.parametrize("bound", ["MOST_SITES", "MOST_EQUATIONS"])
def test_large_models_are_set_up_by_numpyro(bound, monkeypatch):
    monkeypatch.setattr(initial, bound, 1)
    ours, theirs = started(AutoNormal(line)), started(AutoNormal(line))
    with monkeypatch.context() as patch:
        patch.setattr(initial, "in_background", None)  # no program is made
        found = ours.get_params(initial_state(ours, random.key(3), (X, Y), {}))
    known = theirs.get_params(theirs.init(random.key(3), X, Y))
    for param in known:
        np.testing.assert_allclose(found[param], known[param], rtol=1e-6)


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_start_without_density_is_refused_as_by_numpyro(make):
    def impossible(y):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)
        numpyro.factor("never", -jnp.inf)

    svi = started(make(impossible), impossible)
    with pytest.raises(RuntimeError, match="Cannot find valid initial parameters"):
        fit(svi, random.key(0), jnp.zeros(2), progress_bar=False)


def test_error_of_the_model_is_raised_as_it_is():
    def wrong(y):
        raise KeyError("no such column")

    with pytest.raises(KeyError, match="no such column"):
        fit(started(AutoNormal(wrong), wrong), random.key(0), Y, progress_bar=False)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_arrays_are_inputs_and_the_rest_is_constant():
    args, kwargs = (X, 3, np.array(7), np.array(["a"]), None), {"y": jnp.arange(4), "names": {"z": Y > 1}}
    data = split(started(AutoNormal(line)), args, kwargs)
    assert len(data.inputs) == 3
    back, named = data.arguments()
    assert back[1] == 3
    assert back[2].shape == ()
    assert back[4] is None
    assert named["names"]["z"].dtype == bool
    assert jax.tree.structure(data) == jax.tree.structure(split(started(AutoNormal(line)), args, kwargs))
    other = split(started(AutoNormal(line)), (X, 4, *args[2:]), kwargs)
    assert jax.tree.structure(data) != jax.tree.structure(other)


def test_large_numbers_with_small_differences_are_constants():
    """In single precision seconds since 1970 are known to two minutes only. NumPy has the digits."""
    seconds = 1.6e9 + np.arange(0.0, 100.0)
    data = split(started(AutoNormal(line)), (seconds, X), {})
    assert [x is X for x in data.inputs] == [True]


def counts(y, group):
    """Needs the values of its indices while it is traced."""
    with numpyro.plate("groups", int(group.max()) + 1):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.Poisson(rate[group]), obs=y)


def branches(y):
    """Needs the values of its data while it is traced."""
    scale = 10.0 if y.mean() > 1 else 1.0
    z = numpyro.sample("z", dist.Normal(0.0, scale))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "args", "inputs"),
    [(counts, (np.array([1.0, 2.0, 5.0]), np.array([0, 1, 1])), 1), (branches, (Y,), 0), (line, (X, Y), 2)],
)
def test_values_that_a_model_needs_are_found_without_asking(model, args, inputs):
    svi = started(AutoNormal(model), model)
    result = fit(svi, random.key(0), *args, tolerance=0.05, progress_bar=False)
    assert result.converged
    assert len(split(svi, args, {}).inputs) == inputs
    assert np.isfinite(verdict(svi, result, random.key(1), *args, num_draws=200, progress_bar=False).newton_decrement)


def test_refit_with_new_data_compiles_nothing():
    svi = started(AutoMultivariateNormal(line))
    fit(svi, random.key(0), X, Y, tolerance=0.05, progress_bar=False)
    key = random.key(2)
    with compilations() as count:
        again = fit(svi, key, X, 2 * Y, tolerance=0.05, progress_bar=False)
    assert count == [0]
    alone = started(svi.guide)
    expected = fit(alone, key, X, 2 * Y, tolerance=0.05, progress_bar=False)
    np.testing.assert_allclose(again.losses, expected.losses, rtol=1e-4)
    assert again.reason == expected.reason


@pytest.mark.parametrize("guide", [AutoMultivariateNormal, pytest.param(AutoNormal, marks=pytest.mark.slow)])
def test_diagnostics_of_new_data_compile_nothing(guide):
    """Another verdict, linear response and start of NUTS, of another fit; the oracle is a new ``SVI``."""
    svi = started(guide(line))

    def judged(svi, result, y):
        found = verdict(svi, result, random.key(1), X, y, num_draws=230, progress_bar=False)
        response = linear_response(svi, result, random.key(2), X, y, num_particles=32)
        start = to_nuts(svi, result, random.key(3), X, y)
        drawn = found.importance_weighted["slope"].mean, found.linear_response["shift"], found.k_hat
        return *drawn, response.covariance, start.inverse_mass_matrix

    judged(svi, fit(svi, random.key(0), X, Y, tolerance=0.05, progress_bar=False), Y)
    again = fit(svi, random.key(0), X, 2 * Y, tolerance=0.05, progress_bar=False)
    with compilations() as count:
        found = judged(svi, again, 2 * Y)
    assert count == [0]
    alone = started(svi.guide)
    alone.init(random.key(0), X, Y)
    expected = judged(alone, again, 2 * Y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)


def test_programs_of_diagnostics_do_not_keep_their_svi():
    svi = started(AutoNormal(branches), branches)
    svi.init(random.key(0), Y)
    params = {"z_auto_loc": jnp.array(1.0), "z_auto_scale": jnp.array(0.5)}
    linear_response(svi, params, random.key(1), Y, num_particles=8)
    known = weakref.ref(svi)
    del svi
    gc.collect()
    assert known() is None


@pytest.mark.slow
@pytest.mark.parametrize("together", ["several starts", "many data sets"])
def test_fits_together_compile_nothing_the_second_time(together):
    svi = started(AutoMultivariateNormal(line))

    def run(seed, factor):
        key, limits = random.key(seed), {"tolerance": 0.05, "max_steps": 60, "progress_bar": False}
        if together == "several starts":
            return fit(svi, key, X, factor * Y, num_starts=4, **limits).losses
        return fit_many(svi, random.split(key, 3), X, factor * jnp.stack([Y] * 3), in_axes=(None, 0), **limits).elbo

    run(0, 1)
    with compilations() as count:
        found = run(1, 2)
    assert count == [0]
    assert np.isfinite(found).all()


def test_many_data_sets_are_fitted_at_once():
    """Steps of all of them in one ``vmap`` are those of each alone."""
    sets = jnp.array([Y, 2 * Y, Y[::-1]], float)
    svi = started(AutoNormal(line))
    start = svi.init(random.key(0), X, sets[0])

    def run(y):
        step = lambda state, _: svi.update(state, jnp.array(X, float), y)
        return svi.get_params(jax.lax.scan(step, start, length=30)[0])["slope_auto_loc"]

    together = jax.jit(jax.vmap(run))(sets)
    np.testing.assert_allclose(together, [jax.jit(run)(y) for y in sets], rtol=2e-2)
    assert together[0] > 0 > together[2]


# ---- programs on disk ------------------------------------------------------------------------------------------------


def key_of(function, *args):
    return program_key(jax.jit(function).trace(*args), None)


def test_key_does_not_depend_on_the_order_of_sums():
    a, b, c = (jnp.full(3, x) for x in (1.0, 2.0, 3.0))
    one = key_of(lambda a, b, c: (jnp.sin(a) + jnp.cos(b)) + jnp.exp(c), a, b, c)
    assert one == key_of(lambda a, b, c: jnp.exp(c) + (jnp.cos(b) + jnp.sin(a)), a, b, c)
    loop = lambda f: lambda a, b, c: jax.lax.while_loop(lambda x: x[0] < 9, f(a, b), c)
    forth, back = (lambda a, b: lambda x: x + (a + b)), (lambda a, b: lambda x: (b + a) + x)
    assert key_of(loop(forth), a, b, c) == key_of(loop(back), a, b, c)


OTHERS = {
    "another operand": lambda a, b: jnp.sin(b) - b,
    "another order of a difference": lambda a, b: b - jnp.sin(a),
    "another operation": lambda a, b: jnp.cos(a) - b,
    "another constant": lambda a, b: jnp.sin(a) - b * 2.0,
    "another array": lambda a, b: jnp.sin(a) - b * jnp.array([1.0, 2.0, 3.0]),
    "a term twice": lambda a, b: jnp.sin(a) - b + a + a,
    "a term once": lambda a, b: jnp.sin(a) - b + a,
    "another type": lambda a, b: (jnp.sin(a) - b).astype(jnp.float16),
    "two results": lambda a, b: (jnp.sin(a) - b, a),
    "a reduction": lambda a, b: jnp.sum(jnp.sin(a) - b),
    "a product": lambda a, b: jnp.prod(jnp.sin(a) - b),
    "a branch": lambda a, b: jax.lax.cond(a[0] > 0, lambda: jnp.sin(a) - b, lambda: a),
    "the other branch": lambda a, b: jax.lax.cond(a[0] > 0, lambda: a, lambda: jnp.sin(a) - b),
    "a loop": lambda a, b: jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x) - b, a),
    "a longer loop": lambda a, b: jax.lax.fori_loop(0, 4, lambda _, x: jnp.sin(x) - b, a),
    "a scan": lambda a, b: jax.lax.scan(lambda x, y: (jnp.sin(x) - y, None), a[0], b)[0],
    "a reversed scan": lambda a, b: jax.lax.scan(lambda x, y: (jnp.sin(x) - y, None), a[0], b, reverse=True)[0],
}


def test_keys_of_different_functions_differ():
    a, b = jnp.ones(3), jnp.zeros(3)
    keys = {name: key_of(f, a, b) for name, f in {"this": lambda a, b: jnp.sin(a) - b, **OTHERS}.items()}
    assert len(set(keys.values())) == len(keys)
    assert key_of(OTHERS["a loop"], a, b) != key_of(OTHERS["a loop"], jnp.ones(4), jnp.zeros(4))


def test_keys_tell_programs_apart_that_do_not_use_all_of_their_inputs():
    """An input without effect is an argument of the compiled program all the same."""
    x = jnp.ones(3)
    assert len({key_of(lambda x: 2 * x, x), key_of(lambda x, y: 2 * x, x, x), key_of(lambda x, y: 2 * x, x, 1.0)}) == 3


def test_program_that_calls_python_has_no_key():
    with pytest.raises(UnkeyedError, match="callback"):
        key_of(lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), x.dtype), x), jnp.zeros(()))


SCRIPT = """
    import sys, warnings
    import jax, jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoMultivariateNormal
    from numpyro_natgrad import NaturalGradient, fit, verdict

    def model(x, y):
        slope = numpyro.sample("slope", dist.Normal(0.0, 5.0))
        level = numpyro.sample("level", dist.Normal(0.0, 5.0))
        noise = numpyro.sample("noise", dist.HalfNormal(2.0))
        numpyro.sample("y", dist.Normal(level + slope * x, noise), obs=y)

    compiled, compile = [], jax.stages.Lowered.compile  # single operations of JAX are compiled by other means
    jax.stages.Lowered.compile = lambda self, *args, **kwargs: compiled.append(self) or compile(self, *args, **kwargs)
    x = jnp.linspace(-1.0, 1.0, 12)
    svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(num_particles=8))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        y = float(sys.argv[1]) * x + jnp.sin(9 * x)
        result = fit(svi, jax.random.key(0), x, y, progress_bar=False)
        verdict(svi, result, jax.random.key(1), x, y, progress_bar=False)
    print(len(compiled), *(repr(float(v)) for v in result.params["auto_loc"]), sep=",")
    print(*(str(w.message) for w in said if issubclass(w.category, UserWarning)), sep=";")
"""


def in_a_new_process(folder, slope=1.0, seed=1):
    """How many programs of a fit and its verdict were compiled, the means, and the warnings."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {VARIABLE: str(folder), "PYTHONHASHSEED": str(seed), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(slope)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, said = done.stdout.split("\n")[:2]
    count, *means = first.split(",")
    return int(count), np.array(means, float), said


@pytest.mark.slow
def test_next_process_compiles_nothing_for_the_same_shapes(tmp_path):
    """The order of NumPyro's sums depends on the seed of Python's hashes. Damaged files cost a compilation and a line."""
    folder = tmp_path / "programs"
    with ThreadPoolExecutor() as pool:  # two processes at once
        (first, means, said), _ = pool.map(in_a_new_process, [folder, folder])
    assert first >= 5
    assert not said
    again, same, said = in_a_new_process(folder, seed=2)
    assert again == 0
    assert not said
    np.testing.assert_allclose(means, same, rtol=1e-3, atol=1e-3)
    other, moved, _ = in_a_new_process(folder, slope=3.0, seed=3)
    assert other == 0
    assert np.abs(moved - means).max() > 1
    for file in folder.iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
    damaged, same, said = in_a_new_process(folder, seed=4)
    assert damaged >= 5
    assert said.count("cannot be used") == 1
    np.testing.assert_allclose(means, same, rtol=1e-3, atol=1e-3)
    assert in_a_new_process(folder, seed=5)[0] == 0


@pytest.fixture
def without_jaxs_cache():
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def test_where_programs_are_kept(tmp_path, monkeypatch, without_jaxs_cache):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert cache_path(None).parts[-2:] == ("numpyro_natgrad", "programs")
    assert cache_path(False) is None
    assert cache_path(tmp_path) == tmp_path
    for off in ("off", "OFF", "0", "false"):
        monkeypatch.setenv(VARIABLE, off)
        assert cache_path(None) is None
        assert cache_path(str(tmp_path)) == tmp_path
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    assert cache_path(None) == tmp_path / "elsewhere"
    with disk_cache(None):
        assert program_folder().path == tmp_path / "elsewhere"
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o700
    assert program_folder() is None
    with pytest.raises(TypeError, match="cache=3"):
        cache_path(3)


def test_folder_that_cannot_be_trusted_is_not_used(tmp_path, without_jaxs_cache):
    tmp_path.chmod(0o777)
    with pytest.warns(UserWarning, match="other users can write"), disk_cache(tmp_path):
        assert program_folder() is None
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot keep compiled programs"), disk_cache(tmp_path / "file"):
        assert program_folder() is None


def test_jaxs_own_cache_is_used_instead(tmp_path, without_jaxs_cache):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    with disk_cache(tmp_path / "ours"):
        assert program_folder() is None
    assert not (tmp_path / "ours").exists()


def test_folder_is_bounded_and_the_oldest_programs_go(tmp_path, monkeypatch, without_jaxs_cache):
    jax.clear_caches()
    compiled = jax.jit(lambda x: jnp.sin(x) + 1).lower(1.0).compile()
    folder = ProgramFolder(tmp_path)
    folder.keep("a", compiled)
    size = next(tmp_path.iterdir()).stat().st_size
    monkeypatch.setattr("numpyro_natgrad.compilation.disk_cache.MAX_BYTES", 2.5 * size)
    for k, name in enumerate("abc"):
        folder.keep(name, compiled)
        os.utime(tmp_path / f"{name}.program", (k, k))
    folder.keep("d", compiled)
    assert sorted(f.stem for f in tmp_path.iterdir()) == ["c", "d"]
    loaded = folder.load("d", *(jax.tree.structure(x) for x in (((1.0,), {}), 1.0)))
    assert loaded(0.0) == 1.0


def test_foreign_file_is_removed_with_a_warning(tmp_path):
    """One line for each folder: a fit and its verdict, which read the same one, do not repeat each other."""
    for number, content in enumerate((b"", b"short", os.urandom(1000))):
        path = tmp_path / str(number)
        path.mkdir()
        (path / "a.program").write_bytes(content)
        with pytest.warns(UserWarning, match="compiled anew"):
            assert ProgramFolder(path).load("a", None, None) is None
        assert not (path / "a.program").exists()
        (path / "b.program").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ProgramFolder(path).load("a", None, None) is None
            assert ProgramFolder(path).load("b", None, None) is None
        assert not (path / "b.program").exists()


def test_data_is_one_argument_of_a_program():
    data = Data.split((X, "name"), {"n": 3}, lambda x: isinstance(x, np.ndarray))
    doubled = jax.jit(lambda data: data.arguments()[0][0] * data.arguments()[1]["n"])(data)
    np.testing.assert_allclose(doubled, 3 * X, rtol=1e-6)
    assert pickle.loads(pickle.dumps(data)).arguments()[1]["n"] == 3
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(data)).arguments()[0][0], X)
