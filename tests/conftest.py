# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Precision as a fixture, and the settings that keep the suite short.

Nearly all of the time goes into compiling programs that run for milliseconds. So XLA does not optimise them, unless
``XLA_FLAGS`` is set, and each worker keeps a compilation cache, unless ``JAX_COMPILATION_CACHE_DIR`` is set.
"""

import gc
import os
import pathlib
from importlib.metadata import version

# The second flag makes compilation three times as fast. Only this release has it, and an unknown flag ends the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)
os.environ.setdefault("MPLBACKEND", "Agg")
# Two workers on two cores: threads of LAPACK that wait for each other make a factorization a hundred times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest
from hypothesis import settings

import numpyro_natgrad  # noqa: F401  (decides how many threads XLA takes, before a test module uses a device)

settings.register_profile("laws", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("laws")


def pytest_configure(config: pytest.Config) -> None:
    """Every program is cached, however short its compilation: a test compiles what its neighbours compile.

    A folder serves one worker. JAX writes a program in place, so a worker that shared the folder could read a half of it.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and hasattr(config, "cache"):
        folder = config.cache.mkdir(f"jax-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}")
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that takes long belongs to a later tier: ``tiers.txt`` names it under the marker of that tier."""
    marks = tiers((pathlib.Path(__file__).parent / "tiers.txt").read_text())
    for item in items:
        if item.nodeid in marks:
            item.add_marker(marks[item.nodeid])
    # The one test that takes as long as fifty others comes first: at the end the other worker would wait for it.
    items.sort(key=lambda item: not item.name.startswith("test_a_tenth_of_the_starts"))


def tiers(text: str) -> dict[str, str]:
    """The marker of each test that a file like ``tiers.txt`` names: lines of names below a line ``[marker]``."""
    marks, marker = {}, ""
    for line in text.splitlines():
        if line.startswith("["):
            marker = line.strip("[]")
        elif line and not line.startswith("#"):
            marks[line] = marker
    return marks


@pytest.fixture(autouse=True, scope="module")
def release_programs():
    """The programs of a file are released at its end: all together would take several gigabytes a worker."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(params=["float32", pytest.param("float64", marks=pytest.mark.release)])
def dtype(request):
    """Both precisions, for tests about precision or dtypes; the one that is not the default before a release."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def x64():
    """Double precision, for tests whose oracle needs the digits."""
    with jax.enable_x64(True):
        yield
