# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""NumPyro effect handlers that change the loss which ``SVI.update`` hands to an optimizer.

That loss is a function ``fn(params) -> (loss, mutable_state)`` of the unconstrained parameters, which closes over the
draws and data of the step. A handler around the *call* of ``fn`` processes every site of guide and model:

* :class:`PathGradient` lets a Gaussian site's density depend on the parameters through the draw alone::

      ∇_φ E[f(z) + log q_φ(z)]  =  E[∇_z (f + log q)(z_φ(ε)) ∂z_φ(ε)],     because E[∇_φ log q_φ(z)] = 0 at fixed z

  (Roeder, Wu & Duvenaud 2017, "sticking the landing");
* :class:`Frozen` freezes the draws and replaces log q and log p by other densities, such as Fisher surrogates
  (:mod:`.surrogate`).
"""

import math
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.lax import stop_gradient
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.kl import kl_divergence
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.primitives import Messenger

from numpyro_natgrad.distributions.surrogate import (
    Density,
    with_antithetic_draws,
    with_detached_log_prob,
    with_frozen_arguments,
    with_rescaled_draws,
    with_shifted_draws,
    with_tilted_log_prob,
    zero_density,
)
from numpyro_natgrad.distributions.wrappers import (
    base_distribution,
    map_base,
    with_broadcast_loc,
    with_log_prob,
    without_flow_inverse,
)
from numpyro_natgrad.options import StructureError

Params = dict[str, Any]
Loss = Callable[[Params], tuple[jax.Array, Any]]
#: A message of NumPyro's effect handlers, :data:`numpyro.primitives.Message`.
Message = dict[str, Any]


class DensityMode(StrEnum):
    """How log q of a guide site enters the gradient."""

    PATH = "path"  #: through the draw alone (path gradient)
    DETACHED = "detached"  #: not at all: log q keeps its value, and the gradient is that of −log p
    DETACHED_PAIRS = "detached_pairs"  #: detached, with draws in pairs m ± Kε
    PER_PARTICLE = "per_particle"  #: detached, with a gradient for each particle
    ANTITHETIC = "antithetic"  #: per particle, with draws in pairs m ± Kε
    TILTED = "tilted"  #: through the draw and an exponential tilting of the family

    @property
    def per_particle(self) -> bool:
        """Whether every particle has a perturbation of its own."""
        return self in (DensityMode.PER_PARTICLE, DensityMode.ANTITHETIC)

    @property
    def in_pairs(self) -> bool:
        """Whether draws come in antithetic pairs."""
        return self in (DensityMode.DETACHED_PAIRS, DensityMode.ANTITHETIC)

    @property
    def detached(self) -> bool:
        """Whether all particles share one perturbation, beside a log q that keeps its value."""
        return self in (DensityMode.DETACHED, DensityMode.DETACHED_PAIRS)

    @property
    def centered(self) -> bool:
        """Whether the mean of the site is needed."""
        return self.detached or self == DensityMode.ANTITHETIC


def mark_guide_site(msg: Message) -> bool:
    """Mark the message of a site that the guide draws, before NumPyro processes it."""
    # The caller is the outermost handler: sites of the model that the guide has drawn have a value by now.
    msg["is_guide_site"] = msg["type"] == "sample" and not msg["is_observed"] and msg["value"] is None
    return bool(msg["is_guide_site"])


def is_guide_site(msg: Message) -> bool:
    """Whether :func:`mark_guide_site` has marked a message, and its site is not a ``Delta``."""
    return bool(msg.get("is_guide_site", False)) and not isinstance(base_distribution(msg["fn"]), dist.Delta)


def is_enumerated(msg: Message) -> bool:
    """Whether a message carries all values of a discrete site."""
    summable = msg["type"] == "sample" and not msg["is_observed"] and msg["value"] is not None
    return summable and msg["infer"].get("enumerate") == "parallel"


def is_summed(msg: Message) -> bool:
    """Whether the loss sums over a site here; a replayed site of the guide has a ``dim_to_name`` from its trace."""
    return is_enumerated(msg) and "dim_to_name" not in msg["infer"]


def per_particle(copies: jax.Array, key: jax.Array) -> jax.Array:
    """Row s of ``copies`` in the s-th particle; row 0 where particles are not drawn in one batch.

    A loss averages over particles by ``vmap``, or over copies of its particles by two, and only a batching rule knows
    their sizes. The rule returns integers, so that only the indexing with them is differentiated.
    """

    def index(shape: tuple[int, ...]) -> jax.Array:
        # A batch of another size is one of chains or seeds, not of particles.
        n = math.prod(shape)
        return jnp.arange(n).reshape(shape) if n == len(copies) else jnp.zeros(shape, int)

    return copies[_over_particles(len(copies), lambda shape, keys: index(shape))(key)]


def antithetic_key(particles: int, key: jax.Array) -> jax.Array:
    """A particle's own key, or in the second half of a batch (but for an unpaired last one) that of its partner."""

    def paired(shape: tuple[int, ...], keys: jax.Array) -> jax.Array:
        if not shape:
            return keys
        flat = keys.reshape(-1, *keys.shape[len(shape) :])
        half = len(flat) // 2
        return jnp.concatenate([flat[:half], flat[:half], flat[2 * half :]]).reshape(keys.shape)

    return _over_particles(particles, paired)(key)


