# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.calibration``: does ``verdict`` know good answers from bad ones, and does its advice help?"""
