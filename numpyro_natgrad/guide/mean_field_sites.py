# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Several sites of independent Normals as one site, so that a step over them is one operation."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.distributions import transforms

from numpyro_natgrad.guide.gaussian_sites import POSITIVE, CovarianceForm, GaussianSite, Params, elementwise


class MeanFieldSites(NamedTuple):
    """Sites of independent Normals that encode their standard deviations alike, as one site of all their latents."""

    members: tuple[GaussianSite, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.members)

    @property
    def locs(self) -> tuple[str, ...]:
        return tuple(s.loc for s in self.members)

    @property
    def scales(self) -> tuple[str, ...]:
        return tuple(s.scale for s in self.members)

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(p for s in self.members for p in s.params)

    @property
    def form(self) -> CovarianceForm:
        return self.members[0].form

    @property
    def transform(self) -> transforms.Transform:
        return elementwise(self.members[0].transform)

    @property
    def size(self) -> int:
        return sum(s.size for s in self.members)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def analytic(self) -> bool:
        return self.members[0].analytic

    @property
    def block_size(self) -> int:
        return 1

    @property
    def full_covariance(self) -> bool:
        return False

    def report_rows(self, how: str) -> list[tuple[str, str, str, str, str]]:
        return [row for s in self.members for row in s.report_rows(how)]

    def read(self, params: Params) -> tuple[jax.Array, jax.Array]:
        return gathered(params, self.locs), self.covariance_factor(params)

    def covariance_factor(self, params: Params) -> jax.Array:
        return self.form.forward(self.transform(gathered(params, self.scales)))

    def unconstrain(self, factor: jax.Array) -> jax.Array:
        return jnp.asarray(self.transform.inv(self.form.inverse(factor)), factor.dtype)

    def write(self, params: Params, loc: jax.Array, factor: jax.Array) -> Params:
        scales = scattered(self.unconstrain(factor), params, self.scales)
        return {**params, **scattered(loc, params, self.locs), **scales}

    def cholesky(self, params: Params) -> jax.Array:
        return jnp.diag(self.covariance_factor(params))[None]

    def project(self, columns: jax.Array, start: jax.Array) -> jax.Array:
        return 1 / jnp.sqrt(jnp.sum(columns**2, axis=0))

    def kl(self, before: jax.Array, after: jax.Array, shift: jax.Array) -> jax.Array:
        ratio = before / after
        return 0.5 * jnp.sum(ratio**2 - 1 - 2 * jnp.log(ratio) + (shift / after) ** 2)


def join_mean_fields(sites: Sequence[Any], largest: float = math.inf) -> list[Any]:
    """The sites, with those of independent Normals of at most ``largest`` latents joined where they are alike."""
    joined: dict[Any, list[Any]] = {}
    for k, site in enumerate(sites):
        joins = isinstance(site, GaussianSite) and site.form.diagonal and site.size <= largest
        kind = type(elementwise(site.transform)) if joins else None
        # Other bijections than these have parameters, or no elementwise form.
        alike = kind in POSITIVE and (site.form, kind, site.analytic)
        joined.setdefault(alike or k, []).append(site)
    return [mine[0] if len(mine) == 1 else MeanFieldSites(tuple(mine)) for mine in joined.values()]


def gathered(values: Params, names: Sequence[str]) -> jax.Array:
    """The numbers of several arrays, one after another."""
    arrays = [values[name] for name in names]
    if len(arrays) > 1 and len({jnp.shape(x) for x in arrays}) == 1:
        return jnp.stack(arrays).ravel()
    flat = [x.ravel() for x in arrays]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat)


def scattered(x: jax.Array, like: Params, names: Sequence[str]) -> Params:
    """The inverse of :func:`gathered`: arrays of the shapes and types of ``like``."""
    shapes = [jnp.shape(like[name]) for name in names]
    if len(names) > 1 and len(set(shapes)) == 1:
        parts = list(jnp.unstack(x.reshape(len(names), *shapes[0])))
    else:
        ends = list(accumulate(math.prod(shape) for shape in shapes))
        flat = jnp.split(x, ends[:-1]) if len(names) > 1 else [x]
        parts = [part.reshape(shape) for part, shape in zip(flat, shapes, strict=True)]
    return {
        name: part if part.dtype == like[name].dtype else part.astype(like[name].dtype)
        for name, part in zip(names, parts, strict=True)
    }