def _over_particles(particles: int, function: Callable, shape: tuple[int, ...] = ()) -> Callable:
    """``function(shape, keys)`` of the keys of all particles, whose batch shape is found by the rules of ``vmap``.

    As long as a batch has too few particles, and so many batches would have all of them, it waits for another ``vmap``.
    """

    @custom_vmap
    def apply(keys: jax.Array) -> jax.Array:
        return function(shape, keys)

    @apply.def_vmap
    def _(size: int, batched: list[bool], keys: jax.Array) -> tuple[jax.Array, bool]:
        larger = (size, *shape)
        n = math.prod(larger)
        waits = n < particles and particles % n == 0
        return _over_particles(particles, function, larger)(keys) if waits else function(larger, keys), True

    return apply


def antithetic_signs(particles: int) -> jax.Array:
    """−1 for the second particle of each pair, 1 for all others; ``(particles,)``."""
    half = particles // 2
    return jnp.concatenate([jnp.ones(half), -jnp.ones(half), jnp.ones(particles % 2)])


class PathGradient(Messenger):
    """Remove the score term of guide sites from the gradient, and add perturbations that probe the gradient.

    A perturbation is an array of zeros. Its cotangent, the gradient of the loss with respect to it, is

    * of a detached site (``site.shape``) the mean of the draws over the particles: ⟨perturbation, x⟩ is added to the
      gradient of log q, not to its value;
    * of a tilted site (the shape of η) the gradient along η: ⟨perturbation, T(x)⟩ is added in the same way, and along
      the draw;
    * of a per-particle or antithetic site (``(2, particles, *site.shape)``) the draws and the gradients of −log p at
      them, over the number of particles: the first half acts as at a detached site, the second is added to the draws.

    :param modes: the density mode of every site that has one.
    :param particles: how many draws there are, if some come in pairs.
    :param perturbations: of every detached, tilted, per-particle or antithetic site.
    :param means: of detached and antithetic sites m, of as many elements as the draw; where there is none, an
        antithetic site has the mean of its distribution.
    :param stretches: of detached sites a scalar s: draws x of the Gaussian become x + s(x − m), where s(x − m) depends
        on no parameter.
    """

    def __init__(
        self,
        modes: Mapping[str, DensityMode],
        particles: int,
        perturbations: Mapping[str, jax.Array],
        means: Mapping[str, jax.Array] | None = None,
        stretches: Mapping[str, jax.Array] | None = None,
    ) -> None:
        super().__init__()
        self.modes, self.particles, self.perturbations = modes, particles, perturbations
        self.means, self.stretches = means or {}, stretches or {}

    def process_message(self, msg: Message) -> None:
        if not mark_guide_site(msg):
            return
        name = msg["name"]
        mode = self.modes.get(name)
        if mode and mode.in_pairs:
            key = msg["kwargs"]["rng_key"]
            sign = per_particle(antithetic_signs(self.particles), key)
            msg["kwargs"]["rng_key"] = antithetic_key(self.particles, key)
            mean = lambda base: self.means.get(name, base.mean)
            msg["fn"] = map_base(msg["fn"], lambda base: with_antithetic_draws(base, mean(base), sign))
        if mode and mode.per_particle:
            shift = per_particle(self.perturbations[name][1], msg["kwargs"]["rng_key"])
            msg["fn"] = map_base(msg["fn"], lambda base: with_shifted_draws(base, shift))
        elif name in self.stretches:
            msg["fn"] = map_base(
                msg["fn"], lambda base: with_rescaled_draws(base, self.means[name], self.stretches[name])
            )

    def postprocess_message(self, msg: Message) -> None:
        mode = self.modes.get(msg["name"]) if is_guide_site(msg) else None
        if mode is None:
            return
        if mode == DensityMode.PATH:
            msg["fn"] = map_base(msg["fn"], with_frozen_arguments)
            return
        perturbation = self.perturbations[msg["name"]]
        if mode.per_particle:
            perturbation = per_particle(perturbation[0], msg["kwargs"]["rng_key"])
        change = with_tilted_log_prob if mode == DensityMode.TILTED else with_detached_log_prob
        msg["fn"] = map_base(msg["fn"], lambda base: change(base, perturbation))


