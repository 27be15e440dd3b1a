# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""One low-rank Gaussian site, N(m, D(I + WWᵀ)D), with too many latents for a joint step: nothing is d × d.

The step goes towards S ← (1−ρ)S + ρ E_q[∇²f] and to the family's member there (:func:`.reached`). Of the
Hessian H it asks, in units of s,

* HT along 2r + 10 directions T: those of W; (H − S)W outside of T, the gradient with respect to W, from the step before
  (so that W turns as in LOBPCG, Knyazev 2001); the slope and the mean of earlier ones, along which the mean then moves
  by exact lengths, as conjugate gradients would; and (H − S)ω of 8 random ω, which finds what W knows nothing of;
* diag(H − S): along T exactly, and across from 8 random signs ω as ω ⊙ (H − S)ω (Hutch++, Meyer et al. 2021). The 8
  say how noisy their mean is: where it differs from that of earlier steps by no more, it counts an eighth.

All are differences from the guide's own precision, so that where the target is a member of the family there is no noise
at the optimum. At the start W = 0, a saddle without a gradient. Where a direction is zero random signs stand in for it:
they break the symmetry, the same ones in every run.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import random

from numpyro_natgrad.blocks.base import Memory, NoiseTolerance, Randomness, Scope, SquaredNorms, default_noise_tolerance
from numpyro_natgrad.distributions import low_rank_gaussian
from numpyro_natgrad.distributions.low_rank_gaussian import LowRankTangent
from numpyro_natgrad.estimators.derivatives import LossInfo, finite
from numpyro_natgrad.estimators.hessian_products import fall_back_to_gradient, leave_one_out_tangent
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import DensityMode
from numpyro_natgrad.guide.low_rank_sites import LowRankSite

#: Random probes a step: of the Hessian's diagonal, and of what else there is to find.
PROBES = 8
#: The least weight of a new estimate of the diagonal in their running mean.
GAIN = 1 / 8


class Frame(NamedTuple):
    """A natural gradient; arrays have a leading batch axis.

    :ivar tangent: in units of s.
    :ivar loc: m, ``(batch, d)``.  :ivar scale: s, ``(batch, d)``.
    :ivar turned: (H − S − diag(H − S))T outside of T, ``(batch, d, n)``.
    """

    tangent: LowRankTangent
    loc: jax.Array
    scale: jax.Array
    turned: jax.Array


