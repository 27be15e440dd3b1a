# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Which block moves which parameters: the connected components of the graph of parameters and guide sites."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_natgrad.blocks.base import Block, NoiseTolerance, ReportRow, Scope
from numpyro_natgrad.blocks.exponential_family import ExponentialFamilyBlock
from numpyro_natgrad.blocks.fisher.block import FisherBlock
from numpyro_natgrad.blocks.fisher.metrics import KLHessian, Likelihood, ScoreSamples, fisher_sites
from numpyro_natgrad.blocks.fisher.solvers import Cholesky, Woodbury, damped_solver, row_solver
from numpyro_natgrad.blocks.gaussian.curvature import (
    AntitheticProducts,
    CurvatureEstimator,
    HessianProducts,
    ProfileProducts,
    SteinRegression,
)
from numpyro_natgrad.blocks.gaussian.diagonal import DiagonalGaussian
from numpyro_natgrad.blocks.gaussian.full import FullGaussian
from numpyro_natgrad.blocks.gaussian.joint import JointGaussian
from numpyro_natgrad.blocks.gaussian.joint_latents import JointLatents, ModelParameters
from numpyro_natgrad.blocks.gaussian.local_rows import LocalGaussian
from numpyro_natgrad.blocks.gaussian.low_rank import LowRankGaussian
from numpyro_natgrad.blocks.notices import warn_of_first_order, warn_of_trace, warn_of_unowned
from numpyro_natgrad.distributions.surrogate import FisherEstimate
from numpyro_natgrad.estimators.derivatives import GradientRequest
from numpyro_natgrad.guide.exponential_sites import read_exponential_site, stack_sites
from numpyro_natgrad.guide.fisher_method import resolve_fisher_method
from numpyro_natgrad.guide.gaussian_sites import (
    GaussianSite,
    Params,
    is_identity,
    read_gaussian_site,
    read_local_site,
)
from numpyro_natgrad.guide.handlers import DensityMode, Loss, with_copies
from numpyro_natgrad.guide.low_rank_sites import LowRankSite, read_low_rank_site
from numpyro_natgrad.guide.mean_field_sites import MeanFieldSites, join_mean_fields
from numpyro_natgrad.guide.trace import GuideSite, LossTrace, ModelSite, trace_loss
from numpyro_natgrad.options import Options, RuleConstants


