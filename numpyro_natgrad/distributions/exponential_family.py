# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""The open registry of Fisher matrices in closed form: exponential families, and metrics stated directly.

    q(z) = h(z) exp(⟨η, T(z)⟩ − A(η))      natural parameters η, log normaliser A
    E[T] = ∇A,    F_η = ∇²A,    KL(q_η ‖ q_η') = A(η') − A(η) − ⟨∇A(η), η' − η⟩

An exponential family is stated by η of the arguments, A, and the way back; mean map, Fisher and KL follow by automatic
differentiation. Built-in families (:mod:`.builtin`) take the same way as a user's own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_natgrad.distributions.gaussian import positive_ratio, scaled_cholesky_solve

Arguments = dict[str, jax.Array]

# KL by quadrature of its second derivative along the step: the plain difference of log normalisers cancels in float32
# (two Dirichlets of total concentration 1e5 would come out 0.1 nats apart by rounding alone).
_NODES, _WEIGHTS = (np.asarray(x) for x in np.polynomial.legendre.leggauss(6))
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


class ExponentialFamily(NamedTuple):
    """An exponential family in natural parameters η, shape ``(*batch, k)``.

    :ivar natural: the distribution's arguments, by name, to η. Any affine function of natural parameters will do.
    :ivar log_normalizer: A, of η and of the arguments named in ``fixed``: shape ``batch``.
    :ivar arguments: from η back to arguments that the class can be made from, as a dict.
    :ivar lower: lower bounds of η, broadcast to ``(k,)``; ``-inf`` where it is free.
    :ivar fixed: arguments that A depends on, and that are not parameters (a number of trials).
    :ivar solve: F⁻¹g from η and g, where that is known better than by a Cholesky factor of ∇²A.
    :ivar move: η and a change of it to the point reached, for domains that are no product of half-lines.
    """

    natural: Callable[..., jax.Array]
    log_normalizer: Callable[..., jax.Array]
    arguments: Callable[[jax.Array], Arguments]
    lower: Any = -np.inf
    fixed: tuple[str, ...] = ()
    solve: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    move: Callable[[jax.Array, jax.Array, float], jax.Array] | None = None

    def mean(self, eta: jax.Array, **fixed: jax.Array) -> jax.Array:
        """Mean parameters E[T] = ∇A, ``(*batch, k)``."""
        return jax.grad(lambda x: jnp.sum(self.log_normalizer(x, **fixed)))(eta)

    def product(self, eta: jax.Array, v: jax.Array) -> jax.Array:
        """F v = ∇²A v, ``(*batch, k)``."""
        return jax.jvp(self.mean, (eta,), (v,))[1]

    def fisher(self, eta: jax.Array) -> jax.Array:
        """F = ∇²A, ``(*batch, k, k)``."""
        basis = jnp.eye(eta.shape[-1], dtype=eta.dtype)
        return jax.vmap(lambda e: self.product(eta, jnp.broadcast_to(e, eta.shape)), out_axes=-1)(basis)

    def natural_gradient(self, eta: jax.Array, gradient: jax.Array) -> jax.Array:
        """F⁻¹g: the natural gradient, equal to the gradient with respect to the mean parameters."""
        if self.solve:
            return self.solve(eta, gradient)
        return scaled_cholesky_solve(self.fisher(eta), gradient, damping=float(jnp.finfo(eta.dtype).eps))

    def step(self, eta: jax.Array, change: jax.Array, margin: float) -> jax.Array:
        """η + change, kept inside its bounds: a coordinate loses at most a share of its distance to them."""
        if self.move:
            return self.move(eta, change, margin)
        lower = jnp.broadcast_to(jnp.asarray(self.lower, eta.dtype), eta.shape)
        bounded = jnp.isfinite(lower)
        room = jnp.where(bounded, eta - lower, 1.0)
        return jnp.where(bounded, jnp.where(bounded, lower, 0.0) + positive_step(room, change, margin), eta + change)

    def forward_kl(self, eta: jax.Array, change: jax.Array) -> jax.Array:
        """KL(q_η ‖ q_η+change) in nats, summed over the batch: ∫₀¹ (1−t) Δᵀ F(η+tΔ) Δ dt."""
        return self._along(eta, change, 1 - _NODES)

    def reverse_kl(self, eta: jax.Array, change: jax.Array) -> jax.Array:
        """KL(q_η+change ‖ q_η) in nats, summed over the batch: ∫₀¹ t Δᵀ F(η+tΔ) Δ dt."""
        return self._along(eta, change, _NODES)

    def _along(self, eta: jax.Array, change: jax.Array, weights: np.ndarray) -> jax.Array:
        def speed(t: jax.Array) -> jax.Array:
            return jnp.sum(change * self.product(eta + t * change, change))

        speeds = jax.lax.map(speed, jnp.asarray(_NODES, eta.dtype))
        return jnp.maximum(jnp.asarray(weights * _WEIGHTS, eta.dtype) @ speeds, 0.0)


