# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Names the site of a model whose log density is not finite, for whoever reads why a fit ended."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro import distributions as dist
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer import SVI

from numpyro_natgrad.compilation.data import Arguments, Data, split
from numpyro_natgrad.compilation.devices import fetch
from numpyro_natgrad.compilation.kept import Static, jit_for
from numpyro_natgrad.guide.gaussian_sites import Params


def nonfinite_site(svi: SVI, params: Params, key: jax.Array, args: Arguments, kwargs: Params, draws: int = 256) -> str:
    """Which site of the model makes log densities non-finite, as a clause; ``params`` are constrained."""
    data = split(svi, args, {**getattr(svi, "static_kwargs", {}), **kwargs})
    inside, finite, observed = fetch(jit_for(svi, _sites, svi, params, data, key, draws)())
    for name, x in inside.items():
        if not x.all():
            seen = name in observed.value
            what = "the data of" if seen else f"{np.mean(~x):.2g} of the guide's draws of"
            return f"{what} `{name}` {'are' if seen else 'lie'} outside of its support"
    for name, x in finite.items():
        if not x.all():
            return f"the log density of `{name}` is not finite at {np.mean(~x):.2g} of the draws"
    return ""


def _sites(
    svi: SVI, params: Params, data: Data, key: jax.Array, draws: int
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], Static]:
    """Of every site, draw by draw: whether it is in its support, and its density finite; and which are observed."""
    args, kwargs = data.arguments()
    observed: set[str] = set()

    def one(key: jax.Array) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        model_key, guide_key = random.split(key)
        drawn = trace(substitute(seed(svi.guide, guide_key), data=params)).get_trace(*args, **kwargs)
        model = substitute(replay(seed(svi.model, model_key), drawn), data=params)
        sites = {n: s for n, s in trace(model).get_trace(*args, **kwargs).items() if s["type"] == "sample"}
        observed.update(n for n, s in sites.items() if s["is_observed"])
        inside = {n: jnp.all(_inside(s["fn"], s["value"])) for n, s in sites.items()}
        return inside, {n: jnp.all(jnp.isfinite(s["fn"].log_prob(s["value"]))) for n, s in sites.items()}

    inside, finite = lax.map(one, random.split(key, draws))
    return inside, finite, Static(frozenset(observed))


def _inside(fn: dist.Distribution, value: jax.Array) -> jax.Array:
    return fn.support(value) if fn.support is not None else jnp.ones((), bool)
