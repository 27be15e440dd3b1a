# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The posterior as a Markov chain sees it: a model over continuous latents, whose parameters have fitted values."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import random
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import init_to_uniform

from numpyro_natgrad.diagnostics.importance import Draws, FittedGuide

#: The largest number of latents with a dense mass matrix: each step of a chain multiplies by it.
DENSE_LIMIT = 512


def model_sites(fitted: FittedGuide) -> dict[str, dict[str, Any]]:
    """The trace of the model, whose values are abstract; improper priors have no draws, and so take initial values."""
    found: dict[str, dict[str, Any]] = {}

    def look(key: jax.Array) -> None:
        model = substitute(seed(fitted.svi.model, key), data=dict(fitted.params))
        valued = substitute(model, substitute_fn=init_to_uniform)
        found.update(trace(valued).get_trace(*fitted.args, **fitted.kwargs))

    jax.eval_shape(look, random.key(0))
    return found


def discrete_latents(sites: dict[str, dict[str, Any]]) -> list[str]:
    """Names of the discrete latent sites, which no chain of HMC can move."""
    latent = {name: x["fn"] for name, x in sites.items() if x["type"] == "sample" and not x["is_observed"]}
    return [name for name, fn in latent.items() if fn.support.is_discrete]


def fixed_model(fitted: FittedGuide, sites: dict[str, dict[str, Any]]) -> Callable[..., Any]:
    """The model with its parameters at the fitted values, and the arguments that the ``SVI`` keeps."""
    static = {name: x for name, x in fitted.kwargs.items() if name not in fitted.given}
    values = {name: fitted.params[name] for name, x in sites.items() if x["type"] in ("param", "mutable")}
    model = partial(fitted.svi.model, **static) if static else fitted.svi.model
    return substitute(model, data=values) if values else model


def usable(drawn: Draws, weights: np.ndarray) -> np.ndarray:
    """The weights, zero where a latent was rounded to the end of its support."""
    finite = [np.isfinite(z.reshape(len(z), -1)).all(1) for z in drawn.unconstrained.values()]
    return np.where(np.all(finite, axis=0), weights, 0.0)
