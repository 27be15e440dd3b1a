# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Cost of a step beside Adam's on the same guide: milliseconds, memory, and the time to the first step.

The two optimizers are timed alternately, so that other load on the machine affects both. Ratios compare medians.
Memory is XLA's count for the compiled step: arguments, results and temporaries.
"""

import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.optim import Adam

from numpyro_natgrad import NaturalGradient

from .cases import RACES, Case, cheap

OPTIMIZERS = {"Adam": lambda: Adam(0.01), "NaturalGradient": NaturalGradient}
FIRST_STEP = """
import sys, time, jax
from benchmarks import cases, cost
jax.config.update("jax_enable_x64", {x64})
case = cases.RACES["{case}"]()
cost.warm_up()
start = time.perf_counter()
svi = cost.svi_of(case, cost.AutoMultivariateNormal, "{name}")
state = svi.init(jax.random.key(0), *case.data)
middle = time.perf_counter()
jax.block_until_ready(jax.jit(svi.update)(state, *case.data))
print(time.perf_counter() - start, time.perf_counter() - middle)
"""


def svi_of(case: Case, guide: Any, name: str) -> SVI:
    """An SVI of the case with one of the optimizers, 8 particles."""
    return SVI(case.model, guide(case.model), OPTIMIZERS[name](), Trace_ELBO(num_particles=8))


def warm_up() -> None:
    """Start JAX before the clock runs."""
    jax.block_until_ready(jax.jit(lambda key: jax.random.normal(key, (3,)) @ jnp.ones(3))(jax.random.key(0)))


def step_cost(case: Case, guide: Any, turns: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds and megabytes of a step, per optimizer, timed alternately."""
    compiled, states = {}, {}
    times: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for name in OPTIMIZERS:
        svi = svi_of(case, guide, name)
        states[name] = svi.init(jax.random.key(0), *case.data)
        compiled[name] = jax.jit(svi.update).lower(states[name], *case.data).compile()
    for turn in range(turns + 2):
        for name, step in compiled.items():
            start = time.perf_counter()
            states[name], _ = jax.block_until_ready(step(states[name], *case.data))
            times[name] += [time.perf_counter() - start] if turn > 1 else []
    return {name: (1e3 * float(np.median(times[name])), _megabytes(compiled[name])) for name in OPTIMIZERS}


def _megabytes(compiled: Any) -> float:
    m = compiled.memory_analysis()
    return (m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes) / 1e6


def first_step(case: str, name: str) -> tuple[float, float]:
    """Seconds from ``SVI(...)`` to the end of the first update, and of that update alone, in a new process."""
    code = FIRST_STEP.format(case=case, name=name, x64=jnp.zeros(()).dtype == jnp.float64)
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    whole, step = map(float, out.split())
    return whole, step


def report(turns: int = 15) -> str:
    """The tables, in the run's dtype."""
    dtype = jnp.zeros(()).dtype
    lines = [f"## Cost of a step, {dtype}", "", "| guide | Adam, ms | NaturalGradient, ms | ratio | memory ratio |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for guide, d, n in ((AutoNormal, 1_000_000, turns // 2), (AutoMultivariateNormal, 500, 2 * turns)):
        cost = step_cost(cheap(d), guide, n)
        (adam, mb), (ours, our_mb) = cost["Adam"], cost["NaturalGradient"]
        lines += [
            f"| {guide.__name__}, {d} latents | {adam:.1f} | {ours:.1f} | {ours / adam:.2f} | {our_mb / mb:.2f} |"
        ]
    return "\n".join([*lines, "", *_first_steps(dtype)])


def _first_steps(dtype: Any, repeats: int = 2) -> list[str]:
    lines = [f"## Time to first step, {dtype}, new process, seconds (median of {repeats})", ""]
    lines += ["| case | Adam | NaturalGradient | ratio | first update alone: Adam | NaturalGradient | ratio |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for case in RACES:
        turns = [[first_step(case, name) for name in OPTIMIZERS] for _ in range(repeats)]
        (a, a_step), (b, b_step) = np.median(np.array(turns), axis=0)
        lines += [f"| {case} | {a:.1f} | {b:.1f} | {b / a:.2f} | {a_step:.1f} | {b_step:.1f} | {b_step / a_step:.2f} |"]
    return [*lines, ""]
