# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""Importance sampling from a mixture of a Gaussian guide and of two wider distributions.

    w(z) = log p(x, z) − log [ ¼ N(z; m, KKᵀ) + ½ N(z; m, Cov_LR) + ¼ t₅(z; m, Cov_LR) ]

The optimum of the ELBO has tails that are too light, and a mean-field guide is too narrow where latents are correlated:
its own draws then miss what their weights ought to correct, and a small k-hat does not show it. Cov_LR, of
:mod:`.linear_response`, has the right width, and Student's t heavier tails than most posteriors (Geweke 1989,
*Econometrica* 57:1317). A weight is at most four times that of any component alone, so that the mixture is never much
worse than the best of them (Hesterberg 1995, *Technometrics* 37:185; Owen & Zhou 2000, *JASA* 95:135). The standard
deviations by linear response are those of the half from N(m, Cov_LR).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import gammaln, logsumexp

from numpyro_natgrad.compilation.devices import fetch
from numpyro_natgrad.compilation.kept import jit_for
from numpyro_natgrad.diagnostics import importance
from numpyro_natgrad.diagnostics.importance import (
    DRAWS_PER_BATCH,
    Draws,
    ImportanceWeights,
    Inspection,
    map_in_batches,
    unconstrained_value,
)
from numpyro_natgrad.diagnostics.linear_response import GaussianLatents, substitute_latents
from numpyro_natgrad.guide.gaussian_sites import Params

#: Degrees of freedom of Student's t: few, and with finite fourth moments. Not tuned.
DEGREES = 5.0


class Mixture(NamedTuple):
    """Draws of the mixture with their weights; those with the numbers in ``response`` are from N(m, Cov_LR)."""

    drawn: Draws
    weights: ImportanceWeights
    response: slice


def draw(latents: GaussianLatents, covariance: jax.Array, key: jax.Array, num_draws: int, sites: Inspection) -> Mixture:
    """Draw from the mixture and compute the log weight of every draw, in unconstrained space.

    :param covariance: Cov_LR, ``(d, d)``.
    """
    names = tuple(dict.fromkeys(sites.latent + sites.tabulated))
    quarter = int(num_draws) // 4
    first, second, _ = ends = quarter, int(num_draws) - quarter, int(num_draws)
    log_p, log_weights, values, free = fetch(
        jit_for(latents.guide.svi, _draws, latents, covariance, key, ends, names, sites.latent)()
    )
    drawn = Draws(
        log_weights=np.asarray(log_weights, np.float64),
        values=values,
        sites=sites,
        dtype=log_weights.dtype,
        unconstrained=free,
        log_p=np.asarray(log_p, np.float64),
    )
    return Mixture(drawn, importance.smooth(drawn.log_weights, drawn.dtype), slice(first, second))


def _draws(
    latents: GaussianLatents,
    covariance: jax.Array,
    key: jax.Array,
    ends: tuple[int, int, int],
    names: tuple[str, ...],
    latent: tuple[str, ...],
) -> tuple[jax.Array, jax.Array, Params, Params]:
    def one(offset: jax.Array) -> tuple[jax.Array, jax.Array, Params, Params]:
        log_p, log_jacobian, trace = substitute_latents(latents, latents.loc + offset)
        free = {name: unconstrained_value(trace[name]) for name in latent}
        return log_p, log_p - log_jacobian, {name: trace[name]["value"] for name in names}, free

    offsets, log_q = _offsets(latents, covariance, key, ends)
    log_p, target, values, free = map_in_batches(one, offsets, DRAWS_PER_BATCH if latents.guide.vectorized else None)
    return log_p, target - log_q, values, free


def _offsets(
    latents: GaussianLatents, covariance: jax.Array, key: jax.Array, ends: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array]:
    """Draws minus m, ``(S, d)``, and their log density under the mixture, ``(S,)``.

    :param ends: number after the last draw of each component.
    """
    first, second, count = ends
    d, dtype = latents.loc.size, latents.loc.dtype
    narrow = jax.vmap(latents.spread, out_axes=1)(jnp.eye(d, dtype=dtype))
    wide = jnp.linalg.cholesky(covariance)
    keys = random.split(key)
    noise = random.normal(keys[0], (count, d), dtype)
    stretch = jnp.sqrt(DEGREES / 2 / random.gamma(keys[1], DEGREES / 2, (count - second, 1), dtype))
    offsets = jnp.concatenate(
        [noise[:first] @ narrow.T, noise[first:second] @ wide.T, stretch * noise[second:] @ wide.T]
    )
    square = lambda factor: jnp.sum(solve_triangular(factor, offsets.T, lower=True) ** 2, axis=0)
    log_volume = lambda factor: jnp.sum(jnp.log(jnp.diagonal(factor))) + d / 2 * jnp.log(2 * jnp.pi)
    near, far = square(narrow), square(wide)
    student = gammaln((DEGREES + d) / 2) - gammaln(DEGREES / 2) - d / 2 * jnp.log(DEGREES / 2)
    components = jnp.stack(
        [
            -near / 2 - log_volume(narrow),
            -far / 2 - log_volume(wide),
            student - (DEGREES + d) / 2 * jnp.log1p(far / DEGREES) - log_volume(wide),
        ]
    )
    share = jnp.array([first, second - first, count - second], dtype) / count
    return offsets, logsumexp(components + jnp.log(share)[:, None], axis=0)
