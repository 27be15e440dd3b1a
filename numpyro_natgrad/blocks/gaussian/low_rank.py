# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""One low-rank Gaussian site N(m, D(I + WWᵀ)D) with too many latents for a joint step: no array is d × d.

The step projects (1−ρ)S + ρ E_q[∇²f] onto the family (:func:`.low_rank_gaussian.step`). In units of s, it needs two
properties of the *excess* H − S of the Hessian over the guide's precision:

* (H − S)T along 2r + 10 orthonormal directions T: the columns of W; the residuals of the last step, as in LOBPCG
  (Knyazev 2001); the slope and its running mean, as in conjugate gradients; and (H − S)ω of 8 random ω (a range finder,
  Halko, Martinsson & Tropp 2011);
* diag(H − S): exactly along T, and from 8 random signs ω as ω ⊙ (H − S)ω across T (Hutch++, Meyer et al. 2021).

If the posterior is in the family, H − S and the noise are zero at the optimum. At W = 0, where fits begin, the gradient
of W vanishes; random signs in place of zero directions break that symmetry.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import random

from numpyro_natgrad.blocks.base import Memory, Randomness, SquaredNorms, conjugate_kl
from numpyro_natgrad.blocks.gaussian.site_block import SiteBlock
from numpyro_natgrad.distributions import low_rank_gaussian
from numpyro_natgrad.distributions.gaussian import StepKL
from numpyro_natgrad.distributions.low_rank_gaussian import LowRankStep, LowRankTangent
from numpyro_natgrad.estimators.derivatives import LossInfo, finite
from numpyro_natgrad.estimators.hessian_products import (
    fall_back_to_gradient,
    leave_one_out_tangent,
    random_signs,
)
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.low_rank_sites import LowRankSite


class LowRankBlockTangent(NamedTuple):
    """A natural gradient in units of s, with m and s, ``(batch, d)``; all arrays have a leading batch axis.

    :ivar residuals: (H − S − diag(H − S))T outside of the span of T, ``(batch, d, n)``.
    """

    tangent: LowRankTangent
    loc: jax.Array
    scale: jax.Array
    residuals: jax.Array


