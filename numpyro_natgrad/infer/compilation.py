# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""How XLA compiles a fit on a CPU: less thoroughly.

A fit of a hundred small steps is over in a tenth of a second, after XLA has spent ten on making them fast. The kernels
of steps this small gain nothing by that: emitted directly instead of through MLIR and optimised at LLVM's first level,
they run as fast and are compiled in half the time. (Without any optimisation it would be a quarter, and Hessian
products take thirteen times as long.) Matrix products and factorisations are library calls either way.

JAXlib 0.10 has the choice. 0.12 has emitters through MLIR only, where LLVM's level alone saves a few per cent: there a
fit compiles as everything else does.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax

#: By ``python -m benchmarks.posteriordb compiling``, jaxlib 0.10.
QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}


def quickly(function: Callable) -> Any:
    """``jax.jit``, compiling quickly on a CPU, and as ever elsewhere or where XLA does not know how."""
    return jax.jit(function, compiler_options=QUICK if jax.default_backend() == "cpu" and is_known() else None)


@cache
def is_known() -> bool:
    """Whether this XLA takes the options: they are no part of JAX's interface."""
    try:
        jax.jit(lambda: 0, compiler_options=QUICK)()
    except jax.errors.JaxRuntimeError:
        return False
    return True
