# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""An independent estimate of the expected remaining gain, nats: the cross-validated Newton decrement.

    ½ g_Aᵀ H⁻¹ g_B,      g_A, g_B: gradients of the loss at independent halves of fresh draws,  H: Hessian of the loss

Nothing is shared with the steps: neither draws, nor Fisher matrices, nor damping. The gradient and the Hessian are
those of all unconstrained parameters of guide and model together. Since the halves are independent, the noise of the
gradients adds nothing to the mean. A Hessian of negative curvature, or a real reduction of the loss along the Newton
step, on other draws, refutes convergence whatever the quadratic model says.
"""

import copy
import math
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from numpyro.infer.svi import SVIState

from numpyro_natgrad.compilation.data import Arguments, Constants, Data, SameArrays, types
from numpyro_natgrad.compilation.devices import fetch, placed_like
from numpyro_natgrad.compilation.initial import without_validation
from numpyro_natgrad.compilation.programs import in_background
from numpyro_natgrad.estimators.relative_moves import Mirrored, moved, no_move, owned, path_sites, relative_sites
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.low_rank_sites import LowRankSite
from numpyro_natgrad.guide.trace import trace_loss
from numpyro_natgrad.infer.arguments import initialised
from numpyro_natgrad.infer.convergence import Judgement
from numpyro_natgrad.infer.fisher import _loss
from numpyro_natgrad.infer.judge_rule import (
    JUDGE,
    LENGTHS,
    MOST_CHUNKS,
    USUAL_DRAWS,
    Hessian,
    NewtonStep,
    combined,
    newton_step,
    plan_after,
)
from numpyro_natgrad.infer.krylov import flattest_direction
from numpyro_natgrad.infer.nonfinite import nonfinite_site

#: Minibatches that a judgement needs: two independent halves with a standard error each.
MIN_HELD = 4
#: The first number that is folded into the key of the run; the draws are then independent of those of the steps.
JUDGE_KEY = 0x6A756467
#: Chunks that are computed before the first of them is read, for their memory.
_IN_FLIGHT = 16
#: What pairs are drawn for.
_SLOPES, _HESSIAN, _REDUCTIONS = 0, 1, 2
EPS = float(np.finfo(np.float64).eps)
_MEAN_OVER_PARTICLES = (Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)


class _Pairs(NamedTuple):
    """A chunk of groups of pairs of draws.

    The compiled program makes its keys: outside, ``random.split`` would be compiled anew for each number of chunks.

    :ivar key: of the judgement; each pair folds its own number into it, from ``purpose`` and ``number``, that of the
        chunk.
    :ivar batches: minibatches of the groups, ``(chunk, …)``, or ``()``.
    """

    key: jax.Array
    purpose: int
    number: int
    batches: Arguments


class Judge:
    """Judges parameters of one ``SVI``; its program is compiled at the first call, or by :meth:`compile`.

    :param data: the arguments of model and guide; those of a minibatch follow.
    :param batch: arguments of one minibatch, or ``()``.
    """

    def __init__(self, svi: SVI, mutable_state: Any, params: Params, data: Data, batch: Arguments = ()) -> None:
        self.svi, self.data = _single_particle(initialised(svi)), data
        self.mutable_state = mutable_state
        self.vectorized = bool(getattr(svi.loss, "vectorize_particles", True))
        # Under ``eval_shape`` no operation is compiled on its own.
        jax.eval_shape(partial(self._read, batch=batch, data=data), params, jax.eval_shape(random.key, 0))
        self._programs: dict[Any, Future[Any]] = {}  # by places of parameters; shared with copies for other data
        self._last: list[tuple[Any, Judgement]] = []  # with what was judged; shared likewise
        self._cause: str | None = None

    def _read(self, params: Params, key: jax.Array, batch: Arguments, data: Data) -> None:
        """Read model and guide, for parameters that are tracers; only what does not depend on them is kept."""
        found = trace_loss(self._fn(params, key, batch, data), params)
        self.path = path_sites(found)
        self.rough = sorted(name for name, s in found.sites.items() if s.is_score_function)
        self.row_weight = max([1.0, *(s.weight or 1.0 for s in found.sites.values())])
        self.sites = relative_sites(found)
        # A Hessian at fewer pairs than latents that vary together is singular, and its inverse noise.
        together = max([1, *(s.rank if isinstance(s, LowRankSite) else s.block_size for s in self.sites)])
        needed = math.ceil(JUDGE.latent_pairs * together / JUDGE.chunk_pairs)
        self.hessian_chunks = max(needed, JUDGE.min_chunks)
        zero = no_move(params, self.sites)
        self._like = jax.eval_shape(lambda: zero)
        leaves = jax.tree.leaves(self._like)
        self.size, self.dtype = sum(x.size for x in leaves), jnp.result_type(*leaves)
        mine = [owned(p, self.sites) for p, x in sorted(zero.items()) for _ in jax.tree.leaves(x)]
        self._relative = np.repeat(mine, [x.size for x in leaves])

    # ---- the program -------------------------------------------------------------------------------------------------

    def compile(self, params: Params, key: jax.Array, batches: Arguments = ()) -> None:
        """Trace the program and start to compile it, unless that was done before.

        :param batches: stacked arguments of at least one minibatch, or ``()``.
        """
        if (place := types(params)) not in self._programs:
            example = self._pairs(key, batches, _SLOPES, 1)[0]
            zeros, score = self._move(params, np.zeros(self.size)), np.zeros((), self.dtype)
            traced = jax.jit(self._slopes).trace(params, zeros, score, example, self.data)
            self._programs[place] = in_background(traced)

    def of(self, data: Data) -> "Judge":
        """The judge for other data of the same shapes, with the same program."""
        other = copy.copy(self)
        other.data, other._cause = data, None
        return other

    def _fn(
        self, params: Params, key: jax.Array, batch: Arguments, data: Data
    ) -> Callable[[Params], tuple[jax.Array, Any]]:
        args, kwargs = data.arguments()
        return _loss(self.svi, params, SVIState(params, self.mutable_state, key), args + batch, kwargs)

    def _slopes(
        self, params: Params, x: Params, score: jax.Array, pairs: _Pairs, data: Data
    ) -> tuple[jax.Array, Params]:
        """Losses ``(groups, pairs, 2)`` and mean gradients ``(groups, …)`` after a move x.

        :param score: 1 to include the score term of the gradient, 0 for path gradients.
        """
        signs = jnp.array([1.0, -1.0], self.dtype)
        first = JUDGE_KEY + (pairs.purpose * MOST_CHUNKS + pairs.number) * JUDGE.chunk_pairs
        number = jnp.arange(JUDGE.chunk_pairs).reshape(JUDGE.chunk, JUDGE.group)
        keys = jax.vmap(jax.vmap(partial(random.fold_in, pairs.key)))(first + number)

        def group(inputs: tuple[jax.Array, Arguments]) -> tuple[jax.Array, Params]:
            keys, batches = inputs

            def mean(x: Params) -> tuple[jax.Array, jax.Array]:
                values = moved(params, x, self.sites)

                def one(key: jax.Array, sign: jax.Array) -> jax.Array:
                    with Mirrored(self.path, sign, score):
                        return self._fn(values, key, batches, data)(values)[0]

                both = lambda key: self._each(lambda sign: one(key, sign), signs)
                losses = self._each(both, keys)
                return jnp.mean(losses), losses

            slope, losses = jax.grad(mean, has_aux=True)(x)
            return losses, slope

        return lax.map(group, (keys, pairs.batches))

    def _each(self, function: Callable, inputs: jax.Array) -> Any:
        return jax.vmap(function)(inputs) if self.vectorized else lax.map(function, inputs)

    # ---- the judgement -----------------------------------------------------------------------------------------------

    def __call__(
        self, params: Params, key: jax.Array, tolerance: float, batches: Arguments = (), draws: float = USUAL_DRAWS
    ) -> Judgement:
        """Judge unconstrained parameters by fresh draws, as many as it takes to compare the gain with ``tolerance``.

        :param draws: the most draws for the gradients, above the least number of :class:`JudgeConstants`.
        """
        found = self._examine(params, key, tolerance, batches, draws)
        is_final = not (number_held(batches) or found.required)
        self._last[:] = [(SameArrays((params, self.data.inputs)), found)] if is_final else []
        return found

    def last(self, params: Params) -> Judgement | None:
        """The last judgement, if it decided about these very arrays: fit and verdict then give the same number."""
        return next((x for judged, x in self._last if judged.are((params, self.data.inputs))), None)

    def _examine(self, params: Params, key: jax.Array, tolerance: float, batches: Arguments, draws: float) -> Judgement:
        self.compile(params, key, batches)
        rule, held = JUDGE, number_held(batches)
        rows = min(math.ceil(rule.row_pairs * self.row_weight / rule.chunk_pairs), rule.kept_chunks // 2)
        chunks = max(rule.min_chunks, 2 * math.ceil(held / rule.chunk / 2), 2 * rows)
        pairs = partial(self._pairs, key, batches)
        losses, slopes = self._evaluate(params, np.zeros(self.size), 0.0, pairs(_SLOPES, chunks))
        hessian: Hessian | None = None
        while True:
            problem = self._problem(params, losses, slopes, key, batches)
            if problem is not None:
                return problem
            if hessian is None:
                least = max(math.ceil(held / rule.chunk), rows)
                common = pairs(_HESSIAN, max(least, self.hessian_chunks))
                hessian = self._hessian(params, common, max(least, min(self.hessian_chunks, rule.min_chunks)))
            if not math.isfinite(hessian.least):
                return _unknown(losses.size, 0, "derivatives of the loss are not finite")
            count = len(losses) // rule.chunk
            newton = newton_step(slopes, hessian)
            found = newton.judgement(losses.size)
            plan = plan_after(count, newton.noise, tolerance, draws, bool(held))
            # To measure reductions takes eight times as long as all before: not while noise hides what the model says.
            if newton.is_flat or found.is_known(tolerance, rule.errors) or (plan.is_last and not tolerance):
                others = pairs(_REDUCTIONS, min(count, rule.kept_chunks) // 2)
                found = self._measured(params, newton, hessian, others, found)
            if found.is_known(tolerance, rule.errors):
                return found
            if plan.is_last:
                return found._replace(required=plan.required)
            more, apart = plan.more, plan.more * count <= rule.kept_chunks
            extra = pairs(_SLOPES, more * count, count)
            each = 1 if apart else (more - 1) * len(losses) // len(slopes)
            parts = self._evaluate(params, np.zeros(self.size), 0.0, extra, each)
            losses = np.concatenate([losses, parts[0]])
            slopes = np.concatenate([slopes, parts[1]]) if apart else (slopes + (more - 1) * parts[1]) / more

    def _problem(
        self, params: Params, losses: np.ndarray, slopes: np.ndarray, key: jax.Array, batches: Arguments
    ) -> Judgement | None:
        """Why there is no estimate of the gain."""
        count, lost = losses.size, int(np.sum(~np.isfinite(losses)))
        if lost:
            return _unknown(count, lost, self._culprit(params, key, batches))
        if self.rough:
            names = ", ".join(f"`{name}`" for name in self.rough)
            cause = f"draws of {names} are not differentiable, so that the loss has no Hessian"
            return _unknown(count, 0, cause)._replace(abstains=True)
        return None if np.isfinite(slopes).all() else _unknown(count, 0, "derivatives of the loss are not finite")

    def _measured(
        self,
        params: Params,
        newton: NewtonStep,
        hessian: Hessian,
        others: list[_Pairs],
        found: Judgement,
    ) -> Judgement:
        """The judgement of the quadratic model, corrected by reductions of the loss at ``others``.

        Noise in a gradient is largest, in nats, where the curvature is least, and a gradient that happens to have no
        component there looks exact. So the loss is measured along the flattest direction too.
        """
        unit = math.sqrt(max(abs(hessian.least), JUDGE.flat))
        along = [(newton.longest, newton.is_flat), (hessian.flattest / unit, hessian.least < -JUDGE.flat)]
        moves = [(s * t * v, falls) for v, falls in along for t in LENGTHS for s in (1, -1)]
        at = lambda move: self._evaluate(params, -move, 0.0, others)[0].mean((1, 2))
        reductions = at(0 * newton.longest)[:, None] - np.stack([at(move) for move, _ in moves], axis=1)
        return combined(found, reductions, np.array([x for _, x in moves]))

    def _hessian(self, params: Params, pairs: list[_Pairs], few: int) -> Hessian:
        """Products with H, and a direction of little or negative curvature.

        Conjugate gradients from the gradient miss a saddle whose direction is orthogonal to it, as by symmetry.

        :param few: chunks that suffice where H is not inverted.
        """
        product = lambda v, scale: self._product(params, v, scale, pairs[:few])
        scale = self._scales(product)
        if not np.isfinite(scale).all():
            return Hessian(lambda v: v, scale, np.zeros(self.size), math.nan)
        start = np.random.default_rng(1).standard_normal(self.size) / np.sqrt(scale)
        flattest = flattest_direction(lambda v: product(v, scale), start, scale, JUDGE.flat_products)
        return Hessian(lambda v: self._product(params, v, scale, pairs), scale, *flattest)

    def _pairs(self, key: jax.Array, batches: Arguments, purpose: int, end: int, begin: int = 0) -> list[_Pairs]:
        """Independent pairs; the groups go round the minibatches, so that those of even and odd number differ."""
        held, chunk = number_held(batches), JUDGE.chunk
        each = [np.arange(i * chunk, (i + 1) * chunk) % max(held, 1) for i in range(begin, end)]
        held_by = [jax.tree.map(lambda b, i=i: b[i], batches) for i in each]
        return [_Pairs(key, purpose, begin + k, x) for k, x in enumerate(held_by)]

    def _evaluate(
        self, params: Params, x: np.ndarray, score: float, pairs: list[_Pairs], each: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses and gradients of the groups; the gradients are means over so many chunks that follow each other."""
        program, move = self._programs[types(params)].result(), self._move(params, x)
        run = lambda chunk: program(params, move, np.asarray(score, self.dtype), chunk, self.data)
        losses: list[Any] = []
        means: list[np.ndarray] = []
        for begin in range(0, len(pairs), _IN_FLIGHT):
            for some, slopes in fetch([run(chunk) for chunk in pairs[begin : begin + _IN_FLIGHT]]):
                flat, is_first = _flat(slopes), len(losses) % each == 0
                if is_first:
                    means.append(flat.astype(np.float64))
                else:
                    means[-1] += flat
                losses.append(some)
        return np.concatenate(losses).astype(np.float64), np.concatenate(means) / each

    def _move(self, params: Params, x: np.ndarray) -> Params:
        """The vector x as a tree, spread over devices as the parameters are."""
        leaves, tree = jax.tree.flatten(self._like)
        parts = np.split(np.asarray(x, self.dtype), np.cumsum([leaf.size for leaf in leaves])[:-1])
        shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        return placed_like(jax.tree.unflatten(tree, shaped), params)

    def _product(self, params: Params, v: np.ndarray, scale: np.ndarray, pairs: list[_Pairs]) -> np.ndarray:
        """Hv by a difference of gradients at common draws, which needs no second derivatives of the model."""
        step = float(np.finfo(self.dtype).eps) ** JUDGE.difference / math.sqrt(max(v @ (scale * v), EPS))
        ahead, behind = (self._evaluate(params, s * step * v, 1.0, pairs, len(pairs))[1].mean(0) for s in (1, -1))
        return (ahead - behind) / (2 * step)

    def _scales(self, product: Callable) -> np.ndarray:
        """The root mean square of each row of H, from random vectors: an upper bound of its diagonal entry.

        In relative moves of Gaussian sites it is at least 1, the guide's own Fisher matrix. The scale
        of other parameters is found first, by smaller steps.
        """
        random_ = np.random.default_rng(0)
        probes = random_.choice([-1.0, 1.0], (JUDGE.probes, self.size))
        scale = np.ones(self.size)
        for chosen in ([] if self._relative.all() else [~self._relative] * 2) + [np.ones(self.size, bool)]:
            rows = np.sqrt(np.mean([product(v * chosen, scale) ** 2 for v in probes], axis=0))
            scale = np.where(chosen, np.maximum(rows, EPS + 1e-6 * rows.max()), scale)
        return np.where(self._relative, np.maximum(scale, 1.0), scale)

    def _culprit(self, params: Params, key: jax.Array, batches: Arguments) -> str:
        if self._cause is None:  # named once: another program has to be compiled for it
            args, kwargs = self.data.arguments()
            args += jax.tree.map(lambda x: x[0], batches)
            self._cause = nonfinite_site(self.svi, self.svi.constrain_fn(params), key, args, kwargs)
        return self._cause


