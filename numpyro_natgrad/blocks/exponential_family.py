# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Sites of an exponential family whose arguments are parameters: steps in their natural parameters η.

    η₊ = η − ρ v,    v = F⁻¹ ∇_η L = ∇_μ L,    μ = E[T]          (Khan & Rue 2023)

On a conjugate model η − v is the posterior for every η. Given a guess w of v, the noise of draws has a control variate:
tilting log q by ⟨w, T⟩ changes the path gradient ĝ by F̂w, where F̂ is the draws' own estimate of F, E[F̂] = F. Hence

    v = w + F⁻¹(ĝ − F̂w)

is unbiased for any w that does not depend on these draws, and free of noise if w = v and the model is conjugate. The
guess is the running mean of earlier natural gradients. The first step has none, and takes v = F̂⁻¹ĝ, the regression of
Salimans & Knowles (2013), exact on conjugate models and biased on others.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_natgrad.blocks import base
from numpyro_natgrad.blocks.base import Memory, Randomness, SquaredNorms
from numpyro_natgrad.distributions.gaussian import StepKL
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.exponential_sites import ExponentialFamilySite, ExponentialFamilySites
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import DensityMode
from numpyro_natgrad.options import RuleConstants


class ExponentialFamilyTangent(NamedTuple):
    """A natural gradient v of η, ``(sites, *batch, k)``, with the images of v and of the running mean under F."""

    v: jax.Array
    image: jax.Array
    running_mean_image: jax.Array
    eta: jax.Array


