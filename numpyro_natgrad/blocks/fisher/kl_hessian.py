# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The family of everything else: F is the Hessian of the guide's KL to itself, whatever the guide computes.

    F(φ) = ∇²_φ' KL(q_φ ‖ q_φ') |_{φ'=φ} = E_z Σ_sites JᵀF_site J        (frozen draws)

heard along the guide's own draws (:class:`.Frozen`), so that plates, scales, data arguments and particles are
NumPyro's. Up to 512 parameters F is formed and factorised; above, conjugate gradients ask for products with it (rows of
a subsampled plate here, networks in :mod:`.networks`). The step is taken in NumPyro's unconstrained parameters, where
the quadratic model of KL is all there is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import cho_factor, cho_solve
from jax.scipy.sparse.linalg import cg

from numpyro_natgrad.blocks.base import Memory, NoiseTolerance, Randomness, Scope, SquaredNorms, default_noise_tolerance
from numpyro_natgrad.distributions.surrogate import FisherEstimate, fisher_product, fisher_surrogate
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import DensityMode, Frozen

#: Parameters up to which F is formed.
DENSE_LIMIT = 512
#: Damping of guides' Fisher matrices, relative to their own scale.
DAMPING = 3e-3
#: Conjugate gradients stop here; a natural gradient is a direction, 1 % is exact enough.
CG_TOLERANCE, CG_STEPS = 1e-2, 50


class Direction(NamedTuple):
    """−F⁻¹g of one block, raveled.

    :ivar square: its squared Fisher norm gᵀF⁻¹g, nats.
    :ivar image: F times it.  :ivar trend_image: F times the running mean of earlier ones; of a network, what it has of
        the steps before.
    """

    step: jax.Array
    square: jax.Array
    image: jax.Array
    running_mean_image: jax.Array


