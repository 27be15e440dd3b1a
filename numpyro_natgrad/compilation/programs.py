# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""How programs are compiled: with how much optimization, and where several can be compiled at once.

A fit of a hundred small steps runs for a tenth of a second, after seconds of compilation.

* jaxlib 0.10 compiles in half the time if kernels are emitted directly instead of through MLIR, and optimized at LLVM's
  first level. Steps are as fast. Without any optimization Hessian-vector products take thirteen times as long.
* jaxlib 0.12 emits kernels through MLIR only. Without LLVM's optimization it compiles in 0.6 of the time and steps take
  1.5 to 2.5 times as long, which pays in a fit of a few hundred steps unless a step does much work.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp

from numpyro_natgrad.compilation.disk_cache import ProgramFolder, program_folder
from numpyro_natgrad.compilation.program_key import program_key

Function = TypeVar("Function", bound=Callable[..., Any])

#: Measured with jaxlib 0.10 by ``python -m benchmarks.posteriordb compiling``.
QUICK_OPTIONS = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}
#: For jaxlib without the first of these options.
UNOPTIMIZED = {"xla_backend_optimization_level": 0}
#: Floating-point operations of a step (XLA counts the body of a loop once) up to which it is not optimized. Compilation
#: is then 2.2 to 3.6 seconds shorter and a step at most 1.3 milliseconds longer, on twelve posteriors: the same after
#: some 2000 steps. Beyond, steps of 3 milliseconds take 7.
LIGHT_WORK = 1e7


def quick_jit(function: Function) -> Function:
    """``jax.jit`` with :data:`QUICK_OPTIONS` on a CPU, if XLA knows them, and with the default options otherwise."""
    return cast(Function, jax.jit(function, compiler_options=QUICK_OPTIONS if are_known() else None))


def in_background(traced: Any) -> "Future[Any]":
    """The program of ``jax.jit(function).trace(...)``: from disk, or compiled as far as its work is worth the time.

    Tracing and lowering depend on what is global to NumPyro and local to a thread in JAX. So lowering is done here, and
    the rest in another thread.
    """
    return _workers().submit(_begin(traced))


def _begin(traced: Any) -> Callable[[], Any]:
    """The part of a compilation that any thread can do, and most of which holds no lock of Python."""
    folder = program_folder()
    try:
        key = "" if folder is None else program_key(traced, QUICK_OPTIONS if are_known() else UNOPTIMIZED)
    except Exception:  # it calls Python, or has an operation of another version of JAX; then nothing is kept
        folder = None
    if folder is not None and folder.has(key):
        _prepare(traced)
        trees = jax.tree.structure(traced.args_info), jax.tree.structure(traced.out_info)
        x64 = jnp.result_type(float) == jnp.float64
        return partial(_loaded, folder, key, trees, traced, x64)
    lowered = traced.lower()
    return partial(_finished, lowered, _options(lowered), folder, key)


def _loaded(folder: ProgramFolder, key: str, trees: tuple[Any, Any], traced: Any, x64: bool) -> Any:
    if (kept := folder.load(key, *trees)) is not None:
        return kept
    with jax.enable_x64(x64):  # which is local to a thread
        lowered = traced.lower()
        return _finished(lowered, _options(lowered), folder, key)


def _finished(lowered: Any, options: dict[str, Any] | None, folder: ProgramFolder | None, key: str) -> Any:
    program = lowered.compile(compiler_options=options)
    if folder is not None:
        folder.keep(key, program)
    return program


def _prepare(traced: Any) -> None:
    """Do what lowering does for a program besides making it: on a CPU, JAX finds LAPACK when it first lowers a call."""
    if jax.default_backend() == "cpu":
        _find_lapack()
    else:
        traced.lower()


@cache
def _find_lapack() -> None:
    jax.jit(jnp.linalg.cholesky).lower(jax.ShapeDtypeStruct((1, 1), jnp.float32))


def _options(lowered: Any) -> dict[str, Any] | None:
    if jax.default_backend() != "cpu":
        return None
    if are_known():
        return QUICK_OPTIONS
    return UNOPTIMIZED if _work(lowered) < LIGHT_WORK else None


def _work(lowered: Any) -> float:
    """Floating-point operations, as XLA counts them before compilation."""
    analysis = lowered.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return float((analysis or {}).get("flops", 0.0))


@cache
def are_known() -> bool:
    """Whether this XLA knows the options, which are not part of the interface of JAX, and compiles for a CPU."""
    if jax.default_backend() != "cpu":
        return False
    try:
        jax.jit(lambda: 0, compiler_options=QUICK_OPTIONS)()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=2, thread_name_prefix="numpyro_natgrad_compile")
