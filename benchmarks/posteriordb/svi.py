# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``NaturalGradient()`` with default options, and Adam at ten settings, through NumPyro's ``SVI`` with 8 particles.

Gradient evaluations count gradients of one draw's log density. A step of Adam takes one for each particle. A step of
the natural gradient takes one for each particle, two for each Hessian-vector product and particle (forward over
reverse), and a third of one for each value of the loss at a trial point; every step is charged with the largest number
of trials, although most steps need one or none. Adam's settings and seeds run as one batch, and its seconds are those
of a separate run. The natural gradient is compiled as ``fit`` compiles it, Adam as ``SVI.run`` does.
"""

import itertools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.optim import optax_to_numpyro

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.compilation.programs import quick_jit
from numpyro_natgrad.options import RuleConstants

from .guides import Guide
from .models import Data
from .path import Path
from .target import Target

PARTICLES = 8
RATES = (0.3, 0.1, 0.03, 0.01, 0.003)
REFERENCE_PARTICLES, REFERENCE_STEPS = 64, 400


class Problem(NamedTuple):
    """One posterior with one guide.

    :ivar function: the model.
    :ivar arguments: its keyword arguments.
    :ivar target: the posterior in the precision at hand.
    :ivar guide: its guide.
    :ivar starts: where the seeds start, (seeds, d).
    :ivar steps: of the natural gradient; of Adam, and of anything else that takes steps as cheap.
    """

    function: Callable[..., None]
    arguments: Data
    target: Target
    guide: Guide
    starts: np.ndarray
    steps: tuple[int, int]


class Attempt(NamedTuple):
    """One fit: the method's setting (``""`` if it has only one), the seed, and the path."""

    setting: str
    seed: int
    path: Path


def natural_gradient(problem: Problem) -> Iterator[Attempt]:
    """Fits with default options."""
    steps = problem.steps[0]
    marks = np.unique(np.minimum(np.r_[1:61, np.geomspace(60, max(steps, 60), 40).astype(int)], steps))
    yield from _natural(problem, marks, PARTICLES, range(len(problem.starts)))


def reference(problem: Problem) -> Iterator[Attempt]:
    """A long run with many particles, for the best ELBO."""
    marks = np.array([REFERENCE_STEPS // 4, REFERENCE_STEPS // 2, REFERENCE_STEPS])
    yield from _natural(problem, marks, REFERENCE_PARTICLES, range(1))


def _natural(problem: Problem, marks: np.ndarray, particles: int, seeds: range) -> Iterator[Attempt]:
    walk, optimizer = walker(problem, marks, particles), NaturalGradient()
    compiled, compiling = compile_timed(lambda z, key: walk(optimizer, z, key), start(problem, 0), quick_jit)
    gradients = particles * (1 + 2 * products(problem, particles) + RuleConstants().radius_trials / 3)
    for seed in seeds:
        begin = time.perf_counter()
        params = jax.block_until_ready(compiled(*start(problem, seed)))
        seconds = (time.perf_counter() - begin) / marks[-1]
        yield Attempt("", seed, _path(problem, params, marks, gradients, seconds, compiling))


def products(problem: Problem, particles: int) -> int:
    """Hessian-vector products per step and particle, read from the report."""
    guide, optimizer = problem.guide.make(problem.function), NaturalGradient()
    svi = SVI(problem.function, guide, optimizer, Trace_ELBO(particles))
    state = svi.init(jax.random.key(0), **problem.arguments)
    named = re.search(r"(\d+) Hessian-vector products", optimizer.report(svi, state, **problem.arguments))
    return int(named[1]) if named else 0


def adam(problem: Problem) -> Iterator[Attempt]:
    """Five rates, each constant and with a cosine decay to zero over all steps."""
    total, seeds = problem.steps[1], len(problem.starts)
    marks = np.unique(np.geomspace(1, total, 90).round().astype(int))
    seconds, compiling = _seconds_of_adam(problem)
    walk = walker(problem, marks, PARTICLES)
    run = jax.jit(jax.vmap(lambda r, c, z, key: walk(decaying_adam(r, c, total), z, key), in_axes=(None, None, 0, 0)))
    starts = [jnp.stack(x) for x in zip(*(start(problem, seed) for seed in range(seeds)), strict=True)]
    for cosine, rate in itertools.product((False, True), RATES):
        params = jax.device_get(run(jnp.array(rate), jnp.array(cosine), *starts))
        for seed in range(seeds):
            one = {name: x[seed] for name, x in params.items()}
            path = _path(problem, one, marks, PARTICLES, seconds, compiling)
            yield Attempt(f"{'cosine' if cosine else 'constant'} {rate:g}", seed, path)


def decaying_adam(rate: Any, cosine: Any, total: int) -> Any:
    """Adam at a constant rate, or with a cosine decay over ``total`` steps; both arguments may be traced."""

    def schedule(step: Any) -> Any:
        decayed = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / total, 1.0)))
        return rate * jnp.where(cosine, decayed, 1.0)

    return optax_to_numpyro(optax.adam(schedule))


