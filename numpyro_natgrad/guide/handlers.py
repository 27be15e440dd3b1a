# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The file that knows NumPyro's effects: what can be heard in the loss, and what can be changed in it.

``SVI.update`` hands an optimizer one function, ``fn(params) -> (loss, mutable_state)``: the loss at unconstrained
parameters, with this step's draws and data closed over. It runs NumPyro primitives, so a handler around the *call* of
``fn`` sees every site of guide and model. Three handlers:

* :class:`TraceHandler` tags parameters, draws and densities, for :mod:`.provenance` to follow;
* :class:`PathGradient` lets a Gaussian site's density depend on the parameters through the draw alone:

      ∇_φ E[f(z) + log q_φ(z)]  =  E[∇_z (f + log q)(z_φ(ε)) ∂z_φ(ε)],     because E[∇_φ log q_φ(z)] = 0 at fixed z
  (Roeder, Wu & Duvenaud 2017, "sticking the landing");
* :class:`Frozen` freezes the draws, silences the model and puts another density in the place of log q: with lengths
  (:mod:`.surrogate`) the loss becomes the KL that a small step moves the guide, which is what the Fisher matrix says.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.lax import stop_gradient
from numpyro import distributions as dist
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.kl import kl_divergence
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer.util import is_identically_one
from numpyro.primitives import Messenger

from numpyro_natgrad.distributions.surrogate import (
    Density,
    FisherEstimate,
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
    base_shape,
    closed_form_kl,
    distribution_arguments,
    is_masked,
    is_reparameterized,
    is_wrapper,
    map_base,
    owns_parameters,
    with_broadcast_loc,
    with_log_prob,
    without_flow_inverse,
)
from numpyro_natgrad.errors import StructureError
from numpyro_natgrad.guide.provenance import tag

Loss = Callable[[dict[str, Any]], tuple[jax.Array, Any]]


class ParamSite(NamedTuple):
    """A ``numpyro.param`` site: the bijection to its constrained value, and that value's shape (``None``: a tree)."""

    transform: Any
    shape: tuple[int, ...] | None


class ModelSite(NamedTuple):
    """A sample site of the model, at its value: observed, drawn by the guide, or a point of it (``AutoDelta``).

    :ivar base: the class of the distribution under its wrappers.
    :ivar size: numbers in its value.
    :ivar params: the parameters that its density, or its value, is computed from.
    :ivar observed: its value is data.  :ivar point: its value is computed from parameters.
    :ivar drawn: its density depends on draws of the guide.
    :ivar weight: how many rows of the whole data set one row stands for; ``None`` where that is not known.
    :ivar divergence: how its Fisher is got.
    """

    base: Any
    size: int
    params: frozenset[str]
    observed: bool
    point: bool
    drawn: bool
    weight: float | None
    divergence: FisherEstimate


class DrawnSite(NamedTuple):
    """A latent sample site of the guide, as it is met; see :class:`.GuideSite`."""

    base: Any
    shape: tuple[int, ...]
    batch: tuple[int, ...]
    event_size: int
    elements: int
    draw_size: int
    arguments: tuple[str, ...]
    reparameterized: bool
    weight: float | None
    plain: bool
    masked: bool
    divergence: FisherEstimate


