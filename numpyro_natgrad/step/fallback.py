# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Parameters that no distribution of the guide owns go to an ordinary optimizer, in the same step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from numpyro.optim import _NumPyroOptim

from numpyro_natgrad.guide.gaussian_sites import Params


class FallbackOptimizer(NamedTuple):
    """An optax transformation or a NumPyro optimizer, as one pair of functions."""

    optimizer: Any

    def init(self, params: Params) -> Any:
        """The optimizer's state. It is as large as for all parameters: which ones are its own is heard later."""
        return self.optimizer.init(params)

    def step(self, params: Params, gradient: Params, state: Any, mine: tuple[str, ...]) -> tuple[Params, Any]:
        """Move the parameters ``mine`` and leave the others; nothing is computed where there are none."""
        if not mine:
            return params, state
        masked = {p: g if p in mine else jax.tree.map(jnp.zeros_like, g) for p, g in gradient.items()}
        new, state = self._moved(params, masked, state)
        return {p: new[p] if p in mine else x for p, x in params.items()}, state

    def _moved(self, params: Params, gradient: Params, state: Any) -> tuple[Params, Any]:
        if isinstance(self.optimizer, _NumPyroOptim):
            state = self.optimizer.update(gradient, state)
            return self.optimizer.get_params(state), state
        updates, state = self.optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state


def checked(optimizer: Any) -> FallbackOptimizer:
    """The optimizer of parameters without a Fisher, ``optax.adam(1e-2)`` for ``None``."""
    if optimizer is None:
        return FallbackOptimizer(optax.adam(1e-2))
    # (`Minimize` and `NaturalGradient` take the loss itself: there is no step of theirs from a gradient alone.)
    takes_gradients = getattr(type(optimizer), "eval_and_update", None) is _NumPyroOptim.eval_and_update
    if isinstance(optimizer, optax.GradientTransformation) or takes_gradients:
        return FallbackOptimizer(optimizer)
    raise TypeError(
        f"`fallback_optimizer={optimizer!r}`: expected an optax transformation such as `optax.adam(1e-2)`, an "
        "optimizer of `numpyro.optim` that steps by gradients, or None for `optax.adam(1e-2)`."
    )
