# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""By which route the Fisher of every site is got: the best one, or the one that the user asks for, or an error."""

from typing import NoReturn

from numpyro_natgrad.distributions.surrogate import FisherEstimate
from numpyro_natgrad.errors import StructureError
from numpyro_natgrad.guide.handlers import ModelSite
from numpyro_natgrad.guide.trace import GuideSite, LossTrace


def resolve_fisher_method(trace: LossTrace, fisher: str | None) -> LossTrace:
    """The hearing with every site's ``divergence`` as asked for.

    ==================  =======================================================  ==================================
    ``fisher``          the Fisher is                                            refuses
    ==================  =======================================================  ==================================
    ``None``            in closed form where that is known, else by Monte Carlo
    ``"closed_form"``   in closed form                                           sites without a closed form
    ``"kl_hessian"``    ∇²KL in NumPyro's own parameters, and nothing cleverer   sites whose KL is not known
    ``"monte_carlo"``   the mean outer product of scores, for every site         sites without a density
    ``"empirical"``     Σ ∇log p(y_i) ∇log p(y_i)ᵀ at the observed data          guides that draw, no observations
    ==================  =======================================================  ==================================

    :raises StructureError: naming the sites that cannot go the way asked for.
    """
    if fisher in ("closed_form", "kl_hessian"):
        model_sites = {n: site for n, site in trace.model_sites.items() if site.params}
        sites: list[tuple[str, GuideSite | ModelSite]] = [*trace.sites.items(), *model_sites.items()]
        unknown = [f"`{n}` ({s.base.__name__})" for n, s in sites if s.divergence != FisherEstimate.CLOSED_FORM]
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
            "Use `fisher=None`, which takes closed forms where there are any, and else the ordinary optimizer",
        )
    return trace._replace(
        sites={n: s._replace(divergence=FisherEstimate.MONTE_CARLO) for n, s in trace.sites.items()},
        model_sites={n: s._replace(divergence=FisherEstimate.MONTE_CARLO) for n, s in trace.model_sites.items()},
    )


def _empirical(trace: LossTrace) -> LossTrace:
    if trace.sites:
        _refuse(
            "empirical",
            f"the guide draws {sorted(trace.sites)}, and the scores of its own draws are what its Fisher is made of",
            "Use `fisher='monte_carlo'`; the empirical Fisher is for models fitted by points",
        )
    if not any(site.observed and site.params for site in trace.model_sites.values()):
        _refuse("empirical", "the model has no observed site with a parameter", "Give the data as `obs=`")
    return trace._replace(
        model_sites={n: s._replace(divergence=FisherEstimate.EMPIRICAL) for n, s in trace.model_sites.items()}
    )


def _refuse(fisher: str, why: str, remedy: str) -> NoReturn:
    raise StructureError(f"`fisher={fisher!r}`: {why}. {remedy}.")
