# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""The registry of Fisher matrices in closed form: exponential families, and metrics that are stated directly.

    q(z) = h(z) exp(⟨η, T(z)⟩ − A(η))      natural parameters η, log normalizer A
    E[T] = ∇A,    F_η = ∇²A,    KL(q_η ‖ q_η') = A(η') − A(η) − ⟨∇A(η), η' − η⟩

An exponential family is stated by η as a function of NumPyro's arguments, by A, and by the arguments as a function of
η. Its mean, Fisher matrix and KL follow by automatic differentiation.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpyro.distributions import Distribution

from numpyro_natgrad.distributions.gaussian import positive_ratio, scaled_cholesky_solve

Arguments = dict[str, jax.Array]
Metric = Callable[[Arguments, Arguments], jax.Array]

#: Gauss–Legendre nodes on (0, 1) for the KL of a step, which is the integral of its second derivative: the difference
#: of log normalizers cancels in float32 (0.1 nats for two Dirichlets of total concentration 1e5). With 6 nodes the KL
#: of an exponential distribution whose rate changes by a factor r has the relative error 4e-8 for r in [½, 2], 6e-5 for
#: r in [¼, 4] and 3e-3 at r = ⅛, the smallest factor that a step reaches at :data:`.NATURAL_MARGIN`.
QUADRATURE_NODES = 6
#: A natural parameter keeps at least this times ``margin`` of its distance to a bound, the value of
#: :func:`.positive_ratio` for a change that leads exactly to the bound; longer changes keep the same.
KEPT_FRACTION = 0.5

_NODES, _WEIGHTS = (np.asarray(x) for x in np.polynomial.legendre.leggauss(QUADRATURE_NODES))
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


class ExponentialFamily(NamedTuple):
    """An exponential family in η, shape ``(*batch, k)``; the fields are those of :func:`register_exponential_family`.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro import distributions as dist
        >>> family = find_exponential_family(dist.Gamma)
        >>> eta = family.natural(concentration=jnp.array(3.0), rate=jnp.array(2.0))
        >>> print(family.mean(eta)[1])  # E[−z] = −concentration / rate
        -1.5
    """

    natural: Callable[..., jax.Array]
    log_normalizer: Callable[..., jax.Array]
    arguments: Callable[[jax.Array], Arguments]
    lower: ArrayLike = -np.inf
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
        """The Fisher matrix F = ∇²A, ``(*batch, k, k)``."""
        basis = jnp.eye(eta.shape[-1], dtype=eta.dtype)
        return jax.vmap(lambda e: self.product(eta, jnp.broadcast_to(e, eta.shape)), out_axes=-1)(basis)

    def natural_gradient(self, eta: jax.Array, gradient: jax.Array) -> jax.Array:
        """F⁻¹g, ``(*batch, k)``: the natural gradient, which is the gradient with respect to the mean parameters."""
        if self.solve:
            return self.solve(eta, gradient)
        return scaled_cholesky_solve(self.fisher(eta), gradient, damping=float(jnp.finfo(eta.dtype).eps))

    def step(self, eta: jax.Array, change: jax.Array, margin: float) -> jax.Array:
        """η + change, within the bounds: a coordinate keeps at least ½ ``margin`` of its distance to its bound."""
        if self.move:
            return self.move(eta, change, margin)
        lower = jnp.broadcast_to(jnp.asarray(self.lower, eta.dtype), eta.shape)
        bounded = jnp.isfinite(lower)
        distance = jnp.where(bounded, eta - lower, 1.0)
        return jnp.where(
            bounded, jnp.where(bounded, lower, 0.0) + positive_step(distance, change, margin), eta + change
        )

    def kl(self, eta: jax.Array, change: jax.Array) -> jax.Array:
        """KL(q_η ‖ q_η+Δ) and KL(q_η+Δ ‖ q_η) for Δ = ``change``, in nats, summed over the batch; ``(2,)``.

        They are the integrals of (1−t) ΔᵀF(η+tΔ)Δ and of t ΔᵀF(η+tΔ)Δ over t from 0 to 1.
        """

        def squared_norm(t: jax.Array) -> jax.Array:
            return jnp.sum(change * self.product(eta + t * change, change))

        squared_norms = jax.lax.map(squared_norm, jnp.asarray(_NODES, eta.dtype))
        weights = jnp.asarray(np.stack([1 - _NODES, _NODES]) * _WEIGHTS, eta.dtype)
        return jnp.maximum(weights @ squared_norms, 0.0)


