# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The guides, and the Gaussian that the parameters of each describe."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal

from .target import Target

#: Standard deviations that all guides start with, NumPyro's default.
INIT_SCALE = 0.1

Params = dict[str, Any]


class Guide(NamedTuple):
    """One guide.

    :ivar make: builds the guide for a model.
    :ivar family: family of Gaussians; methods of the same family share a best ELBO.
    :ivar place: initial parameters with the mean z, (d,).
    :ivar gaussian: loc (n, d) and factor (n, d, d) or (n, d) of n sets of parameters.
    """

    make: Callable[..., Any]
    family: str
    place: Callable[[Target, Any], Params]
    gaussian: Callable[[Target, Params], tuple[Any, Any]]


def _place_flat(target: Target, z: Any) -> Params:
    return {"auto_loc": z}


def _place_sites(target: Target, z: Any) -> Params:
    return {f"{name}_auto_loc": x for name, x in target.split(z).items()}


def _mean_field(target: Target, params: Params) -> tuple[Any, Any]:
    def joined(suffix: str) -> np.ndarray:
        parts = [np.asarray(params[f"{name}_auto_{suffix}"]) for name in target.shapes]
        return np.concatenate([x.reshape(len(x), -1) for x in parts], 1)

    return joined("loc"), joined("scale")


def _full(target: Target, params: Params) -> tuple[Any, Any]:
    return params["auto_loc"], params["auto_scale_tril"]


def _low_rank(target: Target, params: Params) -> tuple[Any, Any]:
    """In double precision: NumPyro's covariance is D(I + WWᵀ)D with D the scales."""
    with jax.enable_x64(True):
        loc, scale, W = (jnp.asarray(params[f"auto_{x}"], jnp.float64) for x in ("loc", "scale", "cov_factor"))
        within = jnp.eye(target.size) + W @ jnp.swapaxes(W, -1, -2)
        return loc, np.asarray(scale[..., None] * jnp.linalg.cholesky(within))


GUIDES = {
    "AutoMultivariateNormal": Guide(AutoMultivariateNormal, "full", _place_flat, _full),
    "AutoNormal": Guide(AutoNormal, "mean field", _place_sites, _mean_field),
    "AutoLowRankMultivariateNormal": Guide(AutoLowRankMultivariateNormal, "low rank", _place_flat, _low_rank),
}
