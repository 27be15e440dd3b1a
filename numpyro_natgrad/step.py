# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""One step, read from top to bottom:

    fn ──views──▶ loss, gradient ──family──▶ natural gradient ──length──▶ ρ ──family──▶ new parameters ──judge──▶ state

It never raises and never leaves a NaN in the state. The ladder: a step that would move too far is *shortened* to the KL
radius; one that is not finite, or does not deliver on its own draws, is *skipped*, and the radius shrinks; what was
skipped is *counted*.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import certificate, length
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
    """The natural gradient, block by block, and what the length rule made of it; arrays have an entry for each family.

    ``square``: squared Fisher norm, nats.  ``cap``: the longest step that the rule asks for.  ``compared``, ``weight``:
    with the running mean, and in it.
    """

    tangents: list[Any]
    memory: Memory
    pace: Pace
    square: jax.Array
    signal: jax.Array
    compared: length.Comparison
    weight: jax.Array
    cap: jax.Array
    ok: jax.Array


class Proposal(NamedTuple):
    """Where the step leads. ``kl``: KL(q ‖ q₊) of each family and ``moved``: KL(q₊ ‖ q) of all of them, nats."""

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
    families = context.structure.families
    tangents = [f.sharp(evidence, state.params, state.memory, step) for f in families]
    square = _each(f.norm2(v) for f, v in zip(families, tangents, strict=True))
    ok = finite((evidence.loss, evidence.gradient, square))
    tangents = cleaned(ok, tangents)
    start = length.initial_radius(context.options, context.structure.latents)
    pace = state.pace._replace(radius=jnp.where(state.pace.radius > 0, state.pace.radius, start))
    pairs = list(zip(families, tangents, strict=True))
    each = [f.compare(state.memory, v) for f, v in pairs]
    compared = length.Comparison(*(_each(c[i] for c in each) for i in range(3)))
    pace, seen = length.observe(pace, compared)
    memory = state.memory
    for k, (family, v) in enumerate(pairs):
        memory = family.remember(memory, v, seen.weight[k])
    quiet = jnp.array(context.structure.quiet, square.dtype)
    observed = length.Observed(step, seen.signal, seen.noise, seen.trust, evidence.particles, quiet)
    cap = length.cap(context.options, observed)
    square = jnp.where(ok, square, 0.0)
    return Direction(tangents, memory, pace, square, seen.signal, compared, seen.weight, cap, ok)


def _propose(evidence: Evidence, context: Context, direction: Direction, state: State) -> Proposal:
    families = list(zip(context.structure.families, direction.tangents, strict=True))

    def kl(share: jax.Array) -> jax.Array:
        return _each(f.kl(v, share * direction.cap[k]) for k, (f, v) in enumerate(families))

    share = length.longest(lambda s: jnp.sum(kl(s)), jnp.ones((), direction.cap.dtype), direction.pace.radius)
    rho = share * direction.cap
    params, memory = state.params, direction.memory
    for k, (family, v) in enumerate(families):
        params, memory = family.retract(params, memory, v, rho[k])
    moved = jnp.sum(_each(f.moved(v, rho[k]) for k, (f, v) in enumerate(families)))
    params, point = context.point.step(params, evidence.gradient, state.point, tuple(context.structure.point))
    return Proposal(params, memory, point, rho, kl(share), moved, share < 1)


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
    large = (proposal.moved > floor) | (proposal.limited & (direction.pace.radius >= floor))
    asked = large | (not context.structure.exact)
    gained = evidence.loss - lax.cond(ok & asked, evidence.value, lambda _: evidence.loss, proposal.params)
    promised = jnp.sum(proposal.kl / jnp.maximum(proposal.rho, jnp.finfo(proposal.rho.dtype).tiny))
    delivered = ~asked | (gained >= jnp.where(large, length.ACCEPT * promised, -floor))
    return Verdict(ok & delivered, proposal.limited & (gained > length.GROW * promised))


def _settle(context: Context, state: State, direction: Direction, proposal: Proposal, verdict: Verdict) -> State:
    """Take the step or leave it, and write down which."""
    good = verdict.good
    pace = direction.pace
    if context.options.adaptive:
        nats, limited = jnp.sum(proposal.kl), proposal.limited
        pace = length.resized(pace, context.structure.latents, nats, good=good, limited=limited, grows=verdict.grows)
    # A skipped natural gradient stays in the running means only if it was finite.
    kept = _choose(direction.ok, direction.memory, state.memory)
    pace = _choose(direction.ok, pace, state.pace)._replace(radius=pace.radius)
    params = _choose(good, proposal.params, state.params)
    newest = jnp.where(good, _average_weights(pace, context), 0.0)
    rho = jnp.where(good, proposal.rho, 0.0)
    weights = certificate.Weights(rho, direction.weight, newest)
    gap = certificate.observe(state.certificate, direction.compared, pace.noise[: rho.size], weights)
    gap = _choose(direction.ok, gap, state.certificate)
    return State(
        params,
        _averaged(state.average, params, context.structure, newest),
        _choose(good, proposal.memory, kept),
        pace,
        gap,
        _choose(good, proposal.point, state.point),
        _info(state, direction, proposal, good, certificate.remaining(gap, pace.memory[: rho.size])),
    )


def _averaged(average: Params, params: Params, structure: Structure, newest: jax.Array) -> Params:
    """The running mean of the iterates. What the ordinary optimizer moves is its own affair: its last iterate."""
    weights = {p: newest[k] for k, family in enumerate(structure.families) for p in family.params}

    def mean(weight: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        return old + (weight * (new - old)).astype(old.dtype)

    return {p: jax.tree.map(partial(mean, weights[p]), average[p], x) if p in weights else x for p, x in params.items()}


def _average_weights(pace: Pace, context: Context) -> jax.Array:
    """The newest iterate's weight in the average, for each family.

    Average over the steps that noise rules, and only over those: the memory counts half of them.

    Steps of a length that the user has chosen are left alone: then the last iterate is what was asked for.
    """
    memory = pace.memory[: len(context.structure.families)]
    if context.options.step_size is not None:
        return jnp.ones_like(memory)
    return (AVERAGE_DECAY + 1) / (2 * (memory - length.MEMORY_MIN) + AVERAGE_DECAY + 1)


def _info(
    state: State, direction: Direction, proposal: Proposal, good: jax.Array, remaining: tuple[jax.Array, jax.Array]
) -> StepInfo:
    old, square = state.info, jnp.sum(direction.square)
    share = direction.square / jnp.maximum(square, jnp.finfo(square.dtype).tiny)
    return jax.tree.map(
        lambda new, before: jnp.asarray(new, before.dtype),
        StepInfo(
            jnp.where(good, jnp.sum(proposal.kl), 0.0),
            jnp.sqrt(square),
            jnp.where(good, jnp.sqrt(jnp.sum(share * proposal.rho**2)), 0.0),
            jnp.sum(share * direction.signal),
            direction.pace.radius,
            *remaining,
            proposal.limited & good,
            ~good,
            old.skipped_total + ~good,
        ),
        old,
    )


def _choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b).astype(b.dtype), yes, no)


def _each(terms: Any) -> jax.Array:
    """One number for each family, as an array."""
    return jnp.stack([*terms, jnp.zeros(())])[:-1]  # there may be none
