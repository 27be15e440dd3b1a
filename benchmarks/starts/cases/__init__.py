# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The problems, by kind; importing this package registers them."""

from . import changes, counts, curves, discrete, hierarchies, mixtures, multimodal, processes, regressions

__all__ = [
    "changes",
    "counts",
    "curves",
    "discrete",
    "hierarchies",
    "mixtures",
    "multimodal",
    "processes",
    "regressions",
]
