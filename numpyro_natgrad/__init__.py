# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Natural-gradient variational inference for NumPyro: ``SVI(model, guide, NaturalGradient(), Trace_ELBO())``.

    F(φ) = ∇² KL(q_φ ‖ q_φ')    the Fisher is the curvature of KL
    v    = F⁻¹ ∇L               steepest descent in distribution space

==================  ==========================================================
:mod:`.optimizer`   the ``SVI`` optimizer, which orders the calls
:mod:`.geometry`    Fisher operator, natural gradient and KL of any ``SVI``
:mod:`.step`        one step, top to bottom
:mod:`.effects`     NumPyro's messages: what is met in, and changed of, the loss
:mod:`.hearing`     what stands in one loss function
:mod:`.provenance`  where a value in that function comes from
:mod:`.structure`   which family moves which parameters
:mod:`.routes`      by which route the Fisher of a site is got
:mod:`.charts`      what NumPyro's parameters mean
:mod:`.low_rank`    Gaussians D(I + WWᵀ)D, never d × d
:mod:`.evidence`    gradient and Hessian products            (direction)
:mod:`.families`    the geometry of a block of parameters    (movement)
:mod:`.length`      how far                                  (length)
:mod:`.certificate` how many nats are still to gain
:mod:`.fit`         as many steps as it takes
:mod:`.stopping`    when a fit is done, and its history
:mod:`.chunks`      its steps, compiled by the chunk
:mod:`.exponential` the registry of Fisher matrices in closed form
:mod:`.zoo`         NumPyro's distributions in that registry; :mod:`.zoo_matrices` those of directions and matrices
:mod:`.verdict`     is the answer any good, and what to do if not
:mod:`.importance`  log weights of the guide's draws, and what they correct
:mod:`.response`    covariances by linear response
==================  ==========================================================
"""

from . import zoo_matrices as _zoo  # noqa: F401  (fills the registry, with the zoo that it imports)
from .charts import Form as Form
from .charts import register_gaussian as register_gaussian
from .errors import StructureError as StructureError
from .exponential import register_exponential as register_exponential
from .exponential import register_fisher as register_fisher
from .fit import FitResult as FitResult
from .fit import fit as fit
from .geometry import Estimate as Estimate
from .geometry import Fisher as Fisher
from .geometry import fisher as fisher
from .geometry import kl as kl
from .geometry import natural_gradient as natural_gradient
from .geometry import scale_by_fisher as scale_by_fisher
from .optimizer import NaturalGradient as NaturalGradient
from .response import LinearResponse as LinearResponse
from .response import linear_response as linear_response
from .state import State as State
from .state import StepInfo as StepInfo
from .stopping import History as History
from .verdict import Verdict as Verdict
from .verdict import to_arviz as to_arviz
from .verdict import verdict as verdict

__all__ = [
    "Estimate",
    "Fisher",
    "FitResult",
    "Form",
    "History",
    "LinearResponse",
    "NaturalGradient",
    "State",
    "StepInfo",
    "StructureError",
    "Verdict",
    "fisher",
    "fit",
    "kl",
    "linear_response",
    "natural_gradient",
    "register_exponential",
    "register_fisher",
    "register_gaussian",
    "scale_by_fisher",
    "to_arviz",
    "verdict",
]
__version__ = "0.1.0"
