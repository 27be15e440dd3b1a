# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Three metrics of unconstrained parameters φ; each gives a :class:`.FisherOperator`.

    KLHessian      F(φ) = ∇²_φ' KL(q_φ ‖ q_φ') |_{φ'=φ} = E_z Σ_sites JᵀF_site J       sites of the guide
    Likelihood     F(φ) = E_z Σ_i JᵀF_obs J                                            sites of the model
    ScoreSamples   F(φ) = E_{z~q}[∇ log q_φ(z) ∇ log q_φ(z)ᵀ]                          a density without closed form

The first two are derivatives of the loss itself with Fisher surrogates (:mod:`.surrogate`) in place of its densities,
so that plates, scales, data and particles count as they do in NumPyro.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import random
from jax.flatten_util import ravel_pytree

from numpyro_natgrad.blocks.fisher.solvers import FisherOperator
from numpyro_natgrad.distributions.surrogate import (
    Density,
    FisherEstimate,
    fisher_product,
    fisher_surrogate,
    likelihood_surrogate,
    prior_surrogate,
)
from numpyro_natgrad.estimators import score_samples
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import Frozen, IndependentDraws
from numpyro_natgrad.guide.trace import GuideSite, ModelSite


class FisherSite(NamedTuple):
    """A site that contributes to F; ``point`` if its value is a point of the guide, and its density a prior."""

    name: str
    family: str
    estimate: FisherEstimate
    point: bool = False


def fisher_sites(sites: Mapping[str, GuideSite | ModelSite]) -> tuple[FisherSite, ...]:
    point = lambda site: isinstance(site, ModelSite) and site.point
    return tuple(FisherSite(n, s.base.__name__, s.fisher_estimate, point(s)) for n, s in sites.items())


@dataclass(frozen=True)
class Metric(ABC):
    """What F is the Fisher matrix of: the densities of ``sites``."""

    sites: tuple[FisherSite, ...]

    @property
    @abstractmethod
    def description(self) -> str:
        """For the report."""

    @property
    def exact_on_conjugate(self) -> bool:
        return False

    @property
    def is_compared(self) -> bool:
        """Whether successive natural gradients are compared, to separate signal and noise."""
        return True

    @abstractmethod
    def operator(self, loss_info: LossInfo, params: Params, names: Iterable[str], key: jax.Array) -> FisherOperator:
        """F of the parameters ``names`` among all of ``params``; ``key`` is for what F itself draws."""

    def _estimates(self) -> str:
        return ", ".join(dict.fromkeys(site.estimate for site in self.sites))


@dataclass(frozen=True)
class KLHessian(Metric):
    """The Hessian of the guide's KL to itself.

    It is taken at the draws of the step, unless it depends on too few of them (``copies`` > 1). The weight w of a site
    N(w z, σ²) behind a draw z has F = z²/σ² at one draw, and its step g/F ~ 1/z has no variance: F is then averaged
    over ``copies`` independent draws for each draw of the step.
    """

    copies: int = 1

    @property
    def description(self) -> str:
        return f"Hessian of KL ({self._estimates()})"

    def operator(self, loss_info: LossInfo, params: Params, names: Iterable[str], key: jax.Array) -> FisherOperator:
        return _operator_of_loss(Frozen(guide_surrogates(self.sites)), loss_info, params, names, key, self.copies)


@dataclass(frozen=True)
class Likelihood(Metric):
    """The Fisher matrix of the likelihood, for parameters that no distribution of the guide owns: Amari (1998).

    Without latents z a step is Fisher scoring; for a GLM, iteratively reweighted least squares. Beside a guide of z,
    F is that of the complete data with the prior, and steps are those of online EM with F⁻¹ in place of a closed-form
    M-step (Titterington 1984; Sato 2000). The *empirical* Fisher matrix replaces the expectation over y_i by the
    observed y_i; it equals F only at the optimum of a well-specified model (Kunstner, Balles & Hennig 2019). For points
    of the guide (``AutoDelta``) the curvature of the prior is added, so that steps go to the mode.

    :ivar full_data: every step sees the whole data set.
    :ivar drawn: the guide draws latents.
    """

    full_data: bool
    drawn: bool

    @property
    def description(self) -> str:
        return f"Fisher of the likelihood ({self._estimates()})"

    @property
    def exact_on_conjugate(self) -> bool:
        return not self.drawn

    @property
    def is_compared(self) -> bool:
        return self.drawn or not self.full_data

    @property
    def is_exact(self) -> bool:
        """Whether F depends on no draw, neither of latents nor of data."""
        return not self.drawn and all(site.estimate == FisherEstimate.CLOSED_FORM for site in self.sites)

    def operator(self, loss_info: LossInfo, params: Params, names: Iterable[str], key: jax.Array) -> FisherOperator:
        return _operator_of_loss(Frozen({}, model_surrogates(self.sites, key)), loss_info, params, names, key)


@dataclass(frozen=True)
class ScoreSamples(Metric):
    """The mean outer product of the scores of ``draws`` fresh draws, rounded up to a multiple of the particles."""

    draws: int

    @property
    def description(self) -> str:
        return f"Monte Carlo (scores of {self.draws} draws)"

    def operator(self, loss_info: LossInfo, params: Params, names: Iterable[str], key: jax.Array) -> FisherOperator:
        mine = {p: params[p] for p in names}
        u = self.scores(loss_info, params, mine)
        return FisherOperator(mine, lambda d: u @ (d @ u), key, scores=u)

    def scores(self, loss_info: LossInfo, params: Params, mine: Params) -> jax.Array:
        """U, ``(P, S)``: the scores of S draws over √S, so that UUᵀ is unbiased for F."""
        n = int(loss_info.particles) if math.isfinite(loss_info.particles) else 1
        names, calls = frozenset(site.name for site in self.sites), -(-self.draws // n)

        def draw(number: jax.Array) -> jax.Array:
            each = score_samples.sample_scores(loss_info.fn, params, mine, names, n, number)
            return jax.vmap(lambda tree: ravel_pytree(tree)[0])(each)

        u = jax.vmap(draw)(jnp.arange(calls))
        return u.reshape(calls * n, -1).T * jnp.sqrt(n / calls)


def guide_surrogates(sites: Iterable[FisherSite]) -> dict[str, Density]:
    return {site.name: fisher_surrogate(site.estimate) for site in sites}


def model_surrogates(sites: Iterable[FisherSite], key: jax.Array) -> dict[str, Density]:
    """The Fisher surrogate of each site of the model; those without closed form draw data from the model."""
    return {
        site.name: (prior_surrogate if site.point else likelihood_surrogate)(site.estimate, random.fold_in(key, k))
        for k, site in enumerate(sites)
    }


def surrogate_operator(
    surrogate: Callable[[Params], jax.Array], params: Params, key: jax.Array, *, forward: bool
) -> FisherOperator:
    """F from a Fisher surrogate of the parameters; ``forward`` for derivatives in forward mode only."""
    flat, unravel = ravel_pytree(params)
    return FisherOperator(params, fisher_product(lambda x: surrogate(unravel(x)), flat, forward=forward), key)


def _operator_of_loss(
    frozen: Frozen, loss_info: LossInfo, params: Params, names: Iterable[str], key: jax.Array, copies: int = 1
) -> FisherOperator:
    def surrogate(mine: Params) -> jax.Array:
        with frozen:
            return loss_info.fn({**params, **mine})[0]

    def averaged(mine: Params) -> jax.Array:
        def drawn(number: jax.Array) -> jax.Array:
            with IndependentDraws(number):
                return surrogate(mine)

        return jnp.mean(jax.vmap(drawn)(1 + jnp.arange(copies)))

    chosen = averaged if copies > 1 else surrogate
    return surrogate_operator(chosen, {p: params[p] for p in names}, key, forward=loss_info.forward)
