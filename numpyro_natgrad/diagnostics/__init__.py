# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""How close a fitted guide is to the posterior: verdict, importance weights, linear response."""
