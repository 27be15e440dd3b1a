# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Parameters that are moved by a Fisher matrix of their own: F⁻¹g in unconstrained parameters."""
