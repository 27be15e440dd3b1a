# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Factorizations and steps by one thread of LAPACK and by all, alone and beside a busy process.

    python -m benchmarks.threads [--document]

Each cell is a process of its own, as the number of threads is read when NumPy is loaded. Milliseconds, medians of 7
calls, float32. The busy process multiplies matrices by as many threads as there are cores. A step is one of
`NaturalGradient()` with a full Gaussian and 2 particles on a regression whose latents are as many as the rows of the
matrix; Adam's stands beside it.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

OUTPUT = pathlib.Path("docs/benchmarks/threads.md")
HEADING = "## The table\n"
SIZES = (50, 100, 166)
VARIABLE = "OPENBLAS_NUM_THREADS"
BUSY = "import numpy as np\nx = np.ones((1000, 1000))\nwhile True: x @ x"
CALLS = 7


def median_ms(call: Callable[[], Any]) -> float:
    """Milliseconds of a call, after one that compiles."""
    import jax
    import numpy as np

    seconds = []
    for _ in range(1 + CALLS):
        before = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - before)
    return float(1e3 * np.median(seconds[1:]))


def step(size: int, optimizer: Any) -> Callable[[], Any]:
    """A step of a regression with so many coefficients."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from jax import random
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoMultivariateNormal

    x = random.normal(random.key(0), (2 * size, size))

    def model(y: Any) -> None:
        beta = numpyro.sample("beta", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ beta, 1.0).to_event(1), obs=y)

    y = jnp.sum(x[:, :5], axis=1)
    svi = SVI(model, AutoMultivariateNormal(model), optimizer, Trace_ELBO(num_particles=2))
    state, update = svi.init(random.key(1), y), jax.jit(svi.update)
    return lambda: update(state, y)


def measure(size: int) -> str:
    """The cells of one process, milliseconds."""
    import jax
    import jax.numpy as jnp
    from numpyro.optim import Adam

    from numpyro_natgrad import NaturalGradient

    root = jax.random.normal(jax.random.key(0), (size, size))
    matrix = root @ root.T + size * jnp.eye(size)
    factorizations = (jnp.linalg.cholesky, jnp.linalg.qr, jnp.linalg.eigh)
    calls: list[Callable[[], Any]] = [partial(jax.jit(f), matrix) for f in factorizations]
    calls += [step(size, NaturalGradient()), step(size, Adam(0.01))]
    return " ".join(f"{median_ms(call):.2f}" for call in calls)


@contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """Another process works meanwhile, if wanted."""
    cores = str(os.cpu_count())
    other = subprocess.Popen([sys.executable, "-c", BUSY], env={**os.environ, VARIABLE: cores}) if wanted else None
    try:
        yield
    finally:
        if other:
            other.kill()
            other.wait()


def table() -> str:
    """All cells, one line for each size, process beside it and number of threads."""
    cores = os.cpu_count()
    heads = ("rows", "beside it", "threads", "Cholesky", "QR", "eigenvectors", "step", "step of Adam")
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for size in SIZES:
        for wanted in (False, True):
            for threads in (1, cores):
                command = [sys.executable, "-m", "benchmarks.threads", "--size", str(size)]
                with busy(wanted):
                    cells = subprocess.run(
                        command, env={**os.environ, VARIABLE: str(threads)}, check=True, text=True, capture_output=True
                    ).stdout.split()
                name = "a busy process" if wanted else "nothing"
                lines.append(f"| {size} | {name} | {threads} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure one cell, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, help="print the cells of this size in this process, and nothing else")
    parser.add_argument("--document", action="store_true", help=f"write the table to {OUTPUT}")
    options = parser.parse_args()
    if options.size:
        print(measure(options.size))
        return
    found = table()
    if options.document:
        OUTPUT.write_text(OUTPUT.read_text().partition(HEADING)[0] + HEADING + "\n" + found)


if __name__ == "__main__":
    main()