class Partition(NamedTuple):
    """Which block moves which parameters of one loss; static.

    :ivar unowned: parameters without a Fisher matrix, moved by the fallback optimizer, with their sizes.
    :ivar request: how the loss is differentiated.
    :ivar particles: draws a step; infinity where nothing is drawn.
    :ivar latents: latent dimensions of the guide, for the whole data set; observed numbers if there is no guide site.
    :ivar batch_weight: how many rows of the whole data set a row of a step stands for, N/B.
    :ivar joint_latents: latent dimensions of the joint Gaussian block, 0 if there is none.
    :ivar tolerance: every field has an entry for each step size.
    :ivar paired: whether draws follow the parameters, so that losses at two parameters and the same draws have most of
        their noise in common. Draws of a discrete site jump.
    :ivar copies: how many independent draws of the guide each particle of the loss stands for.
    :ivar local: of the rows of a minibatch, which step first.
    """

    blocks: tuple[Block, ...]
    unowned: dict[str, int]
    request: GradientRequest
    particles: float
    latents: int
    batch_weight: float
    joint_latents: int
    exact_on_conjugate: bool
    tolerance: NoiseTolerance
    paired: bool
    copies: int
    local: "Partition | None" = None

    @property
    def step_sizes(self) -> int:
        """How many step sizes its blocks have."""
        return sum(block.count for block in self.blocks)

    @property
    def local_rows(self) -> tuple[LocalGaussian, ...]:
        """The blocks of local rows."""
        return tuple(block for block in self.blocks if isinstance(block, LocalGaussian))

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters that its blocks move."""
        return tuple(p for block in self.blocks for p in block.params)

    def rows(self) -> list[ReportRow]:
        """The report: parameter, site, distribution, Fisher matrix, size."""
        rows = [row for block in self.blocks for row in block.report_rows()]
        rows += self.local.rows() if self.local else []
        return rows + [(p, "–", "–", "none: fallback optimizer", str(size)) for p, size in self.unowned.items()]


def partition_parameters(fn: Loss, params: Params, options: Options, forward: bool) -> Partition:
    """Trace the loss, ``params -> (loss, aux)``, and assign every parameter to a block.

    :param forward: differentiate in forward mode.
    :raises StructureError: if a site has no Fisher matrix of the kind that ``options.fisher`` requests.
    """
    trace = resolve_fisher_method(trace_loss(fn, params), options.fisher)
    copies = _draw_copies(fn, params, trace, options)
    if copies > 1:
        trace = resolve_fisher_method(trace_loss(with_copies(fn, copies), params), options.fisher)
    warn_of_trace(trace)
    sizes = {name: sum(jnp.size(x) for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    local = _local_partition(trace, copies, options, forward)
    first = local.local_rows if local else ()
    apart = set(local.params) if local else set()
    sites, natural = _sites_with_coordinates(trace, options)
    apart_sites = {name for block in first for name in block.site_names}
    covered = {name for block in natural for name in block.site_names} | {g.name for g in sites} | apart_sites
    kl_blocks = _kl_hessian_blocks(trace, covered, sizes, options)
    taken = {p for owner in (*sites, *natural, *kl_blocks) for p in owner.params} | apart
    free = {p: x for p, x in params.items() if p not in taken}
    beside = _model_parameters(trace, free, options, drawn=bool(sites))
    followed = first if len(first) == 1 else ()
    gaussian = _gaussian_blocks(sites, followed, beside, trace, options, set(sizes))
    rest = {p: sizes[p] for p in free if not any(p in block.params for block in gaussian)}
    blocks = (*gaussian, *natural, *kl_blocks, *_likelihood_blocks(trace, rest, options))
    warn_of_first_order((*blocks, *first), options)
    owned = {p for block in blocks for p in block.params} | apart
    unowned = {p: size for p, size in sizes.items() if p not in owned}
    warn_of_unowned(unowned, trace, options)
    scored = frozenset(site.name for block in kl_blocks for site in block.metric.sites)
    request = _gradient_request(blocks, sites, natural, scored, trace, options, forward, first)
    others = {name: site for name, site in trace.sites.items() if name not in apart_sites}
    latents = _numbers(others if trace.sites else trace.model_sites)
    return _partition(blocks, unowned, request, latents, trace, options, copies)._replace(local=local)


def _local_partition(trace: LossTrace, copies: int, options: Options, forward: bool) -> Partition | None:
    """The rows of local Gaussian sites, if there are any and a step has antithetic draws enough for them.

    Copies of a particle share its minibatch, and particles need not: each may draw its own. A pair of draws is
    therefore of two copies.
    """
    enough = copies % 2 == 0 and trace.particles >= options.constants.independent_draws
    found = _local_sites(trace, options) if enough else []
    if not found:
        return None
    particles, constants = round(trace.particles / copies), options.constants
    drawn = lambda s: min(s.shape[0], particles * trace.sites[s.name].size * s.shape[0] // s.size)
    blocks = tuple(LocalGaussian(tuple(s), drawn(s[0]), options.margin, constants) for s in found)
    rows = sum(trace.sites[name].size for block in blocks for name in block.site_names)
    request = _gradient_request(blocks, [], [], frozenset(), trace, options, forward)
    return _partition(blocks, {}, request, rows, trace, options, copies)


def _local_sites(trace: LossTrace, options: Options) -> list[list[GaussianSite]]:
    """The Gaussian sites of which a step draws the rows of a minibatch, those of the same rows together."""
    second = _is_second_order(trace, options)
    if not (second and options.is_adaptive and options.fisher in (None, "closed_form")):
        return []
    read, shared = [read_local_site(name, trace) for name in trace.sites], _shared(trace)
    groups: dict[Any, list[GaussianSite]] = {}
    for s in read:
        if s is not None and not shared & set(s.params):
            groups.setdefault((trace.sites[s.name].plates, s.shape[0]), []).append(s)
    small = lambda sites: sum(s.size for s in sites) <= options.constants.row_limit * sites[0].shape[0]
    return [sites for sites in groups.values() if small(sites)]


def _partition(
    blocks: tuple[Block, ...],
    unowned: dict[str, int],
    request: GradientRequest,
    latents: int,
    trace: LossTrace,
    options: Options,
    copies: int,
) -> Partition:
    exact = trace.is_elbo and all(block.exact_on_conjugate for block in blocks)
    paired = not any(site.is_score_function for site in trace.sites.values())
    count = sum(block.count for block in blocks)
    scope = Scope(
        latents, count, trace.particles, exact, trace.full_data, options.constants, paired, trace.batch_weight
    )
    return Partition(
        blocks=blocks,
        unowned=unowned,
        request=request,
        particles=trace.particles,
        latents=latents,
        batch_weight=trace.batch_weight,
        joint_latents=sum(block.latents.size for block in blocks if isinstance(block, JointGaussian)),
        exact_on_conjugate=exact,
        tolerance=_noise_tolerance(blocks, scope),
        paired=paired,
        copies=copies,
    )


def _noise_tolerance(blocks: tuple[Block, ...], scope: Scope) -> NoiseTolerance:
    """The tolerances of all blocks, with an entry for each step size."""
    each = [block.noise_tolerance(scope) for block in blocks for _ in range(block.count)]
    return NoiseTolerance(*np.array(each, float).reshape(-1, len(NoiseTolerance._fields)).T)


def _draw_copies(fn: Loss, params: Params, trace: LossTrace, options: Options) -> int:
    """How many independent draws each particle of the loss stands for; even, so that they come in pairs.

    A joint block replaces its precision by the Hessians of a step's draws. NumPyro's default of one particle is too few
    for that, and the draws that are added cost less than the steps that they save. A loss with a mutable state is
    evaluated as it is, and so is one whose step size the user chose. Of local rows two copies are a pair of antithetic
    draws: copies of a particle share its minibatch, and particles need not.

    With more latents than a joint block has, two pairs are enough. A minibatch has more noise than pairs would remove.
    """
    if options.step_size is not None or not trace.batched:
        return 1
    if _local_sites(trace, options):
        draws = options.constants.independent_draws
    elif trace.particles >= (draws := _least_draws(trace, options)):
        return 1
    if jax.tree.leaves(jax.eval_shape(fn, params)[1]):
        return 1
    return 2 * math.ceil(draws / (2 * trace.particles))


def _least_draws(trace: LossTrace, options: Options) -> int:
    """Draws, at least, of the Gaussian sites in a step; zero where any number is enough."""
    constants, sites = options.constants, _sites_with_coordinates(trace, options)[0]
    latents = JointLatents(tuple(join_mean_fields(sites)))
    if not latents.sites or any(s.analytic for s in latents.sites):
        return 0
    if _is_joint(latents, trace, options):
        return constants.independent_draws
    small = constants.paired_draws * latents.size <= constants.kept_draws
    return constants.paired_draws if small and trace.full_data and _is_second_order(trace, options) else 0


def _is_second_order(trace: LossTrace, options: Options) -> bool:
    return trace.is_elbo and options.estimator != "first_order"


def _sites_with_coordinates(
    trace: LossTrace, options: Options
) -> tuple[list[GaussianSite | LowRankSite], list[ExponentialFamilyBlock]]:
    """The Gaussian sites, and the sites of exponential families that step in natural parameters."""
    if options.fisher not in (None, "closed_form"):
        return [], []
    shared = _shared(trace)
    # Low-rank Gaussians need Hessian-vector products; without these, the Hessian of KL moves them.
    second = _is_second_order(trace, options)
    read = [read_gaussian_site(n, trace) or (read_low_rank_site(n, trace) if second else None) for n in trace.sites]
    gaussians = [g for g in read if g is not None and not shared & set(g.params)]
    return gaussians, _exponential_family_blocks(trace, {g.name for g in gaussians}, shared, options)


def _shared(trace: LossTrace) -> set[str]:
    """Parameters that more than one site's density depends on."""
    owners = Counter(p for site in trace.sites.values() for p in site.params)
    return {p for p, sites in owners.items() if sites > 1}


