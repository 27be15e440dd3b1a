# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Figures that anyone can rerun: ``python -m benchmarks`` measures all, ``python -m benchmarks race eight`` one."""
