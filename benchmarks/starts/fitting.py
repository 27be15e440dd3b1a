# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Fits from many starts at once: one ``vmap`` over starts, and one program for each method.

The starts of an autoguide are drawn when it is set up, so that each start is the first ``svi.init`` of a new guide.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState
from numpyro.optim import optax_to_numpyro

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.compilation.programs import quick_jit
from numpyro_natgrad.infer.loop import STEPS_PER_CHUNK

from .problems import Problem, Setting

#: Rates of Adam; each decays to zero by a cosine over :data:`ADAM_STEPS` steps.
RATES = (0.1, 0.03, 0.01)
ADAM_STEPS = 3000
#: Points at which Adam's way is kept.
MARKS = 20

Params = dict[str, Any]


class Starts:
    """A problem with a guide and a setting, and its random starts."""

    def __init__(self, problem: Problem, guide: str, setting: Setting, count: int) -> None:
        self.problem, self.count = problem, count
        self._guide, self.particles = guide, setting.particles
        self._model, self.args = problem.make()

    def begin(
        self, key: jax.Array, args: Any, optimizer: Any = None, training: Params | None = None
    ) -> tuple[SVI, SVIState]:
        """An ``SVI`` with a guide of its own, and its state before the first step.

        It is called inside of each program, where a start that is not used costs nothing; outside, each of its
        operations would be compiled by itself.
        """
        optimizer = optimizer or NaturalGradient()
        svi = SVI(
            self._model, self.problem.guide(self._guide, self._model), optimizer, self.problem.loss(self.particles)
        )
        return svi, svi.init(key, *args, **(self.problem.training if training is None else training))

    def set_up(self, training: Params | None = None) -> SVI:
        """An ``SVI`` for the states of the walk, outside of their program.

        Its guide is set up while it is traced, as theirs are: outside, NumPyro keeps the latents of an autoguide in the
        order of the model, and inside in that of the alphabet.
        """
        made: list[SVI] = []
        jax.eval_shape(lambda key: made.append(self.begin(key, self.args, training=training)[0]), jax.random.key(0))
        return made[0]

    @cached_property
    def states(self) -> SVIState:
        """The states before the first step, one for each start."""
        keys = jax.random.split(jax.random.key(self.problem.seed), self.count)
        begin = lambda key, args: self.begin(key, args)[1]
        return quick_jit(jax.vmap(begin, in_axes=(0, None)))(keys, self.args)

    def resumed(self, states: SVIState) -> SVIState:
        """States of a walk as they were before they were kept."""
        return jax.tree.map(jnp.asarray, states._replace(rng_key=jax.random.wrap_key_data(states.rng_key)))

    def params(self, states: SVIState) -> Params:
        """The unconstrained parameters of all starts."""
        return NaturalGradient().get_params(states.optim_state)

    @cached_property
    def _chunk(self) -> Callable[..., Any]:
        def chunk(state: SVIState, args: Any) -> tuple[SVIState, Any]:
            svi, _ = self.begin(jax.random.key(0), args)

            def step(state: SVIState, _: None) -> tuple[SVIState, Any]:
                state, loss = svi.update(state, *args, **self.problem.training)
                return state, (loss, svi.optim.info(state))

            return lax.scan(step, state, None, length=STEPS_PER_CHUNK)

        return quick_jit(jax.vmap(chunk, in_axes=(0, None)))

    def walk(self, states: SVIState, steps: int, every: int = STEPS_PER_CHUNK) -> "Walk":
        """Take steps of the natural gradient from these states, and keep the states ``every`` so many steps."""
        kept, records = [], []
        for step in range(STEPS_PER_CHUNK, steps + 1, STEPS_PER_CHUNK):
            states, record = self._chunk(states, self.args)
            records.append(record)
            if not step % every:
                kept.append(_on_host(states))
        return Walk(kept, jax.tree.map(lambda *xs: np.concatenate(xs, 1), *jax.device_get(records)))

    @cached_property
    def _adam(self) -> Callable[..., Any]:
        def run(rate: jax.Array, params: Params, key: jax.Array, args: Any) -> Params:
            svi, _ = self.begin(key, args, optax_to_numpyro(optax.adam(lambda t: rate * _cosine(t))))

            def leg(state: SVIState, _: None) -> tuple[SVIState, Params]:
                step = lambda _, state: svi.update(state, *args, **self.problem.training)[0]
                state = lax.fori_loop(0, ADAM_STEPS // MARKS, step, state)
                return state, svi.optim.get_params(state.optim_state)

            state = SVIState(svi.optim.init(params), None, key)
            return lax.scan(leg, state, None, length=MARKS)[1]

        return quick_jit(jax.vmap(run, in_axes=(None, 0, 0, None), out_axes=1))

    def adam(self, rate: float, params: Params) -> list[Params]:
        """The parameters at ``MARKS`` equal distances along Adam's way at this rate, from these parameters."""
        keys = jax.random.split(jax.random.key(self.problem.seed + 1), self.count)
        found = jax.device_get(self._adam(jnp.array(rate), params, keys, self.args))
        return [jax.tree.map(lambda x, i=i: x[i], found) for i in range(MARKS)]


class Walk(NamedTuple):
    """The states every ``STEPS_PER_CHUNK`` steps, and loss and ``StepInfo`` of every step, ``(starts, steps)``."""

    states: list[Any]
    records: Any


def gathered(walk: Walk, steps: np.ndarray) -> SVIState:
    """The state of each start after its own number of steps."""
    pick = lambda *xs: jnp.asarray(np.stack([xs[step // STEPS_PER_CHUNK - 1][i] for i, step in enumerate(steps)]))
    states = jax.tree.map(pick, *walk.states)
    return states._replace(rng_key=jax.random.wrap_key_data(states.rng_key))


def _on_host(states: SVIState) -> SVIState:
    return jax.device_get(states._replace(rng_key=jax.random.key_data(states.rng_key)))


def _cosine(step: Any) -> Any:
    return 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / ADAM_STEPS, 1.0)))
