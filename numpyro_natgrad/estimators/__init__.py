# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Gradients, Hessian-vector products and scores of the loss, as one step needs them."""