_EXPONENTIAL_FAMILIES: dict[type, ExponentialFamily] = {}
_METRICS: dict[type, tuple[Metric, tuple[str, ...]]] = {}


def register_exponential_family(
    cls: type,
    *,
    natural: Callable[..., jax.Array],
    log_normalizer: Callable[..., jax.Array],
    arguments: Callable[[jax.Array], Arguments],
    lower: ArrayLike = -np.inf,
    fixed: tuple[str, ...] = (),
    solve: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    move: Callable[[jax.Array, jax.Array, float], jax.Array] | None = None,
) -> None:
    """Register a distribution class as an exponential family q(z) = h(z) exp(⟨η, T(z)⟩ − A(η)).

    If its arguments are parameters of the guide, steps are taken in η, and a step of size 1 is exact on a conjugate
    model (Hoffman et al. 2013, section 2.3). If its arguments are computed from parameters, the Fisher matrix is JᵀF J,
    with F = ∇²A and J the Jacobian of η.

    :param type cls: the distribution class, without its subclasses. Its ``arg_constraints`` name the arguments.
    :param natural: ``natural(**arguments)`` returns η, a :class:`jax.Array` of shape ``(*batch, k)``. It may be any
        affine function of natural parameters.
    :param log_normalizer: ``log_normalizer(eta, **fixed_arguments)`` returns A, shape ``batch``, in nats.
    :param arguments: ``arguments(eta)`` returns a dict of arguments from which ``cls`` can be constructed.
    :param lower: lower bounds of η, broadcast to ``(k,)``; ``-inf``, the default, where it is unbounded.
    :param tuple fixed: names of the arguments on which A depends and that are not natural parameters, such as a number
        of trials.
    :param solve: ``solve(eta, gradient)`` returns F⁻¹ ``gradient``, shape ``(*batch, k)``, if a formula is more
        accurate than the default, a Cholesky factor of ∇²A.
    :param move: ``move(eta, change, margin)`` returns the new η if the domain is not a product of half-lines. The
        default is η + change within ``lower``.
    :return: None
    :raises TypeError: if ``cls`` is not a class of distributions, or a function is none.
    :raises ValueError: if a name is not an argument of ``cls``.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro import distributions as dist
        >>> from numpyro_natgrad import register_exponential_family
        >>> class Rayleigh(dist.HalfNormal):  # density z σ⁻² exp(−½ z² σ⁻²): η = σ⁻², T = −½ z², A = −log η
        ...     def log_prob(self, value):
        ...         return jnp.log(value) - 2 * jnp.log(self.scale) - 0.5 * (value / self.scale) ** 2
        >>> register_exponential_family(
        ...     Rayleigh,
        ...     natural=lambda scale: scale[..., None] ** -2,
        ...     log_normalizer=lambda eta: -jnp.log(eta[..., 0]),
        ...     arguments=lambda eta: {"scale": eta[..., 0] ** -0.5},
        ...     lower=0.0,
        ... )
        >>> print(find_exponential_family(Rayleigh).fisher(jnp.array([2.0])))  # ∇²A = η⁻²
        [[0.25]]
    """
    functions = {"natural": natural, "log_normalizer": log_normalizer, "arguments": arguments}
    optional = {"solve": solve, "move": move}
    check_registration(cls, fixed, functions | {name: f for name, f in optional.items() if f is not None})
    _EXPONENTIAL_FAMILIES[cls] = ExponentialFamily(natural, log_normalizer, arguments, lower, fixed, solve, move)


