# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The value of the loss, its gradient, and products with its Hessian, all at the draws of one step.

At z = m + Kε, log q does not depend on m. The Hessian of the loss with respect to m is therefore the particles' mean of
∇²f, f = −log p, and by Price's identity the gradient with respect to the covariance:

    ∇_Σ E[f(z)] = ½ E[∇²f(z)],       and a product with E[∇²f] costs one linearized gradient.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from numpyro import distributions as dist

from numpyro_natgrad.estimators.equation_batches import LEAST_BATCH, map_stacked
from numpyro_natgrad.estimators.partial_evaluation import partially_evaluated
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import DensityMode, Frozen, IndependentDraws, Loss, PathGradient

#: Larger losses (nats) are rescaled to this value before natural gradients are squared: 1e28 is far from the limit of
#: single precision, 3e38. At 1e14 nats even double precision resolves only 0.016 nats.
MAX_LOSS = 1e14


#: Numbers up to which vectors, and matrices, are copied to be joined with others. A join gathers what is spread over
#: devices: vectors of latents can be, and factors of covariances are not.
SMALL_VECTOR = 256
SMALL_MATRIX = 4096


class LossInfo(NamedTuple):
    """The loss as the blocks use it.

    :ivar loss: the value of ``fn`` at the current parameters, nats; ``aux`` is its second output.
    :ivar gradient: of the loss, without score terms of Gaussian sites, for each unconstrained parameter.
    :ivar perturbation_gradients: for each detached site the mean of its draws over the particles, ``site.shape``; for
        each per-particle or antithetic site the draws and the gradients of −log p there, over the number of particles,
        ``(2, particles, *site.shape)`` (:class:`.PathGradient`).
    :ivar hessian_product: ``(tangents, stretches={}) -> dict``, linear: the change of the gradient with respect to
        :attr:`GradientRequest.hessian_params` by a change of these parameters, and by stretching the draws of detached
        sites away from their means.
    :ivar hessian_product_per_draw: ``shifts -> dict``, linear: the change of an antithetic site's gradients of −log p,
        over the number of particles, by a shift of every particle's draw; both ``(particles, *site.shape)``.
    :ivar sampled_fisher_product: ``tilts -> dict``, linear, for tilted sites: F̂t, the gradient of ⟨t, T⟩ added to
        log q, with F̂ the draws' own estimate of the Fisher matrix.
    :ivar loss_at: the loss at other parameters and the same draws.
    :ivar forward: whether to differentiate in forward mode only.
    :ivar particles: draws a step; infinity where nothing is drawn.
    """

    loss: jax.Array
    aux: Any
    gradient: Params
    perturbation_gradients: Params
    hessian_product: Callable[..., Params]
    hessian_product_per_draw: Callable[[Params], Params]
    sampled_fisher_product: Callable[[Params], Params]
    loss_at: Callable[[Params], jax.Array]
    fn: Loss
    forward: bool
    particles: float
    previous_step_skipped: jax.Array | bool = False


class GradientRequest(NamedTuple):
    """How the loss is differentiated; static.

    :ivar density_modes: how log q of guide sites enters the gradient.
    :ivar particles: how many draws there are; zero where nothing is drawn.
    :ivar perturbations: shapes of the perturbations of sites (:class:`.PathGradient`).
    :ivar hessian_params: the mean parameters along which there are Hessian-vector products.
    :ivar mean_params: the mean parameter of every detached or antithetic site.
    :ivar score_sites: the sites whose score term is subtracted from the gradient.
    :ivar baselines: the sites whose gradients are score functions, with the numbers of their densities.
    :ivar baseline_copies: sets of independent draws from which their baselines are computed.
    :ivar cache_draws: whether to compute values that do not depend on the parameters once (:mod:`.partial_evaluation`).
    """

    density_modes: Mapping[str, DensityMode]
    particles: int
    perturbations: Mapping[str, tuple[int, ...]]
    hessian_params: tuple[str, ...]
    mean_params: Mapping[str, str]
    score_sites: frozenset[str]
    baselines: Mapping[str, int]
    baseline_copies: int
    forward: bool
    cache_draws: bool

    def sites_in(self, mode: DensityMode) -> list[str]:
        return [site for site, other in self.density_modes.items() if other == mode]


class _Inputs(NamedTuple):
    """The arguments of the differentiated loss: parameters, and zero perturbations and stretches of draws."""

    params: Params
    perturbations: Params
    stretches: Params


class _Directions(NamedTuple):
    """Directions along which the gradient is linearized: parameters, stretches, shifts of antithetic draws, tilts."""

    params: Params
    stretches: Params
    shifts: Params
    tilts: Params

    def padded(self, **directions: Params) -> "_Directions":
        return _Directions(**{name: _padded(directions.get(name, {}), at) for name, at in self._asdict().items()})


