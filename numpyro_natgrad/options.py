# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The options of :class:`.NaturalGradient`, checked before anything runs, the constants of its rule, and its errors."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

Estimator = Literal["first_order", "second_order"]
FisherMethod = Literal["closed_form", "kl_hessian", "monte_carlo", "empirical"]


class StructureError(ValueError):
    """Guide, model and optimizer do not fit together; raised while the loss is traced, before any step is taken."""


class RuleConstants(NamedTuple):
    """Every number of the step rule: its meaning, its unit, where it comes from, and what changing it does.

    Nobody should have to change one. Effects are those in ``docs/benchmarks/ablation.md`` ("ablation": steps to 0.1
    nats on seven posteriors) and ``docs/benchmarks/sensitivity.md`` ("sensitivity": numbers halved and doubled on
    five).
    """

    # ---- Step size (:mod:`.step_size`) -------------------------------------------------------------------------------
    #: Noise threshold τ, nats, of blocks whose unit step is exact on conjugate models: an iterate with noise n and step
    #: size ρ stays ½nρ/(2−ρ) ≤ n/2 nats above the optimum, so that this costs at most 0.02 nats before averaging.
    #: Sensitivity: none of the thresholds matters within a factor of two.
    noise_threshold: float = 0.04
    #: The same for each latent; it replaces the former beyond eight latents. 0.0025 nats a latent before averaging.
    noise_threshold_per_latent: float = 0.005
    #: τ, nats, where a unit step is exact on no model, so that noise is multiplied from step to step. Measured on one
    #: random-effects model (docs/step_size_rule.md).
    noise_threshold_inexact: float = 0.01
    #: τ, nats, where the Fisher matrix is sampled: most of that noise lies in directions that damping keeps short.
    noise_threshold_scores: float = 0.5
    #: Joint Gaussian steps have at least this size over √N after N stationary steps. Any constant is admissible for
    #: averaging, since 1/√N falls slower than 1/N (Polyak & Juditsky 1992). Ablation: without it GLMM never arrives;
    #: 4 or 5 is a tenth faster there and leaves a Gaussian process 0.02 nats worse. Sensitivity: 6 leaves a minibatch
    #: fit 0.6 nats off.
    step_size_floor: float = 3.0
    #: Nats of noise per latent up to which that floor holds, full data: beyond 10 successive guides hardly overlap.
    #: Ablation: without a bound GLMM takes 49 steps instead of 68, and four starts of twenty are lost instead of one.
    floor_noise: float = 10.0
    #: The same in minibatches, which have optima of their own: one nat per latent is half a nat off.
    #: Sensitivity: 2 leaves a fit 2.6 nats off, ½ takes 52 steps instead of 83.
    floor_noise_minibatch: float = 1.0
    #: Antithetic draws from which on steps may have size 1; S/(S + 2) below. A single pair is too few for a curvature.
    #: Sensitivity: none with nine draws.
    full_step_draws: int = 4
    #: The signal fraction is at least this, so that a step size is never zero. Sensitivity: none.
    signal_floor: float = 1e-6

    # ---- Noise of the natural gradient (:mod:`.step_size`) -----------------------------------------------------------
    #: Effective number of steps in a running mean, at least. Far from the optimum the model changes with every step.
    #: Sensitivity: 12 to 13 steps instead of 10 with half or twice as many, on random effects beside a parameter.
    window_min: float = 1.1
    #: Innovations longer than this many standard deviations are shortened to that (Huber 1964). Ablation: GLMM takes 82
    #: steps instead of 68 without it, diamonds 12 instead of 11. Sensitivity: with 1, 117 steps instead of 83 on a
    #: minibatch fit; with 4, 5 instead of 7 on a Poisson regression.
    outlier: float = 2.0
    #: Innovations below this many nats, which cannot hurt, are never shortened. Sensitivity: with ½, 12 steps for 10.
    outlier_floor: float = 1.0
    #: Latest innovations whose mean square bounds the noise, and the factor on it: the mean of three squares of k noisy
    #: directions scatters by √(2/3k). Ablation: GLMM ends 915 nats off without the bound.
    #: Sensitivity: one or six steps do as well; a factor of 0.65 leaves a minibatch fit 0.5 nats off.
    recent_steps: int = 3
    recent_factor: float = 1.3
    #: The running mean is corrected for lagging behind by at most this factor. Ablation: no effect on seven posteriors;
    #: random effects beside parameters of the model need it (docs/step_size_rule.md).
    drift_max: float = 10.0
    #: Nats per latent after which the running means count for a single step: the guides hardly overlap. Ablation: GLMM
    #: takes 82 steps instead of 68 without forgetting.
    forgetting_kl: float = 10.0
    #: Polynomial-decay averaging: the newest of n iterates has weight (η + 1)/(n + η) (Shamir & Zhang 2013, section 4).
    #: Ablation: GLMM takes 87 steps instead of 68 with the last iterate in place of the average. Sensitivity: 4 takes
    #: 53 steps instead of 83 on a minibatch fit, 16 leaves it 0.4 nats off.
    average_decay: float = 8.0

    # ---- Trust region (:mod:`.trust_region`) -------------------------------------------------------------------------
    #: A step is taken if actual/predicted reduction exceeds this: η in [0, ¼) (Nocedal & Wright 2006, algorithm 4.1).
    low_cutoff: float = 0.1
    #: The radius grows if the ratio exceeds this at the boundary; ¾ there. Sensitivity: ¼ to 1 are as good, also of the
    #: former from 0.05 to 0.2.
    high_cutoff: float = 0.5
    #: The radius, nats, shrinks and grows by this factor. A KL is a squared distance, so that the distance is doubled
    #: (Nocedal & Wright) or halved (Conn, Gould & Toint 2000, section 6.1). Sensitivity: 2 or 8 leave a centred
    #: hierarchy 3 nats off instead of 1.7.
    radius_factor: float = 4.0
    #: Radii that one step may try. Ablation: 120 steps instead of 68 on GLMM with one, 17 instead of 11 on diamonds.
    radius_trials: int = 6
    #: Bounds of the radius: nats, and multiples of the KL below which steps are not compared. Sensitivity: none.
    radius_max: float = 1e12
    radius_min: float = 1e-3
    #: Nats of KL, and per latent, below which noise of the loss would decide: such steps are taken uncompared.
    #: Sensitivity: 15 steps instead of 19 on eight schools with twice as much per latent, else none.
    comparison_kl: float = 0.1
    comparison_kl_per_latent: float = 0.02

    # ---- Cones of natural parameters ---------------------------------------------------------------------------------
    #: Fraction of a precision that remains where a step begins to bend back from the cone's boundary
    #: (:func:`.positive_ratio`): steps are exact while no variance grows more than twentyfold. A bounded natural
    #: parameter keeps a quarter, since draws of a Gamma without shape are zeros in float32. Without a KL limit the bend
    #: only has to keep the cone. Sensitivity: 6 to 10 steps instead of 7 on a Poisson regression within a factor of
    #: two.
    precision_margin: float = 0.05
    natural_margin: float = 0.25
    unlimited_margin: float = 1e-6

    # ---- Which block (:mod:`.partition`) -----------------------------------------------------------------------------
    #: Latents up to which all Gaussian sites share one dense step: an eigendecomposition of 128 takes a millisecond.
    joint_limit: int = 128
    #: Gradients are regressed on draws if those of this many steps determine slope and curvature, d + 1 numbers each.
    #: Sensitivity: with ¾, 40 % fewer steps on eight schools, by products that cost ten times the gradients.
    regression_steps: float = 1.5
    #: Parameters up to which a Fisher matrix is formed.
    dense_limit: int = 512
    #: Random numbers a step up to which what does not depend on parameters is kept for the whole step.
    kept_draws: int = 1_000_000

    # ---- Stein regression (:mod:`.stein_regression`) -----------------------------------------------------------------
    #: Ridge λ, in draws: the weight of the present Gaussian against them. It keeps the regression well posed in
    #: directions without draws, and holds back 0.2/n of the way to the fit of n draws. Eight schools and 60 counts,
    #: full and mean field, take 0.6 to 1.7 times the steps with 0.02, 1 to 1.7 times with 2. Ablation: a hundred times
    #: as much costs twice the steps.
    ridge: float = 0.2
    #: A draw's influence ‖e‖²(1 + ‖x‖²) is truncated at this fraction of all influence so far: a mean truncated at the
    #: root of n times the second moment has no heavy tail, and its bias vanishes with n (Catoni 2012). Ablation: all
    #: five fits with a regression end 27 to 9e5 nats off without it.
    influence_max: float = 0.25
    #: Remembered draws whose mean square exceeds this multiple of its expectation, their dimension d, lose weight. By
    #: chance that of n draws scatters by √(2/nd): 0.16 for eight draws of ten dimensions.
    spread_max: float = 1.5

    # ---- Probes and products -----------------------------------------------------------------------------------------
    #: Hessian-vector products a step of one wide full Gaussian: 16 were as good as 32 for 50 to 500 latents.
    full_probes: int = 16
    #: Rademacher probes of a Hessian's diagonal: mean field, and low rank.
    diagonal_probes: int = 8
    low_rank_probes: int = 8
    #: The least weight of a new estimate of the diagonal in its running mean, low rank.
    diagonal_weight_min: float = 1 / 8

    # ---- Fisher matrices of their own (:mod:`numpyro_natgrad.blocks.fisher`) -----------------------------------------
    #: Damping relative to each parameter's own scale; conjugate gradients stop at this relative residual or step: a
    #: natural gradient is a direction, for which 1 % will do.
    fisher_damping: float = 3e-3
    fisher_cg_tolerance: float = 1e-2
    fisher_cg_steps: int = 50
    #: Networks: k steps of conjugate gradients from μ times the last step, damping relative to vᵀFv/vᵀv. Three to ten
    #: steps, 0.9 to 0.99 and any damping from 0.01 to 1 of the mean diagonal were as good.
    network_cg_steps: int = 3
    network_momentum: float = 0.97
    network_damping: float = 0.01
    #: Scores: draws, damping relative to tr F, and nats beyond which a natural gradient is shortened: so far away KL is
    #: not its quadratic model.
    score_draws: int = 64
    score_damping: float = 1e-2
    score_norm_max: float = 4.0

    # ---- Exponential families in natural parameters (:mod:`numpyro_natgrad.blocks.exponential_family`) ---------------
    #: Natural parameters up to which the first step takes the draws' own Fisher matrix, the draws for each of them that
    #: it needs, and the ratio of the two Fisher norms within which it is trusted.
    sampled_fisher_limit: int = 16
    sampled_fisher_draws: int = 2
    sampled_fisher_ratio: float = 0.1
    #: Nats that one element of a batch may ask for in a unit step: the KL limit is shared by all of them.
    element_kl: float = 16.0

    @property
    def nonstationarity(self) -> float:
        """Multiple of the squared norm that noise explains, beyond which a running mean shows movement.

        One outlier, shortened to ``outlier`` standard deviations, must not end the average.
        """
        return 1 + self.outlier**2


