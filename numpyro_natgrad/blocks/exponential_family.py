# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""One site of an exponential family whose arguments are parameters: steps in natural parameters.

    η₊ = η − ρ v,    v = F⁻¹ ∇_η L = ∇_μ L          (Khan & Rue 2023, eq. 4; μ = E[T])

On a conjugate model η − v is the posterior, whatever η is. Draws add noise, which a guess w of v takes out: tilting
log q by ⟨w, T⟩ changes the path gradient by F̂w, with F̂ the draws' own estimate of F and E[F̂] = F, so that

    v = w + F⁻¹(ĝ − F̂w)

is unbiased for any w that these draws have not seen, and without noise if w is right and the model conjugate. The guess
is the mean of earlier natural gradients. There is none at first, and v = F̂⁻¹ĝ is taken: the regression of Salimans &
Knowles (2013), exact on a conjugate model, and biased otherwise, but for one step only.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_natgrad.blocks.base import (
    Memory,
    NoiseTolerance,
    Randomness,
    Scope,
    SquaredNorms,
    default_noise_tolerance,
    statistical_threshold,
)
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.exponential_sites import ExponentialFamilySite
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import DensityMode

#: Natural parameters up to which F̂ is formed, draws that it takes for each of them, and the least ratio of vᵀF̂v to
#: vᵀFv, or inverse, at which it is believed.
REGRESSION_LIMIT, REGRESSION_DRAWS, BELIEVED = 16, 2, 0.1


#: Nats that one of many elements may ask for in a step of length 1: the limit on KL is about all of them together, and
#: the noise of one row must neither spend it nor decide about the length for the others.
ELEMENT_LIMIT = 16.0


class Direction(NamedTuple):
    """A natural gradient ``(*batch, k)`` at η.  ``trend_image``: F times the running mean of earlier ones."""

    v: jax.Array
    image: jax.Array
    running_mean_image: jax.Array
    eta: jax.Array