class Frozen(Messenger):
    """Freeze the guide's draws and replace log q and −log p by other densities, which are zero where none is given.

    :param densities: for guide sites ``density(fn, value)``, of the batch shape, from distribution and frozen draw.
    :param model_sites: the same for sites of the model, at their value.
    """

    def __init__(self, densities: Mapping[str, Density], model_sites: Mapping[str, Density] | None = None) -> None:
        super().__init__()
        self.densities, self.model_sites = densities, model_sites or {}

    def process_message(self, msg: Message) -> None:
        mark_guide_site(msg)
        msg["is_summed"] = is_summed(msg)

    def postprocess_message(self, msg: Message) -> None:
        if msg["type"] != "sample":
            return
        fn, measure = msg["fn"], None
        if msg["is_summed"]:
            density = self.densities.get(msg["name"], zero_density)(fn, msg["value"])
            measure = stop_gradient(fn.log_prob(msg["value"]))
        elif is_guide_site(msg):
            msg["value"] = stop_gradient(msg["value"])
            fn = without_flow_inverse(fn, msg["intermediates"])
            density = self.densities.get(msg["name"], zero_density)(fn, msg["value"])
        else:
            density = -self.model_sites.get(msg["name"], zero_density)(fn, msg["value"])
        msg["fn"] = Assigned(fn, density, measure, drawn=True)


class IndependentDraws(Messenger):
    """Draw the guide's sites anew, and add an array of zeros to the log-densities of some.

    :param number: which of the independent draws.
    :param shifts: for each of these sites the array, of as many elements as it has densities.
    """

    def __init__(self, number: jax.typing.ArrayLike, shifts: Mapping[str, jax.Array] | None = None) -> None:
        super().__init__()
        self.number, self.shifts = number, shifts or {}

    def process_message(self, msg: Message) -> None:
        if mark_guide_site(msg) and "rng_key" in msg["kwargs"]:
            msg["kwargs"]["rng_key"] = jax.random.fold_in(msg["kwargs"]["rng_key"], self.number)

    def postprocess_message(self, msg: Message) -> None:
        if is_guide_site(msg) and msg["name"] in self.shifts:
            fn, shift = msg["fn"], self.shifts[msg["name"]].reshape(msg["fn"].batch_shape)
            msg["fn"] = with_log_prob(fn, lambda *args: fn.log_prob(*args) + shift)


def with_copies(fn: Loss, copies: int) -> Loss:
    """The mean of the loss over so many independent draws of the guide, for each draw of its own."""
    if copies == 1:
        return fn

    def mean(params: Params) -> tuple[jax.Array, None]:
        def drawn(number: jax.Array) -> jax.Array:
            with IndependentDraws(number):
                return fn(params)[0]

        return jnp.mean(jax.vmap(drawn)(jnp.arange(copies))), None

    return mean


class Assigned(dist.Distribution):
    """A distribution with an assigned log-density at its one value, and without a registered KL.

    :param base: the distribution whose value it is.
    :param density: the log-density at that value, of the batch shape.
    :param measure: log-weights of a sum over its values; ``TraceEnum_ELBO`` takes them from the expanded distribution.
    :param drawn: its draws are frozen, so that the loss may treat it as reparameterized.
    """

    def __init__(
        self, base: dist.Distribution, density: jax.Array, measure: jax.Array | None = None, *, drawn: bool = False
    ) -> None:
        self.base, self.density, self.measure, self.drawn = base, density, measure, drawn
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return self.base.support

    @property
    def has_rsample(self) -> bool:
        return self.drawn or bool(self.base.has_rsample)

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        return self.base.sample(key, sample_shape)

    def expand(self, batch_shape: tuple[int, ...]) -> dist.Distribution:
        return super().expand(batch_shape) if self.measure is None else Assigned(self.base, self.measure, drawn=True)

    def log_prob(self, value: jax.Array, intermediates: Any = None) -> jax.Array:
        return self.density


def log_ratios(
    guide: Callable, key: jax.Array, old: Params, new: Params, args: tuple[Any, ...], kwargs: Params
) -> jax.Array:
    """log q_old(z) − log q_new(z) at one draw z of q_old, nats; KL itself at sites where NumPyro knows it."""
    drawn = trace(seed(substitute(guide, data=old), key)).get_trace(*args, **kwargs)
    again = trace(seed(substitute(replay(guide, drawn), data=new), key)).get_trace(*args, **kwargs)
    return sum((_log_ratio(site, again[name]) for name, site in drawn.items() if _is_random(site)), jnp.zeros(()))


def _is_random(site: Message) -> bool:
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not isinstance(base_distribution(site["fn"]), dist.Delta)
    )


def _log_ratio(old: Message, new: Message) -> jax.Array:
    try:
        nats = kl_divergence(with_broadcast_loc(old["fn"]), with_broadcast_loc(new["fn"]))
    except NotImplementedError:
        nats = _log_density(old, old["value"]) - _log_density(new, old["value"])
    return jnp.sum(nats if old["scale"] is None else old["scale"] * nats)


def _log_density(site: Message, value: jax.Array) -> jax.Array:
    try:
        return site["fn"].log_prob(value)
    except NotImplementedError:
        raise StructureError(
            f"the guide's site `{site['name']}` ({type(site['fn']).__name__}) has no density at another state's draws: "
            "a flow without an inverse, such as `AutoBNAFNormal`'s. Use a guide that has one (`AutoIAFNormal`)."
        ) from None
