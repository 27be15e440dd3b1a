# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""One step of the optimizer, from the loss to the new state.

    local rows ──▶ loss, gradient ──▶ natural gradients ──▶ noise ──▶ step sizes ──▶ trust region ──▶ new state

It never raises and leaves no NaN in the state. A step that would leave the trust region is *shortened*, again and again
while it does not reduce the loss on its own draws. One that never does, or is not finite, is *skipped* and counted.
"""

import inspect
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_natgrad.blocks.base import Memory, Randomness, SquaredNorms
from numpyro_natgrad.blocks.partition import Partition
from numpyro_natgrad.distributions.gaussian import StepKL
from numpyro_natgrad.estimators.derivatives import LossInfo, evaluate_loss, finite, rescale_loss, zero_unless
from numpyro_natgrad.estimators.equation_batches import map_stacked
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import Loss, with_copies
from numpyro_natgrad.options import Options
from numpyro_natgrad.step import newton_decrement, step_size, trust_region
from numpyro_natgrad.step.fallback import FallbackOptimizer
from numpyro_natgrad.step.newton_decrement import StepWeights
from numpyro_natgrad.step.state import NaturalGradientState, NoiseStatistics, StepInfo, fresh, pack, unpack
from numpyro_natgrad.step.step_size import NoiseEstimate
from numpyro_natgrad.step.trust_region import Acceptance


class Context(NamedTuple):
    """What does not change during a run."""

    partition: Partition
    options: Options
    fallback: FallbackOptimizer


class NaturalGradients(NamedTuple):
    """The natural gradient of every block.

    :ivar tangents: v of each block, in its own coordinates; zero where ``ok`` is false.
    :ivar squared_norms: vᵀFv, nats, for each of B step sizes; ``(B,)``.
    :ivar own_step_sizes: the step size that a block prescribes, or zero; ``(B,)``.
    :ivar scale: the factor on the loss by :func:`.rescale_loss`.
    :ivar ok: whether loss, gradient and norms are finite.
    :ivar stuck: loss and gradient are finite, but not the norms, and the step before was skipped too.
    """

    tangents: list[Any]
    squared_norms: jax.Array
    own_step_sizes: jax.Array
    scale: jax.Array
    ok: jax.Array
    stuck: jax.Array


class Statistics(NamedTuple):
    """The running means and the noise after the natural gradients of this step."""

    memory: Memory
    noise: NoiseStatistics
    norms: SquaredNorms
    estimate: NoiseEstimate


class Proposal(NamedTuple):
    """The step within a radius, nats, in numbers.

    :ivar rho: step size of each block, ``(B,)``.
    :ivar kl: of each block, with the reduction that it promises for the rescaled loss; ``(B,)``.
    :ivar limited: whether the radius shortens it.
    :ivar large: whether it is so large that the loss at its end tells more than noise.
    """

    radius: jax.Array
    rho: jax.Array
    kl: StepKL
    limited: jax.Array
    large: jax.Array


class End(NamedTuple):
    """What the state becomes if the step is taken."""

    params: Params
    memory: Memory
    fallback: Any


class Search(NamedTuple):
    """The best proposal so far and its result, the radius to try next, nats, and whether to try it (``is_open``)."""

    proposal: Proposal
    result: Acceptance
    next_radius: jax.Array
    trials: jax.Array
    is_open: jax.Array


class Curve(NamedTuple):
    """All steps from a state, by their KL radius: one fraction of the largest step sizes for all blocks."""

    context: Context
    params: Params
    memory: Memory
    tangents: list[Any]
    largest: jax.Array

    def within(self, radius: jax.Array) -> Proposal:
        """The longest step within a radius, nats."""
        fraction, kl = trust_region.longest(self._kl, jnp.ones((), self.largest.dtype), radius)
        limited, floor = fraction < 1, _floor(self.context)
        large = (jnp.sum(kl.reverse) > floor) | (limited & (radius >= floor))
        return Proposal(radius, fraction * self.largest, kl, limited, large)

    def end(self, rho: jax.Array) -> tuple[Params, Memory]:
        """Parameters and memory after a step of these sizes."""
        params, memory = self.params, self.memory
        for block, v, own in self._blocks(rho):
            params, memory = block.retract(params, memory, v, own)
        return params, memory

    def _kl(self, fraction: jax.Array) -> StepKL:
        each = [block.kl(v, own) for block, v, own in self._blocks(fraction * self.largest)]
        return StepKL(*(_stack(getattr(kl, name) for kl in each) for name in StepKL._fields))

    def _blocks(self, rho: jax.Array) -> Iterable[tuple[Any, Any, jax.Array]]:
        """Each block with its natural gradient and its part of ``rho``."""
        partition = self.context.partition
        return zip(partition.blocks, self.tangents, _split(rho, partition), strict=True)


def natural_step(
    fn: Loss, context: Context, step: jax.Array, carried: NaturalGradientState
) -> tuple[LossInfo, NaturalGradientState]:
    """Evaluate the loss at the iterate and take one step.

    :param step: number of the step, from 0.
    :param carried: the state, in arrays of the size that the optimizer allocated.
    :return: the loss at the iterate before the step, and the state after it.
    """
    partition = context.partition
    state = unpack(carried, partition, context.options.constants)
    state = step_local_rows(fn, context, step, state)
    drawn = with_copies(fn, partition.copies)
    loss_info = evaluate_loss(drawn, state.params, partition.request, partition.particles)
    state = state._replace(seed=run_seed(fn, loss_info.loss, step, state.seed))
    gradients = natural_gradients(loss_info, partition, step, state)
    statistics = update_statistics(gradients, context, state)
    largest = choose_step_sizes(gradients, statistics, context, step, state)
    each = zip(partition.blocks, gradients.tangents, _split(largest, partition), strict=True)
    tangents = [block.restrained(v, rho) for block, v, rho in each]
    unowned = tuple(partition.unowned)
    params, fallback = context.fallback.step(state.params, loss_info.gradient, state.fallback, unowned)
    curve = Curve(context, params, statistics.memory, tangents, largest)
    search = search_trust_region(curve, loss_info, gradients, state.radius)
    end = End(*curve.end(search.proposal.rho), fallback)
    for block in partition.local.local_rows if partition.local else ():
        settled = block.followed_in_part(state.params, end.params, state.memory)
        end = end._replace(params={**end.params, **{p: settled[p] for p in block.params}})
    return loss_info, pack(finish(gradients, statistics, search, end, context, state), carried)


def step_local_rows(fn: Loss, context: Context, step: jax.Array, state: NaturalGradientState) -> NaturalGradientState:
    """Move the local rows of the minibatch, given everything else, before the rest sees them.

    Stochastic variational inference optimizes the local parameters of a minibatch first (Hoffman et al. 2013, figure
    4). A step of everything at once would follow the starts of rows that no step has visited yet. Rows on their first
    visit therefore take several steps on the same draws, until they have arrived.
    """
    local = context.partition.local
    if local is None:
        return state
    inner, loss = context._replace(partition=local), with_copies(fn, local.copies)

    def body(carried: tuple[Params, Memory, jax.Array, jax.Array]) -> tuple[Params, Memory, jax.Array, jax.Array]:
        params, counted, taken, _ = carried
        memory = state.memory
        for block in local.local_rows:
            memory = block.without_old_rows(memory, taken > 0)
        at = state._replace(params=params, memory=memory)
        loss_info = evaluate_loss(loss, params, local.request, local.particles)
        gradients = natural_gradients(loss_info, local, step, at)
        curve = Curve(inner, params, memory, gradients.tangents, gradients.own_step_sizes)
        search = search_trust_region(curve, loss_info, gradients, jnp.zeros_like(state.radius))
        end = curve.end(search.proposal.rho)
        accepted = gradients.ok & search.result.accepted & finite(end[0])
        params, after = _choose(accepted, end, (params, memory))
        return params, _choose(taken > 0, counted, after), taken + 1, accepted & search.proposal.large

    def is_open(carried: tuple[Params, Memory, jax.Array, jax.Array]) -> jax.Array:
        return carried[3] & (carried[2] < context.options.constants.first_visit_steps)

    start = state.params, state.memory, jnp.array(0), jnp.array(True)
    params, memory, _, _ = lax.while_loop(is_open, body, start)
    average = state.average
    for block in local.local_rows:
        average = block.averaged(average, params, state.memory, memory)
    return state._replace(params=params, average=average, memory=memory)


def run_seed(fn: Loss, loss: jax.Array, step: jax.Array, seed: jax.Array) -> jax.Array:
    """The seed of the blocks' probes: a word of the key of the first draws, which NumPyro's loss function closes over.

    Integers are the same however the sums of the loss are spread over devices. The bits of the first loss, which are
    not, stand in for the key of a loss function that was made otherwise.
    """
    key = inspect.getclosurevars(fn).nonlocals.get("rng_key") if inspect.isfunction(fn) else None
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    if isinstance(key, jax.Array) and key.dtype == jnp.uint32:
        return jnp.where(step == 0, key.ravel()[-1], seed)
    return jnp.where(step == 0, lax.bitcast_convert_type(loss.astype(jnp.float32), jnp.uint32), seed)


def natural_gradients(
    loss_info: LossInfo, partition: Partition, step: jax.Array, state: NaturalGradientState
) -> NaturalGradients:
    """v = F⁻¹g of every block, for the rescaled loss (:func:`.rescale_loss`)."""
    rescaled, scale = rescale_loss(
        loss_info._replace(previous_step_skipped=state.info.skipped), partition.request.density_modes
    )
    randomness = Randomness(jax.random.key(state.seed), step)
    tangents = [b.natural_gradient(rescaled, state.params, state.memory, randomness) for b in partition.blocks]
    squared_norms = _stack(b.squared_norm(v) for b, v in zip(partition.blocks, tangents, strict=True))
    differentiable = finite((loss_info.loss, loss_info.gradient))
    ok = differentiable & finite((squared_norms, tangents))
    stuck = state.info.skipped & ~ok & differentiable
    tangents = zero_unless(ok, tangents)
    own = [(b.count, b.own_step_size(v)) for b, v in zip(partition.blocks, tangents, strict=True)]
    own_step_sizes = _stack(jnp.zeros(n) if rho is None else rho for n, rho in own)
    return NaturalGradients(tangents, jnp.where(ok, squared_norms, 0.0), own_step_sizes, scale, ok, stuck)


def update_statistics(gradients: NaturalGradients, context: Context, state: NaturalGradientState) -> Statistics:
    """Estimate the noise by comparing the natural gradients with earlier ones, and average them in."""
    pairs = list(zip(context.partition.blocks, gradients.tangents, strict=True))
    each = [block.compare(state.memory, v) for block, v in pairs]
    visible = jnp.stack([_stack(norms.visible_norms()[i] for norms in each) for i in range(3)])
    gradient = _stack(n.gradient for n in each)
    running_mean, innovation = _stack(n.running_mean for n in each), _stack(n.innovation for n in each)
    norms = SquaredNorms(running_mean, innovation, gradient, visible)
    noise, estimate = step_size.observe(
        state.statistics, norms, context.options.constants, context.partition.tolerance.visits
    )
    memory = state.memory
    for (block, v), weight in zip(pairs, _split(estimate.weight, context.partition), strict=True):
        memory = block.update_memory(memory, v, weight)
    return Statistics(memory, noise, norms, estimate)


def choose_step_sizes(
    gradients: NaturalGradients, statistics: Statistics, context: Context, step: jax.Array, state: NaturalGradientState
) -> jax.Array:
    """The largest step size of each block: the user's, the block's own, or that of the noise; ``(B,)``."""
    options, constants, before = context.options, context.options.constants, state.statistics
    paired, running_mean, estimate = context.partition.paired, statistics.norms.running_mean, statistics.estimate
    predicted = newton_decrement.predicted_mean(state.decrement, step_size.current_noise(before, constants))
    delay = 1.0 if paired else constants.unpaired_draws
    foreseen = step_size.foreseen(before, running_mean, predicted, estimate, step, delay, constants)
    foreseen = foreseen if paired else foreseen._replace(huber=jnp.ones_like(estimate.huber))
    largest = step_size.largest_step_size(options, step, foreseen, context.partition.tolerance)
    if options.step_size is not None:
        return largest
    if not paired:
        return _limited_unpaired(largest, running_mean + foreseen.noise, context, step)
    return jnp.where(gradients.own_step_sizes > 0, gradients.own_step_sizes, largest)


def _limited_unpaired(largest: jax.Array, square: jax.Array, context: Context, step: jax.Array) -> jax.Array:
    """The step size where draws do not follow the parameters, ``(B,)``; zero until noise is known.

    No comparison of losses bounds such a step. Its expected KL therefore stays below that of steps which are never
    compared. (The KL of the step itself is bounded by the radius, which matters far from the optimum only, where steps
    are long.)

    :param square: expected ‖v‖², nats.
    """
    constants, partition = context.options.constants, context.partition
    draws = jnp.maximum(step, 1) * partition.particles
    limit = jnp.minimum(trust_region.initial_radius(context.options, partition.latents), _floor(context))
    kl = jnp.maximum(0.5 * jnp.sum(largest**2 * square), jnp.finfo(square.dtype).tiny)
    ramp = (1 / (1 + constants.unpaired_draws / draws)).astype(largest.dtype)
    known = (step >= constants.recent_steps) & (square > 0)
    return jnp.where(known, ramp * jnp.minimum(1.0, jnp.sqrt(limit / kl)) * largest, 0.0)


def search_trust_region(curve: Curve, loss_info: LossInfo, gradients: NaturalGradients, carried: jax.Array) -> Search:
    """The best radius: smaller radii while the loss is not reduced, larger ones while that pays.

    A trial costs at most one value of the loss. Where draws do not follow the parameters (``Partition.paired``) the
    difference of two losses is noise, and the first radius is accepted. The loop carries the sizes of the step and not
    its end: carried parameters cost a mean-field guide of a million latents a quarter of its time.
    """
    context = curve.context
    start = trust_region.initial_radius(context.options, context.partition.latents)
    radius = jnp.where((carried > 0) & jnp.isfinite(carried), carried, start)
    uncompared, none = Acceptance(jnp.array(True), jnp.array(False), jnp.zeros_like(loss_info.loss)), jnp.array(0)
    if not context.options.adaptive or not context.partition.paired:
        return Search(curve.within(radius), uncompared, radius, none, jnp.array(False))
    exact = jnp.array(context.partition.exact_on_conjugate)

    def body(search: Search) -> Search:
        proposal = curve.within(search.next_radius)
        needed = gradients.ok & (proposal.large | ~exact | (search.trials > 0))
        result = _compare(curve, loss_info, proposal, gradients.scale, needed)
        widening = (search.trials > 0) & search.result.accepted
        better = result.accepted & (result.reduction > search.result.reduction)
        best, best_result = _choose(~widening | better, (proposal, result), (search.proposal, search.result))
        following = _resized(proposal, result, context)
        # Widen while each radius gains more than the last; shrink until one is accepted.
        larger = exact & result.grows & jnp.where(widening, better, search.trials == 0)
        is_open = needed & (larger | ~(widening | result.accepted))
        return Search(best, best_result, following, search.trials + 1, is_open)

    def is_open(search: Search) -> jax.Array:
        return search.is_open & (search.trials < context.options.constants.radius_trials)

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(curve.within, radius))
    return lax.while_loop(is_open, body, Search(nothing, uncompared, radius, none, jnp.array(True)))


def _compare(curve: Curve, loss_info: LossInfo, proposal: Proposal, scale: jax.Array, needed: jax.Array) -> Acceptance:
    """Compare the reduction of the loss that a step promises with the actual one on its own draws, where ``needed``.

    For a conjugate model a step of size ρ reduces the loss by at least KL(q ‖ q₊)/ρ, which is the prediction. Steps
    below the noise of the loss are accepted if their KL is exact; otherwise they must not increase the loss by more
    than that.
    """
    context = curve.context

    def evaluate(_: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        params, _ = curve.end(proposal.rho)
        return jnp.array(False), loss_info.loss - loss_info.loss_at(params), finite(params)

    # A loop of one trip or none: a batch of fits evaluates the loss only if one of them needs it.
    not_evaluated = needed, jnp.zeros_like(loss_info.loss), jnp.array(True)
    _, actual, ok = lax.while_loop(lambda found: found[0], evaluate, not_evaluated)
    result = trust_region.accept(
        actual,
        jnp.sum(proposal.kl.predicted) / scale,
        large=proposal.large,
        limited=proposal.limited,
        floor=_floor(context),
        constants=context.options.constants,
    )
    compared = needed & (proposal.large | (not context.partition.exact_on_conjugate))
    return result._replace(accepted=ok & (~compared | result.accepted), grows=compared & result.grows)


def _floor(context: Context) -> jax.Array:
    return trust_region.comparison_floor(context.partition.latents, context.options.constants)


def _resized(proposal: Proposal, result: Acceptance, context: Context) -> jax.Array:
    kl, limited, constants = jnp.sum(proposal.kl.forward), proposal.limited, context.options.constants
    return trust_region.resize(
        proposal.radius, result, kl=kl, limited=limited, floor=_floor(context), constants=constants
    )


def finish(
    gradients: NaturalGradients,
    statistics: Statistics,
    search: Search,
    end: End,
    context: Context,
    state: NaturalGradientState,
) -> NaturalGradientState:
    """Take the step or skip it, and update what later steps depend on."""
    ok, constants, proposal, partition = gradients.ok, context.options.constants, search.proposal, context.partition
    taken = ok & search.result.accepted & finite(end.params)
    start = fresh(state, partition, constants)
    noise = _choose(ok, _after_step(statistics, proposal, taken, context, state), state.statistics)
    noise = _finite_or(noise, start.statistics)
    radius = proposal.radius
    if context.options.adaptive and partition.paired:
        resized = _resized(proposal, search.result._replace(accepted=taken), context)
        radius = _finite_or(_choose(ok, resized, state.radius), start.radius)
    params = _choose(taken, end.params, state.params)
    average = jnp.where(taken, step_size.average_weight(context.options, noise), 0.0)
    weights = StepWeights(jnp.where(taken, proposal.rho, 0.0), statistics.estimate.weight, average)
    decrement = newton_decrement.observe(state.decrement, statistics.norms, statistics.estimate.noise, weights)
    decrement = _finite_or(_choose(ok, decrement, state.decrement), start.decrement)
    current = step_size.current_noise(noise, constants)
    remaining = newton_decrement.newton_decrement(decrement, current, noise.window)
    if partition.local and not partition.blocks:  # rows are not compared, and only an independent check judges them
        remaining = jnp.zeros_like(radius), jnp.zeros_like(radius)
    # The natural gradient of a skipped step stays in the running means if it was finite. If it is not, twice in a row
    # with a finite gradient, it may be the running means that make it so.
    kept = _choose(gradients.stuck, start.memory, state.memory)
    memory = _choose(taken, end.memory, _choose(ok, statistics.memory, kept))
    return NaturalGradientState(
        params,
        _averaged(state.average, params, partition, average),
        _finite_or(memory, start.memory),
        noise,
        decrement,
        radius,
        _choose(taken, end.fallback, state.fallback),
        state.seed,
        _info(gradients, statistics.estimate, proposal, taken, remaining, state.info),
    )


def _after_step(
    statistics: Statistics, proposal: Proposal, taken: jax.Array, context: Context, state: NaturalGradientState
) -> NoiseStatistics:
    """The statistics after the step was tried: stationary steps are counted, and windows shrink with distance."""
    constants, partition = context.options.constants, context.partition
    distant = constants.forgetting_kl * partition.latents * partition.batch_weight
    noise = newton_decrement.visible_noise(state.decrement, statistics.estimate.noise)
    predicted = newton_decrement.predicted_mean(state.decrement, noise)
    running_mean = statistics.norms.visible_norms()[0]
    counted = step_size.count_stationary(statistics.noise, predicted, running_mean, noise, constants)
    return _choose(taken, step_size.forget(counted, distant, jnp.sum(proposal.kl.forward)), counted)


def _averaged(average: Params, params: Params, partition: Partition, newest: jax.Array) -> Params:
    """The running mean of the iterates; of the fallback optimizer's parameters, the last iterate."""
    moved = (params for block in partition.blocks for params in block.step_size_params)
    weights = {p: weight for params, weight in zip(moved, jnp.unstack(newest), strict=True) for p in params}

    def mean(old: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
        weight = jnp.expand_dims(weight, tuple(range(weight.ndim, old.ndim)))
        return old + (weight * (new - old)).astype(old.dtype)

    owned = {p: x for p, x in params.items() if p in weights}
    each = {p: jax.tree.map(lambda _, w=weights[p]: w, x) for p, x in owned.items()}
    rows = {p: average[p] for p in partition.local.params} if partition.local else {}
    return {**params, **rows, **map_stacked(mean, {p: average[p] for p in owned}, owned, each)}


def _info(
    gradients: NaturalGradients,
    estimate: NoiseEstimate,
    proposal: Proposal,
    taken: jax.Array,
    remaining: tuple[jax.Array, jax.Array],
    old: StepInfo,
) -> StepInfo:
    square = jnp.sum(gradients.squared_norms)
    fractions = gradients.squared_norms / jnp.maximum(square, jnp.finfo(square.dtype).tiny)
    known = lambda x: jnp.where(jnp.isfinite(x), x, 0.0)
    new = StepInfo(
        kl=jnp.where(taken, jnp.sum(proposal.kl.forward), 0.0),
        natural_gradient_norm=known(jnp.sqrt(square)),
        step_size=known(jnp.where(taken, jnp.sqrt(jnp.sum(fractions * proposal.rho**2)), 0.0)),
        signal=known(jnp.sum(fractions * estimate.signal)),
        radius=proposal.radius,
        newton_decrement=remaining[0],
        newton_decrement_error=remaining[1],
        limited=proposal.limited & taken,
        skipped=~taken,
        skipped_total=old.skipped_total + ~taken,
    )
    return jax.tree.map(lambda x, before: jnp.asarray(x, before.dtype), new, old)


def _choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    old, structure = jax.tree.flatten(no)
    new = jax.tree.leaves(yes)
    changed = [n for n, (a, b) in enumerate(zip(new, old, strict=True)) if a is not b]
    select = lambda a, b: lax.select_n(condition, b, lax.convert_element_type(a, b.dtype))
    found = map_stacked(select, [new[n] for n in changed], [old[n] for n in changed])
    for n, x in zip(changed, found, strict=True):
        old[n] = x
    return jax.tree.unflatten(structure, old)


def _finite_or(tree: Any, start: Any) -> Any:
    """The tree, or all of ``start`` if one of its numbers is not finite."""
    return _choose(finite(tree), tree, start)


def _stack(terms: Iterable[jax.Array]) -> jax.Array:
    """One number for each step size, as an array, from those of every block."""
    return jnp.concatenate([*map(jnp.ravel, terms), jnp.zeros(1)])[:-1]  # there may be none


def _split(numbers: jax.Array, partition: Partition) -> list[jax.Array]:
    """The numbers of every block: a scalar, or as many as it has step sizes."""
    ends = list(accumulate(block.count for block in partition.blocks))
    parts = zip(partition.blocks, ends, strict=True)
    return [numbers[end - 1] if block.count == 1 else numbers[end - block.count : end] for block, end in parts]
