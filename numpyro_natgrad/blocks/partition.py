# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Which family moves which parameters: the connected components of parameters and guide sites, from what was heard."""

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_natgrad.blocks.base import Block
from numpyro_natgrad.blocks.exponential_family import ExponentialFamilyBlock
from numpyro_natgrad.blocks.fisher.kl_hessian import DENSE_LIMIT, KLCurvature
from numpyro_natgrad.blocks.fisher.likelihood import LikelihoodFisher
from numpyro_natgrad.blocks.fisher.network import NetworkCurvature, NetworkLikelihood
from numpyro_natgrad.blocks.fisher.scores import ScoreFisher
from numpyro_natgrad.blocks.gaussian.antithetic import DividedGaussian
from numpyro_natgrad.blocks.gaussian.diagonal import DiagonalGaussian
from numpyro_natgrad.blocks.gaussian.full import FullGaussian
from numpyro_natgrad.blocks.gaussian.joint import JointGaussian
from numpyro_natgrad.blocks.gaussian.low_rank import LowRankGaussian
from numpyro_natgrad.blocks.gaussian.regression import RegressedGaussian
from numpyro_natgrad.distributions.surrogate import FisherEstimate
from numpyro_natgrad.estimators.derivatives import GradientRequest
from numpyro_natgrad.guide.exponential_sites import read_exponential_site
from numpyro_natgrad.guide.fisher_method import resolve_fisher_method
from numpyro_natgrad.guide.gaussian_sites import GaussianSite, Params, read_gaussian_site
from numpyro_natgrad.guide.handlers import DensityMode
from numpyro_natgrad.guide.low_rank_sites import LowRankSite, read_low_rank_site
from numpyro_natgrad.guide.trace import GuideSite, LossTrace, ModelSite, trace_loss
from numpyro_natgrad.options import NATURAL_MARGIN, Options
from numpyro_natgrad.step import step_size
from numpyro_natgrad.step.state import JOINT_LIMIT

#: Numbers drawn a step up to which they are kept for the whole step; beyond, memory is worth more than time.
KEPT_DRAWS = 1_000_000

#: A joint step is made of gradients alone where so many steps' draws are more than its dimensions.
REGRESSED_STEPS = 1.5

_NO_ELBO = (
    "NaturalGradient: the loss is not affine in the guide's log-densities, so it is no ELBO (a Rényi bound, or "
    "score-function gradients of a discrete site). Steps use the plain Fisher metric: gradients without the path "
    "estimator and without second derivatives, which hold for an ELBO only. A step of length 1 is then not exact on "
    "conjugate models, and expect noisier steps."
)

_FIRST_ORDER = (
    "NaturalGradient: `estimator='second_order'` was asked for, but the parameters {} take first-order steps: second "
    "derivatives help single Gaussian sites and losses that are an ELBO."
)


_SCANNED = (
    "NaturalGradient: the guide draws the sites {} inside of `scan`, where a handler hears of a draw only after it has "
    "been used. Their parameters go to the ordinary optimizer. Draw all steps as one site outside of the scan for "
    "natural-gradient steps."
)


class Partition(NamedTuple):
    """The families of one loss; static.

    :ivar families: who moves what.
    :ivar point: parameters without a Fisher, left to the ordinary optimizer, with their sizes.
    :ivar views: how the loss is to be seen.
    :ivar particles: draws a step; infinity where nothing is drawn.
    :ivar latents: latent dimensions of the guide's sites, for the whole data set; of a likelihood, observations.
    :ivar exact: whether a step of length 1 is exact on conjugate models.
    :ivar tolerance: how much noise the steps of every family may have.
    :ivar paired: whether the draws move with the parameters, so that two values of the loss at the same draws differ by
        less than their noise. Draws of a discrete site jump.
    """

    families: tuple[Block, ...]
    point: dict[str, int]
    request: GradientRequest
    particles: float
    latents: int
    exact: bool
    tolerance: step_size.Tolerance
    paired: bool

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """The report: parameter, site, family, how the Fisher is got, size."""
        rows = [row for family in self.families for row in family.report_rows()]
        return rows + [(p, "–", "–", "none: ordinary optimizer", str(size)) for p, size in self.point.items()]


