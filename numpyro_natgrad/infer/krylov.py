# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Krylov methods on a host, for Hessians that are known by their products alone.

All directions are measured in the metric of ``scale``, a positive diagonal matrix near that of H.
"""

import math
from collections.abc import Callable

import numpy as np

Product = Callable[[np.ndarray], np.ndarray]

#: A residual, relative to the vector that it is left of, that is rounding.
ROUNDING = 1e-6
TINY = float(np.finfo(np.float64).eps)


def conjugate_gradients(
    product: Product, right: np.ndarray, scale: np.ndarray, most: int, residual: float, flat: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Solve Hx = g until the residual is small, or the loss is flat or falls along a direction p.

    :param most: the most products.
    :param residual: relative, at which the solution is good enough.
    :param flat: curvature that counts as none.
    :return: x; p, of length 1; and the least curvature pᵀHp/‖p‖² of the directions.
    """
    x, rest_vector, least = np.zeros_like(right), right, math.inf
    p = rest_vector / scale
    rest = first = rest_vector @ p
    for _ in range(most):
        if rest <= residual**2 * first:
            break
        image = product(p)
        curvature = p @ image
        least = min(least, curvature / (p @ (scale * p)))
        if not curvature > flat * (p @ (scale * p)):
            break
        x, rest_vector = x + rest / curvature * p, rest_vector - rest / curvature * image
        after = rest_vector @ (rest_vector / scale)
        p, rest = rest_vector / scale + after / rest * p, after
    return x, p / math.sqrt(max(p @ (scale * p), TINY)), least


def flattest_direction(product: Product, start: np.ndarray, scale: np.ndarray, most: int) -> tuple[np.ndarray, float]:
    """The direction of least curvature in the Krylov space of ``start`` (Lanczos; Golub & Van Loan 2013, §10.1).

    :param most: products, each of which keeps a vector.
    :return: the direction, of length 1, and its curvature; NaN if a product is not finite.
    """
    root = np.sqrt(scale)
    basis = [start * root / np.linalg.norm(start * root)]
    projected = np.zeros((most, most))
    while True:
        now = len(basis) - 1
        rest = product(basis[now] / root) / root
        length = np.linalg.norm(rest)
        for _ in range(2):  # once more, against rounding
            for k, q in enumerate(basis):
                along = q @ rest
                projected[k, now] += along
                rest = rest - along * q
        left = np.linalg.norm(rest)
        if len(basis) == most or not left > ROUNDING * length:
            break
        projected[now + 1, now] = left
        basis.append(rest / left)
    if not np.isfinite(projected).all():  # an eigensolver may raise or not return
        return start, math.nan
    size = len(basis)
    values, vectors = np.linalg.eigh((projected + projected.T)[:size, :size] / 2)
    return sum(c * q for c, q in zip(vectors[:, 0], basis, strict=True)) / root, float(values[0])
