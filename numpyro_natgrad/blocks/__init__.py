# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Blocks of parameters, each with the geometry of its steps."""
