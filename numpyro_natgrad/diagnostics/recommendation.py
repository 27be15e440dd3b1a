# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What to do next, in a sentence or two: from the numbers of a verdict to the next guide, more steps, or nothing.

    k-hat < 0.5  good,    < min(1 − 1/log₁₀ S, 0.7)  usable,    else the family is too small for the posterior

(Vehtari et al. 2024, JMLR 25:72, section 3; for variational answers Yao, Vehtari, Simpson & Gelman 2018, ICML.) More
steps come before a larger family where the family itself still has nats to give.
"""

import math
from typing import Any, NamedTuple

#: k-hat below which importance sampling works as if weights had all moments that matter.
GOOD = 0.5
#: Nats that a Newton step would have to gain for more steps to be advised: half of one is a standard deviation in one
#: direction; and the share of the gap between ELBO and log evidence.
DECREMENT, SHARE = 0.5, 0.1
#: Latents up to which a full covariance is advised.
FULL_LIMIT = 1000
#: Relative error of a standard deviation worth a word.
OFF = 0.1
#: Nats by which the log weights may be rounded.
ROUNDED = 0.1

_FULL = "AutoMultivariateNormal"
_LOW_RANK = "AutoLowRankMultivariateNormal"
_FLOWS = (
    "a flow (`AutoBNAFNormal`, `AutoIAFNormal`), or another parameterisation of the model (`LocScaleReparam`: centred "
    "where data are many, non-centred where they are few)"
)
_LAST = "another parameterisation of the model (`numpyro.infer.reparam`), a larger flow, or NUTS"
#: What follows on a guide, by the name of its class; a wider family is one that contains it.
_NEXT = {
    "AutoDelta": "`AutoNormal`",
    "AutoLaplaceApproximation": "{wider}",
    "AutoNormal": "{wider}",
    "AutoDiagonalNormal": "{wider}",
    "AutoLowRankMultivariateNormal": "{widest}",
    "AutoBatchedMultivariateNormal": "{widest}",
    "AutoBatchedLowRankMultivariateNormal": "{widest}",
    "AutoMultivariateNormal": _FLOWS,
    "AutoIAFNormal": _LAST,
    "AutoBNAFNormal": _LAST,
}


class Case(NamedTuple):
    """What advice is given on.

    :ivar guide: names of the guide's class and of its ancestors.  :ivar latents: numbers that a draw has.
    :ivar draws: how many there are.  :ivar lost: those whose log weight is not finite.
    :ivar k_hat: of the weights.  :ivar ess: their effective number of draws.
    :ivar gap: log evidence minus ELBO, nats.  :ivar rounding: of a log weight, nats.
    :ivar decrement: nats that a Newton step would gain; NaN if unknown.  :ivar flat: the ELBO has no maximum there.
    :ivar points: sites without spread.  :ivar whole: there are no others.
    :ivar subsampled: plates that saw a minibatch.
    :ivar worst: the entry whose standard deviation is most off, and guide's over importance-weighted.
    """

    guide: tuple[str, ...]
    latents: int
    draws: int
    lost: int
    k_hat: float
    ess: float
    gap: float
    rounding: float
    newton_decrement: float
    flat: bool
    points: tuple[str, ...]
    whole: bool
    subsampled: tuple[str, ...]
    worst: tuple[str, float]


def threshold(draws: int) -> float:
    """k-hat above which so many draws do not suffice, min(1 − 1/log₁₀ S, 0.7)."""
    return min(1 - 1 / math.log10(max(draws, 11)), 0.7)


def grade(k_hat: float, draws: int) -> str:
    """One word on k-hat."""
    if math.isnan(k_hat):
        return "unknown"
    return "good" if k_hat < min(GOOD, threshold(draws)) else "usable" if k_hat < threshold(draws) else "too large"


def apart(k_hat: float, limit: float) -> tuple[str, str]:
    """Both numbers, with as many digits as tell them apart, two at least."""
    written = [(f"{k_hat:.{digits}f}", f"{limit:.{digits}f}") for digits in range(2, 17)]
    return next((pair for pair in written if pair[0] != pair[1]), written[0])


def advise(case: Case) -> str:
    """What a person should do."""
    return " ".join([*_reservations(case), _main(case)])


def _reservations(case: Case) -> list[str]:
    """What the numbers do not mean here."""
    said = []
    if case.lost:
        said.append(f"{case.lost} of {case.draws} draws have a log weight that is not finite: look at the model there.")
    if case.subsampled:
        names = ", ".join(f"`{name}`" for name in case.subsampled)
        said.append(f"The plates {names} saw a minibatch: the weights are its own; pass all of the data for a verdict.")
    if case.points and not case.whole:
        names = ", ".join(f"`{name}`" for name in case.points)
        said.append(f"{names} is a point of the guide: all of this is conditional on it.")
    if case.rounding > ROUNDED:
        said.append(f"Log weights are rounded to {case.rounding:.1g} nats: `numpyro.enable_x64()` for a verdict.")
    return said


def _main(case: Case) -> str:
    if case.whole:
        return f"The guide is a point and says nothing of uncertainty: try {following(case)}."
    shown, limit = apart(case.k_hat, threshold(case.draws))
    mark, k = grade(case.k_hat, case.draws), f"k-hat {shown}"
    if mark == "good":
        return f"The guide is good: {k}. {_correction(case)}"
    if mark == "usable":
        return f"The guide is usable: {k}. Take the importance-weighted moments ({case.ess:.0f} effective draws)."
    if _unfinished(case):
        gain = f"by about {case.newton_decrement:.1f} nats"
        return f"The fit is not done: its ELBO can rise {gain} within this family ({k}). Take more steps."
    fault = f"The family is too small: {k}, trustworthy below {limit}"
    advice = f"{fault}. Try {following(case)}."
    return advice + (" Its maximum of the ELBO is not where the fit stopped: more steps may help too." * case.flat)


def _unfinished(case: Case) -> bool:
    return case.newton_decrement > max(DECREMENT, SHARE * case.gap)


def _correction(case: Case) -> str:
    if case.lost:
        return "Take the importance-weighted moments, in which draws without a finite weight count nothing."
    name, ratio = case.worst
    if abs(math.log(ratio)) <= OFF:
        return "Use it as it is."
    size = "small" if ratio < 1 else "large"
    fault = f"Its standard deviation of `{name}` is too {size}, {ratio:.2f} of the importance-weighted one"
    return f"{fault}: take those moments."


def following(case: Case) -> str:
    """The next guide to try."""
    few = case.latents <= FULL_LIMIT
    wider, widest = f"`{_FULL if few else _LOW_RANK}`", f"`{_FULL}`" if few else _FLOWS
    for name in case.guide:
        if name in _NEXT:
            return _NEXT[name].format(wider=wider, widest=widest)
    return f"a guide whose latents depend on each other ({wider} is one), or a flow (`AutoBNAFNormal`)"


def ancestors(guide: Any) -> tuple[str, ...]:
    """Names of the classes of a guide, its own first."""
    return tuple(cls.__name__ for cls in type(guide).__mro__)
