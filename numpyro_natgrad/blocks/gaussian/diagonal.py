# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Mean-field Gaussian sites with too many latents for a joint step: elementwise steps, but for a few stiff directions.

With the whitened slope g = σ ∂L/∂m and curvature λ = σ ∂L/∂σ a step multiplies the precision by 1 + ρλ and moves the
mean by −ρσg/(1 + ρλ) (Khan & Rue 2023). In second order λ comes from k Rademacher probes v of the Hessian of the loss
(Bekas, Kokiopoulou & Saad 2007),

    λ = max(E[v ⊙ σHσv], 0) − 1,    averaged over some steps, since one step's draws have Hessians of their own.

Directions in which all latents move together are treated apart (:func:`decoupled`).

In first order λ comes from the gradient with respect to σ. Its noise is that of σ ∇f ⊙ ε, which grows with the distance
from the optimum; since 1 + ρλ must stay positive, such noise widens more than it narrows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_natgrad.blocks.base import Memory, Randomness, SquaredNorms, conjugate_kl
from numpyro_natgrad.blocks.gaussian.site_block import SiteBlock
from numpyro_natgrad.distributions import gaussian
from numpyro_natgrad.distributions.gaussian import GaussianTangent, StepKL
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.estimators.hessian_products import fall_back_to_gradient, random_signs
from numpyro_natgrad.guide.gaussian_sites import GaussianSite, Params
from numpyro_natgrad.guide.mean_field_sites import MeanFieldSites, gathered, scattered

#: Whether products are wanted, slope, estimates of diag H, and the coupling that is left (:func:`decoupled`).
Carried = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
#: Directions of conjugate gradients, a product each. Three reach no more than two (docs/benchmarks/wide.md).
DIRECTIONS = 2
#: The most of the squared elements of H beside its diagonal that these directions may leave: half of their size.
UNEXPLAINED_MAX = 0.25


class DiagonalTangent(NamedTuple):
    """The natural gradient of independent Normals, and how far their latents move together.

    :ivar step: g and λ, whitened.
    :ivar coupling: squared Frobenius norms of D^(−½)(H − D)D^(−½), with D the diagonal of H, as the difference between
        probes estimates them: of all of H, and of what conjugate directions leave; ``(2,)``.
    """

    step: GaussianTangent
    coupling: jax.Array


