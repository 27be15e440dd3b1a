# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``fit`` and ``fit_many``: the loop around the compiled steps, what it tells, and what it returns and keeps."""
