# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The recommendation of a verdict, in a sentence or two: use the guide, take more steps, or choose another guide.

    k-hat < 0.5  good,    < min(1 − 1/log₁₀ S, 0.7)  usable,    else the family is too small for the posterior

These thresholds are those of Vehtari, Simpson, Gelman, Yao & Gabry 2024, *Pareto smoothed importance sampling*, JMLR
25:72, section 3, and for variational inference of Yao, Vehtari, Simpson & Gelman 2018, *Yes, but did it work?*, ICML.
Moments are recommended only if short Markov chains that start from them leave them as they are (:mod:`.short_chains`).
If the ELBO can still rise within the family, more steps are recommended instead.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

#: k-hat below which a guide is good: importance weights have a finite variance there (Vehtari et al. 2024).
GOOD_K_HAT = 0.5
#: k-hat above which no number of draws suffices in practice (Vehtari et al. 2024).
MAX_K_HAT = 0.7
#: KL(guide ‖ posterior), nats, below which means are off by less than 0.3 posterior standard deviations, and standard
#: deviations by less than 30 %, whatever k-hat is: by Talagrand's inequality W₂ ≤ σ √(2 KL), for posteriors with tails
#: no heavier than those of a Gaussian of standard deviation σ (Talagrand 1996; Huggins et al. 2020).
SMALL_KL = 0.3**2 / 2
#: Standard errors that are added to the KL before it is compared.
KL_ERRORS = 2.0
#: Effective draws below which weighted moments are not recommended: the standard error of a mean is 0.1 standard
#: deviations there (Kong 1992), a third of what the limit of the KL allows.
MIN_ESS = 100
#: Standard deviations by which a mean may differ from the weighted one: the standard error at ``MIN_ESS`` draws.
MEAN_TOLERANCE = 0.1
#: Newton decrement in nats above which more steps are recommended: half a nat is one standard deviation.
MIN_DECREMENT = 0.5
#: Share of log evidence − ELBO that the decrement must exceed as well; else steps close little of the gap. Not tuned.
MIN_DECREMENT_SHARE = 0.1
#: Latents up to which a full covariance is recommended; above, its d²/2 entries are too many. Not tuned.
FULL_COVARIANCE_LIMIT = 1000
#: |log ratio| of standard deviations above which the guide's one is called too small or too large: about 10 %.
SD_TOLERANCE = 0.1
#: Rounding of a log weight, nats, that deserves a warning: weights are then off by 10 %.
ROUNDING_TOLERANCE = 0.1

#: Standard deviation of a site's log scale over the draws above which the site may be a funnel. Not tuned.
FUNNEL_SD = 0.5
#: Particles below which more of them are recommended.
FEW_PARTICLES = 8

_OTHER_STARTS = "other starts (`fit(..., num_starts=8)`, or the guide's `init_loc_fn=init_to_median`)"
_FULL = "AutoMultivariateNormal"
_LOW_RANK = "AutoLowRankMultivariateNormal"
_FLOW_ADVICE = (
    "a flow (`AutoBNAFNormal`, `AutoIAFNormal`), or another parameterisation of the model (`LocScaleReparam`: centred "
    "where data are many, non-centred where they are few)"
)
_LAST = "another parameterisation of the model (`numpyro.infer.reparam`), a larger flow, or NUTS (`to_nuts`)"
#: The guide to try next, by the name of the class of the present one. ``wider`` and ``widest`` families contain it.
_NEXT = {
    "AutoDelta": "`AutoNormal`",
    "AutoLaplaceApproximation": "{wider}",
    "AutoNormal": "{wider}",
    "AutoDiagonalNormal": "{wider}",
    "AutoLowRankMultivariateNormal": "{widest}",
    "AutoBatchedMultivariateNormal": "{widest}",
    "AutoBatchedLowRankMultivariateNormal": "{widest}",
    "AutoMultivariateNormal": _FLOW_ADVICE,
    "AutoIAFNormal": _LAST,
    "AutoBNAFNormal": _LAST,
}


#: Guides with all correlations.
_FULL_COVARIANCE = ("AutoMultivariateNormal", "AutoLaplaceApproximation", "AutoBatchedMultivariateNormal")


