# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Variational inference on twelve posteriors of the public `posteriordb`: every guide, every method, one table."""