class TraceHandler(Messenger):
    """Tag every parameter, and every draw, argument and density of the guide's latent sites.

    :param names: the names of all parameters.
    :param opaque: hide the sites' classes, so that no KL is known in closed form.
    :param summed: guide sites that the loss sums over instead of drawing them (``TraceEnum_ELBO``).
    """

    def __init__(self, names: frozenset[str], *, opaque: bool, summed: frozenset[str]) -> None:
        super().__init__()
        self.names, self.opaque, self._known = names, opaque, summed
        self.params: dict[str, ParamSite] = {}
        self.sites: dict[str, DrawnSite] = {}
        self.model_sites: dict[str, ModelSite] = {}
        self.summed: set[str] = set()
        self.enumerated = False
        self.scanned: set[str] = set()
        self._met: set[str] = set()

    def process_message(self, msg: Any) -> None:
        guide_site(msg)
        if _is_enumerated(msg):
            self.enumerated = True
            self.summed |= set() if _is_summed(msg) else {msg["name"]}
            msg["is_guide_site"] = _is_summed(msg) and msg["name"] in self._known
        if msg["type"] == "sample":
            # A scan draws first and sends its messages afterwards. The guide comes before the model, which replays it.
            drawn = msg.get("_control_flow_done", False) and not msg["is_observed"] and not _is_enumerated(msg)
            self.scanned |= {msg["name"]} - self._met if drawn else set()
            self._met.add(msg["name"])

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "param":
            self._param(msg)
        elif msg["type"] == "sample" and msg["name"] in self.names:
            raise StructureError(
                f"the name `{msg['name']}` stands for a parameter and for a sample site, whose draw it would replace; "
                "expected one site for one name; rename one of them."
            )
        elif is_guide_site(msg):
            self._site(msg)
        elif _is_model_site(msg):
            self._model_site(msg)

    def _model_site(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        how = FisherEstimate.MONTE_CARLO if closed_form_kl(fn) is None else FisherEstimate.CLOSED_FORM
        size, observed, weight = jnp.size(msg["value"]), bool(msg["is_observed"]), _weight(msg["scale"])
        self.model_sites[name] = ModelSite(
            type(base_distribution(fn)), size, frozenset(), observed, False, False, weight, how
        )
        tag("value", name, msg["value"])
        tag("modelled", name, fn.log_prob(msg["value"]))

    def _param(self, msg: Any) -> None:
        name = msg["name"]
        transform = biject_to(msg["kwargs"].get("constraint", constraints.real))
        shape = jnp.shape(msg["value"]) if isinstance(msg["value"], jax.Array | float | int) else None
        heard = ParamSite(transform, shape)
        if self.params.get(name, heard).shape != shape:
            raise StructureError(
                f"the name `{name}` stands for parameters of the shapes {self.params[name].shape} and {shape} in guide "
                "and model; expected one site for one name; rename one of them."
            )
        self.params[name] = heard
        msg["value"] = jax.tree.map(lambda x: tag("param", name, x), msg["value"])

    def _site(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        base, value = base_distribution(fn), msg["value"]
        arguments = distribution_arguments(base)
        for argument, x in arguments.items():
            tag("argument", f"{name}/{argument}", x)
        self.sites[name] = DrawnSite(
            type(base),
            base_shape(fn, msg["kwargs"].get("sample_shape", ())),
            base.batch_shape,
            math.prod(base.event_shape),
            math.prod(fn.batch_shape),
            jnp.size(value),
            tuple(arguments),
            is_reparameterized(fn),
            _weight(msg["scale"]),
            _is_plain(fn, msg),
            is_masked(fn),
            FisherEstimate.MONTE_CARLO if closed_form_kl(fn) is None else FisherEstimate.CLOSED_FORM,
        )
        msg["value"] = tag("draw", name, value)
        _tag_score(name, without_flow_inverse(fn, msg["intermediates"]), stop_gradient(msg["value"]))
        if name in self._known:
            return  # summed over, with weights q: no density that a draw carries
        if self.opaque:
            msg["fn"] = Assigned(fn, tag("density", name, fn.log_prob(msg["value"])))
        else:
            msg["fn"] = with_log_prob(fn, lambda *args: tag("density", name, fn.log_prob(*args)))


#: Modes of sites whose particles are told apart.
APART = ("split", "mirrored")


def per_particle(copies: jax.Array, key: jax.Array) -> jax.Array:
    """Row s of ``copies`` in the s-th particle; row 0 where particles are not drawn in one batch.

    A loss averages over particles without showing them. Only a batching rule sees that the function is called for a
    batch, whose size it is given. What the rule returns is an integer, which has no derivative, so that the gather
    below is all that is differentiated.
    """

    @custom_vmap
    def index(key: jax.Array) -> jax.Array:
        return jnp.zeros((), int)

    @index.def_vmap
    def _(size: int, batched: Any, key: jax.Array) -> tuple[jax.Array, bool]:
        # A batch of another size is one of chains or seeds, not of particles.
        return (jnp.arange(size) if size == len(copies) else jnp.zeros(size, int)), True

    return copies[index(key)]


@custom_vmap
def antithetic_key(key: jax.Array) -> jax.Array:
    """The key of a particle's partner: of 2h particles the second half has the keys of the first half.

    A last particle without a partner keeps its key, and so does one outside of a batch.
    """
    return key


@antithetic_key.def_vmap
def _(size: int, batched: Any, keys: jax.Array) -> tuple[jax.Array, bool]:
    half = size // 2
    return jnp.concatenate([keys[:half], keys[:half], keys[2 * half :]]), True


def antithetic_signs(particles: int) -> jax.Array:
    """1 for the first of a pair of particles and for one without a partner, −1 for the second; ``(particles,)``."""
    half = particles // 2
    return jnp.concatenate([jnp.ones(half), -jnp.ones(half), jnp.ones(particles % 2)])


class PathGradient(Messenger):
    """Remove the score term of Gaussian sites.

    :param modes: per site ``"path"`` (log q keeps its gradient through the draw: the path gradient), ``"silent"``
        (log q keeps its value and loses its gradient: what is left is the gradient of −log p), ``"split"`` (the same,
        particle by particle), ``"mirrored"`` (the same, of draws in pairs m ± Kε) or ``"tilted"`` (the path gradient,
        of an exponential family).
    :param taps: for each silent site zeros of the shape of its draw. The gradient of the loss with respect to a tap is
        the *mean of the draws over the particles*: ⟨t, x⟩ is added to log q with its value taken out again. For each
        tilted site zeros of the shape of η: ⟨t, T(x)⟩ is added in the same way, and along the draw. For each site that
        is split or mirrored zeros ``(2, particles, *shape)``, of which every particle has its own: what a silent site
        has, and what is added to the draw, so that the gradient is the draws and the gradients of −log p there, over
        the number of particles.
    :param means: for silent and mirrored sites m, of as many elements as the draw.
    :param stretches: for silent sites a scalar s: draws x of the Gaussian are moved away from m by s(x − m), which is
        no function of any parameter.
    """

    def __init__(
        self,
        modes: Mapping[str, str],
        perturbations: Mapping[str, jax.Array],
        means: Mapping[str, jax.Array] | None = None,
        stretches: Mapping[str, jax.Array] | None = None,
    ) -> None:
        super().__init__()
        self.modes, self.perturbations, self.means, self.stretches = modes, perturbations, means or {}, stretches or {}

    def process_message(self, msg: Any) -> None:
        if not guide_site(msg):
            return
        name = msg["name"]
        if self.modes.get(name) == "mirrored":
            sign = per_particle(antithetic_signs(self.perturbations[name].shape[1]), msg["kwargs"]["rng_key"])
            msg["kwargs"]["rng_key"] = antithetic_key(msg["kwargs"]["rng_key"])
            msg["fn"] = map_base(msg["fn"], lambda base: with_antithetic_draws(base, self.means[name], sign))
        if self.modes.get(name) in APART:
            shift = per_particle(self.perturbations[name][1], msg["kwargs"]["rng_key"])
            msg["fn"] = map_base(msg["fn"], lambda base: with_shifted_draws(base, shift))
        elif name in self.stretches:
            msg["fn"] = map_base(
                msg["fn"], lambda base: with_rescaled_draws(base, self.means[name], self.stretches[name])
            )

    def postprocess_message(self, msg: Any) -> None:
        mode = self.modes.get(msg["name"]) if is_guide_site(msg) else None
        if mode == "path":
            msg["fn"] = map_base(msg["fn"], with_frozen_arguments)
        elif mode == "silent":
            perturbation = self.perturbations[msg["name"]]
            msg["fn"] = map_base(msg["fn"], lambda base: with_detached_log_prob(base, perturbation))
        elif mode in APART:
            perturbation = per_particle(self.perturbations[msg["name"]][0], msg["kwargs"]["rng_key"])
            msg["fn"] = map_base(msg["fn"], lambda base: with_detached_log_prob(base, perturbation))
        elif mode == "tilted":
            perturbation = self.perturbations[msg["name"]]
            msg["fn"] = map_base(msg["fn"], lambda base: with_tilted_log_prob(base, perturbation))


class Frozen(Messenger):
    """Freeze the guide's draws, and let other densities stand for log q, or −log p, at some sites; silence the others.

    :param densities: per guide site ``density(fn, value)``, an array of its batch shape, from its distribution and its
        frozen draw.
    :param modelled: the same for sites of the model, at their value.
    """

    def __init__(self, densities: Mapping[str, Density], model_sites: Mapping[str, Density] | None = None) -> None:
        super().__init__()
        self.densities, self.model_sites = densities, model_sites or {}

    def process_message(self, msg: Any) -> None:
        guide_site(msg)
        msg["is_summed"] = _is_summed(msg)

    def postprocess_message(self, msg: Any) -> None:
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


class Assigned(dist.Distribution):
    """A distribution whose log-density at its one value has been assigned. No KL is registered for it.

    ``drawn``: its draws are frozen, so that it is differentiated like a reparameterised one whatever it is.
    ``measure``: log-weights of a sum over its values; ``TraceEnum_ELBO`` takes them from the expanded distribution.
    """

    def __init__(self, base: Any, density: jax.Array, measure: jax.Array | None = None, *, drawn: bool = False) -> None:
        self.base, self.density, self.measure, self.drawn = base, density, measure, drawn
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.base.support

    @property
    def has_rsample(self) -> bool:
        return self.drawn or bool(self.base.has_rsample)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        return self.base.sample(key, sample_shape)

    def expand(self, batch_shape: tuple[int, ...]) -> Any:
        return super().expand(batch_shape) if self.measure is None else Assigned(self.base, self.measure, drawn=True)

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        return self.density


def log_ratios(guide: Any, key: jax.Array, old: Any, new: Any, args: Any, kwargs: Any) -> jax.Array:
    """log q_old(z) − log q_new(z) at one draw z of q_old, nats; KL itself at sites where NumPyro knows it."""
    drawn = trace(seed(substitute(guide, data=old), key)).get_trace(*args, **kwargs)
    again = trace(seed(substitute(replay(guide, drawn), data=new), key)).get_trace(*args, **kwargs)
    return sum((_log_ratio(site, again[name]) for name, site in drawn.items() if _is_random(site)), jnp.zeros(()))


def _is_random(site: Any) -> bool:
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not isinstance(base_distribution(site["fn"]), dist.Delta)
    )


def _log_ratio(old: Any, new: Any) -> jax.Array:
    try:
        nats = kl_divergence(with_broadcast_loc(old["fn"]), with_broadcast_loc(new["fn"]))
    except NotImplementedError:
        nats = _log_density(old, old["value"]) - _log_density(new, old["value"])
    return jnp.sum(nats if old["scale"] is None else old["scale"] * nats)


def _log_density(site: Any, value: Any) -> jax.Array:
    try:
        return site["fn"].log_prob(value)
    except NotImplementedError:
        raise StructureError(
            f"the guide's site `{site['name']}` ({type(site['fn']).__name__}) has no density at another state's draws: "
            "a flow without an inverse, such as `AutoBNAFNormal`'s. Use a guide that has one (`AutoIAFNormal`)."
        ) from None


def guide_site(msg: Any) -> bool:
    """Mark a message, before it is processed, as one of a site that the guide draws."""
    # This handler is the outermost one: sites of the model that the guide has drawn carry their value by now.
    msg["is_guide_site"] = msg["type"] == "sample" and not msg["is_observed"] and msg["value"] is None
    return bool(msg["is_guide_site"])


def _is_enumerated(msg: Any) -> bool:
    summable = msg["type"] == "sample" and not msg["is_observed"] and msg["value"] is not None
    return summable and msg["infer"].get("enumerate") == "parallel"


def _is_summed(msg: Any) -> bool:
    """Whether the loss sums over a site here; else it replays the guide's, with what the guide's trace wrote down."""
    return _is_enumerated(msg) and "dim_to_name" not in msg["infer"]


def is_guide_site(msg: Any) -> bool:
    """Whether a message has been marked so."""
    return bool(msg.get("is_guide_site", False)) and not isinstance(base_distribution(msg["fn"]), dist.Delta)


def _is_model_site(msg: Any) -> bool:
    known = msg["type"] == "sample" and not msg.get("is_guide_site", False)
    return known and not isinstance(base_distribution(msg["fn"]), dist.Delta | dist.Unit)


def _is_plain(fn: Any, msg: Any) -> bool:
    unscaled = msg["scale"] is None or is_identically_one(msg["scale"])
    while is_wrapper(fn):
        if isinstance(fn, dist.TransformedDistribution) and owns_parameters(fn.transforms):
            return False
        fn = fn.base_dist
    return bool(unscaled)


def _weight(scale: Any) -> float | None:
    """The scale of a site where it is one known number, 1 where there is none, else ``None``."""
    if scale is None:
        return 1.0
    return None if isinstance(scale, jax.core.Tracer) or jnp.ndim(scale) else float(scale)


def _tag_score(name: str, fn: Any, frozen: Any) -> None:
    try:
        tag("score", name, fn.log_prob(frozen))
    except NotImplementedError:  # a flow without an inverse has no density at given draws
        return
