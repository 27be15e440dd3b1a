# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Precision as a fixture, and what keeps the suite short.

Nearly all of the time goes into compiling, and what is compiled runs for milliseconds: LLVM is told not to optimise.
The flag stands down for whoever sets ``XLA_FLAGS``.
"""

import os
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest
from hypothesis import settings

settings.register_profile("laws", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("laws")


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Every law holds in both precisions."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def x64():
    """For laws whose oracle needs the digits."""
    with jax.enable_x64(True):
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """With several workers, a file stays on one: its fits are shared between its tests."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)
