# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""A NaN or infinity in any intermediate of a step is not in the state after it, and the run goes on."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from tables import tiers
from test_robustness import NONE, finite, full, independent, low_rank, model

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.options import RuleConstants
from numpyro_natgrad.step import natural_step

# The functions of a step whose results are spoilt, one number at a time, and what of the state is.
STAGES = ("unpack", "evaluate_loss", "natural_gradients", "update_statistics", "choose_step_sizes")
STATE = ("memory", "statistics", "decrement", "radius")
GUIDES = {
    "dense and natural parameters": (full, {}, 128),
    "products": (full, {}, 1),
    "low rank": (low_rank, {}, 1),
    "scores": (independent, {"fisher": "monte_carlo"}, 1),
    "first order": (independent, {"estimator": "first_order"}, 1),
}


class Spoiler:
    """Puts ``value`` into the leaf ``which`` of all floating point arrays that it is shown in one step."""

    def __init__(self, which: Any, value: Any) -> None:
        self.which, self.value, self.count = which, value, 0

    def __call__(self, tree: Any) -> Any:
        return jax.tree.map(self._leaf, tree)

    def _leaf(self, x: Any) -> Any:
        if not (isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)):
            return x
        self.count += 1
        hit = self.which == self.count - 1
        return jnp.where(hit & (jnp.arange(x.size) == 0).reshape(x.shape), jnp.asarray(self.value, x.dtype), x)


@cache
def spoilt_update(name: str) -> tuple[Any, Any, int]:
    """(start, ``update(states, which, values)`` of many runs at once, the number of leaves)."""
    guide, options, limit = GUIDES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numpyro_natgrad.options.CONSTANTS", RuleConstants(joint_limit=limit))
        svi = SVI(model, guide, NaturalGradient(**options), Trace_ELBO(num_particles=2))
    state, leaves = svi.init(random.key(0), NONE), []

    def update(state: Any, which: Any, value: Any) -> Any:
        spoil = Spoiler(which, value)
        with pytest.MonkeyPatch.context() as patch:
            for stage in STAGES:
                whole = getattr(natural_step, stage)
                patch.setattr(natural_step, stage, lambda *args, whole=whole: _spoilt(whole(*args), spoil))
            new = svi.update(state, NONE)[0]
        leaves.append(spoil.count)
        return new

    jax.eval_shape(update, state, 0, 0.0)
    return state, jax.jit(jax.vmap(update)), leaves[0]


def _spoilt(result: Any, spoil: Spoiler) -> Any:
    """Of the state what is no parameter, of a ``LossInfo`` the numbers, and the products with the Hessian."""
    if hasattr(result, "fallback"):
        return result._replace(**{field: spoil(getattr(result, field)) for field in STATE})
    if not hasattr(result, "hessian_product"):
        return spoil(result)
    product = result.hessian_product
    values = {name: spoil(getattr(result, name)) for name in ("loss", "gradient", "perturbation_gradients")}
    return result._replace(**values, hessian_product=lambda *tangents: spoil(product(*tangents)))


@pytest.mark.parametrize("name", tiers(GUIDES, "scores", "first order"))
def test_no_intermediate_leaves_a_nan_in_the_state_and_the_next_steps_are_taken(name):
    state, update, leaves = spoilt_update(name)
    assert leaves > 20
    which, values = jnp.tile(jnp.arange(leaves), 2), jnp.repeat(jnp.array([jnp.nan, jnp.inf]), leaves)
    good = jnp.full_like(which, -1)
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (2 * leaves, *jnp.shape(x))), state)
    for _ in range(2):
        states = update(states, good, values)
    assert finite(states.optim_state)
    states = update(states, which, values)
    bad = [k for k in range(2 * leaves) if not finite(jax.tree.map(lambda x, k=k: x[k], states.optim_state))]
    assert not bad
    for _ in range(3):
        before, states = states, update(states, good, values)
    assert finite(states.optim_state)
    assert not states.optim_state[1].info.skipped.any()
    for old, new in zip(*(jax.tree.leaves(s.optim_state[1].params) for s in (before, states)), strict=True):
        assert (old != new).reshape(2 * leaves, -1).any(1).all()
