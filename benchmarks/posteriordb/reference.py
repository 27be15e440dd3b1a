# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Reference draws: the published ones, or else a stored long run of NUTS in double precision."""

import pathlib
from typing import Any

import jax
import numpy as np
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS

from .checkout import arguments, published
from .measure import scalars
from .models import MODELS

#: Defaults, which ``Model.nuts`` overrides.
SETTINGS = {"dense_mass": True, "target_accept_prob": 0.9, "num_warmup": 1000, "num_samples": 5000}
CHAINS = 4


def reference_draws(checkout: pathlib.Path, results: pathlib.Path, posterior: str) -> dict[str, np.ndarray] | None:
    """Draws of each scalar parameter, by Stan's name; None if there are neither published nor stored ones."""
    known = published(checkout, posterior)
    kept = file(results, posterior)
    if known is None and kept.exists():
        with np.load(kept) as stored:
            return {name: np.asarray(stored[name], float) for name in stored.files}
    return known


def file(results: pathlib.Path, posterior: str) -> pathlib.Path:
    """File of the stored draws of a posterior."""
    return results / posterior / "reference.npz"


def draw(checkout: pathlib.Path, results: pathlib.Path, posterior: str) -> str:
    """Run NUTS if there are no reference draws, and return a line of diagnostics."""
    if reference_draws(checkout, results, posterior) is not None:
        return f"{posterior}: has reference draws"
    settings = {**SETTINGS, **MODELS[posterior].nuts}
    lengths = {name: settings.pop(name) for name in ("num_warmup", "num_samples")}
    mcmc = MCMC(NUTS(MODELS[posterior].function, **settings), **lengths, num_chains=CHAINS, chain_method="sequential")
    mcmc.run(jax.random.key(0), **arguments(checkout, posterior), extra_fields=("diverging",))
    chains = {name: np.asarray(x) for name, x in mcmc.get_samples(group_by_chain=True).items()}
    draws = scalars({name: x.reshape(-1, *x.shape[2:]) for name, x in chains.items()})
    kept = file(results, posterior)
    kept.parent.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = {name: x.astype(np.float32) for name, x in draws.items()}
    np.savez_compressed(kept, **stored)
    worst = {"ESS": min(np.min(effective_sample_size(x)) for x in chains.values())}
    worst["R-hat"] = max(np.max(split_gelman_rubin(x)) for x in chains.values())
    diverging = int(np.sum(mcmc.get_extra_fields()["diverging"]))
    return f"{posterior}: least ESS {worst['ESS']:.0f}, worst R-hat {worst['R-hat']:.4f}, {diverging} divergences"