def _gaussian_blocks(
    sites: list[GaussianSite | LowRankSite],
    rows: tuple[LocalGaussian, ...],
    beside: list[ModelParameters],
    trace: LossTrace,
    options: Options,
    names: set[str],
) -> list[Block]:
    """One joint block if its Hessian is small enough to be formed, else blocks of single sites.

    Parameters of the model belong to it where it is small enough with them. Mean-field sites of no more latents than a
    joint block has share one block otherwise, as if they were one site: a model may draw a thousand numbers in a loop
    or in a plate.
    """
    latents = JointLatents(tuple(join_mean_fields(sites)), rows)
    larger = JointLatents((*latents.sites, *beside), rows)
    if larger.sites and larger.size <= joint_limit(larger, options.constants):
        latents = larger
    if not _is_joint(latents, trace, options):
        joined = join_mean_fields(sites, options.constants.joint_limit)
        return [_single_site_block(s, trace, options) for s in joined]
    estimator = _curvature_estimator(latents, trace, options, alone=names == set(latents.params))
    limit = options.constants.widening_decrement if options.is_adaptive else math.inf
    return [JointGaussian(latents, estimator, options.margin, limit, options.fixed_max_kl)]


def _model_parameters(trace: LossTrace, free: Params, options: Options, *, drawn: bool) -> list[ModelParameters]:
    """The parameters of the model that no guide site owns, as one site, unless the user chose how they move.

    They need Gaussian sites beside them (``drawn``), which follow them, or a loss without draws. Such a loss has the
    Fisher matrix of the likelihood, unless it hides the sites of the model (:class:`.LossTrace`): then they are all
    parameters that it depends on.
    """
    hidden = not trace.model_sites and not trace.scanned
    alone = hidden and trace.particles == math.inf
    if options.has_fallback or options.fisher is not None or not (drawn or alone):
        return []
    owned = trace.loss_params if hidden else frozenset().union(*(s.params for s in trace.model_sites.values()))
    shapes = {p: jnp.shape(x) for p, x in free.items() if p in owned and trace.params[p].shape is not None}
    curved = tuple(not is_identity(trace.params[p].transform) for p in shapes)
    scale = options.constants.parameter_scale
    return [ModelParameters(tuple(shapes), tuple(shapes.values()), curved, scale)] if shapes else []


