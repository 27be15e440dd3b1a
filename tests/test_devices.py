# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Law: several devices, and several processes, find the numbers of one, and no array that is in parts is gathered."""

import os
import pathlib
import pickle
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
DEVICES = 8
#: Relative, of float32.
EQUAL = 1e-5
#: Collectives of one step: inside of the loop over radii, and outside.
FEW = 10


def begin(program: str, file: pathlib.Path, devices: int, processes: int = 1, hash_seeds: str = "00") -> list[Any]:
    """Start a program of ``device_programs.py`` on virtual devices, in one process or more."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices // processes}"
    common = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "device_programs.py"), program, str(file), str(processes)]
    return [
        subprocess.Popen(
            [*command, str(number), str(port)],
            env={**common, "PYTHONHASHSEED": hash_seeds[number]},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(processes)
    ]


def ended(running: list[Any], seconds: float) -> list[tuple[int, str]]:
    """Return code and output of each process; all are killed after so many seconds."""
    end, found = time.monotonic() + seconds, []
    try:
        for process in running:
            output, _ = process.communicate(timeout=max(end - time.monotonic(), 0.1))
            found.append((process.returncode, output))
    finally:
        for process in running:
            process.kill()
    return found


def found_by(program: str, folder: pathlib.Path, devices: int = DEVICES, processes: int = 1) -> tuple[Any, list[str]]:
    """What a program finds, and what each process prints."""
    file = folder / f"{program}-{devices}-{processes}.pickle"
    outcomes = ended(begin(program, file, devices, processes), 540)
    assert [code for code, _ in outcomes] == [0] * processes, "\n".join(output[-3000:] for _, output in outcomes)
    return pickle.loads(file.read_bytes()), [output for _, output in outcomes]


def assert_equal(found: Any, expected: Any, tolerance: float = EQUAL) -> None:
    """Every number agrees, relative to the largest of its array."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, x in jax.tree_util.tree_leaves_with_path(expected):
        y = dict(jax.tree_util.tree_leaves_with_path(found))[path]
        np.testing.assert_allclose(y, x, rtol=0, atol=tolerance * np.abs(x).max(), err_msg=jax.tree_util.keystr(path))


def assert_steps_agree(found: dict[str, Any], largest: int, most: int = FEW) -> None:
    """The same numbers, and in the program few collectives, all of them sums, of at most so many numbers."""
    one, many = found["one"], found["many"]
    for name in ("loss", "params"):
        assert_equal(many[name], one[name])
    assert not one["collectives"]
    assert {kind for kind, _ in many["collectives"]} == {"all-reduce"}
    assert len(many["collectives"]) <= most
    assert max(size for _, size in many["collectives"]) <= largest


def test_parameters_in_parts(tmp_path):
    """2048 latents whose features are in parts: only sums over them, of 64 rows and few products, are exchanged."""
    found, _ = found_by("features", tmp_path)
    draws, rows, probes = 4, 64, 2  # two particles of a wide guide on full data stand for two pairs of draws
    # Those of two directions of conjugate gradients are in a loop of one trip, or none where latents are not coupled;
    # the product with the first of them is summed together with those with the probes.
    assert_steps_agree(found, largest=draws * rows * (probes + 1) + 8, most=FEW + 6)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    return found_by("steps", tmp_path_factory.mktemp("steps"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["full", "diagonal"])
def test_rows_in_parts(steps, guide):
    """Two sums: of losses, and of losses with gradients and products at eight draws of six latents."""
    found, draws, latents = steps[guide], 8, 6
    assert_steps_agree(found, largest=draws * (1 + latents + latents**2))
    assert len(found["many"]["collectives"]) == 2


@pytest.mark.slow
def test_particles_in_parts(steps):
    found, particles, latents = steps["particles"], 16, 6
    assert_steps_agree(found, largest=4 * particles * latents)
    assert len(found["many"]["collectives"]) == 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """``fit`` and ``verdict`` on one device, on eight, and on eight of two processes; what the latter print."""
    folder = tmp_path_factory.mktemp("whole")
    (one, _), (many, _) = (found_by("whole", folder, devices) for devices in (1, DEVICES))
    two, printed = found_by("whole", folder, processes=2)
    return {"one": one, "many": many, "two processes": two, "printed": printed}


@pytest.mark.release
@pytest.mark.parametrize("where", ["many", "two processes"])
@pytest.mark.parametrize("name", ["rows", "parameters"])
def test_fit_and_verdict(whole, where, name):
    """Draws and losses agree; the judge differences gradients, so that its gain has fewer digits."""
    found, expected = whole[where][name], whole["one"][name]
    assert all(x == (name == "parameters") for x in found["in parts"].values())
    assert found["reason"] == expected["reason"]
    assert {kind for kind, _ in found["collectives"]} == {"all-reduce"}
    for field in ("loss", "log weights", "moments", "linear response"):
        assert_equal(found[field], expected[field])
    assert found["decrement"] == pytest.approx(expected["decrement"], rel=1e-3)


@pytest.mark.release
def test_only_the_first_process_shows_progress(whole):
    first, second = whole["printed"]
    assert "nats to gain" in first
    assert "nats to gain" not in second


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_and_the_saved_state_goes_on(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "unbroken").mkdir()
    outcomes = ended(begin("checkpointed", tmp_path / "broken" / "found", DEVICES, 2), 240)
    (first, printed), (second, _) = outcomes
    assert second == -9
    assert first not in (0, -9)
    assert "start all of them again, from the last state that was saved" in printed
    again, _ = found_by("checkpointed", tmp_path / "broken")
    expected, _ = found_by("checkpointed", tmp_path / "unbroken")
    assert_equal(again, expected)


@pytest.mark.slow
def test_processes_that_order_sets_differently_are_refused(tmp_path):
    for code, printed in ended(begin("whole", tmp_path / "found", DEVICES, 2, hash_seeds="01"), 240):
        assert code not in (0, -9)
        assert "PYTHONHASHSEED=0" in printed
