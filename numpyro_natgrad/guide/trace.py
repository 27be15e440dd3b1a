# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The parameters of one loss function, its sites of guide and model, and how they depend on each other.

:class:`TraceHandler` finds the sites while the loss is traced, without running it; :mod:`.provenance` finds in the
jaxpr what their values are computed from.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from numpyro import distributions as dist
from numpyro.distributions import biject_to, constraints, transforms
from numpyro.infer.util import is_identically_one
from numpyro.primitives import Messenger

from numpyro_natgrad.distributions import exponential_family
from numpyro_natgrad.distributions.surrogate import FisherEstimate
from numpyro_natgrad.distributions.wrappers import (
    base_distribution,
    base_shape,
    closed_form_kl,
    distribution_arguments,
    is_masked,
    is_reparameterized,
    is_wrapper,
    owns_parameters,
    with_log_prob,
    without_flow_inverse,
)
from numpyro_natgrad.guide.handlers import (
    Assigned,
    Loss,
    Message,
    Params,
    is_enumerated,
    is_guide_site,
    is_summed,
    mark_guide_site,
)
from numpyro_natgrad.guide.provenance import Label, LabelKind, Origin, TaggedValue, Tags, origins, tag
from numpyro_natgrad.options import StructureError

#: Relative rounding error of the factor before log q, which is a product of a few numbers in single precision.
FACTOR_ROUNDING = 1e-4


class ParamSite(NamedTuple):
    """A ``numpyro.param`` site: the bijection to its constrained value, and that value's shape (``None``: a tree)."""

    transform: transforms.Transform
    shape: tuple[int, ...] | None


class ModelSite(NamedTuple):
    """A sample site of the model: observed, drawn by the guide, or a point of the guide (``AutoDelta``).

    :ivar base: the class of the distribution under its wrappers.
    :ivar size: numbers in its value.
    :ivar weight: how many rows of the whole data set one row stands for; ``None`` if unknown.
    :ivar params: the parameters that its density, or its value, is computed from.
    :ivar point: its value is computed from parameters.
    :ivar drawn: its density depends on draws of the guide.
    """

    base: type[dist.Distribution]
    size: int
    observed: bool
    weight: float | None
    fisher_estimate: FisherEstimate
    params: frozenset[str] = frozenset()
    point: bool = False
    drawn: bool = False


class GuideSite(NamedTuple):
    """A latent sample site of the guide. The fields with defaults are known when the whole loss has been traced.

    :ivar shape: shape of the innermost draw, of one particle.
    :ivar batch: batch shape of the base distribution, before it is expanded.
    :ivar event_size: numbers in the base distribution's event.
    :ivar elements: number of densities in its batch.
    :ivar draw_size: numbers in its value, of one particle.
    :ivar weight: the ``scale`` of a subsampled plate: how many draws of the whole data one draw stands for; ``None`` if
        unknown.
    :ivar plates: the names of the plates around it.
    :ivar own_parameters: no parameter in a transform: all of the site's are the base distribution's.
    :ivar plain: the same, and no ``scale``: up to a mask, the base's Fisher matrix is the site's.
    :ivar masked: a mask may exclude some of its densities.
    :ivar arguments: the origin of each argument of the base distribution.
    :ivar density: origin of the density at frozen draws; ``None`` if it has none at given draws.
    :ivar analytic: the loss integrates this site itself (``TraceMeanField_ELBO``, or ``TraceEnum_ELBO`` by summing).
    :ivar leaks: sources of the arguments that the loss depends on by another path than draw and density.
    """

    base: type[dist.Distribution]
    shape: tuple[int, ...]
    batch: tuple[int, ...]
    event_size: int
    elements: int
    draw_size: int
    reparameterized: bool
    weight: float | None
    plates: frozenset[str]
    own_parameters: bool
    plain: bool
    masked: bool
    fisher_estimate: FisherEstimate
    arguments: Mapping[str, Origin]
    density: Origin | None = None
    analytic: bool = False
    leaks: frozenset[Label] = frozenset()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_score_function(self) -> bool:
        """Whether a loss that is unbiased has score functions in the gradients of its parameters."""
        return not (self.reparameterized or self.analytic)

    @property
    def params(self) -> frozenset[str]:
        """The parameters that its density depends on; none if it has no density at given draws."""
        return self.density.params if self.density else frozenset()


