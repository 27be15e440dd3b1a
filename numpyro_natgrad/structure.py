# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Which family moves which parameters: the connected components of parameters and guide sites, from what was heard."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .charts import GaussianSite, Params, read_site
from .effects import Hearing, hear
from .evidence import Views
from .families import Family
from .families.curvature import KLCurvature
from .families.diagonal import DiagonalGaussian
from .families.full import FullGaussian
from .families.joint import JointGaussian
from .options import Options
from .state import JOINT_LIMIT

_NO_ELBO = (
    "NaturalGradient: the loss is not affine in the guide's log-densities, so it is no ELBO (a Rényi bound, or "
    "score-function gradients of a discrete site). Steps use the plain Fisher metric: gradients without the path "
    "estimator and without second derivatives, which hold for an ELBO only. A step of length 1 is then not exact on "
    "conjugate models, and expect noisier steps."
)


class Structure(NamedTuple):
    """The families of one loss; static.

    :ivar families: who moves what.
    :ivar point: parameters without a Fisher, left to the ordinary optimizer.
    :ivar views: how the loss is to be seen.
    :ivar particles: draws a step.
    :ivar latents: latent dimensions of the guide's sites.
    """

    families: tuple[Family, ...]
    point: tuple[str, ...]
    views: Views
    particles: int
    latents: int
    shapes: dict[str, tuple[int, ...]]

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """The report: parameter, site, family, how the Fisher is got, size."""
        rows = [row for family in self.families for row in family.describe()]
        shape = lambda p: "×".join(map(str, self.shapes.get(p, ()))) or "1"  # noqa: E731
        return rows + [(p, "–", "–", "none: ordinary optimizer", shape(p)) for p in self.point]


def discover(fn: Any, params: Params, options: Options, forward: bool) -> Structure:
    """Listen to the loss and give every parameter to a family."""
    hearing = hear(fn, params)
    if not hearing.is_elbo:
        warnings.warn(_NO_ELBO, stacklevel=2)
    shared = _shared(hearing)
    known = {name: read_site(name, hearing) for name in hearing.sites}
    gaussians = [g for g in known.values() if g is not None and not shared & {g.loc, g.scale}]
    families = [*_gaussian_families(gaussians, hearing, options, params)]
    families += _curvature_families(hearing, {g.name for g in gaussians}, params, forward)
    taken = {p for f in families for p in f.params}
    shapes = {name: jnp.shape(x) if isinstance(x, jax.Array) else () for name, x in params.items()}
    point = tuple(p for p in params if p not in taken)
    latents = max(sum(s.size for s in hearing.sites.values()), 1)
    return Structure(
        tuple(families), point, _views(families, hearing, options, forward), hearing.particles, latents, shapes
    )


def _shared(hearing: Hearing) -> set[str]:
    """Parameters that more than one site's density depends on."""
    owners: dict[str, int] = {}
    for site in hearing.sites.values():
        for label in _parameters(site):
            owners[label] = owners.get(label, 0) + 1
    return {label for label, n in owners.items() if n > 1}


def _parameters(site: Any) -> set[str]:
    labels = {s for o in site.arguments.values() for s in o.sources}
    labels |= site.density.sources if site.density else set()
    return {label.removeprefix("param:") for label in labels if label.startswith("param:")}


def _gaussian_families(
    sites: list[GaussianSite], hearing: Hearing, options: Options, params: Params
) -> list[Family]:
    second = options.second_order(sum(s.size for s in sites)) and hearing.is_elbo
    if sites and second and sum(s.size for s in sites) <= JOINT_LIMIT:
        return [JointGaussian(tuple(sites), options.margin)]
    return [_wide(s, hearing, options) for s in sites]


def _wide(site: GaussianSite, hearing: Hearing, options: Options) -> Family:
    mode = "path" if options.path_gradient and hearing.is_elbo else None
    if site.form.diagonal:
        second = options.estimator == "second_order" and hearing.is_elbo
        return DiagonalGaussian(site, second, mode, options.margin)
    second = options.second_order(site.size) and hearing.is_elbo and len(site.shape) == 1
    return FullGaussian(site, second, "silent" if second else mode, options.margin)


def _curvature_families(
    hearing: Hearing, taken: set[str], params: Params, forward: bool
) -> list[Family]:
    groups: list[tuple[set[str], list[str]]] = []
    for name, site in hearing.sites.items():
        mine = _parameters(site) & set(params)
        if name in taken or site.density is None or not mine:
            continue
        touching = [g for g in groups if g[0] & mine]
        merged = (mine.union(*(g[0] for g in touching)), [n for g in touching for n in g[1]] + [name])
        groups = [g for g in groups if g not in touching] + [merged]
    return [_curvature(g, hearing, params, forward) for g in groups]


def _curvature(group: tuple[set[str], list[str]], hearing: Hearing, params: Params, forward: bool) -> Family:
    names = tuple(p for p in params if p in group[0])
    sites = tuple((n, hearing.sites[n].base.__name__, hearing.sites[n].divergence) for n in group[1])
    shapes = {p: (sum(jnp.size(x) for x in jax.tree.leaves(params[p])),) for p in names}
    return KLCurvature(names, sites, shapes, forward)


def _views(families: list[Family], hearing: Hearing, options: Options, forward: bool) -> Views:
    modes = {name: mode for f in families for name, mode in f.modes.items()}
    silent = {name for name, mode in modes.items() if mode == "silent"}
    taps = {name: hearing.sites[name].shape for name in silent}
    curved = tuple(p for f in families if _asks_for_products(f) for p in f.params)
    scored = [n for f in families if isinstance(f, KLCurvature) for n, _, _ in f.sites]
    usable = options.path_gradient and hearing.is_elbo
    free = [n for n in scored if hearing.sites[n].reparameterized and not hearing.sites[n].analytic]
    return Views(modes, taps, curved, frozenset(free if usable else ()), forward)


def _asks_for_products(family: Family) -> bool:
    return isinstance(family, JointGaussian) or bool(getattr(family, "second_order", False))
