# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Errors that teach: what was given, what was expected, what to do."""


class StructureError(ValueError):
    """Guide, model and optimizer do not fit together; raised while the loss is traced, before any step is taken."""