LossAndAux = tuple[jax.Array, Any]
ProbedLoss = Callable[[_Inputs], tuple[jax.Array, LossAndAux]]
Products = tuple[Callable[..., Params], Callable[[Params], Params], Callable[[Params], Params]]


def evaluate_loss(fn: Loss, params: Params, request: GradientRequest, particles: float) -> LossInfo:
    """Evaluate the loss once, with its gradient, and linearize the gradient where the request says so."""
    inputs, probed = _inputs(params, request), _probed_loss(fn, request)
    if request.cache_draws:
        probed = partially_evaluated(probed, inputs)
    (loss, aux), gradient, perturbation_gradients, products = _linearized_gradient(probed, inputs, request)
    if request.score_sites:
        score = _score(fn, params, dict.fromkeys(request.score_sites, 1.0), request.forward)
        gradient = jax.tree.map(jnp.subtract, gradient, score)
    if request.baselines:
        score = _score(fn, params, _costs(fn, params, request), request.forward)
        gradient = jax.tree.map(jnp.subtract, gradient, score)
    return LossInfo(
        loss=loss,
        aux=aux,
        gradient=gradient,
        perturbation_gradients=perturbation_gradients,
        hessian_product=products[0],
        hessian_product_per_draw=products[1],
        sampled_fisher_product=products[2],
        loss_at=_loss_at(fn, probed, inputs, request),
        fn=fn,
        forward=request.forward,
        particles=particles,
    )


def _inputs(params: Params, request: GradientRequest) -> _Inputs:
    dtype = jnp.result_type(*jax.tree.leaves(params))
    perturbations = {name: jnp.zeros(shape, dtype) for name, shape in request.perturbations.items()}
    stretches = {site: jnp.zeros((), dtype) for site, mode in request.density_modes.items() if mode.detached}
    return _Inputs(params, perturbations, stretches)


def _probed_loss(fn: Loss, request: GradientRequest) -> ProbedLoss:
    """The loss as a function of all its inputs; the second output, with the loss again, is for ``has_aux``."""

    def probed(inputs: _Inputs) -> tuple[jax.Array, LossAndAux]:
        params, perturbations, stretches = inputs
        means = {site: params[p] for site, p in request.mean_params.items()}
        with PathGradient(request.density_modes, request.particles, perturbations, means, stretches):
            loss, aux = fn(params)
        return loss, (loss, aux)

    return probed


def _linearized_gradient(
    probed: ProbedLoss, inputs: _Inputs, request: GradientRequest
) -> tuple[LossAndAux, Params, Params, Products]:
    """(Loss, aux), the gradients by parameters and by perturbations, and their products along :class:`_Directions`.

    All products are of one linearization: samplers with rejection are compiled, and run, once for all of them.
    """
    antithetic = request.sites_in(DensityMode.ANTITHETIC)
    directions = _Directions(
        {name: inputs.params[name] for name in request.hessian_params},
        inputs.stretches,
        {site: inputs.perturbations[site][1] for site in antithetic},
        {site: inputs.perturbations[site] for site in request.sites_in(DensityMode.TILTED)},
    )

    def gradients(along: _Directions) -> tuple[tuple[Params, Params], tuple[LossAndAux, Params, Params]]:
        shifted = {site: jnp.stack([inputs.perturbations[site][0], x]) for site, x in along.shifts.items()}
        loss = lambda x: probed(_Inputs(x[0], x[1], along.stretches))
        at = {**inputs.params, **along.params}, {**inputs.perturbations, **shifted, **along.tilts}
        (gradient, by_perturbation), out = derivative(loss, request.forward)(at)
        slopes = gradient, {site: by_perturbation[site][1] for site in along.shifts}
        return slopes, (out, gradient, by_perturbation)

    if directions.params or directions.shifts or directions.tilts:
        _, linear, found = jax.linearize(gradients, directions, has_aux=True)
    else:
        (_, found), linear = gradients(directions), lambda tangents: ({}, {})
    return *found, _products(linear, directions)


def _products(linear: Callable, at: _Directions) -> Products:
    def hessian_product(tangents: Params, stretches: Params | None = None) -> Params:
        change = linear(at.padded(params=tangents, stretches=stretches or {}))[0]
        return {p: change[p] for p in at.params}

    return (
        hessian_product,
        lambda shifts: linear(at.padded(shifts=shifts))[1],
        lambda tilts: linear(at.padded(tilts=tilts))[0],
    )


def _loss_at(fn: Loss, probed: ProbedLoss, inputs: _Inputs, request: GradientRequest) -> Callable:
    # ``fn`` alone holds fewer arrays, and has the same value unless draws are antithetic.
    if request.cache_draws or any(mode.in_pairs for mode in request.density_modes.values()):
        return lambda params: probed(inputs._replace(params=params))[0]
    return lambda params: fn(params)[0]


