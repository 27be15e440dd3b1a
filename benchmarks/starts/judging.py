# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""ELBOs of fitted parameters in float64, on draws that are common to all fits of a problem and guide."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro.infer import SVI

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.compilation.programs import quick_jit

from .problems import Problem

DRAWS = 2000


class Judge:
    """Evaluates ELBOs of a problem and guide, with all rows of the data. Parameters are unconstrained."""

    def __init__(self, problem: Problem, guide: str, width: int) -> None:
        with jax.enable_x64(True):
            model, self._args = problem.make()
        self._width = width
        self._losses = _losses(lambda: SVI(model, problem.guide(guide, model), NaturalGradient(), problem.loss(DRAWS)))

    def elbos(self, params: dict[str, Any]) -> np.ndarray:
        """The ELBO of each entry of the parameters, which have a leading axis; nats."""
        return np.concatenate([self._some(part) for part in _split(params, self._width)])

    def _some(self, params: dict[str, Any]) -> np.ndarray:
        count = len(jax.tree.leaves(params)[0])
        fill = lambda x: np.concatenate([x, np.repeat(x[-1:], self._width - count, 0)])
        with jax.enable_x64(True):
            losses = self._losses(jax.tree.map(lambda x: jnp.asarray(fill(x), float), params), self._args)
        return -np.asarray(losses)[:count]


def _losses(new_svi: Callable[[], SVI]) -> Callable[..., Any]:
    def losses(params: dict[str, Any], args: Any) -> Any:
        svi = new_svi()
        svi.init(jax.random.key(0), *args)  # sets up the guide; what it computes is not used
        loss = lambda p: svi.loss.loss(jax.random.key(1), svi.constrain_fn(p), svi.model, svi.guide, *args)
        return lax.map(loss, params)

    return quick_jit(losses)


def _split(params: dict[str, Any], width: int) -> list[dict[str, Any]]:
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    count = len(jax.tree.leaves(params)[0])
    return [jax.tree.map(lambda x, i=i: x[i : i + width], params) for i in range(0, count, width)]
