# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Mean, scales and factor (m, s, W) of a low-rank Gaussian guide site, Σ = D(I + WWᵀ)D with D = diag(s).

The arguments V = DW and ψ = s² of ``LowRankMultivariateNormal`` may be products of parameters, whose exponents
:class:`.Origin` gives:

    V = x_W x_s^a,   ψ = x_s^b           (a, b) = (0, 1) by hand;  (1, 2) in ``AutoLowRankMultivariateNormal``
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from numpyro import distributions as dist
from numpyro.distributions import transforms

from numpyro_natgrad.distributions import low_rank_gaussian
from numpyro_natgrad.distributions.gaussian import lower_factor
from numpyro_natgrad.guide.gaussian_sites import (
    SCALE,
    Params,
    argument_parameter,
    conditional_factors,
    covers,
    is_identity,
)
from numpyro_natgrad.guide.provenance import Origin
from numpyro_natgrad.guide.trace import GuideSite, LossTrace

#: s, ``(batch, d)``, and W, ``(batch, d, r)``.
LowRankFactor = tuple[jax.Array, jax.Array]


class LowRankSite(NamedTuple):
    """A guide site ``LowRankMultivariateNormal`` whose arguments are products of parameters.

    :ivar loc: the name of the parameter m, as ``factor`` of x_W and ``scale`` of x_s.
    :ivar powers: (a, b); ``rank``: r; ``transform``: of x_s.
    :ivar shape: ``(*batch, d)``: shape of a draw.
    """

    name: str
    loc: str
    factor: str
    scale: str
    analytic: bool
    powers: tuple[int, int]
    transform: transforms.Transform
    shape: tuple[int, ...]
    rank: int
    scale_shape: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def locs(self) -> tuple[str, ...]:
        return (self.loc,)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def params(self) -> tuple[str, ...]:
        return (self.loc, self.factor, self.scale)

    @property
    def block_size(self) -> int:
        return self.shape[-1]

    @property
    def full_covariance(self) -> bool:
        return False

    def report_rows(self, how: str) -> list[tuple[str, str, str, str, str]]:
        shape, kind = "×".join(map(str, self.shape)), "LowRankMultivariateNormal"
        names = (kind, f"{kind} (cov_factor)", f"{kind} (cov_diag)")
        sizes = (shape, f"{shape}×{self.rank}", shape)
        rows = zip(self.params, names, sizes, strict=True)
        return [(p, self.name, name, how, size) for p, name, size in rows]

    def read(self, params: Params) -> tuple[jax.Array, LowRankFactor]:
        """m, ``(batch, d)``, and (s, W)."""
        return params[self.loc].reshape(-1, self.shape[-1]), self.covariance_factor(params)

    def covariance_factor(self, params: Params) -> LowRankFactor:
        """(s, W), with one batch axis."""
        (a, b), d = self.powers, self.shape[-1]
        x = self.transform(params[self.scale]).reshape(-1, d)
        factor = params[self.factor].reshape(-1, d, self.rank)
        return x ** (b / 2), factor * x[..., None] ** (a - b / 2)

    def write(self, params: Params, loc: jax.Array, covariance: LowRankFactor) -> Params:
        new = {self.loc: loc, **self._arguments(*covariance)}
        mine = {p: x.reshape(jnp.shape(params[p])).astype(params[p].dtype) for p, x in new.items()}
        return {**params, **mine}

    def _arguments(self, scale: jax.Array, factor: jax.Array) -> Params:
        a, b = self.powers
        x = scale ** (2 / b)
        value = self.transform.inv(x.reshape(self.scale_shape))
        return {self.factor: factor * x[..., None] ** (b / 2 - a), self.scale: jnp.asarray(value, scale.dtype)}

    def cholesky(self, params: Params) -> jax.Array:
        scale, factor = self.covariance_factor(params)
        eye = jnp.broadcast_to(jnp.eye(scale.shape[-1], dtype=scale.dtype), (*scale.shape, scale.shape[-1]))
        return scale[..., None] * lower_factor(jnp.concatenate([eye, factor], axis=-1))

    def project(self, columns: jax.Array, start: LowRankFactor) -> LowRankFactor:
        dense = conditional_factors(columns, self.shape[-1])
        return jax.vmap(low_rank_gaussian.project)(dense, *start)

    def kl(self, before: LowRankFactor, after: LowRankFactor, shift: jax.Array) -> jax.Array:
        (s, w), (s_new, w_new) = before, after
        return jnp.sum(jax.vmap(low_rank_gaussian.forward_kl)(w, w_new, s_new / s, shift.reshape(s.shape) / s))


def read_low_rank_site(name: str, trace: LossTrace) -> LowRankSite | None:
    """The site as a low-rank Gaussian in closed form, or ``None`` if it is anything else."""
    site = trace.sites[name]
    if site.base is not dist.LowRankMultivariateNormal or not site.plain or site.masked or site.leaks:
        return None
    loc, diag = argument_parameter("loc", site), _powers("cov_diag", site)
    if loc is None or diag is None or len(diag) != 1:
        return None
    (scale, b), factors = next(iter(diag.items())), _powers("cov_factor", site) or {}
    rest = {p: n for p, n in factors.items() if p != scale}
    if list(rest.values()) != [1] or not _fits(loc, next(iter(rest)), scale, site, trace):
        return None
    factor, param = next(iter(rest)), trace.params[scale]
    rank = math.prod(trace.params[factor].shape or ()) // site.size
    return LowRankSite(
        name=name,
        loc=loc,
        factor=factor,
        scale=scale,
        powers=(factors.get(scale, 0), b),
        transform=param.transform,
        shape=site.shape,
        rank=rank,
        scale_shape=param.shape or (),
        analytic=site.analytic,
    )


def _powers(argument: str, site: GuideSite) -> Mapping[str, int] | None:
    """The parameters whose product an argument is, with their exponents."""
    return site.arguments.get(argument, Origin()).param_powers


def _fits(loc: str, factor: str, scale: str, site: GuideSite, trace: LossTrace) -> bool:
    """Whether every latent has its own mean, scale and row of W (r = d is ambiguous), with all valid values."""
    found = [trace.params[p] for p in (loc, factor, scale)]
    if any(x.shape is None for x in found):
        return False
    sizes, d = [math.prod(x.shape or ()) for x in found], site.shape[-1]
    rank = sizes[1] // site.size
    whole = sizes == [site.size, site.size * rank, site.size] and rank > 0 and (rank != d or d == 1)
    return whole and all(is_identity(x.transform) for x in found[:2]) and covers(found[2].transform, SCALE)