class Move(NamedTuple):
    """The entry whose mean or standard deviation short chains move most, by how much, and its standard error.

    ``by`` is in standard deviations of the chains if ``moment`` is ``"mean"``; it is the logarithm of the ratio of the
    chains' standard deviation to that of the answer if it is ``"standard deviation"``.
    """

    moment: str
    entry: str
    by: float
    error: float

    def __str__(self) -> str:
        if self.moment == "mean":
            return f"the mean of `{self.entry}` by {abs(self.by):.2f} ± {self.error:.2f} standard deviations"
        ratio = math.exp(self.by)
        return f"the standard deviation of `{self.entry}` by a factor of {ratio:.2f} ± {ratio * self.error:.2f}"


class Recommendation(NamedTuple):
    """What to do, in a sentence or two, and the field of :class:`.Verdict` whose moments can be used, or ``""``."""

    text: str
    answer: str = ""


class Case(NamedTuple):
    """What a recommendation is based on, beside fields of :class:`.Verdict`.

    :ivar guide: names of the guide's class and of its base classes.
    :ivar latents: dimensions of the latent sites.
    :ivar nonfinite: number of draws whose log weight is not finite.
    :ivar gap: log evidence − ELBO, nats, which is KL(guide ‖ posterior); ``gap_error``: its standard error.
    :ivar rounding: rounding error of a log weight, nats.
    :ivar no_maximum: whether the ELBO has no maximum at the fitted parameters.
    :ivar points: latent sites that the guide gives a single value; ``only_points`` if it gives one to all of them.
    :ivar subsampled: plates with a minibatch.
    :ivar worst: the entry whose standard deviation is most off, and the guide's divided by the importance-weighted one.
    :ivar cause: the site at which losses are not finite, or why there is no Newton decrement; ``abstains``: the latter,
        because draws of discrete sites are not differentiable.
    :ivar term_tail: Pareto shape of the lowest terms of the ELBO.
    :ivar funnel: the latent site whose scale varies with other latents, or ``""``.
    :ivar weighted_k_hat: k-hat of the weights of the weighted moments, NaN if they are those of the guide's draws.
    :ivar farthest: the entry whose mean is most off, and by how many importance-weighted standard deviations.
    :ivar correlated: whether linear response expects wider marginals than the guide's, or is unknown.
    :ivar chain_states: number of states of short chains, 0 if none ran; ``chains_mixed``: whether they have forgotten
        where they started.
    :ivar guide_moves: what the chains move of the guide's moments, if that is more than noise; ``weighted_moves``: of
        the weighted ones.
    """

    guide: tuple[str, ...]
    latents: int
    draws: int
    nonfinite: int
    k_hat: float
    ess: float
    gap: float
    rounding: float
    newton_decrement: float
    no_maximum: bool
    points: tuple[str, ...]
    only_points: bool
    subsampled: tuple[str, ...]
    worst: tuple[str, float]
    newton_decrement_error: float = 0.0
    gap_error: float = math.nan
    cause: str = ""
    abstains: bool = False
    term_tail: float = 0.0
    particles: int = FEW_PARTICLES
    funnel: str = ""
    correlated: bool = True
    weighted_k_hat: float = math.nan
    farthest: tuple[str, float] = ("", 0.0)
    chain_states: int = 0
    chains_mixed: bool = False
    guide_moves: Move | None = None
    weighted_moves: Move | None = None

    @property
    def weights_are_good(self) -> bool:
        """Whether the weighted moments can be used: those of the mixture, if there is one.

        Weights do not know the neck of a funnel, where the guide has no draws. Chains find it; without chains a site
        whose scale varies is taken to have one.
        """
        k_hat = self.k_hat if math.isnan(self.weighted_k_hat) else self.weighted_k_hat
        confirmed = self.weighted_moves is None and (self.chain_states > 0 or not self.funnel)
        return can_be_weighted(k_hat, self.ess, self.draws) and confirmed

    @property
    def guide_is_close(self) -> bool:
        """Whether all means and standard deviations of the guide are those of the weighted draws."""
        return abs(math.log(self.worst[1])) <= SD_TOLERANCE and self.farthest[1] <= MEAN_TOLERANCE


def threshold(draws: int) -> float:
    """The k-hat above which S = ``draws`` do not suffice, min(1 − 1/log₁₀ S, 0.7)."""
    return min(1 - 1 / math.log10(max(draws, 11)), MAX_K_HAT)


def is_small(gap: float, error: float) -> bool:
    """Whether KL(guide ‖ posterior) = ``gap``, nats, is so small that means and standard deviations are right."""
    return gap + KL_ERRORS * error < SMALL_KL