def _is_joint(latents: JointLatents, trace: LossTrace, options: Options) -> bool:
    """Whether these latents share one dense second-order step."""
    second = _is_second_order(trace, options)
    return bool(second and latents.sites) and latents.size <= joint_limit(latents, options.constants)


def joint_limit(latents: JointLatents, constants: RuleConstants) -> int:
    """Latents up to which there is a joint block; a single full Gaussian needs no proxy beside it."""
    return constants.joint_limit if latents.has_proxy else constants.full_joint_limit


def _curvature_estimator(
    latents: JointLatents, trace: LossTrace, options: Options, *, alone: bool
) -> CurvatureEstimator:
    """Stein regression if the draws of a few steps determine slope and curvature; Hessian-vector products otherwise.

    Regression, and antithetic draws (which NumPyro would not make), require that the joint block owns every parameter
    (``alone``). Regression also needs full data: all particles share the error of a minibatch.
    """
    drawn = trace.particles < math.inf and not any(s.analytic for s in latents.sites)
    if latents.rows:
        return ProfileProducts()
    if not (alone and trace.batched and drawn) or latents.has_model_parameters:
        return HessianProducts()
    default = options.estimator is None and options.step_size is None and options.adaptive
    few = latents.size + 1 <= options.constants.regression_steps * trace.particles
    if default and few and trace.full_data:
        return SteinRegression(options.constants)
    return AntitheticProducts(int(trace.particles), options.constants) if trace.particles >= 2 else HessianProducts()


