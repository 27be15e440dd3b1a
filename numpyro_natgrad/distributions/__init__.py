# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Distributions in closed form, without a guide or a loss: natural parameters, Fisher matrices, KL divergences."""
