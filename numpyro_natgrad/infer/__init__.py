# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What a user calls: the optimizer, `fit`, and the geometry of an `SVI`."""
