# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""One step: how long it is, whether it is taken, and what is kept of it."""