@dataclass(frozen=True)
class ExponentialFamilyBlock(base.Block[ExponentialFamilyTangent]):
    """Sites that differ in their names only, in natural parameters, each with a step size of its own.

    :ivar tilted: the noise of their draws is predicted as above.
    :ivar margin: fraction of a bounded natural parameter that a step keeps.
    :ivar limited: the KL of a step is limited.
    """

    sites: ExponentialFamilySites
    tilted: bool
    margin: float
    limited: bool
    constants: RuleConstants

    @property
    def site(self) -> ExponentialFamilySite:
        """The site that stands for all."""
        return self.sites.first

    @property
    def count(self) -> int:
        return len(self.sites.members)

    @property
    def params(self) -> tuple[str, ...]:
        return self.sites.params

    @property
    def step_size_params(self) -> tuple[tuple[str, ...], ...]:
        return tuple(s.params for s in self.sites.members)

    @property
    def site_names(self) -> tuple[str, ...]:
        return self.sites.names

    @property
    def density_modes(self) -> dict[str, DensityMode]:
        return dict.fromkeys(self.sites.names, DensityMode.TILTED) if self.tilted else {}

    @property
    def size(self) -> int:
        """Natural parameters of one site."""
        return math.prod(self.site.eta_shape)

    @property
    def numbers(self) -> int:
        return self.site.copies * self.site.event_size * math.prod(self.site.eta_shape[:-1])

    def noise_tolerance(self, scope: base.Scope) -> base.NoiseTolerance:
        tolerance = super().noise_tolerance(scope)
        if self.size <= scope.constants.dense_limit:
            return tolerance
        return tolerance._replace(threshold=base.statistical_threshold(self.size, self.numbers))

    def report_rows(self) -> list[base.ReportRow]:
        how, rows = "closed form, natural parameters", []
        for site in self.sites.members:
            sizes = (math.prod(shape) for shape in site.shapes)
            each = zip(site.params, site.arguments, sizes, strict=True)
            rows += [(p, site.name, f"{site.cls.__name__} ({a})", how, str(n)) for p, a, n in each]
        return rows

    def natural_gradient(
        self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness
    ) -> ExponentialFamilyTangent:
        eta, running_mean = self.sites.read(params), self._running_mean(memory)
        slope = self.sites.pull(params, loss_info.gradient)
        v = (
            self._unbiased(loss_info, params, eta, running_mean, slope)
            if self.tilted
            else self.site.family.natural_gradient(eta, slope)
        )
        v = jnp.where(self._spread(jnp.all(jnp.isfinite(slope), axis=self._inner)), v, jnp.nan)
        product = jax.vmap(self.site.family.product, in_axes=(None, 0))
        image, running_mean_image = product(eta, jnp.stack([v, running_mean]))
        fraction = self._fraction(v, image)
        return ExponentialFamilyTangent(fraction * v, fraction * image, running_mean_image, eta)

    def squared_norm(self, v: ExponentialFamilyTangent) -> jax.Array:
        return self._squared_norm(v.v, v.image)

    def kl(self, v: ExponentialFamilyTangent, rho: jax.Array) -> StepKL:
        each = self.site.copies * jax.vmap(self.site.family.kl)(v.eta, self._change(v, rho))
        return base.conjugate_kl(each[:, 0], each[:, 1], rho)

    def compare(self, memory: Memory, v: ExponentialFamilyTangent) -> SquaredNorms:
        old = self._running_mean(memory)
        innovation = self._squared_norm(v.v - old, v.image - v.running_mean_image)
        return SquaredNorms(self._squared_norm(old, v.running_mean_image), innovation, self.squared_norm(v))

    def update_memory(self, memory: Memory, v: ExponentialFamilyTangent, weight: jax.Array) -> Memory:
        old = self._running_mean(memory)
        return self._with_running_mean(memory, old + self._spread(weight) * (v.v - old))

    def retract(
        self, params: Params, memory: Memory, v: ExponentialFamilyTangent, rho: jax.Array
    ) -> tuple[Params, Memory]:
        change = self._change(v, rho)
        # The running mean m is that of η minus the estimated optimum, and changes with η.
        memory = self._with_running_mean(memory, self._running_mean(memory) + change)
        return self.sites.write(params, v.eta + change), memory

    @property
    def _inner(self) -> tuple[int, ...]:
        """The axes of one site's η."""
        return tuple(range(1, len(self.sites.eta_shape)))

    def _spread(self, x: jax.Array) -> jax.Array:
        """One number for each site, or one for all, to be multiplied by η."""
        return jnp.expand_dims(jnp.reshape(x, -1), self._inner)

    def _change(self, v: ExponentialFamilyTangent, rho: jax.Array) -> jax.Array:
        return self.site.family.step(v.eta, -self._spread(rho) * v.v, self.margin) - v.eta

    def _fraction(self, v: jax.Array, image: jax.Array) -> jax.Array:
        """Fractions of v, ``(sites, *batch, 1)``, so that no element of a batch uses up the KL limit that all share."""
        kl, limit = 0.5 * self.site.copies * jnp.sum(v * image, axis=-1, keepdims=True), self.constants.element_kl
        if not self.limited or kl[0].size == 1:
            return jnp.ones_like(kl)
        return jnp.sqrt(limit / jnp.maximum(kl, limit))

    def _squared_norm(self, v: jax.Array, image: jax.Array) -> jax.Array:
        return self.site.copies * jnp.maximum(jnp.sum(v * image, axis=self._inner), 0.0)

    def _unbiased(
        self, loss_info: LossInfo, params: Params, eta: jax.Array, running_mean: jax.Array, gradient: jax.Array
    ) -> jax.Array:
        names = self.sites.names
        # F̂ has no entry between two sites, so that one product serves all of them.
        tilts = lambda w: dict(zip(names, jnp.unstack(w), strict=True))
        tilt = lambda w: self.sites.pull(params, loss_info.sampled_fisher_product(tilts(w)))
        natural_gradient = self.site.family.natural_gradient
        if not self._determines_fisher(loss_info.particles):
            return running_mean + natural_gradient(eta, gradient - tilt(running_mean))
        # F̂ of every element of the batch, by one product for each coordinate of η.
        columns = jax.vmap(lambda e: tilt(jnp.broadcast_to(e, eta.shape)), out_axes=-1)
        fisher = columns(jnp.eye(eta.shape[-1], dtype=eta.dtype))
        image = jnp.sum(fisher * running_mean[..., None, :], axis=-1)
        v = running_mean + natural_gradient(eta, gradient - image)
        known = jnp.any(running_mean != 0, axis=self._inner)
        regressed = lambda: jnp.where(self._spread(known), v, self._regressed(fisher, eta, gradient, v))
        return lax.cond(jnp.all(known), lambda: v, regressed)

    def _determines_fisher(self, particles: float) -> bool:
        """Whether the draws of one step determine F̂."""
        k = self.site.eta_shape[-1]
        c, draws = self.constants, particles * self.site.copies * self.site.event_size
        return k <= c.sampled_fisher_limit and draws >= c.sampled_fisher_draws * k

    def _regressed(self, fisher: jax.Array, eta: jax.Array, gradient: jax.Array, plain: jax.Array) -> jax.Array:
        """F̂⁻¹ĝ, element by element; ``plain`` where the norms of F̂⁻¹ĝ by F̂ and by F differ by more than noise."""
        v = jnp.linalg.solve(fisher, gradient[..., None])[..., 0]
        ratio = jnp.sum(v * gradient, axis=-1) / jnp.sum(v * self.site.family.product(eta, v), axis=-1)
        ok = (ratio > self.constants.sampled_fisher_ratio) & (ratio < 1 / self.constants.sampled_fisher_ratio)
        return jnp.where(ok[..., None], v, plain)

    def _running_mean(self, memory: Memory) -> jax.Array:
        return self.sites.flat(memory.running_mean)

    def _with_running_mean(self, memory: Memory, running_mean: jax.Array) -> Memory:
        return memory.with_running_means(self.sites.split(running_mean, memory.running_mean))
