# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""One step, read from top to bottom:

    fn ──views──▶ loss, gradient ──family──▶ natural gradient ──length──▶ ρ ──family──▶ new parameters ──judge──▶ state

It never raises and never leaves a NaN in the state. The ladder: a step that would move too far is *shortened* to the KL
radius, and to a quarter of it while it does not deliver on its own draws; one that never does, or is not finite, is
*skipped*; what was skipped is *counted*.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_natgrad.blocks.partition import Partition
from numpyro_natgrad.estimators.derivatives import LossInfo, evaluate_loss, finite, rescale_loss, zero_unless
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import Loss
from numpyro_natgrad.options import Options
from numpyro_natgrad.step import newton_decrement, step_size
from numpyro_natgrad.step.fallback import FallbackOptimizer
from numpyro_natgrad.step.state import Memory, NoiseStatistics, State, StepInfo

#: Polynomial-decay averaging of the iterates (Shamir & Zhang 2013): weight (η+1)/(n+η+1) on the newest of n.
AVERAGE_DECAY = 8.0
#: Radii that one step may try.
TRIALS = 6


class Context(NamedTuple):
    """What does not change during a run."""

    structure: Partition
    options: Options
    point: FallbackOptimizer
    forward: bool


class Direction(NamedTuple):
    """The natural gradient, block by block, and what the length rule made of it; arrays have an entry for each family.

    ``square``: squared Fisher norm, nats.  ``cap``: the longest step that the rule asks for.  ``compared``: with the
    running mean, and ``seen``: what that says.  ``share``: of the loss, that it is the natural gradient of.
    """

    tangents: list[Any]
    memory: Memory
    statistics: NoiseStatistics
    square: jax.Array
    compared: step_size.SquaredNorms
    seen: step_size.Observation
    cap: jax.Array
    share: jax.Array
    ok: jax.Array


class Proposal(NamedTuple):
    """Where a radius leads. ``kl``: KL(q ‖ q₊) of each family and ``moved``: KL(q₊ ‖ q) of all of them, nats."""

    params: Params
    memory: Memory
    point: Any
    rho: jax.Array
    kl: jax.Array
    moved: jax.Array
    limited: jax.Array
    radius: jax.Array


class Judgement(NamedTuple):
    """Whether a step is taken, whether it has earned a larger radius, and what it gains on its own draws, nats."""

    good: jax.Array
    grows: jax.Array
    gained: jax.Array


class Search(NamedTuple):
    """The best radius so far with the judgement of it, the next one to try, and whether it is worth trying; nats."""

    radius: jax.Array
    judgement: Judgement
    following: jax.Array
    trials: jax.Array
    open: jax.Array


def natural_step(fn: Loss, context: Context, step: jax.Array, state: State) -> tuple[LossInfo, State]:
    """Evaluate the loss at the iterate and move."""
    structure = context.structure
    loss_info = evaluate_loss(fn, state.params, structure.request, structure.particles)
    direction = _direction(loss_info, context, step, state)
    search = _search(loss_info, context, direction, state)
    proposal = _propose(loss_info, context, direction, state, search.radius)
    return loss_info, _settle(context, state, direction, proposal, search)


def _direction(loss_info: LossInfo, context: Context, step: jax.Array, state: State) -> Direction:
    families = context.structure.families
    seen, share = rescale_loss(loss_info._replace(stuck=state.info.skipped), context.structure.request.modes)
    tangents = [f.natural_gradient(seen, state.params, state.memory, step) for f in families]
    square = _each(f.squared_norm(v) for f, v in zip(families, tangents, strict=True))
    ok = finite((loss_info.loss, loss_info.gradient, square))
    tangents = zero_unless(ok, tangents)
    start = step_size.initial_radius(context.options, context.structure.latents)
    statistics = state.statistics._replace(
        radius=jnp.where(state.statistics.radius > 0, state.statistics.radius, start)
    )
    pairs = list(zip(families, tangents, strict=True))
    compared = _compared([f.compare(state.memory, v) for f, v in pairs])
    statistics, observation = step_size.observe(statistics, compared)
    memory = state.memory
    for k, (family, v) in enumerate(pairs):
        memory = family.update_memory(memory, v, observation.weight[k])
    cap = step_size.cap(context.options, step, observation, context.structure.tolerance)
    square = jnp.where(ok, square, 0.0)
    return Direction(tangents, memory, statistics, square, compared, observation, cap, share, ok)


