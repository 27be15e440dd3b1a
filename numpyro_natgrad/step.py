# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""One step, read from top to bottom:

    fn ──views──▶ loss, gradient ──family──▶ natural gradient ──length──▶ ρ ──family──▶ new parameters ──judge──▶ state

It never raises and never leaves a NaN in the state. The ladder: a step that would move too far is *shortened* to the KL
radius; one that is not finite, or does not deliver on its own draws, is *skipped*, and the radius shrinks; what was
skipped is *counted*.
"""

from collections.abc import Container
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import length
from .charts import Params
from .effects import Loss
from .evidence import Evidence, cleaned, finite, gather
from .options import Options
from .point import PointOptimizer
from .state import Memory, Pace, State, StepInfo
from .structure import Structure

#: Polynomial-decay averaging of the iterates (Shamir & Zhang 2013): weight (η+1)/(n+η+1) on the newest of n.
AVERAGE_DECAY = 8.0


class Context(NamedTuple):
    """What does not change during a run."""

    structure: Structure
    options: Options
    point: PointOptimizer
    forward: bool


class Direction(NamedTuple):
    """The natural gradient, block by block, and what the length rule made of it."""

    tangents: list[Any]
    memory: Memory
    pace: Pace
    square: jax.Array
    signal: jax.Array
    cap: jax.Array
    ok: jax.Array


class Proposal(NamedTuple):
    """Where the step leads. ``kl``: KL(q ‖ q₊) and ``moved``: KL(q₊ ‖ q), nats."""

    params: Params
    memory: Memory
    point: Any
    rho: jax.Array
    kl: jax.Array
    moved: jax.Array
    limited: jax.Array


class Verdict(NamedTuple):
    """Whether the step is taken, and whether it has earned a larger radius."""

    good: jax.Array
    grows: jax.Array


def natural_step(fn: Loss, context: Context, step: jax.Array, state: State) -> tuple[Evidence, State]:
    """Evaluate the loss at the iterate and move."""
    structure = context.structure
    evidence = gather(fn, state.params, structure.views, structure.particles)
    direction = _direction(evidence, context, step, state)
    proposal = _propose(evidence, context, direction, state)
    verdict = _judge(evidence, context, direction, proposal)
    return evidence, _settle(context, state, direction, proposal, verdict)


def _direction(evidence: Evidence, context: Context, step: jax.Array, state: State) -> Direction:
    families, options = context.structure.families, context.options
    tangents = [f.sharp(evidence, state.params, state.memory, step) for f in families]
    square = _total(f.norm2(v) for f, v in zip(families, tangents, strict=True))
    ok = finite((evidence.loss, evidence.gradient, square))
    tangents = cleaned(ok, tangents)
    start = length.initial_radius(options, context.structure.latents)
    pace = state.pace._replace(radius=jnp.where(state.pace.radius > 0, state.pace.radius, start))
    pairs = list(zip(families, tangents, strict=True))
    compared = [f.compare(state.memory, v) for f, v in pairs]
    pace, seen = length.observe(pace, length.Comparison(*(_total(c[i] for c in compared) for i in range(3))))
    memory = state.memory
    for family, v in pairs:
        memory = family.remember(memory, v, seen.weight)
    exact = context.structure.exact
    cap = length.cap(options, length.Observed(step, seen.signal, seen.noise, seen.trust, evidence.particles, exact))
    return Direction(tangents, memory, pace, jnp.where(ok, square, 0.0), seen.signal, cap, ok)


def _propose(evidence: Evidence, context: Context, direction: Direction, state: State) -> Proposal:
    families = list(zip(context.structure.families, direction.tangents, strict=True))

    def kl(rho: jax.Array) -> jax.Array:
        return _total(f.kl(v, rho) for f, v in families)

    rho = length.longest(kl, direction.cap, direction.pace.radius)
    params, memory = state.params, direction.memory
    for family, v in families:
        params, memory = family.retract(params, memory, v, rho)
    moved = _total(f.moved(v, rho) for f, v in families)
    params, point = context.point.step(params, evidence.gradient, state.point, tuple(context.structure.point))
    return Proposal(params, memory, point, rho, kl(rho), moved, rho < direction.cap)


def _judge(evidence: Evidence, context: Context, direction: Direction, proposal: Proposal) -> Verdict:
    """Compare what the step promised with what it delivers on its own draws, where that says more than noise.

    For a conjugate model the gain of a step ρ is at least KL(q ‖ q₊)/ρ exactly; elsewhere a tenth of it is asked for.
    Below the noise floor a step is believed if its KL is exact; else it has to show that it loses no more than that.
    Where draws do not move with the parameters, the difference of two losses is noise, and all steps are believed.
    """
    ok = direction.ok & finite(proposal.params)
    if not context.options.adaptive or not context.structure.paired:
        return Verdict(ok, jnp.array(False))
    floor = length.noise_floor(context.structure.latents)
    large = (proposal.moved > floor) | proposal.limited
    asked = large | (not context.structure.exact)
    gained = evidence.loss - lax.cond(ok & asked, evidence.value, lambda _: evidence.loss, proposal.params)
    promised = proposal.kl / jnp.maximum(proposal.rho, jnp.finfo(proposal.rho.dtype).tiny)
    delivered = ~asked | (gained >= jnp.where(large, length.ACCEPT * promised, -floor))
    return Verdict(ok & delivered, proposal.limited & (gained > length.GROW * promised))


def _settle(context: Context, state: State, direction: Direction, proposal: Proposal, verdict: Verdict) -> State:
    """Take the step or leave it, and write down which."""
    good = verdict.good
    pace = direction.pace
    if context.options.adaptive:
        pace = length.resized(
            pace, context.structure.latents, proposal.kl, good=good, limited=proposal.limited, grows=verdict.grows
        )
    # A skipped natural gradient stays in the running means only if it was finite.
    kept = _choose(direction.ok, direction.memory, state.memory)
    pace = _choose(direction.ok, pace, state.pace)._replace(radius=pace.radius)
    params = _choose(good, proposal.params, state.params)
    average = _averaged(state.average, params, _average_weight(pace, context.options), context.structure.point)
    return State(
        params,
        _choose(good, average, state.average),
        _choose(good, proposal.memory, kept),
        pace,
        _choose(good, proposal.point, state.point),
        _info(state, direction, proposal, good),
    )


def _averaged(average: Params, params: Params, weight: jax.Array, point: Container[str]) -> Params:
    """The running mean of the iterates. What the ordinary optimizer moves is its own affair: its last iterate."""

    def mean(old: jax.Array, new: jax.Array) -> jax.Array:
        return old + (weight * (new - old)).astype(old.dtype)

    return {p: x if p in point else jax.tree.map(mean, average[p], x) for p, x in params.items()}


def _average_weight(pace: Pace, options: Options) -> jax.Array:
    """Average over the steps that noise rules, and only over those: the memory counts half of them.

    Steps of a length that the user has chosen are left alone: then the last iterate is what was asked for.
    """
    if options.step_size is not None:
        return jnp.ones_like(pace.memory)
    return (AVERAGE_DECAY + 1) / (2 * (pace.memory - length.MEMORY_MIN) + AVERAGE_DECAY + 1)


def _info(state: State, direction: Direction, proposal: Proposal, good: jax.Array) -> StepInfo:
    old = state.info
    return jax.tree.map(
        lambda new, before: jnp.asarray(new, before.dtype),
        StepInfo(
            jnp.where(good, proposal.kl, 0.0),
            jnp.sqrt(direction.square),
            jnp.where(good, proposal.rho, 0.0),
            direction.signal,
            direction.pace.radius,
            proposal.limited & good,
            ~good,
            old.skipped_total + ~good,
        ),
        old,
    )


def _choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b).astype(b.dtype), yes, no)


def _total(terms: Any) -> jax.Array:
    return sum(terms, jnp.zeros(()))