def _seconds_of_adam(problem: Problem) -> tuple[float, float]:
    """Seconds per step (median of three runs) and of compilation."""
    steps = min(500, problem.steps[1])
    walk = walker(problem, np.array([steps]), PARTICLES)
    begun = start(problem, 0)
    compiled, compiling = compile_timed(lambda z, key: walk(optax_to_numpyro(optax.adam(0.01)), z, key), begun)
    return float(np.median(step_seconds(compiled, begun, steps))), compiling


def step_seconds(compiled: Callable[..., Any], example: tuple[Any, ...], steps: int) -> list[float]:
    """Seconds per step in each of three runs."""
    taken = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*example))
        taken.append((time.perf_counter() - begin) / steps)
    return taken


def walker(problem: Problem, marks: np.ndarray, particles: int) -> Callable[..., Any]:
    """A function of optimizer, start and key: the guide's (constrained) parameters at the marks."""
    guide = problem.guide.make(problem.function)
    SVI(problem.function, guide, optax_to_numpyro(optax.adam(0.1)), Trace_ELBO()).init(
        jax.random.key(0), **problem.arguments
    )
    legs = jnp.array(np.stack([np.r_[0, marks[:-1]], marks], 1), jnp.int32)

    def walk(optimizer: Any, z: jax.Array, key: jax.Array) -> Any:
        svi = SVI(problem.function, guide, optimizer, Trace_ELBO(particles))
        state = svi.init(key, init_params=problem.guide.place(problem.target, z), **problem.arguments)

        def leg(state: Any, ends: jax.Array) -> Any:
            step = lambda _, state: svi.update(state, **problem.arguments)[0]
            state = lax.fori_loop(ends[0], ends[1], step, state)
            return state, svi.get_params(state)

        return lax.scan(leg, state, legs)[1]

    return walk


def compile_timed(
    function: Callable[..., Any], example: tuple[Any, ...], jit: Callable[..., Any] = jax.jit
) -> tuple[Callable[..., Any], float]:
    """The compiled function, and the seconds of tracing and compilation."""
    begin = time.perf_counter()
    compiled = jit(function).lower(*example).compile()
    return compiled, time.perf_counter() - begin


def start(problem: Problem, seed: int) -> tuple[jax.Array, jax.Array]:
    """Initial mean and key of a seed."""
    return jnp.asarray(problem.starts[seed], jnp.zeros(()).dtype), jax.random.key(seed)


def _path(problem: Problem, params: Any, marks: np.ndarray, gradients: float, seconds: float, compiling: float) -> Path:
    loc, factor = problem.guide.gaussian(problem.target, jax.device_get(params))
    return Path(np.asarray(loc), np.asarray(factor), marks, marks * gradients, marks * seconds, compiling)
