# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Blocks of Gaussian sites, which step in natural parameters."""
