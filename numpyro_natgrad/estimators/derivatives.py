# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What one step learns from the loss: its value, its gradient, and products with its Hessian.

Everything is a view of the same stochastic function ``fn`` at the same draws. With z = m + Kε, log q does not depend
on m along the draws, so the Hessian of the loss with respect to m *is* the particles' mean of ∇²f (Price's identity
says that this is what the covariance needs), and products with it cost one linearised gradient.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_natgrad.estimators.partial_evaluation import partially_evaluated
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import DensityMode, Frozen, Loss, PathGradient

#: Nats beyond which a loss says nothing but where to flee: double precision can hardly tell its nats apart.
MAX_LOSS = 1e14


class LossInfo(NamedTuple):
    """What the families may use.

    :ivar loss: the loss at the current parameters, nats.
    :ivar aux: ``fn``'s second output.
    :ivar gradient: of the loss (score terms of Gaussian sites removed), per unconstrained parameter.
    :ivar means: for each silent site, the mean of its draws over the particles, ``site.shape``; for each split one, of
        every particle its draw and the gradient of −log p there, over their number, ``(2, particles, *site.shape)``.
    :ivar push: directional derivative of the gradient, linear: tangents of any of the means that asked for it in, and
        by how much the draws of sites are stretched away from their means (the others stay where they are); of those
        means' gradients out.
    :ivar push_draws: the same draw by draw, linear: of mirrored sites a shift of every particle's draw in,
        ``(particles, *site.shape)``; of the gradients of −log p there, over the number of particles, out.
    :ivar tilt: for exponential families, linear: ⟨t, T⟩ added to log q in, its part of the gradient out: F̂t, with F̂ the
        draws' own estimate of the Fisher.
    :ivar value: the loss at other parameters and the same draws.
    :ivar fn: the loss function itself.
    :ivar forward: forward-mode differentiation.
    :ivar particles: draws a step; infinity where nothing is drawn.
    :ivar stuck: the step before was skipped; what is finite now is to be made use of.
    """

    loss: jax.Array
    aux: Any
    gradient: Params
    means: dict[str, jax.Array]
    hessian_product: Callable[..., Params]
    hessian_product_per_draw: Callable[[Params], Params]
    tilt: Callable[[Params], Params]
    value: Callable[[Params], jax.Array]
    fn: Loss
    forward: bool
    particles: float
    stuck: jax.Array | bool = False


class GradientRequest(NamedTuple):
    """How the loss is to be looked at.

    :ivar modes: how sites with a path gradient are seen (:class:`.PathGradient`).
    :ivar taps: per silent site the shape of its draw, per split or mirrored site ``(2, particles, *shape)``, per tilted
        site that of its natural parameters.
    :ivar curved: the means along which Hessian products are asked (empty: none).
    :ivar centers: the mean of every silent or mirrored site.
    :ivar scored: the sites whose score term is subtracted from the gradient.
    :ivar forward: forward-mode differentiation.
    :ivar keep: hold on to what does not depend on the parameters (:mod:`.partial_evaluation`), the draws above all.
    """

    modes: Mapping[str, DensityMode]
    perturbations: Mapping[str, tuple[int, ...]]
    hessian_params: tuple[str, ...]
    centers: Mapping[str, str]
    scored: frozenset[str]
    forward: bool
    keep: bool


def evaluate_loss(fn: Loss, params: Params, request: GradientRequest, particles: float) -> LossInfo:
    """Evaluate the loss once, with its gradient, and linearise the gradient along the parameters that ask for it."""
    dtype = jnp.result_type(*jax.tree.leaves(params))
    perturbations = {name: jnp.zeros(shape, dtype) for name, shape in request.perturbations.items()}
    still = {site: jnp.zeros((), dtype) for site, mode in request.modes.items() if mode == DensityMode.DETACHED}

    def view(inputs: tuple[Params, Params, Params]) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        values, probes, by = inputs
        with PathGradient(request.modes, probes, {site: values[p] for site, p in request.centers.items()}, by):
            loss, aux = fn(values)
        return loss, (loss, aux)

    viewed = partially_evaluated(view, (params, perturbations, still)) if request.keep else view

    def slope(hessian_params: Params, stretch: Params, moved: Params) -> tuple[tuple[Params, Params], Any]:
        along = derivative(lambda inputs: viewed((*inputs, stretch)), request.forward)
        shifted = {site: jnp.stack([perturbations[site][0], x]) for site, x in moved.items()}
        (gradient, means), out = along(({**params, **hessian_params}, {**perturbations, **shifted}))
        slopes = {name: gradient[name] for name in hessian_params}, {site: means[site][1] for site in moved}
        return slopes, (gradient, means, out)

    hessian_params = {name: params[name] for name in request.hessian_params}
    moved = {site: perturbations[site][1] for site, mode in request.modes.items() if mode == DensityMode.ANTITHETIC}
    if hessian_params or moved:
        _, linear, (gradient, means, (loss, aux)) = jax.linearize(slope, hessian_params, still, moved, has_aux=True)
    else:
        _, (gradient, means, (loss, aux)) = slope(hessian_params, still, moved)
        linear = lambda tangents, by, shifts: (tangents, shifts)
    hessian_product, hessian_product_per_draw = (
        _product(linear, hessian_params, still, moved),
        _product_of_draws(linear, hessian_params, still, moved),
    )
    if request.scored:
        gradient = jax.tree.map(jnp.subtract, gradient, score(fn, params, request))
    tilted = {name: perturbations[name] for name, mode in request.modes.items() if mode == DensityMode.TILTED}
    seen = lambda inputs: viewed((*inputs, still))
    tilt = _tilt(seen, params, perturbations, tilted, request.forward) if tilted else lambda tangents: tangents
    # But for mirrors a view changes gradients only. Where draws are not kept the bare loss holds fewer arrays.
    same = request.keep or DensityMode.ANTITHETIC in request.modes.values()
    value = (lambda values: seen((values, perturbations))[0]) if same else (lambda values: fn(values)[0])
    return LossInfo(
        loss,
        aux,
        gradient,
        means,
        hessian_product,
        hessian_product_per_draw,
        tilt,
        value,
        fn,
        request.forward,
        particles,
    )