def _single_site_block(site: GaussianSite | MeanFieldSites | LowRankSite, trace: LossTrace, options: Options) -> Block:
    """The block of one Gaussian site with more latents than a joint block has."""
    c, margin = options.constants, options.margin
    mode = DensityMode.PATH if options.path_gradient and trace.is_elbo else None
    # A minibatch has more noise than pairs would remove.
    in_pairs = trace.full_data and trace.batched and trace.particles % 2 == 0
    detached = DensityMode.DETACHED_PAIRS if in_pairs else DensityMode.DETACHED
    if isinstance(site, LowRankSite):
        return LowRankGaussian(site, detached, True, margin, c)
    second = _is_second_order(trace, options)
    if isinstance(site, MeanFieldSites) or site.form.diagonal:
        return DiagonalGaussian(site, detached if second else mode, second, margin, c)
    second = second and len(site.shape) == 1
    return FullGaussian(site, detached if second else mode, second, margin, c)


def _exponential_family_blocks(
    trace: LossTrace, taken: set[str], shared: set[str], options: Options
) -> list[ExponentialFamilyBlock]:
    """A block for all sites of an exponential family that differ in name only, whose arguments are parameters."""
    read = [read_exponential_site(name, trace) for name in trace.sites if name not in taken]
    sites = [s for s in read if s is not None and not shared & set(s.params)]
    limited = options.max_kl is not None
    margin = options.constants.natural_margin if limited else options.margin
    split = [[s for s in sites if _is_tilted(trace, s.name, options) == tilted] for tilted in (False, True)]
    stacks = [(stack, bool(tilted)) for tilted, mine in enumerate(split) for stack in stack_sites(mine)]
    return [ExponentialFamilyBlock(s, tilted, margin, limited, options.constants) for s, tilted in stacks]


def _is_tilted(trace: LossTrace, name: str, options: Options) -> bool:
    """Whether the gradient comes from draws alone, so that their noise can be predicted."""
    site = trace.sites[name]
    carried = site.reparameterized and not site.analytic and not site.leaks
    return options.path_gradient and trace.is_elbo and carried


def _kl_hessian_blocks(trace: LossTrace, taken: set[str], sizes: dict[str, int], options: Options) -> list[FisherBlock]:
    owners = {name: site.params & set(sizes) for name, site in trace.sites.items() if name not in taken}
    return [_kl_hessian_block(names, sites, trace, sizes, options) for names, sites in _components(owners)]


def _copies(trace: LossTrace, constants: RuleConstants) -> int:
    """How many sets of independent draws there are for one of the step's."""
    return max(1, math.ceil(constants.independent_draws / trace.particles))


def _is_drawn(sites: Iterable[GuideSite]) -> bool:
    """Whether the distribution of a site depends on the draws of another."""
    return any(origin.is_drawn for site in sites for origin in site.arguments.values())


def _components(owners: Mapping[str, frozenset[str] | set[str]]) -> list[tuple[set[str], list[str]]]:
    """Connected components of the graph between sites and their parameters; sites without any are skipped."""
    groups: list[tuple[set[str], list[str]]] = []
    for name, mine in owners.items():
        if not mine:
            continue
        touching = [g for g in groups if g[0] & mine]
        merged = (set(mine).union(*(g[0] for g in touching)), [n for g in touching for n in g[1]] + [name])
        groups = [g for g in groups if g not in touching] + [merged]
    return groups


def _kl_hessian_block(
    names: set[str], sites: list[str], trace: LossTrace, sizes: dict[str, int], options: Options
) -> FisherBlock:
    mine, constants = {p: size for p, size in sizes.items() if p in names}, options.constants
    traced = {n: trace.sites[n] for n in sites}
    block = partial(FisherBlock, sizes=mine, numbers=_numbers(traced))
    # A single density has one score for each draw of the loss, too few for F: fresh draws are made for it.
    if any(s.elements == 1 and s.fisher_estimate == FisherEstimate.MONTE_CARLO for s in traced.values()):
        scores = ScoreSamples(fisher_sites(traced), constants.score_draws)
        return block(scores, Woodbury(constants.score_damping, constants.score_norm_max))
    axes = _row_axes(tuple(mine), sites, trace)
    size = sum(mine.values())
    rows = max(((trace.params[p].shape or ())[axis] for p, axis in axes.items()), default=0)
    solver = row_solver(size, rows, axes, constants) if axes else damped_solver(size, constants)
    metric = KLHessian(fisher_sites(traced), _copies(trace, constants) if _is_drawn(traced.values()) else 1)
    return block(metric, solver, row_axes=axes, row_kl=constants.element_kl)