class LowRankGaussian(NamedTuple):
    """One low-rank site, by products with the Hessian of the loss.

    What is remembered, in the place of the site's parameters: the mean of gradients (of m), of diag(H − S) (of s), and
    directions (of W), all in units of the latents.
    """

    site: LowRankSite
    margin: float

    @property
    def params(self) -> tuple[str, ...]:
        return self.site.params

    @property
    def exact_on_conjugate(self) -> bool:
        return True

    @property
    def density_modes(self) -> dict[str, DensityMode]:
        return {self.site.name: DensityMode.DETACHED}

    @property
    def hessian_params(self) -> tuple[str, ...]:
        return (self.site.loc,)

    @property
    def directions(self) -> int:
        """n, the columns of T."""
        return min(2 * self.site.rank + 2 + PROBES, self.site.shape[-1])

    def noise_tolerance(self, scope: Scope) -> NoiseTolerance:
        return default_noise_tolerance(scope)

    def report_rows(self) -> list[tuple[str, str, str, str, str]]:
        products = self.directions + 2 * PROBES
        return self.site.report_rows(f"closed form, {products} products with the Hessian of the loss")

    def natural_gradient(self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness) -> Frame:
        loc, (scale, factor) = self.site.read(params)
        plain = scale * loss_info.gradient[self.site.loc].reshape(scale.shape)
        slope = plain + self._control_variate(loss_info, params, loc, scale, factor)
        key, *keys = random.split(randomness.key, 3)
        signs = random.rademacher(key, (*scale.shape, 2 * PROBES + 2 * self.site.rank + 2), scale.dtype)
        probes, others, spare = jnp.split(signs, [PROBES, 2 * PROBES], axis=-1)
        running_mean, diagonal = self._running_mean(memory, scale)
        turned = memory.running_mean[self.site.factor].reshape(factor.shape) / scale[..., None]
        ask = partial(self._asked, loss_info, params, plain)
        slope, found = ask(slope, others, keys[0])
        own = jnp.concatenate([factor, turned, slope[..., None], running_mean[..., None]], axis=-1)
        basis = jax.vmap(directions, (0, 0, 0, None))(own, spare, found, self.directions)
        asked = jnp.concatenate([basis, probes], axis=-1)
        slope, residual = ask(slope, asked, keys[1])
        ok = finite((slope, basis, residual))
        slope, basis, asked, residual = (jnp.where(ok, x, 0.0) for x in (slope, basis, asked, residual))
        v, turned = jax.vmap(_differences)(factor, slope, diagonal, basis, asked, residual)
        return Frame(v._replace(slope=jnp.where(ok, slope, jnp.nan)), loc, scale, turned)

    def squared_norm(self, v: Frame) -> jax.Array:
        return jnp.sum(jax.vmap(low_rank_gaussian.squared_norm)(v.tangent))

    def forward_kl(self, v: Frame, rho: jax.Array) -> jax.Array:
        new, old = self._reached(v, rho), v.tangent.factor
        return jnp.sum(jax.vmap(low_rank_gaussian.forward_kl)(old, new.factor, new.ratio, new.shift))

    def reverse_kl(self, v: Frame, rho: jax.Array) -> jax.Array:
        new, old = self._reached(v, rho), v.tangent.factor
        return jnp.sum(jax.vmap(low_rank_gaussian.forward_kl)(new.factor, old, 1 / new.ratio, new.shift / new.ratio))

    def compare(self, memory: Memory, v: Frame) -> SquaredNorms:
        """Mean and diagonal: what is seen along T changes with T, and would pass for noise."""
        slope, diagonal = self._running_mean(memory, v.scale)
        old, new = (slope, diagonal), (v.tangent.slope, v.tangent.diagonal)
        news = jax.tree.map(jnp.subtract, new, old)
        return SquaredNorms(
            *(
                jnp.sum(jax.vmap(low_rank_gaussian.mean_scale_squared_norm)(v.tangent.factor, *x))
                for x in (old, news, new)
            )
        )

    def own_step_size(self, v: Frame) -> jax.Array | None:
        return None

    def update_memory(self, memory: Memory, v: Frame, weight: jax.Array) -> Memory:
        slope, _ = self._running_mean(memory, v.scale)
        return self._with_running_mean(memory, v, slope + weight * (v.tangent.slope - slope), v.tangent.diagonal)

    def retract(self, params: Params, memory: Memory, v: Frame, rho: jax.Array) -> tuple[Params, Memory]:
        new = self._reached(v, rho)
        slope, diagonal = self._running_mean(memory, v.scale)
        # As in DiagonalGaussian: the step is subtracted, and the slope is that at the new mean.
        diagonal = diagonal - jax.vmap(low_rank_gaussian.precision_diagonal_change, (0, None, None))(
            v.tangent, rho, self.margin
        )
        memory = self._with_running_mean(memory, v, slope - rho * v.tangent.slope + diagonal * new.shift, diagonal)
        memory = self._with(memory, {self.site.factor: v.scale[..., None] * (v.turned @ new.coefficients)})
        loc, scale = v.loc + v.scale * new.shift, v.scale * new.ratio
        return self.site.write(params, loc, (scale, new.factor)), memory

    def _reached(self, v: Frame, rho: jax.Array) -> low_rank_gaussian.LowRankStep:
        return jax.vmap(low_rank_gaussian.step, (0, None, None))(v.tangent, rho, self.margin)

    def _running_mean(self, memory: Memory, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        slope, diagonal = (memory.running_mean[p].reshape(scale.shape) for p in (self.site.loc, self.site.scale))
        return scale * slope, scale**2 * diagonal

    def _with_running_mean(self, memory: Memory, v: Frame, slope: jax.Array, diagonal: jax.Array) -> Memory:
        return self._with(memory, {self.site.loc: slope / v.scale, self.site.scale: diagonal / v.scale**2})

    def _with(self, memory: Memory, new: Params) -> Memory:
        shaped = {p: x.reshape(jnp.shape(memory.running_mean[p])) for p, x in new.items()}
        return memory._replace(running_mean={**memory.running_mean, **shaped})

    def _asked(
        self, loss_info: LossInfo, params: Params, plain: jax.Array, slope: jax.Array, x: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The slope and (H − S)x, or what gets away from where they are no numbers."""
        _, (scale, factor) = self.site.read(params)
        residual = self._images(loss_info, params, scale, x, key) - _product(factor, x)
        return fall_back_to_gradient(loss_info.previous_step_skipped, plain, slope, residual)

    def _images(self, loss_info: LossInfo, params: Params, scale: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
        """Each batch element's own Hx for its x, ``(batch, d, n)``.

        Elements are probed together, with random signs, so that in the mean they do not see each other.
        """
        shape = (x.shape[0], 1, x.shape[-1])
        signs = random.rademacher(key, shape, x.dtype) if x.shape[0] > 1 else jnp.ones(shape, x.dtype)
        hessian_product = lambda column: self._hessian_product(loss_info, params, scale * column)
        return scale[..., None] * signs * jax.vmap(hessian_product, in_axes=-1, out_axes=-1)(signs * x)

    def _hessian_product(
        self, loss_info: LossInfo, params: Params, shift: jax.Array, stretch: float = 0.0
    ) -> jax.Array:
        tangents = {self.site.loc: shift.reshape(jnp.shape(params[self.site.loc]))}
        by = {self.site.name: jnp.asarray(stretch)}
        return loss_info.hessian_product(tangents, by)[self.site.loc].reshape(shift.shape)

    def _control_variate(
        self, loss_info: LossInfo, params: Params, loc: jax.Array, scale: jax.Array, factor: jax.Array
    ) -> jax.Array:
        """What takes the noise of the draws' mean out of the slope: :func:`.products.whitened_hessian_products`."""
        if self.site.analytic:
            return jnp.zeros_like(loc)
        offset = loss_info.perturbation_gradients[self.site.name].reshape(loc.shape) - loc
        if loss_info.particles == 1:
            return -_product(factor, (offset / scale)[..., None])[..., 0]
        return scale * self._hessian_product(loss_info, params, *leave_one_out_tangent(offset, loss_info.particles))


def directions(own: jax.Array, spare: jax.Array, found: jax.Array, n: int) -> jax.Array:
    """T, ``(d, n)``: an orthonormal basis of ``own``, with ``spare`` for columns of zeros, and of what was found."""
    length = jnp.linalg.norm(own, axis=0)
    tiny = jnp.finfo(length.dtype).tiny ** 0.5
    own = jnp.where(length > tiny, own / jnp.maximum(length, tiny), spare)
    return jnp.linalg.qr(jnp.concatenate([own, found], axis=1)[:, :n])[0]


_product = jax.vmap(low_rank_gaussian.precision_product)


def _differences(
    factor: jax.Array,
    slope: jax.Array,
    running_mean: jax.Array,
    basis: jax.Array,
    asked: jax.Array,
    residual: jax.Array,
) -> tuple[LowRankTangent, jax.Array]:
    """The natural gradient, and (H − S − diag(H − S))T outside of T.

    :param trend: what earlier steps say diag(H − S) is.
    :param asked: T and probes, ``(d, n + 8)``.  :param residual: (H − S) times them.
    """
    n = basis.shape[1]
    probes, along, across = asked[:, n:], residual[:, :n], residual[:, n:]
    inner = basis.T @ along
    turned = along - basis @ inner
    # With P = TTᵀ: diag(H − S) is that of (I − P)(H − S)(I − P), to be probed, and of the rest, which is known.
    across = across - basis @ (basis.T @ across) - turned @ (basis.T @ probes)
    known = jnp.sum(basis * (2 * turned + basis @ (inner + inner.T) / 2), axis=1)
    diagonal = running_mean + _news(factor, known[:, None] + probes * across - running_mean[:, None])
    v = low_rank_gaussian.tangent(
        factor, slope, diagonal, basis, along + low_rank_gaussian.precision_product(factor, basis)
    )
    return v, turned - diagonal[:, None] * basis


def _news(factor: jax.Array, news: jax.Array) -> jax.Array:
    """The mean of k estimates, ``(d, k)``, times its share of signal: 1 − (variance of the mean) / (mean)²."""
    mean = jnp.mean(news, axis=1)
    spread = jnp.sqrt(jnp.mean((news - mean[:, None]) ** 2, axis=1) / (news.shape[1] - 1))
    square = lambda x: low_rank_gaussian.mean_scale_squared_norm(factor, jnp.zeros_like(x), x)
    tiny = jnp.finfo(mean.dtype).tiny
    return jnp.maximum(1 - square(spread) / jnp.maximum(square(mean), tiny), GAIN) * mean
