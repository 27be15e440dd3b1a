# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""By which route the Fisher of every site is got: the best one, or the one that the user asks for, or an error."""

from typing import NoReturn

from .densities import CLOSED, EMPIRICAL, MONTE_CARLO
from .effects import ModelSite
from .errors import StructureError
from .hearing import HeardSite, Hearing


def routed(hearing: Hearing, fisher: str | None) -> Hearing:
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
        modelled = {n: site for n, site in hearing.modelled.items() if site.params}
        sites: list[tuple[str, HeardSite | ModelSite]] = [*hearing.sites.items(), *modelled.items()]
        unknown = [f"`{n}` ({s.base.__name__})" for n, s in sites if s.divergence != CLOSED]
        if unknown:
            _refuse(
                fisher,
                f"the sites {', '.join(unknown)} have no Fisher in closed form",
                "Make it known with `register_exponential` or `register_fisher`, or use `fisher='monte_carlo'`",
            )
    if fisher == "monte_carlo":
        return _monte_carlo(hearing)
    if fisher == "empirical":
        return _empirical(hearing)
    return hearing


def _monte_carlo(hearing: Hearing) -> Hearing:
    hidden = [f"`{n}` ({s.base.__name__})" for n, s in hearing.sites.items() if s.density is None]
    if hidden:
        _refuse(
            "monte_carlo",
            f"the sites {', '.join(hidden)} have no density at given draws",
            "Use `fisher=None`, which takes closed forms where there are any, and else the ordinary optimizer",
        )
    return hearing._replace(
        sites={n: s._replace(divergence=MONTE_CARLO) for n, s in hearing.sites.items()},
        modelled={n: s._replace(divergence=MONTE_CARLO) for n, s in hearing.modelled.items()},
    )


def _empirical(hearing: Hearing) -> Hearing:
    if hearing.sites:
        _refuse(
            "empirical",
            f"the guide draws {sorted(hearing.sites)}, and the scores of its own draws are what its Fisher is made of",
            "Use `fisher='monte_carlo'`; the empirical Fisher is for models fitted by points",
        )
    if not any(site.observed and site.params for site in hearing.modelled.values()):
        _refuse("empirical", "the model has no observed site with a parameter", "Give the data as `obs=`")
    return hearing._replace(modelled={n: s._replace(divergence=EMPIRICAL) for n, s in hearing.modelled.items()})


def _refuse(fisher: str, why: str, remedy: str) -> NoReturn:
    raise StructureError(f"`fisher={fisher!r}`: {why}. {remedy}.")
