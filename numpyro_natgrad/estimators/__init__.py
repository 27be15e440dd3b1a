# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What one step evaluates of the loss: gradients, Hessian products, scores."""
