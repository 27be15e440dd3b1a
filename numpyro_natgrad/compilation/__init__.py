# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""From a standing start: one program for the initial state, data as inputs of programs, and programs kept on disk."""
