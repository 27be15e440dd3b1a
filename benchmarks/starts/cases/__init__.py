# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The problems, by kind; importing this package registers them."""

from . import changes, hierarchies, mixtures, multimodal

__all__ = ["changes", "hierarchies", "mixtures", "multimodal"]