@dataclass(frozen=True)
class LowRankGaussian(SiteBlock[LowRankSite, LowRankBlockTangent]):
    """One low-rank site. In place of (m, s, W) its memory has running means of slope and diag(H − S), and residuals."""

    @property
    def basis_size(self) -> int:
        """n, the columns of T."""
        return min(2 * self.site.rank + 2 + self.constants.low_rank_probes, self.site.shape[-1])

    @property
    def products(self) -> int:
        return self.basis_size + 2 * self.constants.low_rank_probes

    def natural_gradient(
        self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness
    ) -> LowRankBlockTangent:
        k = self.constants.low_rank_probes
        loc, (scale, factor) = self.site.read(params)
        plain = scale * loss_info.gradient[self.site.loc].reshape(scale.shape)
        slope = plain + self._control_variate(loss_info, loc, scale, factor)
        key, *keys = random.split(randomness.key, 3)
        signs = random_signs(key, (*scale.shape, 2 * k + 2 * self.site.rank + 2), scale.dtype)
        diagonal_probes, range_probes, substitutes = jnp.split(signs, [k, 2 * k], axis=-1)
        mean_slope, mean_diagonal = self._running_mean(memory, scale)
        residuals = memory.running_mean[self.site.factor].reshape(factor.shape) / scale[..., None]
        excess = lambda x, key: self._hessian_products(loss_info, scale, x, key) - _precision_product(factor, x)
        usable = partial(fall_back_to_gradient, loss_info.previous_step_skipped, plain)
        slope, found = usable(slope, excess(range_probes, keys[0]))
        known = jnp.concatenate([factor, residuals, slope[..., None], mean_slope[..., None]], axis=-1)
        basis = jax.vmap(orthonormal_basis, (0, 0, 0, None))(known, substitutes, found, self.basis_size)
        probes = jnp.concatenate([basis, diagonal_probes], axis=-1)
        slope, images = usable(slope, excess(probes, keys[1]))
        ok = finite((slope, basis, images))
        slope, basis, probes, images = (jnp.where(ok, x, 0.0) for x in (slope, basis, probes, images))
        assemble = partial(_assemble, weight_min=self.constants.diagonal_weight_min)
        v, residuals = jax.vmap(assemble)(factor, slope, mean_diagonal, basis, probes, images)
        return LowRankBlockTangent(v._replace(slope=jnp.where(ok, slope, jnp.nan)), loc, scale, residuals)

    def squared_norm(self, v: LowRankBlockTangent) -> jax.Array:
        return jnp.sum(jax.vmap(low_rank_gaussian.squared_norm)(v.tangent))

    def kl(self, v: LowRankBlockTangent, rho: jax.Array) -> StepKL:
        new, old = self._step(v, rho), v.tangent.factor
        there = old, new.factor, new.ratio, new.shift
        back = new.factor, old, 1 / new.ratio, new.shift / new.ratio
        each = jax.vmap(jax.vmap(low_rank_gaussian.forward_kl))(*map(jnp.stack, zip(there, back, strict=True)))
        forward, reverse = jnp.sum(each, axis=1)
        return conjugate_kl(forward, reverse, rho)

    def compare(self, memory: Memory, v: LowRankBlockTangent) -> SquaredNorms:
        """Mean and diagonal only: the curvature along T changes with T, which would count as noise."""
        mean, new = self._running_mean(memory, v.scale), (v.tangent.slope, v.tangent.diagonal)
        norm = jax.vmap(low_rank_gaussian.mean_scale_squared_norm)
        pairs = (mean, jax.tree.map(jnp.subtract, new, mean), new)
        return SquaredNorms(*(jnp.sum(norm(v.tangent.factor, *x)) for x in pairs))

    def update_memory(self, memory: Memory, v: LowRankBlockTangent, weight: jax.Array) -> Memory:
        slope, _ = self._running_mean(memory, v.scale)
        return self._remembered(memory, v, slope + weight * (v.tangent.slope - slope), v.tangent.diagonal)

    def retract(self, params: Params, memory: Memory, v: LowRankBlockTangent, rho: jax.Array) -> tuple[Params, Memory]:
        new = self._step(v, rho)
        slope, diagonal = self._running_mean(memory, v.scale)
        # As in the diagonal block: the step is subtracted, and the slope is transported to the new mean.
        change = jax.vmap(low_rank_gaussian.precision_diagonal_change, (0, None, None))
        diagonal = diagonal - change(v.tangent, rho, self.margin)
        memory = self._remembered(memory, v, slope - rho * v.tangent.slope + diagonal * new.shift, diagonal)
        memory = memory.with_running_means({self.site.factor: v.scale[..., None] * (v.residuals @ new.coefficients)})
        loc, scale = v.loc + v.scale * new.shift, v.scale * new.ratio
        return self.site.write(params, loc, (scale, new.factor)), memory

    def _step(self, v: LowRankBlockTangent, rho: jax.Array) -> LowRankStep:
        return jax.vmap(low_rank_gaussian.step, (0, None, None))(v.tangent, rho, self.margin)

    def _running_mean(self, memory: Memory, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of slope and diag(H − S), in units of s."""
        slope, diagonal = (memory.running_mean[p].reshape(scale.shape) for p in (self.site.loc, self.site.scale))
        return scale * slope, scale**2 * diagonal

    def _remembered(self, memory: Memory, v: LowRankBlockTangent, slope: jax.Array, diagonal: jax.Array) -> Memory:
        return memory.with_running_means({self.site.loc: slope / v.scale, self.site.scale: diagonal / v.scale**2})

    def _hessian_products(self, loss_info: LossInfo, scale: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
        """Hx of every batch element, ``(batch, d, n)``, by shared products; random signs cancel cross terms in mean."""
        shape = (x.shape[0], 1, x.shape[-1])
        signs = random_signs(key, shape, x.dtype) if x.shape[0] > 1 else jnp.ones(shape, x.dtype)
        product = lambda column: self._hessian_product(loss_info, scale * column)
        return scale[..., None] * signs * jax.vmap(product, in_axes=-1, out_axes=-1)(signs * x)

    def _control_variate(self, loss_info: LossInfo, loc: jax.Array, scale: jax.Array, factor: jax.Array) -> jax.Array:
        """The leave-one-out control variate of the slope, as in :func:`.whitened_hessian_products`."""
        offset = self._mean_offset(loss_info, loc)
        if offset is None:
            return jnp.zeros_like(loc)
        if loss_info.particles == 1:
            return -_precision_product(factor, (offset / scale)[..., None])[..., 0]
        return scale * self._hessian_product(loss_info, *leave_one_out_tangent(offset, loss_info.particles))


_precision_product = jax.vmap(low_rank_gaussian.precision_product)


def orthonormal_basis(known: jax.Array, substitutes: jax.Array, found: jax.Array, n: int) -> jax.Array:
    """T, ``(d, n)``, from the known directions, with substitutes for zeros, and then from those found."""
    norm = jnp.linalg.norm(known, axis=0)
    tiny = jnp.finfo(norm.dtype).tiny ** 0.5
    known = jnp.where(norm > tiny, known / jnp.maximum(norm, tiny), substitutes)
    return jnp.linalg.qr(jnp.concatenate([known, found], axis=1)[:, :n])[0]


def _assemble(
    factor: jax.Array,
    slope: jax.Array,
    mean_diagonal: jax.Array,
    basis: jax.Array,
    probes: jax.Array,
    images: jax.Array,
    *,
    weight_min: float,
) -> tuple[LowRankTangent, jax.Array]:
    """The natural gradient, and the residuals (H − S − diag(H − S))T outside of the span of T.

    :param mean_diagonal: running mean of diag(H − S).
    :param probes: T and the probes of the diagonal, ``(d, n + 8)``.
    :param images: (H − S) times them.
    """
    n = basis.shape[1]
    signs, along, across = probes[:, n:], images[:, :n], images[:, n:]
    inner = basis.T @ along
    outside = along - basis @ inner
    # With P = TTᵀ, the diagonal of (I − P)(H − S)(I − P) is probed, and that of the rest of H − S is known.
    across = across - basis @ (basis.T @ across) - outside @ (basis.T @ signs)
    known = jnp.sum(basis * (2 * outside + basis @ (inner + inner.T) / 2), axis=1)
    innovations = known[:, None] + signs * across - mean_diagonal[:, None]
    diagonal = mean_diagonal + _shrunk_mean(factor, innovations, weight_min)
    image = along + low_rank_gaussian.precision_product(factor, basis)
    return low_rank_gaussian.tangent(factor, slope, diagonal, basis, image), outside - diagonal[:, None] * basis


def _shrunk_mean(factor: jax.Array, samples: jax.Array, weight_min: float) -> jax.Array:
    """The mean of k estimates, ``(d, k)``, times its signal fraction 1 − (variance of the mean) / (mean)²."""
    mean = jnp.mean(samples, axis=1)
    error = jnp.sqrt(jnp.mean((samples - mean[:, None]) ** 2, axis=1) / (samples.shape[1] - 1))
    square = lambda x: low_rank_gaussian.mean_scale_squared_norm(factor, jnp.zeros_like(x), x)
    tiny = jnp.finfo(mean.dtype).tiny
    return jnp.maximum(1 - square(error) / jnp.maximum(square(mean), tiny), weight_min) * mean
