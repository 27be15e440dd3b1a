# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The path of a fit: its Gaussians at some of the steps, with their costs."""

from typing import NamedTuple

import numpy as np


class Path(NamedTuple):
    """The Gaussians N(loc, factor factorᵀ) of one fit at n of its steps, in the model's unconstrained space.

    :ivar loc: means (n, d).
    :ivar factor: lower triangular (n, d, d), or standard deviations (n, d).
    :ivar steps: how many steps had been taken, (n,).
    :ivar gradients: how many gradients of one draw's log density had been evaluated, (n,).
    :ivar seconds: of the compiled loop, (n,).
    :ivar compiling: seconds of tracing and compilation.
    """

    loc: np.ndarray
    factor: np.ndarray
    steps: np.ndarray
    gradients: np.ndarray
    seconds: np.ndarray
    compiling: float
