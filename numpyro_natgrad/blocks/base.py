# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Families: the geometry of one block of parameters, behind one protocol.

    sharp     g  ->  natural gradient v = F⁻¹g, in the family's own coordinates
    norm2     v  ->  vᵀFv, nats
    kl        v, ρ  ->  KL of the step, exact where closed
    retract   v, ρ  ->  new parameters, always valid

=================  =====================================================  ==================================
family             parameters                                             coordinates of the step
=================  =====================================================  ==================================
:mod:`.joint`      all Gaussian sites together, up to 128 latents         natural parameters, lifted
:mod:`.divided`    the same by mirrored draws, which share the products         natural parameters, lifted
:mod:`.regressed`  the same of a guide of few latents, gradients only     natural parameters, lifted
:mod:`.full`       one full Gaussian site, more latents                   natural parameters
:mod:`.diagonal`   one mean-field Gaussian site, more latents             natural parameters
:mod:`.low_rank_gaussian`   one low-rank Gaussian site, more latents               natural parameters, projected
:mod:`.natural`    one site of an exponential family                      natural parameters
:mod:`.curvature`  everything else that a site's density depends on       NumPyro's unconstrained parameters
:mod:`.networks`   the same of more than 512 parameters, with momentum    the same
:mod:`.scores`     one density of many parameters, without a KL: a flow   the same
:mod:`.likelihood` parameters of the model, and points                    the same
=================  =====================================================  ==================================
"""

from typing import Any, Protocol

import jax

from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import DensityMode
from numpyro_natgrad.step.state import Memory
from numpyro_natgrad.step.step_size import SquaredNorms


class Block(Protocol):
    """The geometry of one block of parameters. ``v`` is a tangent in the family's own coordinates."""

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters that it moves."""
        ...

    @property
    def exact(self) -> bool:
        """Whether a step of length 1 is exact on conjugate models."""
        ...

    @property
    def modes(self) -> dict[str, DensityMode]:
        """How the loss is to be seen at its Gaussian sites (:class:`.PathGradient`)."""
        ...

    @property
    def hessian_params(self) -> tuple[str, ...]:
        """The means along which it asks for products with the Hessian of the loss."""
        ...

    def report_rows(self) -> list[tuple[str, str, str, str, str]]:
        """Rows of the report: parameter, site, family, how the Fisher is got, size."""
        ...

    def natural_gradient(self, loss_info: LossInfo, params: Params, memory: Memory, step: jax.Array) -> Any:
        """The natural gradient."""
        ...

    def squared_norm(self, v: Any) -> jax.Array:
        """Squared Fisher norm of the natural gradient, nats."""
        ...

    def kl(self, v: Any, rho: jax.Array) -> jax.Array:
        """KL(q ‖ q₊) of a step of length ρ, nats; increasing in ρ."""
        ...

    def moved(self, v: Any, rho: jax.Array) -> jax.Array:
        """KL(q₊ ‖ q) of a step of length ρ, nats."""
        ...

    def compare(self, memory: Memory, v: Any) -> SquaredNorms:
        """How ``v`` compares with the running mean of those before."""
        ...

    def update_memory(self, memory: Memory, v: Any, weight: jax.Array) -> Memory:
        """Take a natural gradient into the running mean: memory ← memory + weight (v − memory)."""
        ...

    def retract(self, params: Params, memory: Memory, v: Any, rho: jax.Array) -> tuple[Params, Memory]:
        """The parameters after a step of length ρ, and the memory carried to the new frame."""
        ...
