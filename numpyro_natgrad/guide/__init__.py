# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What the loss is made of: the sites and parameters of guide and model, and the coordinates of each site."""