def can_be_weighted(k_hat: float, ess: float, draws: int) -> bool:
    """Whether weighted moments can be trusted: their error is known, and small enough."""
    return k_hat < threshold(draws) and ess > MIN_ESS


def grade(k_hat: float, draws: int) -> str:
    """One word for k-hat."""
    if math.isnan(k_hat):
        return "unknown"
    if k_hat >= threshold(draws):
        return "too large"
    return "good" if k_hat < GOOD_K_HAT else "usable"


def distinguishable(k_hat: float, limit: float) -> tuple[str, str]:
    """Both numbers with the least number of decimals, at least two, at which they differ."""
    written = [(f"{k_hat:.{digits}f}", f"{limit:.{digits}f}") for digits in range(2, 17)]
    return next((pair for pair in written if pair[0] != pair[1]), written[0])


def recommend(case: Case) -> Recommendation:
    """The sentences that end a verdict: reservations first, then what to do."""
    found = _main(case)
    return found._replace(text=" ".join([*_reservations(case), found.text]))


def _reservations(case: Case) -> list[str]:
    """What limits the meaning of the numbers."""
    said = []
    if case.nonfinite:
        where = f"{case.cause}. Draw it in the guide from its support, or mend" if case.cause else "check"
        said.append(f"{case.nonfinite} of {case.draws} draws have a non-finite log weight: {where} the model there.")
    elif case.term_tail > MAX_K_HAT:
        shape = f"{case.term_tail:.2f}"
        said.append(
            f"The ELBO has no finite variance: its lowest terms have the Pareto shape {shape} (finite below 0.5)."
        )
    if case.subsampled:
        names = ", ".join(f"`{name}`" for name in case.subsampled)
        said.append(f"The plates {names} saw a minibatch, and the weights are those of it: pass all of the data.")
    if case.points and not case.only_points:
        names = ", ".join(f"`{name}`" for name in case.points)
        said.append(f"The guide gives {names} a single value, and all numbers are conditional on it.")
    if case.rounding > ROUNDING_TOLERANCE:
        said.append(f"Log weights have rounding errors of {case.rounding:.1g} nats: use `numpyro.enable_x64()`.")
    return said


def _main(case: Case) -> Recommendation:
    if case.nonfinite == case.draws:
        return Recommendation("No draw has a weight, and so nothing is known of the posterior yet.")
    if case.only_points:
        return Recommendation(f"The guide is a point and has no uncertainty: try {next_guide(case)}.")
    shown, limit = distinguishable(case.k_hat, threshold(case.draws))
    mark, k = grade(case.k_hat, case.draws), f"k-hat {shown}"
    if found := _good_enough(case, mark, k):
        return found
    rise = f"its ELBO can rise by about {case.newton_decrement:.1f} nats within this family"
    gain = f"The fit has not converged: {rise} ({k})."
    unfinished = case.newton_decrement - case.newton_decrement_error > max(
        MIN_DECREMENT, MIN_DECREMENT_SHARE * case.gap
    )
    if unfinished and case.no_maximum:
        return Recommendation(f"{gain} It stopped where the ELBO has no maximum: try {_OTHER_STARTS}, then more steps.")
    if unfinished and 0 < case.particles < FEW_PARTICLES:
        ratio = FEW_PARTICLES / case.particles
        more = (
            f"Use more particles (`num_particles={FEW_PARTICLES}`; a step then costs up to {ratio:.0f} times as much)"
        )
        return Recommendation(f"{gain} {more}, or take more steps.")
    if unfinished:
        more = f"Take more steps, about as many again; if that does not help, try {_OTHER_STARTS}."
        return Recommendation(f"{gain} {more}")
    if case.weights_are_good:
        return _proposal_only(case, k)
    if case.chains_mixed:
        return _by_chains(case, k)
    if case.abstains:
        cause = f"sum over discrete sites by `TraceEnum_ELBO`, since {case.cause}"
        return Recommendation(f"The guide is too far off ({k}): {cause}.")
    return Recommendation(_too_small(case, k, limit))