@dataclass(frozen=True)
class DiagonalGaussian(SiteBlock[GaussianSite | MeanFieldSites, DiagonalTangent]):
    """One site of independent Normals, or several."""

    @property
    def products(self) -> int:
        return self.constants.diagonal_probes

    def natural_gradient(
        self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness
    ) -> DiagonalTangent:
        loc, scale = self.site.read(params)
        plain = scale * gathered(loss_info.gradient, self.site.locs).reshape(self.site.shape)
        if not self.second_order:
            step = GaussianTangent(plain, self._first_order_curvature(loss_info, scale), None)
            return DiagonalTangent(step, jnp.zeros(2, scale.dtype))
        mean = self._running_mean(memory).values
        slope = plain + self._control_variate(loss_info, loc, scale, mean)
        product = lambda u: scale * self._hessian_product(loss_info, scale * u)
        probes = random_signs(randomness.key, (self.products, *self.site.shape), scale.dtype)
        precision = gaussian.positive_ratio(mean, self.margin)
        known = memory.coupling[self._row(memory)]
        slope, diagonals, coupling = decoupled(product, slope, precision, probes, jax.vmap(product)(probes), known)
        weight = jnp.maximum(self.constants.diagonal_weight, 1 / (1 + randomness.step)).astype(scale.dtype)
        update = weight * (jnp.mean(diagonals, axis=0) - 1 - mean)
        # The mean of H is 1/σ² at an optimum. Negative, it is noise, or of a distant guide, and one bad draw of a
        # network would widen σ beyond the prior's: draws of wide weights then have such Hessians again.
        values = jnp.maximum(mean + update, -1.0)
        usable = fall_back_to_gradient(loss_info.previous_step_skipped, plain, slope, values)
        return DiagonalTangent(GaussianTangent(*usable, None), coupling)

    def squared_norm(self, v: DiagonalTangent) -> jax.Array:
        return gaussian.squared_norm(v.step)

    def kl(self, v: DiagonalTangent, rho: jax.Array) -> StepKL:
        kl = gaussian.kl(v.step, rho, self.margin)
        return conjugate_kl(kl.forward, kl.reverse, rho)

    def compare(self, memory: Memory, v: DiagonalTangent) -> SquaredNorms:
        mean = self._running_mean(memory)
        return SquaredNorms(*map(gaussian.squared_norm, (mean, jax.tree.map(jnp.subtract, v.step, mean), v.step)))

    def update_memory(self, memory: Memory, v: DiagonalTangent, weight: jax.Array) -> Memory:
        mean = jax.tree.map(lambda m, x: m + weight * (x - m), self._running_mean(memory), v.step)
        row = self._row(memory)
        memory = memory._replace(coupling=memory.coupling.at[row].add(weight * (v.coupling - memory.coupling[row])))
        return self._remembered(memory, mean._replace(values=v.step.values) if self.second_order else mean)

    def retract(self, params: Params, memory: Memory, v: DiagonalTangent, rho: jax.Array) -> tuple[Params, Memory]:
        loc, scale = self.site.read(params)
        shift = gaussian.mean_shift(v.step, rho, self.margin)
        ratio = gaussian.relative_factor(v.step, rho, self.margin)
        # As in the joint block: the step is subtracted from the running mean, which is then whitened by the new σ.
        mean = self._running_mean(memory)
        values = mean.values - (ratio**-2 - 1)
        slope = ratio * (mean.slope - rho * v.step.slope + values * shift)
        memory = self._remembered(memory, GaussianTangent(slope, ratio**2 * values, None))
        return self.site.write(params, loc + scale * shift, scale * ratio), memory

    def _row(self, memory: Memory) -> int:
        """The row of ``Memory.coupling`` that is this block's."""
        return sorted(memory.running_mean).index(self.site.locs[0])

    def _running_mean(self, memory: Memory) -> GaussianTangent:
        both = (gathered(memory.running_mean, names) for names in (self.site.locs, self.site.scales))
        slope, values = (x.reshape(self.site.shape) for x in both)
        return GaussianTangent(slope, values, None)

    def _remembered(self, memory: Memory, mean: GaussianTangent) -> Memory:
        slopes = scattered(mean.slope.ravel(), memory.running_mean, self.site.locs)
        values = scattered(mean.values.ravel(), memory.running_mean, self.site.scales)
        return memory.with_running_means({**slopes, **values})

    def _first_order_curvature(self, loss_info: LossInfo, scale: jax.Array) -> jax.Array:
        gradient = gathered(loss_info.gradient, self.site.scales)
        # dx/dσ of the parameter x along each coordinate: its bijection is elementwise.
        rate = jax.jvp(self.site.unconstrain, (scale,), (jnp.ones_like(scale),))[1]
        return scale * (gradient * rate.ravel()).reshape(self.site.shape)

    def _control_variate(
        self, loss_info: LossInfo, loc: jax.Array, scale: jax.Array, curvature: jax.Array
    ) -> jax.Array:
        """−(1 + λ)ε̄ with the λ of earlier steps, which does not depend on these draws: E[ε̄] = 0.

        It removes the noise of a slope whose Hessian is diagonal. That of the other elements would cost a product, and
        reaches no more in as many steps (docs/benchmarks/wide.md).
        """
        offset = self._mean_offset(loss_info, loc)
        return jnp.zeros_like(loc) if offset is None else -(1 + curvature) * offset / scale


