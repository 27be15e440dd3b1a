# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The first advice of a recommendation that was not followed before, and how it is followed without thinking.

Advice is recognised by a word of the recommendation; the words that stand first in it come first.
"""

import re
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro.infer.autoguide as autoguide
from numpyro.handlers import reparam
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.reparam import LocScaleReparam

from numpyro_natgrad import FitResult, NaturalGradient, fit, to_nuts
from numpyro_natgrad.diagnostics.importance import Moments, moments

#: Words of a recommendation, and the advice that each stands for.
WORDS = {
    "more steps": "more steps",
    "further steps": "more steps",
    "another start": "another start",
    "other start": "another start",
    "num_starts": "another start",
    "init_to_median": "another start",
    "particles": "more particles",
    "LocScaleReparam(0)": "non-centred",
    "TraceEnum_ELBO": "enumeration",
    "AutoMultivariateNormal": "full covariance",
    "flow": "flow",
    "NUTS": "NUTS",
    "non-finite": "mend the model",
    "is good": "use it",
    "Use the importance-weighted moments": "use it",
    "Use the moments of the short chains": "use it",
}
#: Particles of a fit, and the most steps of one.
PARTICLES, MAX_STEPS = 8, 2000
#: Draws of each chain of NUTS that starts from a fit.
NUTS_DRAWS = 500
#: Starts of a fit that is told to use several.
NUM_STARTS = 8

GUIDES = {
    "mean-field": autoguide.AutoNormal,
    "full": autoguide.AutoMultivariateNormal,
    "flow": autoguide.AutoBNAFNormal,
}


class Attempt(NamedTuple):
    """How a problem is fitted: guide, number of starts, non-centred sites, and the advice that was followed before."""

    guide: str
    key: int
    particles: int = PARTICLES
    num_starts: int = 1
    non_centred: tuple[str, ...] = ()
    followed: tuple[str, ...] = ()


def advice(recommendation: str, followed: Collection[str] = ()) -> str:
    """The first advice of a recommendation that is not among those ``followed`` before, since it did not help."""
    at = {word: recommendation.find(word) for word, kind in WORDS.items() if kind not in followed}
    given = {word: place for word, place in at.items() if place >= 0}
    return WORDS[min(given, key=lambda word: given[word])] if given else "other"


def run(attempt: Attempt, model: Any, args: Any, training: dict[str, Any]) -> tuple[SVI, FitResult]:
    """Fit by the defaults of :func:`fit`."""
    if attempt.non_centred:
        model = reparam(model, config={name: LocScaleReparam(0) for name in attempt.non_centred})
    svi = SVI(model, GUIDES[attempt.guide](model), NaturalGradient(), Trace_ELBO(attempt.particles))
    key = jax.random.key(attempt.key)
    options: dict[str, Any] = {
        "tolerance": 0.05,
        "max_steps": MAX_STEPS,
        "progress_bar": False,
        "num_starts": attempt.num_starts,
    }
    return svi, fit(svi, key, *args, **options, **training)


def follow(
    attempt: Attempt, said: str, svi: SVI, result: FitResult, model: Any, args: Any, training: dict[str, Any]
) -> tuple[Attempt, SVI, FitResult] | None:
    """Do what a recommendation says first; nothing if that is not a matter of the guide or of the fit."""
    given = advice(said, attempt.followed)
    followed = (*attempt.followed, given)
    if given == "more steps":
        more: dict[str, Any] = {"resume": result, "tolerance": 0.0, "max_steps": max(len(result.losses), 100)}
        return (
            attempt._replace(followed=followed),
            svi,
            fit(svi, jax.random.key(0), *args, progress_bar=False, **more, **training),
        )
    changes: dict[str, dict[str, Any]] = {
        "another start": {"num_starts": NUM_STARTS},
        "more particles": {"particles": 4 * attempt.particles},
        "full covariance": {"guide": "full"},
        "flow": {"guide": "flow"},
        "non-centred": {"non_centred": (*attempt.non_centred, *_sites(said))},
    }
    if given not in changes:
        return None
    next_ = attempt._replace(**changes[given], key=attempt.key + 100, followed=followed)
    return next_, *run(next_, model, args, training)


def by_nuts(
    attempt: Attempt, svi: SVI, result: FitResult, args: Any, exact: Collection[str]
) -> tuple[Attempt, dict[str, Moments]]:
    """Start NUTS from the fit, by its defaults, and return the moments of its draws."""
    start = to_nuts(svi, result, jax.random.key(attempt.key + 200), *args)
    chains: dict[str, Any] = {"num_chains": len(jax.tree.leaves(start.init_params)[0]), "chain_method": "vectorized"}
    mcmc = MCMC(start.kernel, num_warmup=start.num_warmup, num_samples=NUTS_DRAWS, progress_bar=False, **chains)
    mcmc.run(jax.random.key(attempt.key + 300), *args, init_params=start.init_params)
    draws = {name: np.asarray(x) for name, x in mcmc.get_samples().items() if name in exact}
    return attempt._replace(followed=(*attempt.followed, "NUTS")), {n: moments(x) for n, x in draws.items()}


def _sites(said: str) -> list[str]:
    """The site that a recommendation calls a funnel; its name after a reparameterisation ends in ``_decentered``."""
    return [name.removesuffix("_decentered") for name in re.findall(r"scale of `([^`]+)` varies", said)]
