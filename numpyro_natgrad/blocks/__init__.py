# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Blocks of parameters: the geometry in which each one is moved."""