def rescale_loss(loss_info: LossInfo, modes: Mapping[str, DensityMode]) -> tuple[LossInfo, jax.Array]:
    """The evidence of ``share`` times the loss, so that squares of natural gradients are numbers in single precision.

    Rates of a log-linear model are e^50 where it starts, and a fit has to get away from there. The share is 1 up to
    :data:`HUGE` nats.

    :param modes: of the sites with a path gradient, as in :class:`Views`.
    """
    share = jnp.minimum(1.0, MAX_LOSS / jnp.abs(loss_info.loss))
    scaled = lambda tree: jax.tree.map(lambda x: (share * x).astype(x.dtype), tree)
    means = {
        name: jnp.stack([x[0], scaled(x[1])]) if name in modes and modes[name].per_particle else x
        for name, x in loss_info.means.items()
    }
    hessian_product = lambda *tangents: scaled(loss_info.hessian_product(*tangents))
    hessian_product_per_draw = lambda shifts: scaled(loss_info.hessian_product_per_draw(shifts))
    gradient = scaled(loss_info.gradient)
    return loss_info._replace(
        gradient=gradient,
        means=means,
        hessian_product=hessian_product,
        hessian_product_per_draw=hessian_product_per_draw,
    ), share


def _product(linear: Callable, hessian_params: Params, still: Params, moved: Params) -> Callable[..., Params]:
    def hessian_product(tangents: Params, by: Params | None = None) -> Params:
        return linear(_completed(tangents, hessian_params), _completed(by or {}, still), _completed({}, moved))[0]

    return hessian_product


def _product_of_draws(
    linear: Callable, hessian_params: Params, still: Params, moved: Params
) -> Callable[[Params], Params]:
    return lambda shifts: linear(_completed({}, hessian_params), _completed({}, still), _completed(shifts, moved))[1]


def _tilt(viewed: Callable, params: Params, perturbations: Params, tilted: Params, forward: bool) -> Callable:
    def slope(tilts: Params) -> Params:
        return derivative(viewed, forward)((params, {**perturbations, **tilts}))[0][0]

    _, linear = jax.linearize(slope, tilted)
    return lambda tangents: linear(_completed(tangents, tilted))


def _completed(tangents: Params, at: Params) -> Params:
    """Zeros for what a family does not move, in the parameters' own types."""
    return {p: tangents[p].astype(x.dtype) if p in tangents else jnp.zeros_like(x) for p, x in at.items()}


def derivative(function: Callable, forward: bool) -> Callable:
    """Gradient (first) and auxiliary output of a function, in the mode of differentiation asked for."""
    return (jax.jacfwd if forward else jax.grad)(function, has_aux=True)


def score(fn: Loss, params: Params, request: GradientRequest) -> Params:
    """∇_φ E[log q_φ(z)] at frozen draws: zero in expectation, and no small part of a gradient's noise."""

    def log_q(values: Params) -> tuple[jax.Array, None]:
        with Frozen(dict.fromkeys(request.scored, lambda site, value: site.log_prob(value))):
            return fn(values)[0], None

    return derivative(log_q, request.forward)(params)[0]


def finite(tree: Any) -> jax.Array:
    """Whether every number in a tree is finite."""
    return jnp.isfinite(sum((jnp.sum(jnp.abs(x) * 0) for x in jax.tree.leaves(tree)), jnp.zeros(())))


def zero_unless(ok: jax.Array, tree: Any) -> Any:
    """The tree, or zeros: what follows a failure must not meet a NaN (an eigensolver would never return)."""
    return jax.tree.map(lambda x: lax.select(ok, x, jnp.zeros_like(x)), tree)