def decoupled(
    product: Callable[[jax.Array], jax.Array],
    slope: jax.Array,
    precision: jax.Array,
    probes: jax.Array,
    images: jax.Array,
    coupling: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A slope whose elementwise step is a step of conjugate gradients, and the diagonal of H by each probe.

    Elementwise steps are too long where D⁻¹H has eigenvalues above 2, as a factor common to d covariates gives one of
    order d; and the probes v ⊙ Hv have the noise of all elements of H beside the diagonal. Two steps of conjugate
    gradients for H s = g, preconditioned with D, find such a direction. Their directions p are H-conjugate, so that

        H = Σ Hp pᵀH / pᵀHp + R,        diag H = Σ (Hp)² / pᵀHp + E[v ⊙ Rv],

    and Rv needs no product but Hv. No step exceeds the elementwise one: along directions of less curvature than D, the
    draws' own Hessian is noise. Both estimates of diag H are unbiased, and the difference between probes is the noise
    of either. Only where R has little of it does H have so few stiff directions at other draws too. Two probes that are
    nearly orthogonal to a stiff direction do not see it, at one step of thirty: the step by them alone is then as much
    too long as the direction is stiff. The estimates of earlier steps therefore count as much as the present one.

    :param product: with H, whitened.
    :param slope: g, whitened.
    :param precision: D, positive: the whitened diagonal of H by earlier steps.
    :param probes: v, random signs, ``(k, *slope.shape)``.
    :param images: Hv.
    :param coupling: that of earlier steps (:class:`DiagonalTangent`).
    :return: D s, or g where the coupling is weak or has more directions; estimates of diag H like ``probes``; and the
        coupling of this step.
    """
    plain = probes * images
    spread = _squared_spread(plain / precision)

    def separated(carried: Carried) -> Carried:
        _, slope, plain, spread = carried
        solution, pairs = _conjugate_directions(product, slope, precision)
        explained, rest = jnp.zeros_like(slope), plain
        for image, inverse in pairs:
            explained = explained + inverse * image**2
            along = jax.vmap(lambda v, image=image: jnp.sum(v * image))(probes)
            rest = rest - probes * image * (inverse * along.reshape(-1, *[1] * slope.ndim))
        left = _squared_spread(rest / precision)
        few = coupling[1] + left < UNEXPLAINED_MAX * (coupling[0] + spread)
        diagonals = jnp.where(few, explained + rest, plain)
        return jnp.array(False), jnp.where(few, precision * solution, slope), diagonals, left

    # Elementwise steps contract by ½ or more if D^(−½)(H − D)D^(−½) has no larger Frobenius norm, which the difference
    # between probes estimates. A loop of one trip or none: a batch of fits evaluates products only if one needs them.
    coupled = jnp.maximum(coupling[0], spread) > 0.25
    start = coupled, slope, plain, spread
    _, step, diagonals, left = lax.while_loop(lambda carried: carried[0], separated, start)
    return step, diagonals, jnp.stack([spread, left])


def _conjugate_directions(
    product: Callable[[jax.Array], jax.Array], slope: jax.Array, precision: jax.Array
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """H⁻¹g by preconditioned conjugate gradients, with Hp and 1/pᵀHp of each direction p, zero unless it is stiff."""
    tiny = jnp.finfo(slope.dtype).tiny
    solution, residual, direction, pairs, goes_on = jnp.zeros_like(slope), slope, slope / precision, [], jnp.array(True)
    square = jnp.sum(slope * direction)
    for _ in range(DIRECTIONS):
        image = product(direction)
        curvature = jnp.sum(direction * image)
        stiff = curvature > jnp.sum(precision * direction**2)
        inverse = jnp.where(stiff, 1 / jnp.maximum(curvature, tiny), 0.0)
        pairs.append((image, inverse))
        length = jnp.where(goes_on, jnp.where(stiff, jnp.minimum(square * inverse, 1.0), 1.0), 0.0)
        solution, residual = solution + length * direction, residual - length * image
        previous, square = square, jnp.sum(residual**2 / precision)
        direction = residual / precision + square / jnp.maximum(previous, tiny) * direction
        goes_on = goes_on & stiff
    return solution, pairs


def _squared_spread(estimates: jax.Array) -> jax.Array:
    """The variance of k estimates, ``(k, ...)``, summed over their elements."""
    return jnp.sum((estimates - jnp.mean(estimates, axis=0)) ** 2) / (estimates.shape[0] - 1)
