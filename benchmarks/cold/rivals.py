# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Other packages from a standing start: Pathfinder of PyMC and of BlackJAX, and glmmTMB; each with its default options.

Their imports come before the clock, as ours. PyMC's clock begins with the model's definition; BlackJAX's with NumPyro's
``initialize_model``, which makes the log density; glmmTMB's with the formula.
"""

import importlib.metadata as meta
import io
import json
import pathlib
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro.infer.util import initialize_model

from benchmarks.posteriordb.models import Data
from benchmarks.posteriordb.target import Target, target

from . import scoring
from .clock import Clock

R_FILE = pathlib.Path(__file__).with_name("glmmtmb.R")
DRAWS = 1000

Result = dict[str, Any]


def measure(line: str, problem: Any) -> Result:
    """Seconds and k-hat of one rival."""
    return _RIVALS[line](problem)


def _blackjax(problem: Any) -> Result:
    """One path from NumPyro's random start, the search and 1000 draws in one program."""
    import blackjax

    clock = Clock()
    key, search_key, draw_key = jax.random.split(jax.random.key(problem.seed), 3)
    info = initialize_model(key, problem.model, model_kwargs=problem.data)
    start, unravel = ravel_pytree(info.param_info.z)

    def search(z: jax.Array, search_key: jax.Array, draw_key: jax.Array) -> Any:
        log_density = lambda z: -info.potential_fn(unravel(z))
        state, _ = blackjax.vi.pathfinder.approximate(search_key, log_density, z)
        return blackjax.vi.pathfinder.sample(draw_key, state, scoring.DRAWS)

    draws, log_q = jax.block_until_ready(jax.jit(search)(start, search_key, draw_key))
    taken = clock.read()
    sites = {name: np.asarray(x, float) for name, x in jax.vmap(unravel)(draws).items()}
    return taken | {"version": _versions("blackjax")} | _weighed(problem, sites, np.asarray(log_q))


def _weighed(problem: Any, sites: dict[str, np.ndarray], log_q: np.ndarray) -> Result:
    """ELBO and k-hat from unconstrained draws of every site, (n, …), and their log density."""
    with jax.enable_x64(True):
        place = target(problem.model, problem.data)
        log_p = -np.asarray(jax.jit(jax.vmap(place.potential))(_flat(place, sites)))
    return scoring.weighed(log_p - log_q)


def _versions(*names: str) -> str:
    return ", ".join(f"{name} {meta.version(name)}" for name in names)


def _flat(place: Target, sites: dict[str, np.ndarray]) -> jax.Array:
    return jnp.concatenate([jnp.asarray(sites[name]).reshape(len(sites[name]), -1) for name in place.shapes], 1)


def _pymc(problem: Any) -> Result:
    """Four paths, 1000 draws each; k-hat is that of their importance weights, which PyMC reports."""
    import pymc_extras  # noqa: F401
    from pymc_extras.inference.pathfinder import fit_pathfinder

    from .pymc_models import PYMC_MODELS

    clock = Clock()
    with PYMC_MODELS[problem.posterior](problem.data):
        found = fit_pathfinder(progressbar=False, random_seed=problem.seed)
    taken = clock.read()
    khat = float(found["pathfinder"]["pareto_k"].item())
    return taken | {"khat": khat, "version": _versions("pymc", "pymc-extras", "pytensor")}


def _glmmtmb(problem: Any) -> Result:
    """The Laplace approximation of a likelihood without priors; k-hat where there are no random effects."""
    columns = {name: np.ravel(x) for name, x in problem.data.items() if np.ndim(x)}
    text = io.StringIO()
    np.savetxt(text, np.stack(list(columns.values()), 1), "%.17g", ",", header=",".join(columns), comments="")
    command = ["Rscript", str(R_FILE), problem.posterior]
    process = subprocess.run(command, input=text.getvalue(), capture_output=True, text=True, check=True)
    found = json.loads(process.stdout.splitlines()[-1])
    result = {"seconds": found["seconds"], "cpu": found["cpu"], "version": f"glmmTMB {found['version']}"}
    return result | (_laplace(problem, found) if "covariance" in found else {})


def _laplace(problem: Any, found: Data) -> Result:
    """ELBO and k-hat of the Gaussian that a maximum-likelihood fit reports."""
    with jax.enable_x64(True):
        place = target(problem.model, problem.data)
        factor = jnp.linalg.cholesky(jnp.asarray(found["covariance"], float))
        return scoring.normal(place, jnp.asarray(found["mean"], float), factor)


_RIVALS: dict[str, Callable[[Any], Result]] = {
    "pymc": _pymc,
    "pymc_again": _pymc,
    "blackjax": _blackjax,
    "glmmtmb": _glmmtmb,
}
