# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""How many threads XLA and LAPACK take on a CPU.

Threads of OpenBLAS, whose LAPACK comes with SciPy and serves JAX, wait for each other in a busy loop. If another
process takes one of their cores, a factorization of 100 to 500 rows takes up to a hundred times as long as by one
thread. If none does, several threads gain little at these sizes (``docs/benchmarks/threads.md``).

jaxlib 0.10.0 to 0.11.1 spread a batch of factorizations or triangular solves over the threads of a program, from one of
these threads, which waits for the others. As many such batches at once as there are threads wait for ever: a log
density with two multivariate normal sites, vectorized over particles, does so on two cores. One thread is safe, because
it does not share its work.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from threadpoolctl import threadpool_limits

#: Releases of jaxlib from the first one on, and before the second one.
AFFECTED = (0, 10, 0), (0, 11, 2)
#: Cores. So many batches are rarely ready at once, and one thread would cost a large machine more of its speed.
FEW_CORES = 8
#: JAX reads it when it first uses the CPU.
THREADS = "PJRT_NPROC"
#: By these a user says how many threads a BLAS library takes.
BLAS_THREADS = {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"}


def avoid_waiting_threads() -> None:
    """Let XLA use one thread on few cores with an affected jaxlib, unless the environment says how many."""
    release = tuple(int(part) for part in version("jaxlib").split(".")[:3] if part.isdigit())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if AFFECTED[0] <= release < AFFECTED[1] and cores <= FEW_CORES and not {THREADS, "NPROC"} & {*os.environ}:
        os.environ[THREADS] = "1"


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let BLAS and LAPACK on the CPU take one thread meanwhile, unless the environment says how many."""
    if BLAS_THREADS & {*os.environ}:
        yield
        return
    with threadpool_limits(limits=1, user_api="blas"):
        yield
