# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Names the site of a model whose log density is not finite, for whoever reads why a fit ended."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro import distributions as dist
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer import SVI

from numpyro_natgrad.compilation.data import Arguments
from numpyro_natgrad.compilation.devices import fetch, jit_for
from numpyro_natgrad.guide.gaussian_sites import Params


def nonfinite_site(svi: SVI, params: Params, key: jax.Array, args: Arguments, kwargs: Params, draws: int = 256) -> str:
    """Which site of the model makes log densities non-finite, as a clause; ``params`` are constrained."""
    kwargs = {**getattr(svi, "static_kwargs", {}), **kwargs}
    observed: dict[str, bool] = {}

    def one(
        given: tuple[Params, Arguments, Params], key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        params, args, kwargs = given
        model_key, guide_key = random.split(key)
        drawn = trace(substitute(seed(svi.guide, guide_key), data=params)).get_trace(*args, **kwargs)
        model = substitute(replay(seed(svi.model, model_key), drawn), data=params)
        sites = {n: s for n, s in trace(model).get_trace(*args, **kwargs).items() if s["type"] == "sample"}
        observed.update({n: bool(s["is_observed"]) for n, s in sites.items()})
        inside = {n: jnp.all(_inside(s["fn"], s["value"])) for n, s in sites.items()}
        return inside, {n: jnp.all(jnp.isfinite(s["fn"].log_prob(s["value"]))) for n, s in sites.items()}

    many = jit_for((params, args, kwargs), lambda given, keys: lax.map(partial(one, given), keys))
    inside, finite = fetch(many(random.split(key, draws)))
    for name, x in inside.items():
        if not x.all():
            what = "the data of" if observed[name] else f"{np.mean(~x):.2g} of the guide's draws of"
            return f"{what} `{name}` {'are' if observed[name] else 'lie'} outside of its support"
    for name, x in finite.items():
        if not x.all():
            return f"the log density of `{name}` is not finite at {np.mean(~x):.2g} of the draws"
    return ""


def _inside(fn: dist.Distribution, value: jax.Array) -> jax.Array:
    return fn.support(value) if fn.support is not None else jnp.ones((), bool)
