# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Natural-gradient variational inference for NumPyro: ``SVI(model, guide, NaturalGradient(), Trace_ELBO())``.

    F(φ) = ∇² KL(q_φ ‖ q_φ')    the Fisher is the curvature of KL
    v    = F⁻¹ ∇L               steepest descent in distribution space

==================  ==========================================================
:mod:`.optimizer`   the ``SVI`` optimizer, which orders the calls
:mod:`.fisher`    Fisher operator, natural gradient and KL of any ``SVI``
:mod:`.natural_step`        one step, top to bottom
:mod:`.handlers`     NumPyro's messages: what is met in, and changed of, the loss
:mod:`.trace`     what stands in one loss function
:mod:`.provenance`  where a value in that function comes from
:mod:`.partition`   which family moves which parameters
:mod:`.fisher_method`      by which route the Fisher of a site is got
:mod:`.gaussian_sites`      what NumPyro's parameters mean
:mod:`.low_rank_gaussian`    Gaussians D(I + WWᵀ)D, never d × d
:mod:`.derivatives`    gradient and Hessian products            (direction)
:mod:`.base`    the geometry of a block of parameters    (movement)
:mod:`.step_size`      how far                                  (length)
:mod:`.newton_decrement` how many nats are still to gain
:mod:`.fit`         as many steps as it takes
:mod:`.convergence`    when a fit is done, and its history
:mod:`.loop`      its steps, compiled by the chunk
:mod:`.exponential_family` the registry of Fisher matrices in closed form
:mod:`.builtin`         NumPyro's distributions in that registry, with :mod:`.builtin_matrix`
:mod:`.verdict`     is the answer any good, and what to do if not
:mod:`.importance`  log weights of the guide's draws, and what they correct
:mod:`.linear_response`    covariances by linear response
==================  ==========================================================
"""

from numpyro_natgrad.diagnostics.linear_response import LinearResponse as LinearResponse
from numpyro_natgrad.diagnostics.linear_response import linear_response as linear_response
from numpyro_natgrad.diagnostics.verdict import Verdict as Verdict
from numpyro_natgrad.diagnostics.verdict import to_arviz as to_arviz
from numpyro_natgrad.diagnostics.verdict import verdict as verdict
from numpyro_natgrad.distributions import builtin_matrix as _builtin  # noqa: F401  (fills the registry, with the module that it imports)
from numpyro_natgrad.distributions.exponential_family import register_exponential_family as register_exponential_family
from numpyro_natgrad.distributions.exponential_family import register_fisher as register_fisher
from numpyro_natgrad.guide.gaussian_sites import CovarianceForm as CovarianceForm
from numpyro_natgrad.guide.gaussian_sites import register_gaussian as register_gaussian
from numpyro_natgrad.infer.convergence import History as History
from numpyro_natgrad.infer.fisher import Estimate as Estimate
from numpyro_natgrad.infer.fisher import Fisher as Fisher
from numpyro_natgrad.infer.fisher import fisher as fisher
from numpyro_natgrad.infer.fisher import kl as kl
from numpyro_natgrad.infer.fisher import natural_gradient as natural_gradient
from numpyro_natgrad.infer.fisher import scale_by_fisher as scale_by_fisher
from numpyro_natgrad.infer.fit import FitResult as FitResult
from numpyro_natgrad.infer.fit import fit as fit
from numpyro_natgrad.infer.optimizer import NaturalGradient as NaturalGradient
from numpyro_natgrad.options import StructureError as StructureError
from numpyro_natgrad.step.state import NaturalGradientState as NaturalGradientState
from numpyro_natgrad.step.state import StepInfo as StepInfo

__all__ = [
    "Estimate",
    "Fisher",
    "FitResult",
    "Form",
    "History",
    "LinearResponse",
    "NaturalGradient",
    "NaturalGradientState",
    "StepInfo",
    "StructureError",
    "Verdict",
    "fisher",
    "fit",
    "kl",
    "linear_response",
    "natural_gradient",
    "register_exponential_family",
    "register_fisher",
    "register_gaussian",
    "scale_by_fisher",
    "to_arviz",
    "verdict",
]
__version__ = "0.1.0"
