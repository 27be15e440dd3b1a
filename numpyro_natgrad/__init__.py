# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Natural-gradient variational inference for NumPyro: ``SVI(model, guide, NaturalGradient(), Trace_ELBO())``.

    F(φ) = ∇² KL(q_φ ‖ q_φ')    the Fisher matrix is the curvature of KL
    v    = F⁻¹ ∇L               steepest descent of the loss, with steps measured in KL

Each package imports only those below it:

=====================  ==================================================================================
:mod:`.diagnostics`    comparison of a fitted guide with the posterior
:mod:`.infer`          the optimizer, ``fit``, and the Fisher matrix of any ``SVI``
:mod:`.step`           one step: step size, trust region, state
:mod:`.blocks`         natural gradients and steps of groups of parameters
:mod:`.estimators`     gradients, Hessian-vector products and scores of the loss
:mod:`.guide`          sites and parameters of the loss, and the coordinates of each site
:mod:`.distributions`  closed forms: natural parameters, log normalizers, Fisher matrices, KL divergences
:mod:`.options`        options, constants of the step rule, errors
=====================  ==================================================================================
"""

from numpyro_natgrad.blocks.fisher.solvers import FisherOperator as FisherOperator
from numpyro_natgrad.compilation.threads import avoid_waiting_threads as _avoid_waiting_threads
from numpyro_natgrad.diagnostics.arviz_compat import to_arviz as to_arviz
from numpyro_natgrad.diagnostics.linear_response import LinearResponse as LinearResponse
from numpyro_natgrad.diagnostics.linear_response import linear_response as linear_response
from numpyro_natgrad.diagnostics.nuts import NUTSStart as NUTSStart
from numpyro_natgrad.diagnostics.nuts import to_nuts as to_nuts
from numpyro_natgrad.diagnostics.verdict import Verdict as Verdict
from numpyro_natgrad.diagnostics.verdict import verdict as verdict
from numpyro_natgrad.distributions import builtin_matrix as _builtin  # noqa: F401  (fills the registry, with the module that it imports)
from numpyro_natgrad.distributions.exponential_family import register_exponential_family as register_exponential_family
from numpyro_natgrad.distributions.exponential_family import register_fisher as register_fisher
from numpyro_natgrad.guide.gaussian_sites import CovarianceForm as CovarianceForm
from numpyro_natgrad.guide.gaussian_sites import register_gaussian as register_gaussian
from numpyro_natgrad.infer.fisher import Estimate as Estimate
from numpyro_natgrad.infer.fisher import fisher as fisher
from numpyro_natgrad.infer.fisher import kl as kl
from numpyro_natgrad.infer.fisher import natural_gradient as natural_gradient
from numpyro_natgrad.infer.fisher import scale_by_fisher as scale_by_fisher
from numpyro_natgrad.infer.fitting.fit import fit as fit
from numpyro_natgrad.infer.fitting.many import FitManyResult as FitManyResult
from numpyro_natgrad.infer.fitting.many import fit_many as fit_many
from numpyro_natgrad.infer.fitting.outcome import FitResult as FitResult
from numpyro_natgrad.infer.fitting.progress import Progress as Progress
from numpyro_natgrad.infer.fitting.saved import load as load
from numpyro_natgrad.infer.fitting.saved import save as save
from numpyro_natgrad.infer.history import History as History
from numpyro_natgrad.infer.optimizer import NaturalGradient as NaturalGradient
from numpyro_natgrad.options import StructureError as StructureError
from numpyro_natgrad.step.state import NaturalGradientState as NaturalGradientState
from numpyro_natgrad.step.state import StepInfo as StepInfo

__all__ = [
    "CovarianceForm",
    "Estimate",
    "FisherOperator",
    "FitManyResult",
    "FitResult",
    "History",
    "LinearResponse",
    "NUTSStart",
    "NaturalGradient",
    "NaturalGradientState",
    "Progress",
    "StepInfo",
    "StructureError",
    "Verdict",
    "fisher",
    "fit",
    "fit_many",
    "kl",
    "linear_response",
    "load",
    "natural_gradient",
    "register_exponential_family",
    "register_fisher",
    "register_gaussian",
    "save",
    "scale_by_fisher",
    "to_arviz",
    "to_nuts",
    "verdict",
]
__version__ = "0.1.0"

_avoid_waiting_threads()