#: The constants of every new optimizer.
CONSTANTS = RuleConstants()


class Options(NamedTuple):
    """See :class:`.NaturalGradient`, whose arguments they are.

    :ivar has_fallback: the user gave an optimizer for parameters without a Fisher matrix.
    """

    step_size: float | Callable[[Any], Any] | None
    max_kl: float | Literal["adaptive"] | None
    estimator: Estimator | None
    path_gradient: bool
    fisher: FisherMethod | None = None
    has_fallback: bool = False
    constants: RuleConstants = CONSTANTS

    @property
    def margin(self) -> float:
        """Fraction of a precision that a step has to leave."""
        return self.constants.unlimited_margin if self.max_kl is None else self.constants.precision_margin

    @property
    def fixed_max_kl(self) -> bool:
        """Whether the limit is a number of nats: the KL of the guide then has to keep it."""
        return self.max_kl is not None and not self.adaptive

    @property
    def adaptive(self) -> bool:
        """Whether the trust-region radius adapts."""
        return self.max_kl == "adaptive"


def checked(
    step_size: Any, max_kl: Any, estimator: Any, path_gradient: Any, fisher: Any = None, *, has_fallback: bool = False
) -> Options:
    """The options, or an error that names the one that cannot be used."""
    if step_size is not None and not callable(step_size) and not _positive(step_size):
        raise ValueError(
            f"`step_size={step_size!r}`: expected a positive number (1 goes to the minimum of the local model), a "
            "schedule `step -> number`, or None for the adaptive rule."
        )
    if max_kl is not None and max_kl != "adaptive" and not _positive(max_kl):
        raise ValueError(
            f"`max_kl={max_kl!r}`: expected a positive number of nats a step, 'adaptive' (the default), or None for "
            "no limit."
        )
    if estimator not in (None, *get_args(Estimator)):
        raise ValueError(
            f"`estimator={estimator!r}`: expected 'first_order' (gradients only), 'second_order' (Hessian-vector "
            "products of the loss), or None to choose by the number of latents."
        )
    if not isinstance(path_gradient, bool):
        raise TypeError(f"`path_gradient={path_gradient!r}`: expected True or False.")
    if fisher not in (None, *get_args(FisherMethod)):
        raise ValueError(
            f"`fisher={fisher!r}`: expected one of {', '.join(map(repr, get_args(FisherMethod)))}, or None for the "
            "best method at every site."
        )
    return Options(step_size, max_kl, estimator, path_gradient, fisher, has_fallback, CONSTANTS)


def _positive(x: Any) -> bool:
    try:
        return bool(not isinstance(x, bool) and np.ndim(x) == 0 and float(x) > 0 and np.isfinite(float(x)))
    except (TypeError, ValueError):
        return False
