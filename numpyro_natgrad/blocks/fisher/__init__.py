# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Blocks with a Fisher matrix of their own, in unconstrained parameters: metric × solver."""
