# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Compile a fit on a CPU with fewer optimizations.

A hundred small steps run for a tenth of a second, after ten seconds of compilation. They are as fast and compile in
half the time if kernels are emitted directly instead of through MLIR, and optimized at LLVM's first level. (Without any
optimization they compile in a quarter of the time, but Hessian-vector products take thirteen times as long.) Matrix
products and factorizations are library calls, which these options do not change. jaxlib 0.10 has the options. 0.12
emits kernels through MLIR only, and LLVM's level alone saves a few per cent, so that the default options are used.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import jax

Function = TypeVar("Function", bound=Callable[..., Any])

#: Measured with jaxlib 0.10 by ``python -m benchmarks.posteriordb compiling``.
QUICK_OPTIONS = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}


def quick_jit(function: Function) -> Function:
    """``jax.jit`` with :data:`QUICK_OPTIONS` on a CPU, if XLA knows them, and with the default options otherwise."""
    quick = jax.default_backend() == "cpu" and are_known()
    return cast(Function, jax.jit(function, compiler_options=QUICK_OPTIONS if quick else None))


@cache
def are_known() -> bool:
    """Whether this XLA knows the options, which are not part of the interface of JAX."""
    try:
        jax.jit(lambda: 0, compiler_options=QUICK_OPTIONS)()
    except jax.errors.JaxRuntimeError:
        return False
    return True