def _compared(each: list[step_size.SquaredNorms]) -> step_size.SquaredNorms:
    """Of all families, as arrays."""
    running_mean2, innovation2, gradient2, reach = (_each(c[i] for c in each) for i in range(4))
    visible = jnp.stack([_each(c.visible_squares()[i] for c in each) for i in range(3)])
    return step_size.SquaredNorms(running_mean2, innovation2, gradient2, reach, visible)


def _search(loss_info: LossInfo, context: Context, direction: Direction, state: State) -> Search:
    """The radius of this step: the one carried, a quarter of it while steps do not deliver, four times while they do.

    A trial costs one value of the loss, a step its gradient and Hessian products as well. Where draws do not move with
    the parameters the difference of two losses is noise, and all steps are believed.
    """
    radius = direction.statistics.radius
    nothing = Judgement(jnp.array(True), jnp.array(False), jnp.zeros_like(loss_info.loss))
    search = Search(radius, nothing, radius, jnp.array(0, jnp.int32), direction.ok)
    if not context.options.adaptive or not context.structure.paired:
        return search

    def body(search: Search) -> Search:
        proposal = _propose(loss_info, context, direction, state, search.following)
        judgement = _judge(loss_info, context, proposal, direction.share)
        up = (search.trials > 0) & search.judgement.good
        better = judgement.good & (judgement.gained > search.judgement.gained)
        radius, best = _choose(~up | better, (search.following, judgement), (search.radius, search.judgement))
        # Farther while that pays; nearer until it delivers, and then no farther.
        farther = jnp.array(context.structure.exact) & judgement.grows & jnp.where(up, better, search.trials == 0)
        following = jnp.where(judgement.good, step_size.grown(search.following), search.following / 4)
        return Search(radius, best, following, search.trials + 1, farther | ~(up | judgement.good))

    return lax.while_loop(lambda search: search.open & (search.trials < TRIALS), body, search)


def _propose(loss_info: LossInfo, context: Context, direction: Direction, state: State, radius: jax.Array) -> Proposal:
    """The longest step within the radius."""
    families = list(zip(context.structure.families, direction.tangents, strict=True))

    def kl(share: jax.Array) -> jax.Array:
        return _each(f.kl(v, share * direction.cap[k]) for k, (f, v) in enumerate(families))

    share = step_size.longest(lambda s: jnp.sum(kl(s)), jnp.ones((), direction.cap.dtype), radius)
    rho = share * direction.cap
    params, memory = state.params, direction.memory
    for k, (family, v) in enumerate(families):
        params, memory = family.retract(params, memory, v, rho[k])
    moved = jnp.sum(_each(f.moved(v, rho[k]) for k, (f, v) in enumerate(families)))
    params, point = context.point.step(params, loss_info.gradient, state.point, tuple(context.structure.point))
    return Proposal(params, memory, point, rho, kl(share), moved, share < 1, radius)


