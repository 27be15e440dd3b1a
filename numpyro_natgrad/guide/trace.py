# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What stands in one loss function: its parameters, the guide's sites, the model's, and how each depends on the others.

The sites are met by :class:`.TraceHandler` while the loss is traced; where their values come from is read off the
jaxpr (:mod:`.provenance`). Nothing is run, and nothing is asked of the guide's author.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from numpyro_natgrad.distributions import exponential_family
from numpyro_natgrad.distributions.surrogate import FisherEstimate
from numpyro_natgrad.guide.handlers import DrawnSite, Loss, ModelSite, ParamSite, TraceHandler
from numpyro_natgrad.guide.provenance import Origin, Sighting, origins


class GuideSite(NamedTuple):
    """A latent sample site of the guide.

    :ivar base: the class of the distribution under its wrappers.
    :ivar shape: shape of the innermost draw, of one particle.
    :ivar batch: batch shape of the base distribution, before it is expanded.  :ivar event_size: numbers in its event.
    :ivar elements: how many densities its batch has.
    :ivar arguments: for each argument of the base distribution, where it comes from.
    :ivar density: where the density at frozen draws comes from (``None``: it cannot be computed at given draws).
    :ivar reparameterized: whether gradients flow through its draws.
    :ivar weight: how many draws of the whole data set one draw stands for (the ``scale`` of a subsampled plate);
        ``None`` where that is not known.
    :ivar plain: no ``scale`` and no parameter in a transform: but for a mask, the base's Fisher is the site's.
    :ivar masked: some of its densities may not count.
    :ivar analytic: the loss integrates this site itself (``TraceMeanField_ELBO``, or ``TraceEnum_ELBO`` by summing).
    :ivar leaks: the base's parameters reach the loss by another way than the site.
    :ivar divergence: how its KL to itself is got, ``"closed form"`` or ``"Monte Carlo"``.
    """

    base: Any
    shape: tuple[int, ...]
    batch: tuple[int, ...]
    event_size: int
    elements: int
    arguments: dict[str, Origin]
    density: Origin | None
    reparameterized: bool
    weight: float | None
    plain: bool
    masked: bool
    analytic: bool
    leaks: frozenset[str]
    divergence: FisherEstimate

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class LossTrace(NamedTuple):
    """All that was heard in one loss function.

    :ivar sites: the latent sites of the guide.
    :ivar modelled: the sites of the model, unless the loss sums over values of any.
    :ivar whole: whether every step sees all of the data: no site stands for more rows than it has.
    :ivar particles: draws a step; infinity where nothing is drawn.
    :ivar batched: whether all particles are drawn in one batch.
    :ivar is_elbo: affine in log q.
    :ivar scanned: sites that the guide draws inside of NumPyro's ``scan``, of which nothing is known but that.
    """

    params: dict[str, ParamSite]
    sites: dict[str, GuideSite]
    model_sites: dict[str, ModelSite]
    whole: bool
    particles: float
    batched: bool
    is_elbo: bool
    scanned: frozenset[str]


def trace_loss(fn: Loss, params: dict[str, Any]) -> LossTrace:
    """Trace the loss, without running it, and say what stands in it.

    A loss that integrates a site's KL itself is traced once more with that KL unknown to it: otherwise what the KL
    takes from the parameters would hide what else does. One that enumerates sites is traced again when it is known
    which of them are the guide's.

    :raises StructureError: if a parameter's name is taken twice.
    """
    listener, total, seen = _listened(fn, params, opaque=False)
    if summed := listener.summed:
        listener, total, seen = _listened(fn, params, opaque=False, summed=frozenset(summed))
    found = {name: site for name, site in listener.sites.items() if f"draw:{name}" in seen}
    analytic = {name for name in found if f"density:{name}" not in total.sources}
    drawn = _listened(fn, params, opaque=True)[1] if analytic else total
    sites = {name: _heard(name, site, seen, name in analytic, drawn) for name, site in found.items()}
    random = {name: site for name, site in found.items() if name not in listener.summed}
    counts = [seen[f"draw:{name}"].size // max(site.draw_size, 1) for name, site in random.items()]
    # A sum over values stands between the densities and the loss; draws inside of a scan are not heard.
    hidden = summed or listener.enumerated or listener.scanned
    model_sites = {} if hidden else _all_modelled(listener.model_sites, seen)
    particles, scanned = max(counts, default=math.inf), frozenset(listener.scanned)
    batched = all(seen[f"draw:{name}"].batched for name in random)
    weights = {s.weight for s in listener.model_sites.values()} | {s.weight for s in sites.values()}
    whole = all(weight is not None and weight <= 1 for weight in weights)
    return LossTrace(listener.params, sites, model_sites, whole, particles, batched, total.degree <= 1, scanned)


def _listened(
    fn: Loss, params: dict[str, Any], *, opaque: bool, summed: frozenset[str] = frozenset()
) -> tuple[TraceHandler, Origin, dict[str, Sighting]]:
    listener = TraceHandler(frozenset(params), opaque=opaque, summed=summed)

    def loss(values: dict[str, Any]) -> jax.Array:
        with listener:
            return fn(values)[0]

    return listener, *origins(loss, params)


def _heard(name: str, site: DrawnSite, seen: Mapping[str, Sighting], analytic: bool, total: Origin) -> GuideSite:
    arguments = {a: seen[f"argument:{name}/{a}"].origin for a in site.arguments}
    mine = frozenset().union(*(o.sources for o in arguments.values()))
    density = seen.get(f"score:{name}")
    bounded = any(arguments[a].sources for a in exponential_family.fixed_arguments(site.base) if a in arguments)
    return GuideSite(
        site.base,
        site.shape,
        site.batch,
        site.event_size,
        site.elements,
        arguments,
        density and density.origin,
        site.reparameterized,
        site.weight,
        site.plain,
        site.masked,
        analytic,
        mine & total.sources,
        FisherEstimate.MONTE_CARLO if bounded else site.divergence,
    )


def _all_modelled(sites: Mapping[str, ModelSite], seen: Mapping[str, Sighting]) -> dict[str, ModelSite]:
    density, value = ({name: seen[f"{kind}:{name}"].origin for name in sites} for kind in ("modelled", "value"))
    # What moves draws on their way to the model (the steps of an annealed guide) belongs to no density of the model.
    carriers = frozenset().union(*(_params(origin) for origin in value.values() if _is_drawn(origin)))
    return {
        name: site._replace(
            params=_params(density[name]) - carriers,
            point=bool(_params(value[name]) - carriers),
            drawn=_is_drawn(density[name]),
        )
        for name, site in sites.items()
    }


def _params(origin: Origin) -> frozenset[str]:
    return frozenset(x.removeprefix("param:") for x in origin.sources if x.startswith("param:"))


def _is_drawn(origin: Origin) -> bool:
    return any(x.startswith("draw:") for x in origin.sources)
