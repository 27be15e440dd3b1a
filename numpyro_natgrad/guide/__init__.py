# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The sites and parameters of guide and model in a loss, and the coordinates of each site."""