@dataclass(frozen=True)
class KLCurvature:
    """One connected component of parameters and sites, by the curvature of KL.

    :ivar params: parameter names.
    :ivar sites: per site its name, its distribution class, and how its KL is got.
    :ivar sizes: number of entries of each parameter.
    :ivar numbers: how many numbers its sites draw, for the whole data set.
    :ivar local: they belong to the rows of a subsampled plate, of which a step sees a few.
    """

    params: tuple[str, ...]
    sites: tuple[tuple[str, str, FisherEstimate], ...]
    sizes: Mapping[str, int]
    numbers: int
    local: bool

    @property
    def exact_on_conjugate(self) -> bool:
        return False

    @property
    def density_modes(self) -> dict[str, DensityMode]:
        return {}

    @property
    def hessian_params(self) -> tuple[str, ...]:
        return ()

    @property
    def size(self) -> int:
        return sum(self.sizes.values())

    @property
    def iterative(self) -> bool:
        """Whether F is too large to be formed."""
        return self.size > DENSE_LIMIT

    @property
    def source(self) -> str:
        """What F is the curvature of, for the report."""
        return "Hessian of KL"

    def noise_tolerance(self, scope: Scope) -> NoiseTolerance:
        return default_noise_tolerance(scope)

    def report_rows(self) -> list[tuple[str, str, str, str, str]]:
        names = ", ".join(name for name, _, _ in self.sites)
        classes = ", ".join(dict.fromkeys(cls for _, cls, _ in self.sites))
        ways = ", ".join(dict.fromkeys(how for _, _, how in self.sites))
        solver = "conjugate gradients" if self.iterative else "dense"
        return [(p, names, classes, f"{self.source} ({ways}), {solver}", str(self.sizes[p])) for p in self.params]

    def natural_gradient(
        self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness
    ) -> Direction:
        slope, unravel = self._mine(loss_info.gradient)
        running_mean, _ = self._mine(memory.running_mean)
        product = self._product(loss_info, params, randomness)
        ok = jnp.all(jnp.isfinite(slope))
        v = jnp.where(ok, self._solved(product, jnp.where(ok, slope, 0.0), unravel), jnp.nan)
        return Direction(-v, jnp.maximum(slope @ v, 0.0), -slope, product(running_mean))

    def squared_norm(self, v: Direction) -> jax.Array:
        return v.square

    def forward_kl(self, v: Direction, rho: jax.Array) -> jax.Array:
        return 0.5 * rho**2 * v.square

    def reverse_kl(self, v: Direction, rho: jax.Array) -> jax.Array:
        return 0.5 * rho**2 * v.square

    def compare(self, memory: Memory, v: Direction) -> SquaredNorms:
        # A row is seen again after many steps, and sees all of its own data then (Hoffman et al. 2013): no comparison.
        if self.local:
            return SquaredNorms(v.square, jnp.zeros_like(v.square), v.square)
        old, _ = self._mine(memory.running_mean)
        news, image = v.step - old, v.image - v.running_mean_image
        return SquaredNorms(jnp.maximum(old @ v.running_mean_image, 0.0), jnp.maximum(news @ image, 0.0), v.square)

    def own_step_size(self, v: Direction) -> jax.Array | None:
        return None

    def update_memory(self, memory: Memory, v: Direction, weight: jax.Array) -> Memory:
        old, unravel = self._mine(memory.running_mean)
        return memory._replace(running_mean={**memory.running_mean, **unravel(old + weight * (v.step - old))})

    def retract(self, params: Params, memory: Memory, v: Direction, rho: jax.Array) -> tuple[Params, Memory]:
        mine, unravel = self._mine(params)
        running_mean, _ = self._mine(memory.running_mean)
        memory = memory._replace(running_mean={**memory.running_mean, **unravel(running_mean - rho * v.step)})
        return {**params, **unravel(mine + rho * v.step)}, memory

    def _mine(self, tree: Params) -> tuple[jax.Array, Any]:
        """The block's part of a tree shaped like the parameters, raveled, and the way back."""
        return ravel_pytree({p: tree[p] for p in self.params})

    def _product(self, loss_info: LossInfo, params: Params, randomness: Randomness) -> Any:
        """d ↦ Fd, of raveled tangents."""
        mine, unravel = self._mine(params)
        length = lambda x: self._length(loss_info, params, randomness, unravel(x))
        return fisher_product(length, mine, forward=loss_info.forward)

    def _solved(self, product: Any, slope: jax.Array, unravel: Any) -> jax.Array:
        """F⁻¹g, damped."""
        return _iterative(product, slope) if self.iterative else _dense(product, slope, unravel)

    def _length(self, loss_info: LossInfo, params: Params, randomness: Randomness, mine: Params) -> jax.Array:
        with Frozen({name: fisher_surrogate(how) for name, _, how in self.sites}):
            return loss_info.fn({**params, **mine})[0]


def _dense(product: Any, slope: jax.Array, unravel: Any) -> jax.Array:
    fisher = jax.vmap(product)(jnp.eye(slope.size, dtype=slope.dtype))
    fisher = (fisher + fisher.T) / 2
    damped = fisher + jnp.diag(DAMPING * _scale(jnp.diagonal(fisher), unravel))
    return cho_solve(cho_factor(damped), slope)


def _scale(diagonal: jax.Array, unravel: Any) -> jax.Array:
    """Each parameter's own scale. Where its Fisher vanishes (a factor that starts at zero) it takes the block's."""
    mean = jnp.mean(diagonal)
    overall = jnp.where(mean > 0, mean, 1.0)
    return ravel_pytree(jax.tree.map(lambda x: x + _or(jnp.mean(x), overall), unravel(diagonal)))[0]


def _or(mean: jax.Array, overall: jax.Array) -> jax.Array:
    return jnp.where(mean > 1e-6 * overall, mean, overall)


def _iterative(product: Any, slope: jax.Array) -> jax.Array:
    probe = jax.random.rademacher(jax.random.key(0), slope.shape, slope.dtype)
    mean = jnp.abs(probe @ product(probe)) / slope.size  # of F's diagonal (Hutchinson)
    scale = DAMPING * jnp.where(mean > 0, mean, 1.0)
    return cg(lambda v: product(v) + scale * v, slope, tol=CG_TOLERANCE, maxiter=CG_STEPS)[0]
