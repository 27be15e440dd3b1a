# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""Gaussian sites with latents of their own for each row of the data, of which a step draws a minibatch.

Given everything else, a row depends on its own data only, of which a step sees all. So its E latents go all the way to
the minimum of their local model, in which H is the E × E Hessian of −log p of the row:

    m₊ = m − (diag(1/σ²)(1 − ρ) + ρH)⁻¹ ρg,       1/σ₊² = (1 − ρ)/σ² + ρ diag H,       ρ = (η + 1)/(k + η) at visit k

with the polynomial decay of the averages. The latents z of the whole data set step after the rows, and let them follow
(:class:`RowResponse`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_natgrad.blocks.base import Block, Memory, Randomness, ReportRow, SquaredNorms, conjugate_kl
from numpyro_natgrad.distributions.gaussian import StepKL, positive_ratio
from numpyro_natgrad.distributions.surrogate import fisher_product, kl_surrogate
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.gaussian_sites import GaussianSite, Params, elementwise
from numpyro_natgrad.guide.handlers import DensityMode, Frozen, PathGradient
from numpyro_natgrad.options import RuleConstants


class Rows(NamedTuple):
    """The rows that the draws of a step have seen; at most R, and what is left of R has the weight zero.

    :ivar numbers: which they are, ``(R,)``; N, which is out of bounds, where there is none.
    :ivar weight: how often the loss counts each, ``(R,)``.
    """

    numbers: jax.Array
    weight: jax.Array


class RowResponse(NamedTuple):
    """How the optimum of each row follows D latents: derivatives, ``(D, R, E)``.

    :ivar loc: of the row's means.
    :ivar log_scale: of the logarithms of its standard deviations.
    """

    rows: Rows
    loc: jax.Array
    log_scale: jax.Array


class LocalTangent(NamedTuple):
    """A step of the rows that the draws of a step have seen.

    :ivar shift: of the means by a unit step, in standard deviations before it, ``(R, E)``.
    :ivar values: ρ(σ² diag H − 1), by which the precisions grow, ``(R, E)``.
    """

    rows: Rows
    shift: jax.Array
    values: jax.Array


@dataclass(frozen=True)
class LocalGaussian(Block[LocalTangent]):
    """The local rows of one plate: independent Normals with E entries for each of N rows, which come first.

    Draws are antithetic, which leaves little noise in g and H. The rows' running means in the memory count visits.

    :ivar drawn: R, the most rows that the draws of a step can see.
    """

    sites: tuple[GaussianSite, ...]
    drawn: int
    margin: float
    constants: RuleConstants

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(p for s in self.sites for p in s.params)

    @property
    def site_names(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.sites)

    @property
    def density_modes(self) -> dict[str, DensityMode]:
        return dict.fromkeys(self.site_names, DensityMode.ANTITHETIC)

    @property
    def hessian_params(self) -> tuple[str, ...]:
        return tuple(s.loc for s in self.sites)

    @property
    def count_of_rows(self) -> int:
        """N."""
        return self.sites[0].shape[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The entries of a row in each site."""
        return tuple(s.size // self.count_of_rows for s in self.sites)

    @property
    def size(self) -> int:
        """E."""
        return sum(self.sizes)

    def report_rows(self) -> list[ReportRow]:
        how = f"closed form, local rows, {self.size} Hessian-vector products"
        return [row for s in self.sites for row in s.report_rows(how)]

    def natural_gradient(
        self, loss_info: LossInfo, params: Params, memory: Memory, randomness: Randomness
    ) -> LocalTangent:
        rows = self._rows(loss_info, params)
        scale, known = self._scales(params, rows), _known(rows)
        slope = scale * self._means(loss_info.gradient, rows) / known
        nothing = {s.loc: jnp.zeros_like(params[s.loc]) for s in self.sites}
        product = lambda e: self._means(loss_info.hessian_product(self._added(nothing, rows, scale * e), {}), rows)
        images = jax.vmap(product, out_axes=2)(jnp.eye(self.size, dtype=scale.dtype))
        curvature = scale[:, :, None] * images / known[:, :, None]
        finite = jnp.all(jnp.isfinite(slope), axis=1) & jnp.all(jnp.isfinite(curvature), axis=(1, 2))
        seen = ((rows.weight > 0) & finite)[:, None]
        visits = self._visits(memory)[rows.numbers]
        rho = jnp.where(seen, self._weight(visits + 1)[:, None], 0.0)
        values = jnp.where(seen, rho * (jnp.maximum(jnp.einsum("nee->ne", curvature), 0.0) - 1.0), 0.0)
        precision = positive_ratio(values, self.margin)
        # The noise of g and of H is that of the same draws, so that E[H⁻¹g] ≠ 0 where E[g] = 0. After the first visit
        # the precision of earlier draws divides g, where the new one differs by no more than noise would explain.
        steady = (visits[:, None] > 0) & (jnp.abs(precision - 1) < 0.25)
        precision = jnp.where(steady, 1.0, precision)
        coupling = jnp.where(seen[:, :, None], rho[:, :, None] * curvature, 0.0)
        shift = -solve_rows(precision, coupling, jnp.where(seen, rho * slope, 0.0), self.margin)
        # All rows share the trust region: one whose mean would go too far must not shorten the steps of the others.
        square = jnp.sum(precision * shift**2, axis=1, keepdims=True)
        longest = 2 * self.constants.element_kl * self.size
        shift = jnp.minimum(1.0, jnp.sqrt(longest / jnp.maximum(square, jnp.finfo(square.dtype).tiny))) * shift
        return LocalTangent(rows, shift, values)

    def squared_norm(self, v: LocalTangent) -> jax.Array:
        return jnp.sum(v.shift**2) + 0.5 * jnp.sum(v.values**2)

    def kl(self, v: LocalTangent, rho: jax.Array) -> StepKL:
        w, shift = self._path(v, rho)
        square = shift**2
        forward = 0.5 * jnp.sum(w - 1 - jnp.log(w) + square * w)
        reverse = 0.5 * jnp.sum(1 / w - 1 + jnp.log(w) + square)
        weight = jnp.sum(v.rows.weight) / jnp.maximum(jnp.sum(v.rows.weight > 0), 1)
        return conjugate_kl(forward, reverse, rho / weight)

    def compare(self, memory: Memory, v: LocalTangent) -> SquaredNorms:
        """Not compared: the number of visits decides how far a row goes."""
        square = self.squared_norm(v)
        return SquaredNorms(jnp.zeros_like(square), square, square)

    def update_memory(self, memory: Memory, v: LocalTangent, weight: jax.Array) -> Memory:
        return memory

    def own_step_size(self, v: LocalTangent) -> jax.Array:
        return jnp.ones((), v.shift.dtype)

    def retract(self, params: Params, memory: Memory, v: LocalTangent, rho: jax.Array) -> tuple[Params, Memory]:
        w, shift = self._path(v, rho)
        moved = jnp.any((v.shift != 0) | (v.values != 0), axis=1)
        visits = self._visits(memory).at[v.rows.numbers].add(moved.astype(w.dtype), mode="drop")
        params = self._moved(params, v.rows, self._scales(params, v.rows) * shift, w**-0.5)
        return params, self._counted(memory, visits)

    def _path(self, v: LocalTangent, rho: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The factors of the precisions, and the shift of the means, by a step of size ρ of a diagonal Gaussian."""
        whole, w = positive_ratio(v.values, self.margin), positive_ratio(rho * v.values, self.margin)
        return w, rho * whole / w * v.shift

    def without_old_rows(self, memory: Memory, condition: jax.Array) -> Memory:
        """The memory with which rows that a step has moved before stay where they are, if ``condition`` is true."""
        visits = self._visits(memory)
        return self._counted(memory, jnp.where(condition & (visits > 0), jnp.inf, visits))

    def averaged(self, average: Params, params: Params, before: Memory, after: Memory) -> Params:
        """The averages of the rows over their visits, after a step.

        The other latents are averaged too, and a row belongs to the place where these were at its visit.
        """
        moved = self._visits(after) > self._visits(before)
        return self._blended(average, params, jnp.where(moved, self._weight(self._visits(after)), 0.0))

    def followed_in_part(self, settled: Params, followed: Params, memory: Memory) -> Params:
        """The rows after they have followed a step, with the weight of their visit.

        The step follows the noise of the minibatch. Rows that followed all of the way would carry that noise, which is
        that of their own data, and later visits with their small weights would not remove it.
        """
        return self._blended(settled, followed, self._weight(self._visits(memory)))

    def _weight(self, visit: jax.Array) -> jax.Array:
        """The weight of a row's visit among all up to it, which are numbered from 1."""
        eta = self.constants.average_decay
        return (eta + 1) / (jnp.maximum(visit, 1) + eta)

    def _blended(self, old: Params, new: Params, weight: jax.Array) -> Params:
        """``old`` with the rows moved towards ``new``, by a fraction of the way for each, ``(N,)``."""

        def between(a: jax.Array, b: jax.Array) -> jax.Array:
            return a + (weight.reshape(-1, *[1] * (a.ndim - 1)) * (b - a)).astype(a.dtype)

        return {**old, **{p: between(old[p], new[p]) for p in self.params}}

    def response(
        self, loss_info: LossInfo, params: Params, place: Callable[[jax.Array], Params], at: jax.Array
    ) -> tuple[RowResponse, jax.Array]:
        """How the optima of the rows follow D latents, and C, what the loss gains by that (:class:`.ProfileProducts`).

        :param place: the means of the D latents, ``(D,)``, as parameters; ``at`` are the present ones.
        """
        rows = self._rows(loss_info, params)
        loc, scale, known = self._means(params, rows), self._scales(params, rows), _known(rows)
        units = jnp.eye(self.size, dtype=loc.dtype)

        def slopes_and_hessians(means: jax.Array) -> tuple[jax.Array, jax.Array]:
            there = {**params, **place(means)}
            moved = lambda x: {**there, **self._added(params, rows, x - loc)}
            gradient = jax.grad(lambda x: self._paired(loss_info, moved(x)))
            slope, product = jax.linearize(gradient, loc)
            return slope, jax.vmap(lambda e: product(jnp.broadcast_to(e, loc.shape)), out_axes=2)(units)

        (_, hessian), linear = jax.linearize(slopes_and_hessians, at)
        slopes, hessians = jax.vmap(linear)(jnp.eye(len(at), dtype=at.dtype))
        finite = jnp.all(jnp.isfinite(slopes), axis=(0, 2)) & jnp.all(jnp.isfinite(hessians), axis=(0, 2, 3))
        seen = ((rows.weight > 0) & finite & jnp.all(jnp.isfinite(hessian), axis=(1, 2)))[:, None]
        # Rows have just been optimized, so that 1/σ² stands for the diagonal of their Hessians.
        precision, hessian = scale**-2, jnp.where(seen[:, :, None], hessian / known[:, :, None], 0.0)
        solve = lambda slope: -solve_rows(precision, hessian, slope, self.margin)
        means = jax.vmap(solve)(jnp.where(seen, slopes / known, 0.0))
        log_scales = -0.5 * jnp.where(seen, jnp.einsum("dnee->dne", hessians) * scale**2 / known, 0.0)
        weights = jnp.where(seen, rows.weight[:, None], 0.0)
        image = precision * means + without_diagonal(hessian, means)
        square = lambda x, y: x.reshape(len(x), -1) @ (weights * y).reshape(len(y), -1).T
        coupling = square(means, image) + 2 * square(log_scales, log_scales)
        return RowResponse(rows, means, log_scales), (coupling + coupling.T) / 2

    def follow(self, params: Params, response: RowResponse, shift: jax.Array) -> Params:
        """The parameters after the D latents have moved by ``shift``, ``(D,)``."""
        moved = lambda x: jnp.tensordot(shift, x, axes=1)
        return self._moved(params, response.rows, moved(response.loc), jnp.exp(moved(response.log_scale)))

    def _rows(self, loss_info: LossInfo, params: Params) -> Rows:
        """The rows that the draws have seen: σ² times the Fisher matrix of a mean in the loss, which is diagonal."""
        site = self.sites[0]

        def surrogate(loc: jax.Array) -> jax.Array:
            with Frozen({site.name: kl_surrogate}):
                return loss_info.fn({**params, site.loc: loc})[0]

        loc, n = params[site.loc], self.count_of_rows
        fisher = fisher_product(surrogate, loc, forward=loss_info.forward)(jnp.ones_like(loc)).reshape(n, -1)[:, 0]
        index = jnp.nonzero(fisher, size=self.drawn, fill_value=n)[0]
        weight = self._scales(params, Rows(index, fisher))[:, 0] ** 2 * fisher[index]
        return Rows(index, jnp.where(index < n, weight, 0.0))

    def _paired(self, loss_info: LossInfo, params: Params) -> jax.Array:
        """The loss at antithetic draws of the rows."""
        pairs = {name: jnp.zeros_like(loss_info.perturbation_gradients[name]) for name in self.site_names}
        with PathGradient(self.density_modes, int(loss_info.particles), pairs):
            return loss_info.fn(params)[0]

    def _means(self, values: Params, rows: Rows) -> jax.Array:
        """What belongs to the mean parameters of the rows, ``(R, E)``."""
        return jnp.concatenate(
            [values[s.loc].reshape(self.count_of_rows, -1)[rows.numbers] for s in self.sites], axis=1
        )

    def _scales(self, params: Params, rows: Rows) -> jax.Array:
        """σ, ``(R, E)``."""
        each = [params[s.scale].reshape(self.count_of_rows, -1)[rows.numbers] for s in self.sites]
        forward = [s.form.forward(elementwise(s.transform)(x)) for s, x in zip(self.sites, each, strict=True)]
        return jnp.concatenate(forward, axis=1)

    def _added(self, params: Params, rows: Rows, x: jax.Array) -> Params:
        """The mean parameters with an array ``(R, E)`` added to the rows."""
        added = {}
        for site, part in zip(self.sites, self._parts(x), strict=True):
            old = params[site.loc]
            flat = old.reshape(self.count_of_rows, -1).at[rows.numbers].add(part.astype(old.dtype), mode="drop")
            added[site.loc] = flat.reshape(old.shape)
        return added

    def _moved(self, params: Params, rows: Rows, shift: jax.Array, ratio: jax.Array) -> Params:
        """The parameters with means shifted and standard deviations multiplied, ``(R, E)``."""
        params = {**params, **self._added(params, rows, shift)}
        for site, scale in zip(self.sites, self._parts(ratio * self._scales(params, rows)), strict=True):
            old = params[site.scale]
            new = elementwise(site.transform).inv(site.form.inverse(scale)).astype(old.dtype)
            flat = old.reshape(self.count_of_rows, -1).at[rows.numbers].set(new, mode="drop")
            params = {**params, site.scale: flat.reshape(old.shape)}
        return params

    def _parts(self, x: jax.Array) -> list[jax.Array]:
        return jnp.split(x, list(accumulate(self.sizes))[:-1], axis=1)

    def _visits(self, memory: Memory) -> jax.Array:
        """How many steps have moved each row, ``(N,)``."""
        return memory.running_mean[self.sites[0].loc].reshape(self.count_of_rows, -1)[:, 0]

    def _counted(self, memory: Memory, visits: jax.Array) -> Memory:
        shape = (self.count_of_rows, self.sizes[0])
        return memory.with_running_means({self.sites[0].loc: jnp.broadcast_to(visits[:, None], shape)})


def _known(rows: Rows) -> jax.Array:
    """The weight of each row, by which sums over draws are divided, ``(R, 1)``; 1 where there is none."""
    return jnp.where(rows.weight > 0, rows.weight, 1.0)[:, None]


def solve_rows(diagonal: jax.Array, matrix: jax.Array, right: jax.Array, margin: float) -> jax.Array:
    """E steps of conjugate gradients for each of R systems: exact where the matrices are positive definite.

    :param diagonal: positive, ``(R, E)``; it takes the place of that of ``matrix``, and preconditions.
    :param matrix: ``(R, E, E)``, symmetric.
    :param right: ``(R, E)``.
    :param margin: the least curvature along a step, relative to that of the diagonal.
    """
    tiny = jnp.finfo(right.dtype).tiny
    dot = lambda x, y: jnp.sum(x * y, axis=1, keepdims=True)
    x, residual = jnp.zeros_like(right), right
    direction = residual / diagonal
    square = dot(residual, direction)
    for _ in range(matrix.shape[1]):
        image = diagonal * direction + without_diagonal(matrix, direction)
        curvature = jnp.maximum(dot(direction, image), margin * dot(direction, diagonal * direction))
        length = square / jnp.maximum(curvature, tiny)
        x, residual = x + length * direction, residual - length * image
        previous, square = square, dot(residual, residual / diagonal)
        direction = residual / diagonal + square / jnp.maximum(previous, tiny) * direction
    return x


def without_diagonal(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """Products of R matrices ``(R, E, E)`` without their diagonals, with ``(..., R, E)``."""
    return jnp.einsum("nef,...nf->...ne", matrix * (1 - jnp.eye(matrix.shape[1], dtype=matrix.dtype)), x)