Metric = Callable[[Arguments, Arguments], jax.Array]
_EXPONENTIAL: dict[type, ExponentialFamily] = {}
_METRIC: dict[type, tuple[Metric, tuple[str, ...]]] = {}


def register_exponential_family(
    cls: type,
    *,
    natural: Callable[..., jax.Array],
    log_normalizer: Callable[..., jax.Array],
    arguments: Callable[[jax.Array], Arguments],
    lower: Any = -np.inf,
    fixed: tuple[str, ...] = (),
    solve: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    move: Callable[[jax.Array, jax.Array, float], jax.Array] | None = None,
) -> None:
    """Make a distribution class known as an exponential family; the fields are those of :class:`Exponential`.

    Where its arguments are parameters of the guide, steps are taken in η, so that a step of length 1 is exact on a
    conjugate model; where they are computed from parameters, F is the pulled back ∇²A.

    :param cls: the distribution class (exactly this class, no subclass). Its ``arg_constraints`` name the arguments.
    """
    _EXPONENTIAL[cls] = ExponentialFamily(natural, log_normalizer, arguments, lower, fixed, solve, move)


def register_fisher(cls: type, metric: Metric, *, fixed: tuple[str, ...] = ()) -> None:
    """Make the Fisher matrix of a distribution class known that is no exponential family.

    :param cls: the distribution class (exactly this class, no subclass).
    :param metric: ``metric(at, d)`` is dᵀF(at)d, of shape ``batch``: the squared Fisher length, in nats, of a change
        ``d`` of the arguments. Both are dicts of the arguments that the distribution was given.
    :param fixed: arguments whose Fisher the metric leaves out. Where one of them is computed from parameters, the
        Fisher is estimated from draws.
    """
    _METRIC[cls] = metric, fixed


def find_exponential_family(cls: type) -> ExponentialFamily | None:
    """The exponential family that a class is registered as."""
    return _EXPONENTIAL.get(cls)


def is_registered(cls: type) -> bool:
    """Whether the Fisher of a class is known in closed form."""
    return cls in _EXPONENTIAL or cls in _METRIC


def fixed_arguments(cls: type) -> tuple[str, ...]:
    """The arguments whose Fisher is not known in closed form."""
    return _EXPONENTIAL[cls].fixed if cls in _EXPONENTIAL else _METRIC[cls][1] if cls in _METRIC else ()


def registered_kl(cls: type, frozen: Arguments, arguments: Arguments) -> jax.Array | None:
    """A function of ``arguments`` whose Hessian at ``frozen`` is the Fisher: KL, or its quadratic model. Nats."""
    if cls in _EXPONENTIAL:
        return _bregman(_EXPONENTIAL[cls], frozen, arguments)
    if cls in _METRIC:
        return 0.5 * _METRIC[cls][0](frozen, {name: x - frozen[name] for name, x in arguments.items()})
    return None


def _bregman(family: ExponentialFamily, frozen: Arguments, arguments: Arguments) -> jax.Array:
    fixed = {name: frozen[name] for name in family.fixed}
    old, new = family.natural(**free_arguments(family, frozen)), family.natural(**free_arguments(family, arguments))
    linear = jnp.sum(family.mean(old, **fixed) * (new - old), axis=-1)
    return family.log_normalizer(new, **fixed) - family.log_normalizer(old, **fixed) - linear


def positive_step(room: jax.Array, change: jax.Array, margin: float) -> jax.Array:
    """A positive number and a change of it to a positive number, whatever the change, and one that has a logarithm.

    No less than half of ``margin`` is left of it.
    """
    info = jnp.finfo(room.dtype)
    small, large = info.tiny**0.5, info.max**0.5
    share = jnp.maximum(positive_ratio(jnp.clip(change / room, -large, large), margin), 0.5 * margin)
    return jnp.clip(room * share, small, large)


def free_arguments(family: ExponentialFamily, arguments: Arguments) -> Arguments:
    """The arguments that η is made of."""
    return {name: x for name, x in arguments.items() if name not in family.fixed}