def _judge(loss_info: LossInfo, context: Context, proposal: Proposal, share: jax.Array) -> Judgement:
    """Compare what a step promises with what it delivers on its own draws, where that says more than noise.

    For a conjugate model the gain of a step ρ is at least KL(q ‖ q₊)/ρ exactly; elsewhere a tenth of it is asked for.
    Below the noise floor a step is believed if its KL is exact; else it has to show that it loses no more than that.
    """
    ok = finite(proposal.params)
    floor = step_size.noise_floor(context.structure.latents)
    large = (proposal.moved > floor) | (proposal.limited & (proposal.radius >= floor))
    asked = large | (not context.structure.exact)
    gained = loss_info.loss - lax.cond(ok & asked, loss_info.value, lambda _: loss_info.loss, proposal.params)
    promised = jnp.sum(proposal.kl / jnp.maximum(proposal.rho, jnp.finfo(proposal.rho.dtype).tiny)) / share
    delivered = ~asked | (gained >= jnp.where(large, step_size.ACCEPT * promised, -floor))
    return Judgement(ok & delivered, proposal.limited & (gained > step_size.GROW * promised), gained)


def _settle(context: Context, state: State, direction: Direction, proposal: Proposal, search: Search) -> State:
    """Take the step or leave it, and write down which."""
    good = direction.ok & search.judgement.good & finite(proposal.params)
    statistics = _choose(direction.ok, _paced(context, state, direction, proposal, search, good), state.statistics)
    # A skipped natural gradient stays in the running means only if it was finite.
    kept = _choose(direction.ok, direction.memory, state.memory)
    params = _choose(good, proposal.params, state.params)
    newest = jnp.where(good, _average_weights(statistics, context), 0.0)
    weights = newton_decrement.Weights(jnp.where(good, proposal.rho, 0.0), direction.seen.weight, newest)
    gap = newton_decrement.observe(state.certificate, direction.compared, direction.seen.noise, weights)
    gap, noise = _choose(direction.ok, gap, state.certificate), step_size.noise_seen(statistics)[: newest.size]
    return State(
        params,
        _averaged(state.average, params, context.structure, newest),
        _choose(good, proposal.memory, kept),
        statistics,
        gap,
        _choose(good, proposal.point, state.point),
        _info(
            state, direction, proposal, good, newton_decrement.remaining(gap, noise, statistics.memory[: newest.size])
        ),
    )


def _paced(
    context: Context, state: State, direction: Direction, proposal: Proposal, search: Search, good: jax.Array
) -> NoiseStatistics:
    """The pace after the step was tried. (A loss that is not finite where the step starts says nothing about it.)"""
    latents, statistics = context.structure.latents, direction.statistics
    noise = newton_decrement.visible_noise(state.certificate, direction.seen.noise)
    foreseen = newton_decrement.foreseen(state.certificate, noise)
    statistics = step_size.averaged(statistics, foreseen, direction.compared.visible_squares()[0], noise)
    statistics = _choose(good, step_size.forgotten(statistics, latents, jnp.sum(proposal.kl)), statistics)
    if not context.options.adaptive:
        return statistics
    tried = statistics._replace(radius=proposal.radius)
    nats, limited, grows = jnp.sum(proposal.kl), proposal.limited, search.judgement.grows
    return step_size.resized(tried, latents, nats, good=good, limited=limited, grows=grows)


def _averaged(average: Params, params: Params, structure: Partition, newest: jax.Array) -> Params:
    """The running mean of the iterates. What the ordinary optimizer moves is its own affair: its last iterate."""
    weights = {p: newest[k] for k, family in enumerate(structure.families) for p in family.params}

    def mean(weight: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        return old + (weight * (new - old)).astype(old.dtype)

    return {p: jax.tree.map(partial(mean, weights[p]), average[p], x) if p in weights else x for p, x in params.items()}


def _average_weights(statistics: NoiseStatistics, context: Context) -> jax.Array:
    """The newest iterate's weight in the average over the steps that noise rules, for each family.

    Steps of a length that the user has chosen are left alone: then the last iterate is what was asked for.
    """
    steps = statistics.averaged[: len(context.structure.families)]
    if context.options.step_size is not None:
        return jnp.ones_like(steps)
    return (AVERAGE_DECAY + 1) / (steps + AVERAGE_DECAY)


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
            jnp.sum(share * direction.seen.signal),
            proposal.radius,
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
