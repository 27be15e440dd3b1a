# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Compile a fit on a CPU with fewer optimizations.

A fit of a hundred small steps takes a tenth of a second, after ten seconds of compilation. With kernels that are
emitted directly instead of through MLIR, and optimized at LLVM's first level, small steps are as fast and compile in
half the time. (Without any optimization compilation takes a quarter, but Hessian-vector products take thirteen times as
long.) Matrix products and factorizations are library calls in any case.

jaxlib 0.10 has these options. 0.12 emits kernels through MLIR only, and the level of LLVM alone saves a few per cent:
there a fit is compiled with the default options.
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
