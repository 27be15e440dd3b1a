# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The fallback optimizer: it moves the parameters without a Fisher matrix, in the same step as the blocks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from numpyro.optim import _NumPyroOptim

from numpyro_natgrad.estimators.derivatives import finite
from numpyro_natgrad.guide.gaussian_sites import Params

#: Learning rate of the default, Adam. NumPyro's examples use 0.001 to 0.05.
LEARNING_RATE = 1e-2


class FallbackOptimizer(NamedTuple):
    """An optax transformation or a NumPyro optimizer, as one pair of functions."""

    optimizer: Any

    def init(self, params: Params) -> Any:
        """The state for all parameters: which of them it moves is not known before the loss is traced."""
        return self.optimizer.init(params)

    def step(self, params: Params, gradient: Params, state: Any, unowned: tuple[str, ...]) -> tuple[Params, Any]:
        """Move the parameters ``unowned`` and no others, unless the optimizer's state would not be finite."""
        if not unowned:
            return params, state
        masked = {p: g if p in unowned else jax.tree.map(jnp.zeros_like, g) for p, g in gradient.items()}
        new, new_state = self._step(params, masked, state)
        moved = {p: new[p] if p in unowned else x for p, x in params.items()}
        # The squares of large gradients, for instance, are infinite in single precision.
        ok = finite(new_state)
        return jax.tree.map(lambda a, b: jnp.where(ok, a, b), (moved, new_state), (params, state))

    def _step(self, params: Params, gradient: Params, state: Any) -> tuple[Params, Any]:
        if isinstance(self.optimizer, _NumPyroOptim):
            state = self.optimizer.update(gradient, state)
            return self.optimizer.get_params(state), state
        updates, state = self.optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state


def fallback_optimizer(optimizer: Any) -> FallbackOptimizer:
    """The user's optimizer, or Adam for ``None``.

    :raises TypeError: if it cannot step by a gradient alone: ``Minimize`` and ``NaturalGradient`` need the loss itself.
    """
    if optimizer is None:
        return FallbackOptimizer(optax.adam(LEARNING_RATE))
    takes_gradients = getattr(type(optimizer), "eval_and_update", None) is _NumPyroOptim.eval_and_update
    if isinstance(optimizer, optax.GradientTransformation) or takes_gradients:
        return FallbackOptimizer(optimizer)
    raise TypeError(
        f"`fallback_optimizer={optimizer!r}`: expected an optax transformation such as `optax.adam(1e-2)`, an "
        "optimizer of `numpyro.optim` that steps by gradients, or None for `optax.adam(1e-2)`."
    )
