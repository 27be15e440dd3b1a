# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Laws: independent batches of triangular solves end, whatever the release of jaxlib and the number of cores; a fit does
its linear algebra by one thread.
"""

import os
import subprocess
import sys

import numpyro
import pytest
import threadpoolctl
from jax import random
from numpyro import distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_natgrad import NaturalGradient, fit
from numpyro_natgrad.compilation import threads

#: Forty independent batches of solves and factorizations. jaxlib 0.10 with two threads waits for ever within 10 runs.
PROGRAM = """
import os
if hasattr(os, "sched_setaffinity"):  # as on a machine of two cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import numpyro_natgrad
import jax, jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

def run(factor, sides):
    solved = [solve_triangular(factor + i * jnp.eye(8), x, lower=True) for i, x in enumerate(sides)]
    return sum(jnp.sum(jnp.linalg.cholesky(x @ x.mT + jnp.eye(8))) for x in solved)

factor = jnp.tril(jax.random.normal(jax.random.key(0), (2048, 8, 8))) + 5 * jnp.eye(8)
sides = [jax.random.normal(key, (2048, 8, 8)) for key in jax.random.split(jax.random.key(1), 40)]
for _ in range(30):
    found = jax.jit(run)(factor, sides).block_until_ready()
assert jnp.isfinite(found)
"""


@pytest.mark.slow
def test_independent_batches_of_solves_end():
    environment = {name: x for name, x in os.environ.items() if name != threads.THREADS}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True, timeout=240)


@pytest.mark.parametrize(
    ("release", "cores", "given", "expected"),
    [
        ("0.9.2", 2, {}, None),
        ("0.10.0", 2, {}, "1"),
        ("0.10.2", 8, {}, "1"),
        ("0.11.1", 4, {}, "1"),
        ("0.10.2", 9, {}, None),
        ("0.11.2", 2, {}, None),
        ("0.12.0.1", 2, {}, None),
        ("0.12.0.dev20261001", 2, {}, None),
        ("0.10.2", 2, {"PJRT_NPROC": "4"}, "4"),
        ("0.10.2", 2, {"NPROC": "4"}, None),
    ],
)
def test_one_thread_on_few_cores_with_an_affected_release(monkeypatch, release, cores, given, expected):
    monkeypatch.setattr(threads, "version", lambda name: {"jaxlib": release}[name])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    for name in ("PJRT_NPROC", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    threads.avoid_waiting_threads()
    assert os.environ.get(threads.THREADS) == expected


def normal():
    numpyro.sample("z", dist.Normal(0.0, 1.0))


def blas_threads():
    return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.parametrize("given", [None, "3"])
def test_a_fit_takes_one_thread_of_blas_and_returns_the_others(monkeypatch, given):
    """Unless the environment says how many, also after an error."""
    for name in threads.BLAS_THREADS:
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", given)
    svi = SVI(normal, AutoNormal(normal), NaturalGradient(), Trace_ELBO(num_particles=2))
    seen = []
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        look = lambda *_: seen.append(blas_threads())
        fit(svi, random.key(0), max_steps=20, callback=look, progress_bar=False)
        with pytest.raises(TypeError, match="max_steps"):
            fit(svi, random.key(0), max_steps="many", progress_bar=False)
        assert blas_threads() == {3}
    assert {*map(tuple, seen)} == {(3 if given else 1,)}
