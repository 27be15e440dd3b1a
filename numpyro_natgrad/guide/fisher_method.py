# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Choose how each site's Fisher matrix is computed: the best available estimate, or the one that ``fisher=`` names."""

from typing import NoReturn, TypeVar

from numpyro_natgrad.distributions.surrogate import FisherEstimate
from numpyro_natgrad.guide.trace import GuideSite, LossTrace, ModelSite
from numpyro_natgrad.options import StructureError

Site = TypeVar("Site", GuideSite, ModelSite)


def resolve_fisher_method(trace: LossTrace, fisher: str | None) -> LossTrace:
    """The trace with every site's ``fisher_estimate`` set by the option ``fisher``.

    ==================  =======================================================  ==================================
    ``fisher``          the Fisher matrix is                                     refuses
    ==================  =======================================================  ==================================
    ``None``            in closed form where that is known, else by Monte Carlo
    ``"closed_form"``   in closed form                                           sites without a closed form
    ``"kl_hessian"``    ∇²KL in NumPyro's own parameters, for every site         sites whose KL is not known
    ``"monte_carlo"``   the mean outer product of scores, for every site         sites without a density
    ``"empirical"``     Σ ∇log p(y_i) ∇log p(y_i)ᵀ at the observed data          guides that draw, no observations
    ==================  =======================================================  ==================================

    :raises StructureError: naming the sites that it refuses.
    """
    if fisher in ("closed_form", "kl_hessian"):
        model_sites = {n: site for n, site in trace.model_sites.items() if site.params}
        sites: list[tuple[str, GuideSite | ModelSite]] = [*trace.sites.items(), *model_sites.items()]
        unknown = [f"`{n}` ({s.base.__name__})" for n, s in sites if s.fisher_estimate != FisherEstimate.CLOSED_FORM]
        if unknown:
            _refuse(
                fisher,
                f"the sites {', '.join(unknown)} have no Fisher in closed form",
                "Make it known with `register_exponential_family` or `register_fisher`, or use `fisher='monte_carlo'`",
            )
    if fisher == "monte_carlo":
        return _monte_carlo(trace)
    if fisher == "empirical":
        return _empirical(trace)
    return trace


def _monte_carlo(trace: LossTrace) -> LossTrace:
    hidden = [f"`{n}` ({s.base.__name__})" for n, s in trace.sites.items() if s.density is None]
    if hidden:
        _refuse(
            "monte_carlo",
            f"the sites {', '.join(hidden)} have no density at given draws",
            "Use `fisher=None`, which takes closed forms where there are any, and else the fallback optimizer",
        )
    return trace._replace(
        sites=_with_estimate(trace.sites, FisherEstimate.MONTE_CARLO),
        model_sites=_with_estimate(trace.model_sites, FisherEstimate.MONTE_CARLO),
    )


def _empirical(trace: LossTrace) -> LossTrace:
    if trace.sites:
        _refuse(
            "empirical",
            f"the guide draws {sorted(trace.sites)}, and its Fisher matrix is made of the scores of its own draws",
            "Use `fisher='monte_carlo'`; the empirical Fisher matrix is for models fitted by points",
        )
    if not any(site.observed and site.params for site in trace.model_sites.values()):
        _refuse("empirical", "the model has no observed site with a parameter", "Give the data as `obs=`")
    return trace._replace(model_sites=_with_estimate(trace.model_sites, FisherEstimate.EMPIRICAL))


def _with_estimate(sites: dict[str, Site], estimate: FisherEstimate) -> dict[str, Site]:
    return {name: site._replace(fisher_estimate=estimate) for name, site in sites.items()}


def _refuse(fisher: str, why: str, remedy: str) -> NoReturn:
    raise StructureError(f"`fisher={fisher!r}`: {why}. {remedy}.")
