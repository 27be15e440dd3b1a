# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""A fit that is saved, loaded and resumed takes the steps of one that was not interrupted, bit for bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from numpyro_natgrad import NaturalGradient, fit, load, save
from numpyro_natgrad.infer.convergence import Judgement

X = jnp.linspace(-2.0, 2.0, 12)
Y = jnp.array([0.0, 1, 0, 2, 1, 1, 3, 2, 6, 5, 9, 13])
ROOT = pathlib.Path(__file__).parent.parent


def model(x, y, width=5.0):
    level = numpyro.sample("level", dist.Normal(0.0, width))
    slope = numpyro.sample("slope", dist.Normal(0.0, width))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Poisson(jnp.exp(level + slope * x)), obs=y)


def make(guide=AutoMultivariateNormal, particles=1):
    return SVI(model, guide(model), NaturalGradient(), Trace_ELBO(num_particles=particles))


KEY = random.key(0)
STEPS = 40
OPTIONS = {"tolerance": 0, "progress_bar": False}


def finished(svi, past, key=KEY, **options):
    """The fit of ``STEPS`` steps, gone on with from a part of it."""
    left = STEPS - (past.history.steps if past else 0)
    return fit(svi, key, X, Y, resume=past, max_steps=left, **OPTIONS, **options)


@pytest.fixture(scope="module")
def svi():
    return make()


@pytest.fixture(scope="module")
def parts(svi):
    """A fit without interruption, and its results after each chunk."""
    parts = []
    return finished(svi, None, callback=lambda progress: parts.append(progress.result())), parts


def raw(x):
    return random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def assert_equal(a, b):
    """Bit for bit, but for seconds."""
    for one, two in zip(jax.tree.leaves(tuple(a[:2])), jax.tree.leaves(tuple(b[:2])), strict=True):
        np.testing.assert_array_equal(raw(one), raw(two), strict=True)
    for name, one, two in zip(a.history._fields, a.history, b.history, strict=True):
        if name != "seconds":
            np.testing.assert_array_equal(one, two)
    assert a.converged == b.converged


@pytest.mark.slow
def test_resumed_fits_are_judged_when_the_whole_fit_is(svi, monkeypatch):
    """The judge refuses every stop here, and waits longer after each refusal; a part that is resumed waits as long."""
    monkeypatch.setattr(Judgement, "grants", lambda self, tolerance: False)
    options = {"tolerance": 0.2, "progress_bar": False}
    whole, part = [], []
    last = fit(svi, KEY, X, Y, max_steps=60, callback=lambda progress: whole.append(progress.result()), **options)
    assert len({one.next_check for one in whole}) > 2, "fewer than two refusals, so that this test shows nothing"
    for begin in (2, 7):
        part.clear()
        past, left = whole[begin], 60 - whole[begin].history.steps
        told = lambda progress: part.append(progress.result())
        assert_equal(fit(svi, random.key(7), X, Y, resume=past, max_steps=left, callback=told, **options), last)
        assert [one.next_check for one in part] == [one.next_check for one in whole[begin + 1 :]]


def test_a_resumed_fit_that_had_converged_is_judged_at_once(svi):
    result = fit(svi, KEY, X, Y, tolerance=0.5, progress_bar=False)
    assert result.converged
    assert result.next_check == result.history.steps


def test_a_file_has_the_result_bit_for_bit(svi, parts, tmp_path):
    _, each = parts
    save(tmp_path / "fit.npz", each[2])
    again = load(tmp_path / "fit.npz", make(), KEY, X, Y)
    assert_equal(again, each[2])
    np.testing.assert_array_equal(again.history.seconds, each[2].history.seconds)
    for name in ("reason", "report", "judgement", "next_check", "starts", "judge_seconds", "batch_seconds"):
        assert getattr(again, name) == getattr(each[2], name), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.npz"], "nothing is left beside the file"


@pytest.mark.slow
def test_a_loaded_fit_goes_on_in_another_svi(svi, parts, tmp_path):
    whole, each = parts
    save(tmp_path / "fit.npz", each[3])
    new = make()
    again = load(tmp_path / "fit.npz", new, KEY, X, Y)
    assert_equal(finished(new, again, random.key(7)), whole)


@pytest.mark.slow
def test_several_starts_and_raw_keys_are_saved(tmp_path):
    svi = make(AutoNormal, 4)
    result = fit(svi, random.PRNGKey(0), X, Y, num_starts=3, max_steps=30, progress_bar=False)
    save(tmp_path / "fit.npz", result)
    again = load(tmp_path / "fit.npz", make(AutoNormal, 4), random.PRNGKey(1), X, Y)
    assert_equal(again, result)
    assert str(again.starts) == str(result.starts)


