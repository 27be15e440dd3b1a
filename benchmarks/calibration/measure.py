# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Fit, judge, follow the advice, and compare each answer with NUTS."""

import time
from typing import Any

import jax
import numpy as np
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.handlers import reparam, seed, trace
from numpyro.infer import MCMC, NUTS
from numpyro.infer.reparam import LocScaleReparam

from numpyro_natgrad import verdict
from numpyro_natgrad.diagnostics.importance import Moments

from ..starts.problems import Problem
from . import advice

CHAINS, WARMUP, DRAWS = 4, 1000, 1000
#: Chains agree if R-hat is below, and the effective number of draws of each mean is above: its error is 0.07 sd then.
MAX_R_HAT, MIN_ESS = 1.02, 200
#: Standard error of a log standard deviation, from the chains, above which there is no reference for it.
MAX_SD_ERROR = 0.1
#: What a good answer may be off by, in standard deviations and as a ratio of them.
MEAN_OFF, RATIO_OFF = 0.3, 1.5
#: Sites whose centred form biases NUTS near a scale of zero, whatever its chains say: the reference is non-centred.
NON_CENTRED = {"centred_effects": "theta", "counts_by_region": "log_rate"}
#: Kinds whose modes NUTS does not travel between, whatever its chains say.
MULTIMODAL = ("multimodal",)

Row = dict[str, Any]


def dropped(problem: Problem) -> str:
    """Why a problem has no reference, or nothing."""
    if problem.enumerated:
        return "discrete sites are summed over: `verdict` raises `StructureError`, as documented"
    if problem.kind in MULTIMODAL:
        return "multimodal: NUTS is no reference"
    model, args = problem.make()
    if any(site["type"] == "param" for site in _sites(model, args).values()):
        return "parameters of the model: NUTS is no reference"
    rows = {name: x for name, x in _sites(model, args, **problem.training).items() if x["type"] == "plate"}
    batches = [name for name, x in rows.items() if np.size(x["value"]) < x["args"][0]]
    local = [x["name"] for x in latent_sites(model, args) if {f.name for f in x["cond_indep_stack"]} & set(batches)]
    return f"the guide goes on to draw a minibatch of `{local[0]}`: `verdict` warns, as documented" if local else ""


def reference(problem: Problem) -> dict[str, Any]:
    """Means and standard deviations by NUTS, or ``dropped`` if its chains disagree."""
    model, args = problem.make()
    own = {site["name"] for site in latent_sites(model, args)}
    if problem.name in NON_CENTRED:
        model = reparam(model, config={NON_CENTRED[problem.name]: LocScaleReparam(0)})
    begin = time.perf_counter()
    kernel = NUTS(model, target_accept_prob=0.9)
    mcmc = MCMC(
        kernel, num_warmup=WARMUP, num_samples=DRAWS, num_chains=CHAINS, chain_method="vectorized", progress_bar=False
    )
    mcmc.run(jax.random.key(problem.seed), *args)
    draws = {n: np.asarray(x, float) for n, x in mcmc.get_samples(group_by_chain=True).items() if n in own}
    varying = {n: x.std((0, 1)) > 1e-6 * (1e-300 + np.abs(x).max((0, 1))) for n, x in draws.items()}
    r_hat = max(np.max(split_gelman_rubin(x)[varying[n]], initial=1.0) for n, x in draws.items())
    ess = min(np.min(effective_sample_size(x)[varying[n]], initial=np.inf) for n, x in draws.items())
    found: dict[str, Any] = {"r_hat": float(r_hat), "ess": float(ess), "seconds": time.perf_counter() - begin}
    if not (r_hat < MAX_R_HAT and ess > MIN_ESS):
        return found | {"dropped": f"chains of NUTS disagree: R-hat {r_hat:.2f}, {ess:.0f} effective draws"}
    return found | {"sites": {n: _moments(x, varying[n]) for n, x in draws.items()}}


def latent_sites(model: Any, args: Any) -> list[dict[str, Any]]:
    """The latent sites of a model."""
    return [site for site in _sites(model, args).values() if site["type"] == "sample" and not site["is_observed"]]


def _sites(model: Any, args: Any, **training: Any) -> dict[str, dict[str, Any]]:
    return trace(seed(model, jax.random.key(0))).get_trace(*args, **training)


