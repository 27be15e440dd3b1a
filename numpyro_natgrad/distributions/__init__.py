# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Distributions in closed form: natural parameters, Fisher matrices, KL divergences.

These modules do not depend on a guide or on a loss.
"""
