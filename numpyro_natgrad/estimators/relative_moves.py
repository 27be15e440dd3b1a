# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Moves of all parameters that are relative to the guide's own scale, and draws in mirrored pairs.

    m ← m + K a,   K ← K (I + T)          of a Gaussian site;   x ← x + a of any other parameter

In (a, T) the Hessian of the loss at a Gaussian posterior is near the identity, whatever the units of the latents.
"""

import copy
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from numpyro import distributions as dist
from numpyro.primitives import Messenger

from numpyro_natgrad.distributions.wrappers import base_distribution, map_arguments, map_base, with_log_prob
from numpyro_natgrad.guide.gaussian_sites import GaussianSite, Params, read_gaussian_site
from numpyro_natgrad.guide.handlers import Message, is_guide_site, mark_guide_site
from numpyro_natgrad.guide.low_rank_sites import LowRankSite, read_low_rank_site
from numpyro_natgrad.guide.trace import LossTrace

#: Classes whose draws are m + Kε with a symmetric ε.
_SYMMETRIC = (dist.Normal, dist.MultivariateNormal, dist.LowRankMultivariateNormal)
Sites = tuple[GaussianSite | LowRankSite, ...]


class Mirrored(Messenger):
    """Gaussian draws m + sign Kε, and path gradients.

    A pair of mirrored draws has no noise in odd functions of ε, such as the slope of a quadratic.

    :param path: sites whose log q passes a fraction ``score`` of its gradient on to the arguments of its base.
    """

    def __init__(self, path: frozenset[str], sign: jax.Array, score: jax.Array) -> None:
        super().__init__()
        self.path, self.sign, self.score = path, sign, score

    def process_message(self, msg: Message) -> None:
        mark_guide_site(msg)
        if is_guide_site(msg) and isinstance(base_distribution(msg["fn"]), _SYMMETRIC):
            msg["fn"] = map_base(msg["fn"], lambda base: _mirrored(base, self.sign))

    def postprocess_message(self, msg: Message) -> None:
        if is_guide_site(msg) and msg["name"] in self.path:
            msg["fn"] = map_base(msg["fn"], lambda base: _with_score(base, self.score))


def _with_score(base: dist.Distribution, score: jax.Array) -> dist.Distribution:
    """The same distribution, whose log density passes a fraction of its gradient on to its arguments."""

    def damped(x: Any) -> Any:
        if not (isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)):
            return x
        return stop_gradient(x) + score.astype(x.dtype) * (x - stop_gradient(x))

    return with_log_prob(base, map_arguments(damped, base).log_prob)


def _mirrored(base: dist.Distribution, sign: jax.Array) -> dist.Distribution:
    changed, loc = copy.copy(base), base.loc

    def sample(key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        x = base.sample(key, sample_shape)
        return loc + sign.astype(x.dtype) * (x - loc)

    changed.sample = sample
    return changed


def path_sites(found: LossTrace) -> frozenset[str]:
    """The sites whose score term has zero mean: the loss is affine in their log density, at differentiable draws."""
    carried = [name for name, s in found.sites.items() if s.reparameterized and not s.analytic]
    return frozenset(carried if found.is_elbo else ())


def relative_sites(found: LossTrace) -> Sites:
    """The sites that move relative to their own covariance factor."""
    read = [read_gaussian_site(name, found) or read_low_rank_site(name, found) for name in found.sites]
    sites = [s for s in read if s is not None]
    names = [p for s in sites for p in s.params]
    return tuple(s for s in sites if all(names.count(p) == 1 for p in s.params))


def no_move(params: Params, sites: Sites) -> Params:
    """Zero moves: of means in units of K, of factors as K(I + T), of other parameters as they are."""
    zero = jax.tree.map(jnp.zeros_like, params)
    for site in sites:
        loc: jax.Array
        factor: Any
        loc, factor = site.read(params)
        zero[site.loc] = jnp.zeros_like(loc)
        if isinstance(site, LowRankSite):
            zero[site.scale], zero[site.factor] = (jnp.zeros_like(x) for x in factor)
        else:
            zero[site.scale] = jnp.zeros_like(factor)
    return zero


def moved(params: Params, move: Params, sites: Sites) -> Params:
    """The parameters after a move, which is relative to the guide's own scale."""
    new = {p: x if owned(p, sites) else jax.tree.map(jnp.add, x, move[p]) for p, x in params.items()}
    for site in sites:
        factor: Any
        loc, factor = site.read(params)
        shift = move[site.loc]
        if isinstance(site, LowRankSite):
            scale, rows = factor
            new = site.write(new, loc + scale * shift, (scale * (1 + move[site.scale]), rows + move[site.factor]))
        elif site.form.diagonal:
            new = site.write(new, loc + factor * shift, factor * (1 + move[site.scale]))
        else:
            step = jnp.einsum("...ij,...j->...i", factor, shift)
            new = site.write(new, loc + step, factor + factor @ jnp.tril(move[site.scale]))
    return new


def owned(name: str, sites: Sites) -> bool:
    return any(name in site.params for site in sites)
