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

    "Ablation" is ``docs/benchmarks/ablation.md`` (steps to 0.1 nats on seven posteriors), "sensitivity" is
    ``docs/benchmarks/sensitivity.md`` (each number halved and doubled on five).
    """

    # ---- Step size (:mod:`.step_size`) -------------------------------------------------------------------------------
    #: Noise threshold τ, nats, of blocks whose unit step is exact on conjugate models: an iterate with noise n and step
    #: size ρ stays ½nρ/(2−ρ) ≤ n/2 nats above the optimum: at most 0.02 nats here, before averaging.
    #: Sensitivity: no threshold matters within a factor of two.
    noise_threshold: float = 0.04
    #: The same per latent; the larger of the two applies. It costs at most 0.0025 nats per latent before averaging.
    noise_threshold_per_latent: float = 0.005
    #: τ, nats, where a unit step is exact on no model: noise is then multiplied from step to step. Measured on one
    #: random-effects model (docs/step_size_rule.md).
    noise_threshold_inexact: float = 0.01
    #: τ, nats, where the Fisher matrix is sampled: most of the noise lies in directions that damping shortens. Where
    #: draws do not follow the parameters no loss is compared, and ``noise_threshold_inexact`` applies: a component of a
    #: mixture that no draw comes from is not found again.
    noise_threshold_scores: float = 0.5
    #: Draws after which a step size is half of its largest where draws do not follow the parameters, and steps by which
    #: its decay is delayed there. Steps of 1/(t + 10) with one draw each are stable on score functions of one latent.
    unpaired_draws: float = 10.0
    #: Joint Gaussian steps have at least this size over √N after N stationary steps; averaging admits any constant
    #: (Polyak & Juditsky 1992). Ablation: without the floor GLMM does not converge; 4 or 5 is a tenth faster there and
    #: leaves a Gaussian process 0.02 nats worse. Sensitivity: 6 leaves a minibatch fit 0.6 nats off.
    step_size_floor: float = 3.0
    #: Nats of noise per latent up to which the floor holds, full data: beyond 10 successive guides hardly overlap.
    #: Ablation: without a bound GLMM takes 49 steps instead of 68, and four starts of twenty fail instead of one.
    floor_noise: float = 10.0
    #: The same with minibatches, each of which has its own optimum: one nat of noise per latent leaves it half a nat
    #: off. Sensitivity: 2 leaves a fit 2.6 nats off, ½ takes 52 steps instead of 83.
    floor_noise_minibatch: float = 1.0
    #: The least signal fraction: no step size is zero. Sensitivity: none.
    signal_floor: float = 1e-6

    # ---- Noise of the natural gradient (:mod:`.step_size`) -----------------------------------------------------------
    #: The least effective number of steps in a running mean; far from the optimum earlier steps say little.
    #: Sensitivity: 12 to 13 steps instead of 10 with half or twice as many, on random effects beside a parameter.
    window_min: float = 1.1
    #: Innovations longer than this many standard deviations are shortened to that (Huber 1964). Ablation: GLMM takes 82
    #: steps instead of 68 without it, diamonds 12 instead of 11. Sensitivity: with 1, 117 steps instead of 83 on a
    #: minibatch fit; with 4, 5 instead of 7 on a Poisson regression.
    outlier: float = 2.0
    #: Innovations below this many nats are harmless and never shortened. Sensitivity: with ½, 12 steps, not 10.
    outlier_floor: float = 1.0
    #: The noise is at most ``recent_factor`` times the mean square of this many latest innovations, which scatters by
    #: √(2/3k) in k noisy directions. Ablation: GLMM ends 915 nats off without the bound. Sensitivity: one or six steps
    #: do as well; a factor of 0.65 leaves a minibatch fit 0.5 nats off.
    recent_steps: int = 3
    recent_factor: float = 1.3
    #: After a step of this many nats per latent the running means count as a single step, since the two guides hardly
    #: overlap. Ablation: GLMM takes 82 steps instead of 68 without forgetting.
    forgetting_kl: float = 10.0
    #: Polynomial-decay averaging: the newest of n iterates has weight (η + 1)/(n + η) (Shamir & Zhang 2013, section 4).
    #: Ablation: GLMM takes 87 steps instead of 68 with the last iterate in place of the average. Sensitivity: 4 takes
    #: 53 steps instead of 83 on a minibatch fit, 16 leaves it 0.4 nats off.
    average_decay: float = 8.0

    # ---- Trust region (:mod:`.trust_region`) -------------------------------------------------------------------------
    #: A step is taken if actual/predicted reduction exceeds this: η in [0, ¼) (Nocedal & Wright 2006, algorithm 4.1).
    low_cutoff: float = 0.1
    #: The radius grows if the ratio exceeds this and the radius limited the step; ¾ in Nocedal & Wright. Sensitivity:
    #: ¼ to 1 are as good here, and 0.05 to 0.2 for ``low_cutoff``.
    high_cutoff: float = 0.5
    #: The radius, nats, shrinks and grows by this factor. KL is a squared distance: 4 doubles the distance (Nocedal &
    #: Wright) or halves it (Conn, Gould & Toint 2000). Sensitivity: 2 or 8 leave a centred hierarchy 3 nats off instead
    #: of 1.7.
    radius_factor: float = 4.0
    #: The most radii tried in a step. Ablation: 120 steps instead of 68 on GLMM with one, 17 instead of 11 on diamonds.
    radius_trials: int = 6
    #: Bounds of the radius: nats, and multiples of the KL below which steps are not compared. Sensitivity: none.
    radius_max: float = 1e12
    radius_min: float = 1e-3
    #: Steps below this KL, nats, and nats per latent, are taken uncompared: noise of the loss would decide.
    #: Sensitivity: 15 steps instead of 19 on eight schools with twice as much per latent, else none.
    comparison_kl: float = 0.1
    comparison_kl_per_latent: float = 0.02

    # ---- Cones of natural parameters ---------------------------------------------------------------------------------
    #: A step is exact until this fraction of a precision remains (no variance grows more than twentyfold); beyond, it
    #: bends away from the cone's boundary (:func:`.positive_ratio`). Bounded natural parameters keep ¼: draws of
    #: a Gamma with a shape near zero are zeros in float32. Without a KL limit a step only has to stay in the cone.
    #: Sensitivity: 6 to 10 steps instead of 7 on a Poisson regression within a factor of two.
    precision_margin: float = 0.05
    natural_margin: float = 0.25
    unlimited_margin: float = 1e-6
    #: Squared step of the mean in one direction, in standard deviations of the new guide, up to which a covariance
    #: widens freely there (:func:`.gaussian.wait`). Of 64 random starts of a line with outliers 57, 55, 54 and 56
    #: arrive with 0.01, 0.03, 0.1 and 0.3, and 16 without a limit.
    widening_decrement: float = 0.1

    # ---- Which block (:mod:`.partition`) -----------------------------------------------------------------------------
    #: Latents up to which all Gaussian sites share one dense step: an eigendecomposition of 128 takes a millisecond.
    joint_limit: int = 128
    #: The same where that is one full Gaussian, whose covariance is dense in any case and needs no proxy.
    full_joint_limit: int = 1024
    #: Standard deviation of a parameter of the model in the proxy before the first step: that of NumPyro's autoguides.
    parameter_scale: float = 0.1
    #: Gradients are regressed on draws if this many steps have the d + 1 draws that determine slope and curvature.
    #: Sensitivity: with ¾ eight schools takes 40 % fewer steps, with products that cost ten times the gradients.
    regression_steps: float = 1.5
    #: Parameters up to which a Fisher matrix is formed.
    dense_limit: int = 512
    #: Parameters of one row of a subsampled plate up to which its Fisher matrix is formed, by as many products with F.
    #: Conjugate gradients take at least that many.
    row_limit: int = 8
    #: Steps, at most, of those local rows of a minibatch that no step has visited before: Newton's method takes three
    #: to five from the starts of the autoguides.
    first_visit_steps: int = 8
    #: Up to this many random numbers a step, values that depend on no parameter are computed once and kept, and draws
    #: are added to those of few particles.
    kept_draws: int = 1_000_000

    # ---- Stein regression (:mod:`.stein_regression`) -----------------------------------------------------------------
    #: Ridge λ: the weight of the present Gaussian, in draws. It keeps the regression well posed in directions without
    #: draws, and shortens the way to the fit of n draws by 0.2/n. Eight schools and 60 counts, full and mean field,
    #: take 0.6 to 1.7 times the steps with 0.02, 1 to 1.7 with 2. Ablation: a hundredfold ridge doubles the steps.
    ridge: float = 0.2
    #: A draw's influence ‖e‖²(1 + ‖x‖²) is truncated at this fraction of all influence so far: such a mean has no heavy
    #: tail, and its bias vanishes with n (Catoni 2012). Ablation: all five fits with a regression end 27 to 9e5 nats
    #: off without it.
    influence_max: float = 0.25
    #: Remembered draws lose weight if their mean square exceeds this multiple of its expectation d. By chance it
    #: scatters by √(2/nd): 0.16 for n = 8 draws of d = 10 dimensions.
    spread_max: float = 1.5

    # ---- Probes and products -----------------------------------------------------------------------------------------
    #: Hessian-vector products a step of one wide full Gaussian: 16 were as good as 32 for 50 to 500 latents.
    full_probes: int = 16
    #: Rademacher probes of a Hessian's diagonal: mean field, whose running mean joins many steps, and low rank.
    #: A network, a regression and a hierarchy of 1000 latents reach as much in as many steps with 8 probes as with 2,
    #: which take a third to two thirds of the time (docs/benchmarks/wide.md). Their difference needs two.
    diagonal_probes: int = 2
    low_rank_probes: int = 8
    #: The weight of a step's estimate of the diagonal in the running mean of a mean field. With a tenth walks take more
    #: steps; with each estimate by itself a network of 130 weights ends 1.5 nats lower (docs/benchmarks/wide.md).
    diagonal_weight: float = 1 / 6
    #: The least weight of a new estimate of the diagonal in its running mean, low rank.
    diagonal_weight_min: float = 1 / 8

    # ---- Fisher matrices of their own (:mod:`numpyro_natgrad.blocks.fisher`) -----------------------------------------
    #: Damping relative to each parameter's own scale; the relative residual or the number of steps at which conjugate
    #: gradients stop: 1 % is enough for a direction.
    fisher_damping: float = 3e-3
    fisher_cg_tolerance: float = 1e-2
    fisher_cg_steps: int = 50
    #: Networks: steps of conjugate gradients, momentum μ, and damping relative to vᵀFv/vᵀv
    #: (:class:`.MomentumConjugateGradients`). Three to ten steps, 0.9 to 0.99 and 0.01 to 1 were as good.
    network_cg_steps: int = 3
    network_momentum: float = 0.97
    network_damping: float = 0.01
    #: Scores: draws, damping relative to tr F, and the nats to which a longer natural gradient is shortened, because KL
    #: is not its quadratic model so far away.
    score_draws: int = 64
    score_damping: float = 1e-2
    score_norm_max: float = 4.0
    #: Draws, at least, of a joint Gaussian block's step, of a Fisher matrix behind draws, and of the baselines of score
    #: functions. The inverse of a mean of n squares has a variance for n > 4, and a baseline of n draws adds 1/n to the
    #: noise. With one draw a step 12 of 55 rows of the random starts are behind Adam (docs/step_size_rule.md).
    independent_draws: int = 8
    #: Draws, at least, of a wide Gaussian block's step on full data, in pairs. One pair is as good on walks,
    #: regressions and hierarchies, and behind Adam on a network of 130 weights (docs/step_size_rule.md).
    paired_draws: int = 4

    # ---- Exponential families in natural parameters (:mod:`numpyro_natgrad.blocks.exponential_family`) ---------------
    #: The first step uses the Fisher matrix F̂ of the draws up to this many natural parameters, with at least this many
    #: draws for each, if its norm of v is between this multiple and its inverse of that by F.
    sampled_fisher_limit: int = 16
    sampled_fisher_draws: int = 2
    sampled_fisher_ratio: float = 0.1
    #: The most nats of one batch element, or per latent of one local row of a minibatch, in a unit step: all of them
    #: share the KL limit.
    element_kl: float = 16.0

    @property
    def nonstationarity(self) -> float:
        """A running mean moves if its square exceeds this multiple of what noise explains; one outlier does not."""
        return 1 + self.outlier**2


#: The constants of every new optimizer.
CONSTANTS = RuleConstants()


class Options(NamedTuple):
    """The arguments of :class:`.NaturalGradient`; ``has_fallback``: the user gave a fallback optimizer."""

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
    def is_adaptive(self) -> bool:
        """Whether the rule chooses both the step size and the trust-region radius."""
        return self.step_size is None and self.adaptive

    @property
    def fixed_max_kl(self) -> bool:
        """Whether the limit is a number of nats, which then bounds the KL of the guide itself."""
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
