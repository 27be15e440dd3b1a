# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Distributions in closed form: natural parameters, Fisher matrices, KL divergences.

Nothing here knows a guide or a loss.
"""
