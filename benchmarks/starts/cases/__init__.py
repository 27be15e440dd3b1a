# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The problems, by kind; importing this package registers them."""

from ..problems import PROBLEMS
from . import (
    applied,
    changes,
    counts,
    curves,
    discrete,
    hierarchies,
    mixtures,
    model_parameters,
    multimodal,
    processes,
    regressions,
)

__all__ = [
    "PROBLEMS",
    "applied",
    "changes",
    "counts",
    "curves",
    "discrete",
    "hierarchies",
    "mixtures",
    "model_parameters",
    "multimodal",
    "processes",
    "regressions",
]