def _likelihood_blocks(trace: LossTrace, free: dict[str, int], options: Options) -> list[FisherBlock]:
    """Connected components of the parameters that no guide site owns and the sites of the model."""
    if options.has_fallback and (trace.sites or options.fisher is None):
        return []
    owners = {name: site.params & set(free) for name, site in trace.model_sites.items()}
    return [_likelihood_block(names, sites, trace, free, options) for names, sites in _components(owners)]


def _likelihood_block(
    names: set[str], sites: list[str], trace: LossTrace, sizes: dict[str, int], options: Options
) -> FisherBlock:
    ordered = {p: size for p, size in sizes.items() if p in names}
    mine = {n: trace.model_sites[n] for n in sites}
    full_data = all(site.weight == 1 for site in mine.values())
    metric, size = Likelihood(fisher_sites(mine), full_data, bool(trace.sites)), sum(ordered.values())
    exact = metric.is_exact and size <= options.constants.dense_limit
    solver = Cholesky() if exact else damped_solver(size, options.constants)
    return FisherBlock(metric, solver, ordered, _numbers(mine))


def _numbers(sites: Mapping[str, GuideSite | ModelSite]) -> int:
    """How many numbers are drawn or observed, for the whole data set."""
    return max(round(sum((s.weight or 1.0) * s.size for s in sites.values())), 1)


def _row_axes(names: tuple[str, ...], sites: list[str], trace: LossTrace) -> dict[str, int]:
    """Of each parameter the axis of the rows, if all have an entry for each row of one subsampled plate, else none."""
    mine = [trace.sites[name] for name in sites]
    found = {p: [_row_axis(p, s, trace) for s in mine if p in s.params] for p in names}
    if any(axis is None for axes in found.values() for axis in axes):
        return {}
    axes = {p: axis for p, (axis, *_) in found.items() if axis is not None}
    rows = {(trace.params[p].shape or ())[axis] for p, axis in axes.items()}
    return axes if len(rows) == 1 and set(axes) == set(names) else {}


def _row_axis(parameter: str, site: GuideSite, trace: LossTrace) -> int | None:
    """The axis of the parameter with as many entries as the plate has rows, up to the rounding of the scale."""
    shape, weight = trace.params[parameter].shape or (), site.weight or 1.0
    rows = (k for k, a in enumerate(shape) if any(math.isclose(a, weight * b, rel_tol=0.01) for b in site.shape))
    return next(rows, None) if weight > 1 else None


def _gradient_request(
    blocks: tuple[Block, ...],
    gaussians: list[GaussianSite | LowRankSite],
    natural: list[ExponentialFamilyBlock],
    scored: frozenset[str],
    trace: LossTrace,
    options: Options,
    forward: bool,
    rows: tuple[Block, ...] = (),
) -> GradientRequest:
    modes = {name: mode for block in (*blocks, *rows) for name, mode in block.density_modes.items()}
    detached = [name for name, mode in modes.items() if mode.detached]
    own = [name for name, mode in modes.items() if mode.per_particle]
    noisy = {n for n in scored if trace.sites[n].reparameterized and not trace.sites[n].analytic}
    return GradientRequest(
        density_modes=modes,
        particles=int(trace.particles) if trace.particles < math.inf else 0,
        perturbations={
            **{name: trace.sites[name].shape for name in detached},
            **{name: (2, int(trace.particles), *trace.sites[name].shape) for name in own},
            **{s.name: s.eta_shape for block in natural if block.tilted for s in block.sites.members},
        },
        hessian_params=tuple(p for block in blocks for p in block.hessian_params),
        mean_params={g.name: g.loc for g in gaussians if g.name in modes and modes[g.name].centered},
        score_sites=frozenset(noisy if options.path_gradient and trace.is_elbo else ()),
        baselines={} if trace.is_elbo else {n: s.elements for n, s in trace.sites.items() if s.is_score_function},
        baseline_copies=_copies(trace, options.constants),
        forward=forward,
        cache_draws=sum(trace.particles * s.size for s in trace.sites.values()) <= options.constants.kept_draws,
    )