def partition_parameters(fn: Any, params: Params, options: Options, forward: bool) -> Partition:
    """Listen to the loss and give every parameter to a family."""
    trace = resolve_fisher_method(trace_loss(fn, params), options.fisher)
    if not trace.is_elbo:
        warnings.warn(_NO_ELBO, stacklevel=5)
    if trace.scanned:
        warnings.warn(_SCANNED.format(sorted(trace.scanned)), stacklevel=5)
    sizes = {name: sum(jnp.size(x) for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    gaussians, naturals = _charted(trace, options)
    closed = {g.name for g in gaussians} | {n.site.name for n in naturals}
    curvatures = _curvature_families(trace, closed, sizes)
    gaussian = _gaussian_families(gaussians, trace, options, set(sizes))
    guided: tuple[Block, ...] = (*gaussian, *naturals, *curvatures)
    free = {p: size for p, size in sizes.items() if not any(p in family.params for family in guided)}
    families = (*guided, *_likelihood_families(trace, free, options))
    taken = {p for family in families for p in family.params}
    point = {p: size for p, size in sizes.items() if p not in taken}
    scored = frozenset(name for family in curvatures for name, _, _ in family.sites)
    latents = _numbers(trace.sites or trace.model_sites)
    second = [family.hessian_params or _is_mirrored(family) for family in families]
    first_order = [p for family, asks in zip(families, second, strict=True) if not asks for p in family.params]
    if options.estimator == "second_order" and first_order:
        warnings.warn(_FIRST_ORDER.format(first_order), stacklevel=5)
    request = _views(families, gaussians, naturals, scored, trace, options, forward)
    exact = trace.is_elbo and all(family.exact for family in families)
    paired = all(site.reparameterized or site.analytic for site in trace.sites.values())
    most = tuple(step_size.most(trace.particles, _is_mirrored(f)) for f in families)
    tolerance = step_size.Tolerance(most, _quiet(families, exact, latents), _bearable(families, trace.full_data))
    return Partition(families, point, request, trace.particles, latents, exact, tolerance, paired)


def _is_mirrored(family: Block) -> bool:
    return DensityMode.ANTITHETIC in family.modes.values()


def _quiet(families: tuple[Block, ...], exact: bool, latents: int) -> tuple[float, ...]:
    rest = step_size.quiet(latents) if exact else step_size.QUIET_INEXACT
    return tuple(_quiet_one(family, rest, len(families)) for family in families)


def _quiet_one(family: Block, rest: float, families: int) -> float:
    if isinstance(family, NetworkCurvature | ExponentialFamilyBlock) and family.size > DENSE_LIMIT:
        return step_size.statistical(family.size, family.numbers)
    if isinstance(family, JointGaussian):  # its steps last as it is
        return min(rest, step_size.QUIET) / families
    return (step_size.QUIET_SCORES if isinstance(family, ScoreFisher) else rest) / families


def _bearable(families: tuple[Block, ...], whole: bool) -> tuple[float, ...]:
    return tuple(step_size.bearable(f.size, whole) if isinstance(f, JointGaussian) else 0.0 for f in families)


def _charted(
    trace: LossTrace, options: Options
) -> tuple[list[GaussianSite | LowRankSite], list[ExponentialFamilyBlock]]:
    """The sites that have coordinates of their own: Gaussians, and exponential families in natural parameters."""
    if options.fisher not in (None, "closed_form"):
        return [], []
    shared = _shared(trace)
    # Low-rank Gaussians are moved by Hessian products; where there are none, by the curvature of KL.
    second = trace.is_elbo and options.estimator != "first_order"
    read = [read_gaussian_site(n, trace) or (read_low_rank_site(n, trace) if second else None) for n in trace.sites]
    gaussians = [g for g in read if g is not None and not shared & set(g.params)]
    return gaussians, _natural_families(trace, {g.name for g in gaussians}, shared, options)


def _shared(trace: LossTrace) -> set[str]:
    """Parameters that more than one site's density depends on."""
    owners = Counter(p for site in trace.sites.values() for p in site.params)
    return {p for p, sites in owners.items() if sites > 1}


def _gaussian_families(
    sites: list[GaussianSite | LowRankSite], trace: LossTrace, options: Options, names: set[str]
) -> list[Block]:
    """One joint step where its Hessian is small enough, else a family for every site."""
    latents = sum(s.size for s in sites)
    if 0 < latents <= JOINT_LIMIT and trace.is_elbo and options.estimator != "first_order":
        alone = names == {p for s in sites for p in s.params}
        if alone and _is_regressed(sites, trace, options):
            joint: type[JointGaussian] = RegressedGaussian
        else:
            joint = DividedGaussian if alone and _is_divided(sites, trace) else JointGaussian
        return [joint(tuple(sites), options.margin, options.strict, trace.particles)]
    return [_wide(s, trace, options) for s in sites]


def _is_regressed(sites: list[GaussianSite | LowRankSite], trace: LossTrace, options: Options) -> bool:
    """Whether a step and a half's draws determine slope and curvature, and particles, told apart, share all data.

    (What draws of one batch of rows agree on is no more certain than the batch.)
    """
    chosen = options.estimator is None and options.step_size is None and options.adaptive
    few = sum(s.size for s in sites) + 1 <= REGRESSED_STEPS * trace.particles < math.inf
    return chosen and few and trace.full_data and trace.batched and not any(s.analytic for s in sites)


def _is_divided(sites: list[GaussianSite | LowRankSite], trace: LossTrace) -> bool:
    """Whether there are pairs of particles, and they can be told apart.

    (Draws are antithetic there. Other parameters beside a Gaussian move by the very draws that NumPyro made.)
    """
    return 2 <= trace.particles < math.inf and trace.batched and not any(s.analytic for s in sites)


def _wide(site: GaussianSite | LowRankSite, trace: LossTrace, options: Options) -> Block:
    if isinstance(site, LowRankSite):
        return LowRankGaussian(site, options.margin)
    # Beside the draws of a full Gaussian a few Hessian products cost little; a mean-field site does without, unless
    # they are asked for.
    mode = DensityMode.PATH if options.path_gradient and trace.is_elbo else None
    if site.form.diagonal:
        return DiagonalGaussian(site, options.estimator == "second_order" and trace.is_elbo, mode, options.margin)
    second = options.estimator != "first_order" and trace.is_elbo and len(site.shape) == 1
    return FullGaussian(site, second, DensityMode.DETACHED if second else mode, options.margin)


def _natural_families(
    trace: LossTrace, taken: set[str], shared: set[str], options: Options
) -> list[ExponentialFamilyBlock]:
    """A family for every site of an exponential family whose arguments are its own parameters."""
    read = [read_exponential_site(name, trace) for name in trace.sites if name not in taken]
    sites = [s for s in read if s is not None and not shared & set(s.params)]
    limited = options.max_kl is not None
    margin = NATURAL_MARGIN if limited else options.margin
    return [ExponentialFamilyBlock(s, _is_tilted(trace, s.name, options), margin, limited) for s in sites]


def _is_tilted(trace: LossTrace, name: str, options: Options) -> bool:
    """Whether draws, and nothing else, carry the gradient: then their noise can be foreseen."""
    site = trace.sites[name]
    carried = site.reparameterized and not site.analytic and not site.leaks
    return options.path_gradient and trace.is_elbo and carried


def _curvature_families(trace: LossTrace, taken: set[str], sizes: dict[str, int]) -> list[KLCurvature]:
    """Connected components of the remaining parameters and the sites that depend on them."""
    owners = {name: site.params & set(sizes) for name, site in trace.sites.items() if name not in taken}
    return [_curvature(names, sites, trace, sizes) for names, sites in _components(owners)]


def _components(owners: Mapping[str, frozenset[str] | set[str]]) -> list[tuple[set[str], list[str]]]:
    """Connected components of the graph between sites and their parameters; sites without any are left out."""
    groups: list[tuple[set[str], list[str]]] = []
    for name, mine in owners.items():
        if not mine:
            continue
        touching = [g for g in groups if g[0] & mine]
        merged = (set(mine).union(*(g[0] for g in touching)), [n for g in touching for n in g[1]] + [name])
        groups = [g for g in groups if g not in touching] + [merged]
    return groups


def _likelihood_families(trace: LossTrace, free: dict[str, int], options: Options) -> list[LikelihoodFisher]:
    """Connected components of the parameters that no guide site owns and the sites of the model."""
    if options.ordinary and (trace.sites or options.fisher is None):
        return []
    owners = {name: site.params & set(free) for name, site in trace.model_sites.items()}
    return [_likelihood(names, sites, trace, free) for names, sites in _components(owners)]


def _likelihood(names: set[str], sites: list[str], trace: LossTrace, sizes: dict[str, int]) -> LikelihoodFisher:
    ordered = {p: size for p, size in sizes.items() if p in names}
    mine = {n: trace.model_sites[n] for n in sites}
    rows = tuple((n, site.base.__name__, site.fisher_estimate) for n, site in mine.items())
    points = frozenset(n for n, site in mine.items() if site.point)
    whole = all(site.weight == 1 for site in mine.values())
    family = NetworkLikelihood if sum(ordered.values()) > DENSE_LIMIT else LikelihoodFisher
    return family(tuple(ordered), rows, ordered, _numbers(mine), False, points, whole, bool(trace.sites))


def _numbers(sites: Mapping[str, GuideSite | ModelSite]) -> int:
    """How many numbers are drawn or observed, for the whole data set."""
    return max(round(sum((s.weight or 1.0) * s.size for s in sites.values())), 1)


def _curvature(names: set[str], sites: list[str], trace: LossTrace, sizes: dict[str, int]) -> KLCurvature:
    ordered = tuple(p for p in sizes if p in names)
    rows = tuple((n, trace.sites[n].base.__name__, trace.sites[n].fisher_estimate) for n in sites)
    mine, local = {p: sizes[p] for p in ordered}, _is_local(ordered, sites, trace)
    # One density of many parameters has one score a draw; many densities of a few each have many.
    single = any(trace.sites[n].elements == 1 for n, _, how in rows if how == FisherEstimate.MONTE_CARLO)
    network = NetworkCurvature if sum(mine.values()) > DENSE_LIMIT and not local else KLCurvature
    family = ScoreFisher if single else network
    return family(ordered, rows, mine, _numbers({n: trace.sites[n] for n in sites}), local)


def _is_local(names: tuple[str, ...], sites: list[str], trace: LossTrace) -> bool:
    """Whether all parameters have an entry for every row of a subsampled plate, and sites are drawn for some rows."""
    heard = [trace.sites[name] for name in sites]
    return all(_has_rows(p, s, trace) for p in names for s in heard if p in s.params)


def _has_rows(parameter: str, site: GuideSite, trace: LossTrace) -> bool:
    shape, weight = trace.params[parameter].shape or (), site.weight or 1.0
    return weight > 1 and any(math.isclose(a, weight * b, rel_tol=0.01) for a in shape for b in site.shape)


def _views(
    families: tuple[Block, ...],
    gaussians: list[GaussianSite | LowRankSite],
    naturals: list[ExponentialFamilyBlock],
    scored: frozenset[str],
    trace: LossTrace,
    options: Options,
    forward: bool,
) -> GradientRequest:
    modes = {name: mode for family in families for name, mode in family.modes.items()}
    perturbations = {name: trace.sites[name].shape for name, mode in modes.items() if mode == DensityMode.DETACHED}
    particles = {n: (2, int(trace.particles), *trace.sites[n].shape) for n, mode in modes.items() if mode.per_particle}
    perturbations.update(particles)
    perturbations.update({n.site.name: n.site.eta_shape for n in naturals if n.tilted})
    hessian_params = tuple(p for family in families for p in family.hessian_params)
    centers = {g.name: g.loc for g in gaussians if modes.get(g.name) in (DensityMode.DETACHED, DensityMode.ANTITHETIC)}
    sites = {n for n in scored if trace.sites[n].reparameterized and not trace.sites[n].analytic}
    seen = frozenset(sites if options.path_gradient and trace.is_elbo else ())
    draws = sum(trace.particles * s.size for s in trace.sites.values())
    return GradientRequest(modes, perturbations, hessian_params, centers, seen, forward, draws <= KEPT_DRAWS)
