# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""From a standing start: the seconds from ``SVI(...)`` to an answer, in a new process, beside Adam."""