def _moments(x: np.ndarray, varying: np.ndarray) -> dict[str, list[Any]]:
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.log(x.std(1)).std(0, ddof=1) / np.sqrt(CHAINS)
    known = varying & (error < MAX_SD_ERROR)
    return {"mean": x.mean((0, 1)).tolist(), "sd": x.std((0, 1)).tolist(), "known": known.tolist()}


def rows(problem: Problem, guide: str, start: int, exact: dict[str, Any]) -> list[Row]:
    """What ``verdict`` says of a fit, then of what comes of its first advice, and of the next advice on that."""
    model, args = problem.make()
    attempt = advice.Attempt(guide, key=1000 * start + problem.seed)
    found: list[Row] = []
    svi = result = None
    for _ in range(3):
        begin = time.perf_counter()
        try:
            if svi is None or result is None:
                svi, result = advice.run(attempt, model, args, problem.training)
            else:
                said = found[-1]["recommendation"]
                if advice.advice(said, attempt.followed) == "NUTS":
                    found.append(_nuts_row(attempt, svi, result, args, exact))
                    break
                followed = advice.follow(attempt, said, svi, result, model, args, problem.training)
                if followed is None:
                    break
                attempt, svi, result = followed
            seconds = time.perf_counter() - begin
            found.append(_row(attempt, svi, result, args, exact) | {"fit seconds": seconds})
        except Exception as error:  # what a user would see is a result as well
            found.append({"error": f"{type(error).__name__}: {error}"})
            break
        if called_good(found[-1]) or answer_is_good(found[-1]):
            break
    return found


def _nuts_row(attempt: advice.Attempt, svi: Any, result: Any, args: Any, exact: dict[str, Any]) -> Row:
    """The answer of NUTS, started from a fit."""
    after, moments = advice.by_nuts(attempt, svi, result, args, tuple(exact))
    answer = off(moments, exact)
    return {
        "attempt": after._asdict(),
        "recommendation": "",
        "advice": "use it",
        "answer": "guide",
        "guide": answer,
        "importance_weighted": answer,
    }


def _row(attempt: advice.Attempt, svi: Any, result: Any, args: Any, exact: dict[str, Any]) -> Row:
    begin = time.perf_counter()
    said = verdict(svi, result, jax.random.key(7), *args, sites=tuple(exact), progress_bar=False)
    text = said.recommendation
    return {
        "attempt": attempt._asdict(),
        "verdict seconds": time.perf_counter() - begin,
        "steps": len(result.losses),
        "reason": result.reason,
        "elbo": float(said.elbo.value),
        "log_evidence": [float(x) for x in said.log_evidence],
        "k_hat": float(said.k_hat),
        "weighted_k_hat": float(said.weighted_k_hat),
        "newton_decrement": float(said.newton_decrement),
        "recommendation": text,
        "advice": advice.advice(text, attempt.followed),
        "answer": said.answer,
        "guide": off(said.guide, exact),
        "importance_weighted": off(said.importance_weighted, exact),
        "short_chains": off(said.short_chains, exact) if said.short_chains else None,
    }


def off(moments: dict[str, Moments], exact: dict[str, Any]) -> tuple[float, float]:
    """The largest error of a mean in standard deviations, and the ratio of standard deviations that is most off."""
    errors, ratios = [0.0], [1.0]
    for name, right in exact.items():
        known = np.asarray(right["known"])
        sd = np.asarray(right["sd"])[known]
        errors.extend(np.ravel(np.abs(moments[name].mean[known] - np.asarray(right["mean"])[known]) / sd))
        ratios.extend(np.ravel(moments[name].sd[known] / sd))
    with np.errstate(divide="ignore"):
        return float(np.max(errors)), float(ratios[int(np.argmax(np.abs(np.log(ratios))))])


def is_good(found: tuple[float, float]) -> bool:
    """Whether an answer is within the limits."""
    return bool(found[0] <= MEAN_OFF and 1 / RATIO_OFF <= found[1] <= RATIO_OFF)


def called_good(row: Row) -> bool:
    """Whether ``verdict`` tells the user to use the guide, its weighted moments, or those of short chains."""
    return bool(row["answer"])


def answer_is_good(row: Row) -> bool:
    """Whether the answer that ``verdict`` names is good; the guide, if it names none."""
    return is_good(row[row["answer"] or "guide"])