def _padded(tangents: Params, at: Params) -> Params:
    """The tangents with zeros for the other parameters, in the parameters' own types."""
    zero = cache(jnp.zeros)
    cast = lambda x, dtype: x if x.dtype == dtype else x.astype(dtype)
    return {p: cast(tangents[p], x.dtype) if p in tangents else zero(x.shape, x.dtype) for p, x in at.items()}


def _score(fn: Loss, params: Params, weights: Mapping[str, Any], forward: bool) -> Params:
    """∇_φ E[Σ w log q_φ(z)] over densities at frozen draws: zero in expectation, but noisy."""

    def weighted(w: Any) -> Callable[[dist.Distribution, jax.Array], jax.Array]:
        return lambda fn, value: jnp.reshape(w, fn.batch_shape if jnp.ndim(w) else ()) * fn.log_prob(value)

    def log_q(values: Params) -> tuple[jax.Array, None]:
        with Frozen({name: weighted(w) for name, w in weights.items()}):
            return fn(values)[0], None

    return derivative(log_q, forward)(params)[0]


def _costs(fn: Loss, params: Params, request: GradientRequest) -> Params:
    """What each score in the gradient is multiplied by, at independent draws: the baseline of its site.

    A score function c ∇ log q, with c the loss as far as it depends on the draw, has the noise E[c²] and not Var(c),
    and c has the size of the loss. Since E[∇ log q] = 0, c − b has the same mean for any b that does not depend on the
    draw (Mnih & Rezende 2016). The mean of c at n other draws is such a b: the noise becomes (1 + 1/n) Var(c), which is
    zero where the guide is the posterior. An array of zeros added to log q has the gradient c.
    """

    def shifted(shifts: Params) -> tuple[jax.Array, None]:
        def drawn(number: jax.Array) -> jax.Array:
            with IndependentDraws(number, shifts):
                return fn(params)[0]

        return jnp.mean(jax.vmap(drawn)(jnp.arange(request.baseline_copies))), None

    dtype = jnp.result_type(*jax.tree.leaves(params))
    zeros = {name: jnp.zeros(size, dtype) for name, size in request.baselines.items()}
    return derivative(shifted, request.forward)(zeros)[0]


def rescale_loss(loss_info: LossInfo, modes: Mapping[str, DensityMode]) -> tuple[LossInfo, jax.Array]:
    """The derivatives of ``scale`` times the loss, so that squared natural gradients are finite in single precision.

    :return: the rescaled derivatives (the value is unchanged), and the scale: 1 up to :data:`MAX_LOSS` nats. (A
        log-linear model may start with rates of e^50.)
    """
    scale = jnp.minimum(1.0, MAX_LOSS / jnp.abs(loss_info.loss))
    scaled = lambda tree: map_stacked(lambda x: (scale * x).astype(x.dtype), tree)
    # Of (draws, gradients) only the gradients are scaled.
    own = {name for name, mode in modes.items() if mode.per_particle}
    by_perturbation = {
        name: jnp.stack([x[0], scaled(x[1])]) if name in own else x
        for name, x in loss_info.perturbation_gradients.items()
    }
    return loss_info._replace(
        gradient=scaled(loss_info.gradient),
        perturbation_gradients=by_perturbation,
        hessian_product=lambda *tangents: scaled(loss_info.hessian_product(*tangents)),
        hessian_product_per_draw=lambda shifts: scaled(loss_info.hessian_product_per_draw(shifts)),
    ), scale


def derivative(function: Callable, forward: bool) -> Callable:
    return (jax.jacfwd if forward else jax.grad)(function, has_aux=True)


def finite(tree: Any) -> jax.Array:
    """Whether all numbers of a tree are finite; small arrays are joined, which costs one kernel instead of many."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    is_small = lambda x: jnp.size(x) <= (SMALL_MATRIX if jnp.ndim(x) > 1 else SMALL_VECTOR)
    small, large = ([x for x in leaves if is_small(x) == wanted] for wanted in (True, False))
    kinds: dict[Any, list[Any]] = {}
    for x in small:
        kinds.setdefault((jnp.shape(x), jnp.result_type(x)), []).append(x)
    alike = ([jnp.stack(xs)] if len(xs) >= LEAST_BATCH else xs for xs in kinds.values())
    stacks = [jnp.ravel(x) for xs in alike for x in xs]
    joined = [jnp.concatenate(stacks)] if stacks else []
    return jnp.isfinite(sum((jnp.sum(x * 0) for x in large + joined), jnp.zeros(())))


def zero_unless(ok: jax.Array, tree: Any) -> Any:
    """The tree, or zeros where ``ok`` is false: an eigensolver that meets a NaN would never return."""
    return jax.tree.map(lambda x: lax.select(ok, x, jnp.zeros_like(x)), tree)
