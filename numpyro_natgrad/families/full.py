# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""One full Gaussian site with too many latents for a dense Hessian: k random probes of it, or first order.

Second order: k orthonormal probes V of the whitened Hessian (:func:`sweep`) give M̂ of rank 2k
(:func:`.gaussian.sketch`), without noise at the solution.
First order: M = tril(Kᵀ ∂L/∂K) made symmetric (Tan 2021, section 3), from the gradient alone; its noise grows with d
over the number of draws.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import gaussian
from ..charts import GaussianSite, Params
from ..evidence import Evidence
from ..gaussian import Tangent
from ..length import Comparison
from ..state import Memory
from .products import usable, whitened_products

#: Hessian products a step of a wide Gaussian; 16 were as good as 32 on targets of 50–500 dimensions.
PROBES = 16


class Frame(NamedTuple):
    """A natural gradient with the frame (m, K) that it is whitened in."""

    tangent: Tangent
    loc: jax.Array
    factor: jax.Array


class FullGaussian(NamedTuple):
    """One site N(m, KKᵀ), K lower triangular; ``second_order`` needs a site without batch axes."""

    site: GaussianSite
    second_order: bool
    mode: str | None
    margin: float

    @property
    def params(self) -> tuple[str, ...]:
        return (self.site.loc, self.site.scale)

    @property
    def exact(self) -> bool:
        return True

    @property
    def modes(self) -> dict[str, str]:
        return {self.site.name: self.mode} if self.mode else {}

    @property
    def curved(self) -> tuple[str, ...]:
        return (self.site.loc,) if self.second_order else ()

    def describe(self) -> list[tuple[str, str, str, str, str]]:
        how = f"{PROBES} products with the Hessian of the loss" if self.second_order else "draws ⊗ gradients"
        return self.site.describe(f"closed form, {how}")

    def sharp(self, evidence: Evidence, params: Params, memory: Memory, step: jax.Array) -> Frame:
        loc, factor = self.site.read(params)
        slope = _whiten(factor, evidence.gradient[self.site.loc].reshape(self.site.shape))
        if not self.second_order:
            curvature = self._first_order(evidence.gradient[self.site.scale], factor)
            return Frame(gaussian.tangent(slope, jnp.nan_to_num(curvature)), loc, factor)
        return Frame(self._sketch(evidence, params, slope, factor, step), loc, factor)

    def norm2(self, v: Frame) -> jax.Array:
        return gaussian.norm2(v.tangent)

    def kl(self, v: Frame, rho: jax.Array) -> jax.Array:
        return gaussian.kl_forward(v.tangent, rho, self.margin)

    def moved(self, v: Frame, rho: jax.Array) -> jax.Array:
        return gaussian.kl_backward(v.tangent, rho, self.margin)

    def compare(self, memory: Memory, v: Frame) -> Comparison:
        """The mean part only: successive sketches see different parts of M and would pass for noise."""
        trend = self._trend(memory)
        slope = v.tangent.slope
        return Comparison(jnp.sum(trend**2), jnp.sum((slope - trend) ** 2), jnp.sum(slope**2))

    def remember(self, memory: Memory, v: Frame, weight: jax.Array) -> Memory:
        trend = self._trend(memory)
        return self._with_trend(memory, trend + weight * (v.tangent.slope - trend))

    def retract(self, params: Params, memory: Memory, v: Frame, rho: jax.Array) -> tuple[Params, Memory]:
        shift = gaussian.displacement(v.tangent, rho, self.margin)
        contraction = gaussian.contraction(v.tangent, rho, self.margin)
        loc = v.loc + jnp.einsum("...ij,...j->...i", v.factor, shift)
        left = _whiten(contraction, self._trend(memory) - rho * v.tangent.slope)
        return self.site.write(params, loc, v.factor @ contraction), self._with_trend(memory, left)

    def _trend(self, memory: Memory) -> jax.Array:
        return memory.trend[self.site.loc].reshape(self.site.shape)

    def _with_trend(self, memory: Memory, slope: jax.Array) -> Memory:
        old = memory.trend
        return memory._replace(trend={**old, self.site.loc: slope.reshape(old[self.site.loc].shape)})

    def _first_order(self, gradient: jax.Array, factor: jax.Array) -> jax.Array:
        _, pull = jax.vjp(lambda k: self.site.unconstrain(jnp.tril(k)).reshape(gradient.shape), factor)
        lower = jnp.tril(jnp.swapaxes(factor, -1, -2) @ pull(gradient)[0])
        return lower + jnp.swapaxes(jnp.tril(lower, -1), -1, -2)

    def _sketch(
        self, evidence: Evidence, params: Params, slope: jax.Array, factor: jax.Array, step: jax.Array
    ) -> Tangent:
        probes = sweep(self.site.size, min(PROBES, self.site.size), step).astype(factor.dtype)
        push, offset = partial(self._push, evidence, params), self._offset(evidence, params)
        image, correction = whitened_products(push, factor, factor @ probes, offset, evidence.particles)
        slope, image = usable(evidence.stuck, slope, slope + correction, image - probes)
        ok = jnp.all(jnp.isfinite(image))
        sketched = gaussian.sketch(slope, probes, jnp.where(ok, image, 0.0))
        return sketched._replace(values=jnp.where(ok, sketched.values, jnp.nan))

    def _offset(self, evidence: Evidence, params: Params) -> jax.Array | None:
        return None if self.site.analytic else evidence.means[self.site.name] - self.site.read(params)[0]

    def _push(self, evidence: Evidence, params: Params, shift: jax.Array, stretch: jax.Array) -> jax.Array:
        tangents = {self.site.loc: shift.reshape(params[self.site.loc].shape)}
        return evidence.push(tangents, {self.site.name: stretch})[self.site.loc].reshape(self.site.shape)


def sweep(d: int, k: int, step: jax.Array) -> jax.Array:
    """k orthonormal probes of d dimensions, ``(d, k)``: the next k of a cosine basis with random signs.

    V_ij = ±√(2/d) cos(π (i + ½) j / d), the columns j in random order: every direction is seen once in d/k steps,
    and neither random numbers nor an orthogonalisation are computed.
    """
    draw = np.random.default_rng(d)
    signs, order = draw.choice([-1.0, 1.0], d), draw.permutation(d)
    j = jnp.asarray(order)[(step * k + jnp.arange(k)) % d]
    scale = jnp.where(j == 0, np.sqrt(1 / d), np.sqrt(2 / d))
    return jnp.asarray(signs)[:, None] * scale * jnp.cos(np.pi / d * (jnp.arange(d)[:, None] + 0.5) * j)


def _whiten(factor: jax.Array, gradient: jax.Array) -> jax.Array:
    return jnp.einsum("...ij,...i->...j", factor, gradient)
