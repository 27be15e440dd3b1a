# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The k-hat of an answer: the Pareto shape of its importance weights p / q, for every method in the same way.

k-hat of  log w = log p(z, y) − log q(z),      z ~ q,   2000 draws, in double precision
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.posteriordb.guides import GUIDES
from benchmarks.posteriordb.measure import base_draws, log_weights, psis
from benchmarks.posteriordb.models import Data
from benchmarks.posteriordb.target import Target, target

DRAWS = 2000


def gaussian(model: Callable[..., None], data: Data, guide: str, params: Any) -> dict[str, float]:
    """ELBO (nats) and k-hat of a guide with these parameters."""
    with jax.enable_x64(True):
        place = target(model, data)
        several = {name: np.asarray(x, np.float64)[None] for name, x in params.items()}
        loc, factor = (jnp.asarray(np.asarray(x)[0]) for x in GUIDES[guide].gaussian(place, several))
        return normal(place, loc, factor)


def normal(place: Target, loc: Any, factor: Any) -> dict[str, float]:
    """ELBO (nats) and k-hat of N(loc, LLᵀ) over the unconstrained latents, with L the factor; in double precision."""
    draws = base_draws(place.size, DRAWS)
    return weighed(np.asarray(jax.jit(lambda m, L: log_weights(place, m, L, draws))(loc, factor)))


def weighed(log_w: np.ndarray) -> dict[str, float]:
    """Mean and k-hat of log weights; NaN if one is not finite."""
    finite = bool(np.isfinite(log_w).all())
    return {"elbo": float(np.mean(log_w)), "khat": psis(log_w)[1] if finite else float("nan")}
