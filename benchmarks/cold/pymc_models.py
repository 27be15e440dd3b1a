# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Four of the posteriors as PyMC models, with the priors of the NumPyro models."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pymc as pm

from benchmarks.posteriordb.models import Data


def _eight_schools(data: Data) -> Any:
    with pm.Model() as model:
        z = pm.Normal("theta_trans", 0.0, 1.0, shape=len(data["y"]))
        mu = pm.Normal("mu", 0.0, 5.0)
        tau = pm.HalfCauchy("tau", 5.0)
        pm.Normal("y", mu + tau * z, data["sigma"], observed=data["y"])
    return model


def _kidiq(data: Data) -> Any:
    hs, iq = (np.asarray(data[name], float) for name in ("mom_hs", "mom_iq"))
    design = np.stack([np.ones_like(iq), hs, iq, hs * iq], -1)
    with pm.Model() as model:
        beta = pm.Flat("beta", shape=4)
        sigma = pm.HalfCauchy("sigma", 2.5)
        pm.Normal("y", pm.math.dot(design, beta), sigma, observed=np.asarray(data["kid_score"], float))
    return model


def _mesquite(data: Data) -> Any:
    names = ("diam1", "diam2", "canopy_height", "total_height", "density")
    logs = [np.log(np.asarray(data[name], float)) for name in names]
    design = np.stack([np.ones_like(logs[0]), *logs, np.asarray(data["group"], float)], -1)
    with pm.Model() as model:
        beta = pm.Flat("beta", shape=7)
        sigma = pm.HalfFlat("sigma")
        pm.Normal("y", pm.math.dot(design, beta), sigma, observed=np.log(data["weight"]))
    return model


def _wells(data: Data) -> Any:
    distance, arsenic = (np.asarray(data[name], float) for name in ("distance", "arsenic"))
    design = np.stack([distance, arsenic, distance * arsenic], -1)
    with pm.Model() as model:
        alpha = pm.Flat("alpha")
        beta = pm.Flat("beta", shape=3)
        pm.Bernoulli("y", logit_p=alpha + pm.math.dot(design, beta), observed=data["switched"])
    return model


PYMC_MODELS: dict[str, Callable[[Data], Any]] = {
    "eight_schools-eight_schools_noncentered": _eight_schools,
    "kidiq-kidscore_interaction": _kidiq,
    "mesquite-logmesquite": _mesquite,
    "wells_data-wells_interaction_model": _wells,
}