class LossTrace(NamedTuple):
    """Parameters and sites of one loss function.

    :ivar sites: the latent sites of the guide.
    :ivar model_sites: the sites of the model; none if the loss sums over a discrete site.
    :ivar full_data: whether every step uses all of the data.
    :ivar batch_weight: the largest known number of rows N/B for which one row of a step stands; at least 1.
    :ivar particles: draws a step; infinity where nothing is drawn.
    :ivar batched: whether all particles are drawn in one batch.
    :ivar is_elbo: whether it is affine in log q, with the factor of an ELBO.
    :ivar factor: how many times an ELBO it is; 1 where that is not known.
    :ivar scanned: sites that the guide draws inside of NumPyro's ``scan``, where only their names are known.
    :ivar loss_params: the parameters that the loss depends on, directly or by draws and densities of the guide.
    """

    params: dict[str, ParamSite]
    sites: dict[str, GuideSite]
    model_sites: dict[str, ModelSite]
    full_data: bool
    batch_weight: float
    particles: float
    batched: bool
    is_elbo: bool
    factor: float
    scanned: frozenset[str]
    loss_params: frozenset[str]


def trace_loss(fn: Loss, params: Params) -> LossTrace:
    """Trace the loss without running it.

    A loss that integrates a site's KL itself is traced a second time without that KL, to find other effects of the
    parameters. A loss that enumerates sites is traced a second time, when the guide's sites among them are known.

    :raises StructureError: if a parameter's name is taken twice.
    """
    handler, total, tags = _traced(fn, params, opaque=False)
    if handler.enumerated:
        handler, total, tags = _traced(fn, params, opaque=False, enumerated=frozenset(handler.enumerated))
    found = {name: site for name, site in handler.guide_sites.items() if Label(LabelKind.DRAW, name) in tags}
    analytic = {name for name in found if Label(LabelKind.DENSITY, name) not in total.sources}
    without_kl = _traced(fn, params, opaque=True)[1] if analytic else total
    sites = {
        name: _with_origins(name, site, tags, without_kl)._replace(analytic=name in analytic)
        for name, site in found.items()
    }
    draws = {name: tags[Label(LabelKind.DRAW, name)] for name in found if name not in handler.enumerated}
    counts = [draw.size // max(found[name].draw_size, 1) for name, draw in draws.items()]
    # Origins are unknown behind sums over values, and for draws inside of a scan, which have no tags.
    hidden = handler.enumerated or handler.enumerates or handler.scanned
    factor = 1.0 if hidden else _factor(without_kl, sites, draws)
    weights = [s.weight for s in handler.model_sites.values()] + [s.weight for s in sites.values()]
    return LossTrace(
        params=handler.params,
        sites=sites,
        model_sites={} if hidden else _model_sites_with_origins(handler.model_sites, tags),
        full_data=all(weight is not None and weight <= 1 for weight in weights),
        batch_weight=max([1.0, *(weight for weight in weights if weight is not None)]),
        particles=max(counts, default=math.inf),
        batched=all(draw.batched for draw in draws.values()),
        is_elbo=total.degree <= 1 and factor == 1.0,
        factor=factor,
        scanned=frozenset(handler.scanned),
        loss_params=_params_behind(total, tags),
    )


def _traced(
    fn: Loss, params: Params, *, opaque: bool, enumerated: frozenset[str] = frozenset()
) -> tuple["TraceHandler", Origin, Tags]:
    handler = TraceHandler(frozenset(params), opaque=opaque, enumerated=enumerated)

    def loss(values: Params) -> jax.Array:
        with handler:
            return fn(values)[0]

    return handler, *origins(loss, params)


def _factor(total: Origin, sites: Mapping[str, GuideSite], draws: Mapping[str, TaggedValue]) -> float:
    """How many times an ELBO the loss is: the factor before log q, times the particles of which an ELBO is a mean."""
    for name, site in sites.items():
        factor = total.factors.get(Label(LabelKind.DENSITY, name))
        if factor is not None and site.weight:
            times = factor * (draws[name].size // max(site.draw_size, 1)) / site.weight
            if not math.isclose(times, 1.0, rel_tol=FACTOR_ROUNDING):
                return times
    return 1.0


def _params_behind(total: Origin, tags: Tags) -> frozenset[str]:
    """The parameters that a value depends on, also those behind the draws and densities that it depends on."""
    found: frozenset[Label] = frozenset()
    behind = total.sources
    while behind - found:
        found |= behind
        behind = frozenset().union(*(tags[label].origin.sources for label in behind if label in tags))
    return frozenset(label.name for label in found if label.kind == LabelKind.PARAM)


def _with_origins(name: str, site: GuideSite, tags: Tags, total: Origin) -> GuideSite:
    arguments = {a: tags[Label(LabelKind.ARGUMENT, name, a)].origin for a in site.arguments}
    density = tags.get(Label(LabelKind.FROZEN_DENSITY, name))
    bounded = any(arguments[a].sources for a in exponential_family.fixed_arguments(site.base) if a in arguments)
    return site._replace(
        arguments=arguments,
        density=density and density.origin,
        leaks=frozenset().union(*(o.sources for o in arguments.values())) & total.sources,
        fisher_estimate=FisherEstimate.MONTE_CARLO if bounded else site.fisher_estimate,
    )


def _model_sites_with_origins(sites: Mapping[str, ModelSite], tags: Tags) -> dict[str, ModelSite]:
    density, value = (
        {name: tags[Label(kind, name)].origin for name in sites}
        for kind in (LabelKind.MODEL_DENSITY, LabelKind.MODEL_VALUE)
    )
    # Parameters that transform draws before the model uses them (the steps of an annealed guide) are not the model's.
    carriers = frozenset().union(*(origin.params for origin in value.values() if origin.is_drawn))
    return {
        name: site._replace(
            params=density[name].params - carriers,
            point=bool(value[name].params - carriers),
            drawn=density[name].is_drawn,
        )
        for name, site in sites.items()
    }


class TraceHandler(Messenger):
    """Tag parameters, draws, arguments and densities of the guide's sites, and values and densities of the model's.

    :param names: the names of all parameters.
    :param opaque: hide the sites' classes, so that no KL is known in closed form.
    :param enumerated: guide sites that the loss sums over instead of drawing them (``TraceEnum_ELBO``).
    """

    def __init__(self, names: frozenset[str], *, opaque: bool, enumerated: frozenset[str]) -> None:
        super().__init__()
        self.names, self.opaque, self._known = names, opaque, enumerated
        self.params: dict[str, ParamSite] = {}
        self.guide_sites: dict[str, GuideSite] = {}
        self.model_sites: dict[str, ModelSite] = {}
        self.enumerated: set[str] = set()  # the guide's
        self.enumerates = False
        self.scanned: set[str] = set()
        self._visited: set[str] = set()

    def process_message(self, msg: Message) -> None:
        mark_guide_site(msg)
        if is_enumerated(msg):
            self.enumerates = True
            self.enumerated |= set() if is_summed(msg) else {msg["name"]}
            msg["is_guide_site"] = is_summed(msg) and msg["name"] in self._known
        if msg["type"] == "sample":
            # A scan draws first and sends its messages afterwards. The guide comes before the model, which replays it.
            drawn = msg.get("_control_flow_done", False) and not msg["is_observed"] and not is_enumerated(msg)
            self.scanned |= {msg["name"]} - self._visited if drawn else set()
            self._visited.add(msg["name"])

    def postprocess_message(self, msg: Message) -> None:
        if msg["type"] == "param":
            self._param(msg)
        elif msg["type"] == "sample" and msg["name"] in self.names:
            raise StructureError(
                f"the name `{msg['name']}` stands for a parameter and for a sample site, whose draw it would replace; "
                "expected one site for one name; rename one of them."
            )
        elif is_guide_site(msg):
            self._guide_site(msg)
        elif _is_model_site(msg):
            self._model_site(msg)

    def _param(self, msg: Message) -> None:
        name = msg["name"]
        transform = biject_to(msg["kwargs"].get("constraint", constraints.real))
        shape = jnp.shape(msg["value"]) if isinstance(msg["value"], jax.Array | float | int) else None
        site = ParamSite(transform, shape)
        if self.params.get(name, site).shape != shape:
            raise StructureError(
                f"the name `{name}` stands for parameters of the shapes {self.params[name].shape} and {shape} in guide "
                "and model; expected one site for one name; rename one of them."
            )
        self.params[name] = site
        msg["value"] = jax.tree.map(lambda x: tag(Label(LabelKind.PARAM, name), x), msg["value"])

    def _model_site(self, msg: Message) -> None:
        name, fn = msg["name"], msg["fn"]
        self.model_sites[name] = ModelSite(
            base=type(base_distribution(fn)),
            size=jnp.size(msg["value"]),
            observed=bool(msg["is_observed"]),
            weight=_weight(msg["scale"]),
            fisher_estimate=FisherEstimate.MONTE_CARLO if closed_form_kl(fn) is None else FisherEstimate.CLOSED_FORM,
        )
        tag(Label(LabelKind.MODEL_VALUE, name), msg["value"])
        tag(Label(LabelKind.MODEL_DENSITY, name), fn.log_prob(msg["value"]))

    def _guide_site(self, msg: Message) -> None:
        name, fn = msg["name"], msg["fn"]
        for argument, x in distribution_arguments(base_distribution(fn)).items():
            tag(Label(LabelKind.ARGUMENT, name, argument), x)
        self.guide_sites[name] = _guide_site(msg)
        msg["value"] = tag(Label(LabelKind.DRAW, name), msg["value"])
        _tag_frozen_density(name, without_flow_inverse(fn, msg["intermediates"]), stop_gradient(msg["value"]))
        if name in self._known:
            return  # summed over, with weights q: no density that a draw carries
        label = Label(LabelKind.DENSITY, name)
        if self.opaque:
            msg["fn"] = Assigned(fn, tag(label, fn.log_prob(msg["value"])))
        else:
            msg["fn"] = with_log_prob(fn, lambda *args: tag(label, fn.log_prob(*args)))


def _guide_site(msg: Message) -> GuideSite:
    fn = msg["fn"]
    base = base_distribution(fn)
    return GuideSite(
        base=type(base),
        shape=base_shape(fn, msg["kwargs"].get("sample_shape", ())),
        batch=base.batch_shape,
        event_size=math.prod(base.event_shape),
        elements=math.prod(fn.batch_shape),
        draw_size=jnp.size(msg["value"]),
        reparameterized=is_reparameterized(fn),
        weight=_weight(msg["scale"]),
        plates=frozenset(frame.name for frame in msg["cond_indep_stack"]),
        own_parameters=_has_own_parameters(fn),
        plain=_has_own_parameters(fn) and (msg["scale"] is None or bool(is_identically_one(msg["scale"]))),
        masked=is_masked(fn),
        fisher_estimate=FisherEstimate.MONTE_CARLO if closed_form_kl(fn) is None else FisherEstimate.CLOSED_FORM,
        arguments=dict.fromkeys(distribution_arguments(base), Origin()),
    )


def _is_model_site(msg: Message) -> bool:
    known = msg["type"] == "sample" and not msg.get("is_guide_site", False)
    return known and not isinstance(base_distribution(msg["fn"]), dist.Delta | dist.Unit)


def _has_own_parameters(fn: dist.Distribution) -> bool:
    while is_wrapper(fn):
        if isinstance(fn, dist.TransformedDistribution) and owns_parameters(fn.transforms):
            return False
        fn = fn.base_dist
    return True


def _weight(scale: Any) -> float | None:
    """The scale if it is a known scalar, 1 if there is none, else ``None``."""
    if scale is None:
        return 1.0
    return None if isinstance(scale, jax.core.Tracer) or jnp.ndim(scale) else float(scale)


def _tag_frozen_density(name: str, fn: dist.Distribution, draw: jax.Array) -> None:
    try:
        tag(Label(LabelKind.FROZEN_DENSITY, name), fn.log_prob(draw))
    except NotImplementedError:  # a flow without an inverse has no density at given draws
        return
