# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Figures that anyone can rerun: ``python -m benchmarks`` measures all, ``python -m benchmarks race eight`` one."""

import os

# LAPACK reads it when NumPy is loaded. With more threads a factorization of some hundred rows takes up to a hundred
# times as long as soon as another process runs (`benchmarks.threads`).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