def _good_enough(case: Case, mark: str, k: str) -> Recommendation | None:
    """Use the guide, or its weighted draws, if k-hat or the KL says so and no chain contradicts."""
    if mark == "good" and case.weights_are_good:
        if not case.nonfinite and case.guide_is_close and case.guide_moves is None:
            return Recommendation(f"The guide is good: {k}. Use it as it is.", "guide")
        return Recommendation(f"The guide is good: {k}. {_correction(case)}", "importance_weighted")
    if mark == "usable" and case.weights_are_good:
        use = f"Use the importance-weighted moments ({case.ess:.0f} effective draws)."
        return Recommendation(f"The guide is usable: {k}. {use}", "importance_weighted")
    if is_small(case.gap, case.gap_error) and case.guide_moves is None:
        kl = f"KL(guide ‖ posterior) is {case.gap:.3f} ± {case.gap_error:.3f} nats"
        tails = f"Do not weight its draws: {k}, since its tails are too light."
        return Recommendation(f"The guide is good for means and standard deviations: {kl}. {tails}", "guide")
    return None


def _proposal_only(case: Case, k: str) -> Recommendation:
    """The guide is too far off, and its mixture has good weights."""
    shown, _ = distinguishable(case.weighted_k_hat, threshold(case.draws))
    return Recommendation(
        f"The guide is too far off to be used as it is ({k}), and usable for importance sampling. Use the "
        f"importance-weighted moments ({case.ess:.0f} effective draws, k-hat {shown} of their weights) or resampled "
        f"draws (`to_arviz(judged, rng_key)`). For a better guide, try {next_guide(case)}.",
        "importance_weighted",
    )


def _by_chains(case: Case, k: str) -> Recommendation:
    """Neither the guide nor its weights can be used, and the chains from its draws have forgotten them."""
    moves = case.weighted_moves or case.guide_moves
    changed = f" They move {moves}." if moves else ""
    return Recommendation(
        f"The guide is too far off to be used as it is ({k}). Use the moments of the short chains of Hamiltonian Monte "
        f"Carlo that start from its draws, or their {case.chain_states} states (`to_arviz(judged, rng_key)`).{changed} "
        f"For a better guide, try {next_guide(case)}.",
        "short_chains",
    )


def _too_small(case: Case, k: str, limit: str) -> str:
    """What to do if the optimum of the family is too far from the posterior: first what costs least."""
    small = case.k_hat < threshold(case.draws)
    moves = case.weighted_moves or case.guide_moves
    seen = f"short chains that start from its draws move {moves}" if moves else ""
    why = ", but ".join([k, seen] if small and seen else [k if small else f"{k}, trustworthy below {limit}"])
    said = f"The family is too small: {why}."
    wider = next_guide(case)
    if case.funnel:
        first = f"The scale of `{case.funnel}` varies with other latents: use `LocScaleReparam(0)` for it"
        return f"{said} {first} (non-centred; the same cost), or {wider}."
    if case.correlated and not any(name in _FULL_COVARIANCE for name in case.guide):
        return f"{said} Try {wider}."
    if case.no_maximum:
        return f"{said} The fit stopped where the ELBO has no maximum: try {_OTHER_STARTS}, then {wider}."
    modes = f"If the posterior may have other modes, try {_OTHER_STARTS}."
    return f"{said} Start NUTS from this fit (`to_nuts`), or try {wider}. {modes}"


def _correction(case: Case) -> str:
    """What the weighted moments mend of a good guide."""
    if case.nonfinite:
        return "Use the importance-weighted moments, in which draws with a non-finite log weight have weight zero."
    name, ratio = case.worst
    if abs(math.log(ratio)) > SD_TOLERANCE:
        size = "small" if ratio < 1 else "large"
        fault = f"Its standard deviation of `{name}` is too {size}, {ratio:.2f} of the importance-weighted one"
    elif case.farthest[1] > MEAN_TOLERANCE:
        name, shift = case.farthest
        fault = f"Its mean of `{name}` is off by {shift:.2f} standard deviations"
    else:
        fault = f"Short chains that start from its draws move {case.guide_moves}"
    return f"{fault}: use the importance-weighted moments."


def next_guide(case: Case) -> str:
    """The guide to try next."""
    few = case.latents <= FULL_COVARIANCE_LIMIT
    wider, widest = f"`{_FULL if few else _LOW_RANK}`", f"`{_FULL}`" if few else _FLOW_ADVICE
    for name in case.guide:
        if name in _NEXT:
            return _NEXT[name].format(wider=wider, widest=widest)
    return f"a guide whose latents depend on each other, such as {wider}, or a flow (`AutoBNAFNormal`)"


def class_names(guide: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the classes of a guide, its own first."""
    return tuple(cls.__name__ for cls in type(guide).__mro__)