def test_another_guide_is_refused_by_the_names_that_differ(parts, tmp_path):
    save(tmp_path / "fit.npz", parts[1][0])
    with pytest.raises(
        ValueError, match=r"does not fit this `svi`: .*auto_loc.* and \d+ more\. Use the model"
    ) as raised:
        load(tmp_path / "fit.npz", make(AutoNormal), KEY, X, Y)
    assert "`state.optim_state[1].params['level_auto_loc']` is absent, expected float32()" in str(raised.value)


@pytest.mark.slow
def test_another_shape_and_another_precision_are_quoted(tmp_path):
    def wide(x, count):
        numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0, 1).expand([count])), 1), obs=x)

    make = lambda: SVI(wide, AutoNormal(wide), NaturalGradient(), Trace_ELBO())
    result = fit(make(), KEY, jnp.ones(3), 3, max_steps=1, progress_bar=False)
    save(tmp_path / "fit.npz", result)
    with pytest.raises(ValueError, match=r"`state.*\['z_auto_loc'\]` is float32\(3,\), expected float32\(4,\)"):
        load(tmp_path / "fit.npz", make(), KEY, jnp.ones(4), 4)
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"is float32\(3,\), expected float64\(3,\)"):
        load(tmp_path / "fit.npz", make(), KEY, jnp.ones(3), 3)


def test_another_version_is_warned_of_and_named(parts, tmp_path):
    file = tmp_path / "fit.npz"
    save(file, parts[1][0])
    with np.load(file) as old:
        arrays = dict(old)
    header = json.loads(str(arrays["header"]))
    header["versions"]["jax"] = "0.1.2"
    np.savez(file, **arrays | {"header": np.array(json.dumps(header))})
    with pytest.warns(UserWarning, match=rf"jax 0\.1\.2, here {jax.__version__}.*up to rounding"):
        again = load(file, make(), KEY, X, Y)
    assert_equal(again, parts[1][0])
    np.savez(file, **arrays | {"header": np.array(json.dumps(header | {"format": 99}))})
    with pytest.raises(ValueError, match="has the format 99: expected 1"):
        load(file, make(), KEY, X, Y)


@pytest.mark.parametrize("content", ["nothing", "half", "pickle", "other"])
def test_what_save_has_not_written_is_refused(parts, tmp_path, content):
    """A pickle is not read: it could run any code."""
    file = tmp_path / "fit.npz"
    save(file, parts[1][0])
    if content == "pickle":
        np.savez(file, header=np.array({"code": print}, object))
    elif content == "other":
        np.savez(file, x=np.ones(3))
    else:
        file.write_bytes(file.read_bytes()[: {"nothing": 0, "half": 2000}[content]])
    with pytest.raises(ValueError, match="is not a complete file of `save`"):
        load(file, make(), KEY, X, Y)


def test_only_results_of_fit_are_saved(tmp_path):
    with pytest.raises(TypeError, match=r"`save\(path, <dict>\)`: expected a `FitResult`"):
        save(tmp_path / "fit.npz", {})


@pytest.mark.slow
def test_a_state_survives_orbax_bit_for_bit(svi, parts, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    whole, each = parts
    part = each[2]
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", part.state)
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "state", part.state)
    assert_equal(finished(svi, part._replace(state=state)), whole)


#: Fits, saves after each chunk, and prints the step; with a file as its argument it goes on from that.
PROGRAM = """
    import sys, time
    from numpyro_natgrad import load, save
    from test_saved import KEY, X, Y, finished, make

    file, pause, going_on = sys.argv[1], float(sys.argv[2]), sys.argv[3] == "on"
    svi = make()
    past = load(file, svi, KEY, X, Y) if going_on else None


    def callback(progress):
        save(file, progress.result())
        print(progress.step, flush=True)
        time.sleep(pause)


    finished(svi, past, callback=callback)
    print("end", flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_is_resumed_to_the_same_bits(tmp_path):
    """``SIGKILL`` after some chunks; another process goes on from the file, and equals one that was not killed."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    # NumPyro sums over sets of names, whose order is that of hashes.
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": "0", "NUMPYRO_NATGRAD_CACHE": "off"}

    def start(file, pause, mode):
        command = [sys.executable, str(program), str(file), str(pause), mode]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    with start(tmp_path / "killed.npz", 0.2, "new") as process:
        for line in process.stdout:
            if int(line) >= 10:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    for file, mode in ((tmp_path / "whole.npz", "new"), (tmp_path / "killed.npz", "on")):
        with start(file, 0, mode) as process:
            said = process.stdout.read().split("\n")
        assert process.returncode == 0
        assert said[-2] == "end"
    assert int(said[0]) > 10, "the second process began where the first one was killed"
    svi = make()
    killed, whole = (load(tmp_path / name, svi, KEY, X, Y) for name in ("killed.npz", "whole.npz"))
    assert whole.history.steps == STEPS
    assert_equal(killed, whole)