def _flat(groups: Params) -> np.ndarray:
    """The leaves of a tree, of a row for each group, side by side."""
    return np.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(groups)], axis=1)


def _unknown(draws: int, lost: int, cause: str) -> Judgement:
    return Judgement(gain=math.nan, error=math.nan, saddle=False, draws=draws, nonfinite=lost, cause=cause)


def number_held(batches: Arguments) -> int:
    """How many minibatches are stacked."""
    return next((len(x) for x in jax.tree.leaves(batches)), 0)


def _single_particle(svi: SVI) -> SVI:
    """A copy whose loss takes one draw, if the loss is a mean over particles."""
    svi = copy.copy(svi)
    svi.guide = without_validation(svi.guide)
    if isinstance(svi.loss, _MEAN_OVER_PARTICLES):
        svi.loss = copy.copy(svi.loss)
        svi.loss.num_particles = 1
    return svi


#: The last judge of every ``SVI``, with what it was compiled for: ``verdict`` uses that of ``fit``.
_JUDGES: "weakref.WeakKeyDictionary[SVI, tuple[Any, Judge]]" = weakref.WeakKeyDictionary()


def judge_of(svi: SVI, mutable_state: Any, params: Params, data: Data, batch: Arguments = ()) -> Judge:
    """A judge of this ``SVI`` for these arguments: the last one if its program holds for them, else a new one."""
    parts = Constants(None, (svi.model, svi.guide, svi.loss))
    key = parts, types(batch), data.signature()
    known = _JUDGES.get(svi)
    if known is None or mutable_state is not None or known[0] != key:
        known = _JUDGES[svi] = key, Judge(svi, mutable_state, params, data, batch)
    return known[1].of(data)