class ExponentialFamilyBlock(NamedTuple):
    """One site in natural parameters.

    ``tilted``: its draws are reparameterised, and their noise is taken out.  ``limited``: KL is, by the user's options.
    """

    site: ExponentialFamilySite
    tilted: bool
    margin: float
    limited: bool

    @property
    def params(self) -> tuple[str, ...]:
        return self.site.params

    @property
    def exact_on_conjugate(self) -> bool:
        return True

    @property
    def density_modes(self) -> dict[str, DensityMode]:
        return {self.site.name: DensityMode.TILTED} if self.tilted else {}

    @property
    def hessian_params(self) -> tuple[str, ...]:
        return ()

    @property
    def size(self) -> int:
        return math.prod(self.site.eta_shape)

    @property
    def numbers(self) -> int:
        """How many numbers the site draws."""
        return self.site.copies * self.site.event_size * math.prod(self.site.eta_shape[:-1])

    def noise_tolerance(self, scope: Scope) -> NoiseTolerance:
        tolerance = default_noise_tolerance(scope)
        if self.size <= scope.constants.dense_limit:
            return tolerance
        return tolerance._replace(threshold=statistical_threshold(self.size, self.numbers))

    def report_rows(self) -> list[tuple[str, str, str, str, str]]:
        sizes = (math.prod(shape) for shape in self.site.shapes)
        how = "closed form, natural parameters"
        rows = zip(self.site.params, self.site.arguments, sizes, strict=True)
        return [(p, self.site.name, f"{self.site.cls.__name__} ({a})", how, str(n)) for p, a, n in rows]

    def natural_gradient(
        self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness
    ) -> Direction:
        eta, running_mean = self.site.read(params), self._running_mean(memory)
        slope = self.site.pull(params, loss_info.gradient)
        v = (
            self._unbiased(loss_info, params, eta, running_mean, slope)
            if self.tilted
            else self.site.family.natural_gradient(eta, slope)
        )
        v = jnp.where(jnp.all(jnp.isfinite(slope)), v, jnp.nan)
        product = self.site.family.product
        image = product(eta, v)
        share = self._share(v, image)
        return Direction(share * v, share * image, product(eta, running_mean), eta)

    def squared_norm(self, v: Direction) -> jax.Array:
        return self._square(v.v, v.image)

    def forward_kl(self, v: Direction, rho: jax.Array) -> jax.Array:
        return self.site.copies * self.site.family.forward_kl(v.eta, self._change(v, rho))

    def reverse_kl(self, v: Direction, rho: jax.Array) -> jax.Array:
        return self.site.copies * self.site.family.reverse_kl(v.eta, self._change(v, rho))

    def compare(self, memory: Memory, v: Direction) -> SquaredNorms:
        old = self._running_mean(memory)
        news = self._square(v.v - old, v.image - v.running_mean_image)
        return SquaredNorms(self._square(old, v.running_mean_image), news, self.squared_norm(v))

    def own_step_size(self, v: Direction) -> jax.Array | None:
        return None

    def update_memory(self, memory: Memory, v: Direction, weight: jax.Array) -> Memory:
        old = self._running_mean(memory)
        return self._with_running_mean(memory, old + weight * (v.v - old))

    def retract(self, params: Params, memory: Memory, v: Direction, rho: jax.Array) -> tuple[Params, Memory]:
        change = self._change(v, rho)
        # Where the optimum lies, η − v, is remembered: it stays while η moves.
        memory = self._with_running_mean(memory, self._running_mean(memory) + change)
        return self.site.write(params, v.eta + change), memory

    def _change(self, v: Direction, rho: jax.Array) -> jax.Array:
        return self.site.family.step(v.eta, -rho * v.v, self.margin) - v.eta

    def _share(self, v: jax.Array, image: jax.Array) -> jax.Array:
        """How much of each element's natural gradient is taken, ``(*batch, 1)``."""
        nats = 0.5 * self.site.copies * jnp.sum(v * image, axis=-1, keepdims=True)
        if not self.limited or nats.size == 1:
            return jnp.ones_like(nats)
        return jnp.minimum(1.0, jnp.sqrt(ELEMENT_LIMIT / jnp.maximum(nats, ELEMENT_LIMIT)))

    def _square(self, v: jax.Array, image: jax.Array) -> jax.Array:
        return self.site.copies * jnp.maximum(jnp.sum(v * image), 0.0)

    def _unbiased(
        self, loss_info: LossInfo, params: Params, eta: jax.Array, running_mean: jax.Array, gradient: jax.Array
    ) -> jax.Array:
        tilt = lambda w: self.site.pull(params, loss_info.sampled_fisher_product({self.site.name: w}))
        innovation = lambda: running_mean + self.site.family.natural_gradient(eta, gradient - tilt(running_mean))
        if not self._regresses(loss_info.particles):
            return innovation()
        return lax.cond(jnp.any(running_mean != 0), innovation, lambda: self._regressed(tilt, eta, gradient))

    def _regresses(self, particles: float) -> bool:
        k = self.site.eta_shape[-1]
        return k <= REGRESSION_LIMIT and particles * self.site.copies * self.site.event_size >= REGRESSION_DRAWS * k

    def _regressed(self, tilt: Callable, eta: jax.Array, gradient: jax.Array) -> jax.Array:
        """F̂⁻¹ĝ, element by element; F⁻¹ĝ where F̂ measures it otherwise than F does, by more than noise."""
        columns = jax.vmap(lambda e: tilt(jnp.broadcast_to(e, eta.shape)), out_axes=-1)
        v = jnp.linalg.solve(columns(jnp.eye(eta.shape[-1], dtype=eta.dtype)), gradient[..., None])[..., 0]
        ratio = jnp.sum(v * gradient, axis=-1) / jnp.sum(v * self.site.family.product(eta, v), axis=-1)
        ok = (ratio > BELIEVED) & (ratio < 1 / BELIEVED)
        return jnp.where(ok[..., None], v, self.site.family.natural_gradient(eta, gradient))

    def _running_mean(self, memory: Memory) -> jax.Array:
        flat = jnp.concatenate([memory.running_mean[p].ravel() for p in self.site.params])
        return flat.reshape(self.site.eta_shape)

    def _with_running_mean(self, memory: Memory, running_mean: jax.Array) -> Memory:
        old, flat, start = memory.running_mean, running_mean.ravel(), 0
        new = {}
        for p in self.site.params:
            new[p] = flat[start : start + old[p].size].reshape(old[p].shape).astype(old[p].dtype)
            start += old[p].size
        return memory._replace(running_mean={**old, **new})
