# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What a step costs, and where it runs: many sites, parameters, rows, devices."""
