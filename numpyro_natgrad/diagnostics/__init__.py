# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""How good the answer is: verdict, importance weights, linear response."""