def register_fisher(cls: type, metric: Metric, *, fixed: tuple[str, ...] = ()) -> None:
    """Register the Fisher matrix of a distribution class that is not an exponential family.

    :param type cls: the distribution class, without its subclasses.
    :param metric: ``metric(at, d)`` returns dᵀF(at)d, shape ``batch``: the squared Fisher norm, in nats, of a change
        ``d`` of the arguments ``at``. Both are dicts of the arguments from which the distribution was constructed.
    :param tuple fixed: names of the arguments that the metric does not cover. If one of them is computed from
        parameters, the Fisher matrix is estimated from draws.
    :return: None
    :raises TypeError: if ``cls`` is not a class of distributions, or a function is none.
    :raises ValueError: if a name is not an argument of ``cls``.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro import distributions as dist
        >>> from numpyro_natgrad import register_fisher
        >>> class Secant(dist.Cauchy):  # hyperbolic secant: E[s²] = ½, E[(1 + zs)²] = π²/8 at unit scale
        ...     def log_prob(self, value):
        ...         z = (value - self.loc) / self.scale
        ...         return -jnp.log(jnp.pi * self.scale) - jnp.log(jnp.cosh(z))
        >>> register_fisher(
        ...     Secant, lambda at, d: (d["loc"] ** 2 / 2 + d["scale"] ** 2 * jnp.pi**2 / 8) / at["scale"] ** 2
        ... )
        >>> is_registered(Secant)
        True
    """
    check_registration(cls, fixed, {"metric": metric})
    _METRICS[cls] = metric, fixed


def check_registration(cls: Any, arguments: Iterable[str], functions: Mapping[str, Any]) -> None:
    """Refuse what is not a class of distributions, names that are not its arguments, and what is not a function."""
    is_distribution = isinstance(cls, type) and issubclass(cls, Distribution)
    if not is_distribution:
        raise TypeError(f"`cls={cls!r}`: expected a class of distributions, such as `dist.Gamma`.")
    if isinstance(arguments, str) or not set(arguments) <= set(cls.arg_constraints):
        raise ValueError(
            f"{arguments!r}: expected a tuple of arguments of `{cls.__name__}`, some of {list(cls.arg_constraints)}. "
            "They are the names in its `arg_constraints`."
        )
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"`{name}={function!r}`: expected a function.")


def find_exponential_family(cls: type) -> ExponentialFamily | None:
    return _EXPONENTIAL_FAMILIES.get(cls)


def is_registered(cls: type) -> bool:
    """Whether the Fisher matrix of a class is known in closed form."""
    return cls in _EXPONENTIAL_FAMILIES or cls in _METRICS


def fixed_arguments(cls: type) -> tuple[str, ...]:
    """The arguments that the registered Fisher matrix of a class does not cover."""
    if cls in _EXPONENTIAL_FAMILIES:
        return _EXPONENTIAL_FAMILIES[cls].fixed
    return _METRICS[cls][1] if cls in _METRICS else ()


def free_arguments(family: ExponentialFamily, arguments: Arguments) -> Arguments:
    """The arguments from which η is computed."""
    return {name: x for name, x in arguments.items() if name not in family.fixed}


def registered_kl(cls: type, frozen: Arguments, arguments: Arguments) -> jax.Array | None:
    """KL(q_frozen ‖ q_arguments) or its quadratic model, in nats, shape ``batch``; ``None`` for an unknown class."""
    if cls in _EXPONENTIAL_FAMILIES:
        return _bregman_divergence(_EXPONENTIAL_FAMILIES[cls], frozen, arguments)
    if cls in _METRICS:
        return 0.5 * _METRICS[cls][0](frozen, {name: x - frozen[name] for name, x in arguments.items()})
    return None


def _bregman_divergence(family: ExponentialFamily, frozen: Arguments, arguments: Arguments) -> jax.Array:
    fixed = {name: frozen[name] for name in family.fixed}
    old, new = family.natural(**free_arguments(family, frozen)), family.natural(**free_arguments(family, arguments))
    linear = jnp.sum(family.mean(old, **fixed) * (new - old), axis=-1)
    return family.log_normalizer(new, **fixed) - family.log_normalizer(old, **fixed) - linear


def positive_step(value: jax.Array, change: jax.Array, margin: float) -> jax.Array:
    """``value`` + ``change`` for a positive ``value``, kept positive by :func:`.positive_ratio` for any change.

    The result is at least ½ ``margin`` times ``value``. It stays in [√tiny, √max] of the floating-point type, and the
    relative change in ±√max, so that their squares (the Fisher matrix of a rate is η⁻²) neither overflow nor underflow.
    """
    info = jnp.finfo(value.dtype)
    small, large = info.tiny**0.5, info.max**0.5
    ratio = positive_ratio(jnp.clip(change / value, -large, large), margin)
    return jnp.clip(value * jnp.maximum(ratio, KEPT_FRACTION * margin), small, large)
