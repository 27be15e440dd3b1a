# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Forty and more small problems of ordinary applied work, each fitted from twenty random starts."""
