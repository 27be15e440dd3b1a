# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""In ``SVI`` the optimizer behaves like any other: equal steps are equal, whichever interface takes them."""

import pickle
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import lax, random
from numpyro import distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from oracles import assert_close, root_eps
from tables import DATA

from numpyro_natgrad import NaturalGradient, NaturalGradientState, fit

STEPS = 4
X = jnp.asarray(DATA, jnp.float32)
TRACES = []


def model(x: Any, width: float = 1.0) -> None:
    """A Normal of unknown mean and scale, not conjugate to the guide. It counts its traces."""
    TRACES.append(None)
    mean = numpyro.sample("mean", dist.Normal(0, 3))
    scale = numpyro.sample("scale", dist.HalfNormal(width))
    numpyro.sample("x", dist.Normal(mean, scale).expand(x.shape).to_event(1), obs=x)


@cache
def fitted() -> tuple[SVI, Any, Any, list[Any], list[Any]]:
    """(svi, start, jitted update, states, losses) of a few updates."""
    svi = SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO(num_particles=8))
    start = svi.init(random.key(0), X)
    update, states, losses = jax.jit(svi.update), [start], []
    for _ in range(STEPS):
        state, loss = update(states[-1], X)
        states.append(state)
        losses.append(loss)
    return svi, start, update, states, losses


def numbers(state: Any) -> Any:
    """A state without its key."""
    return state.optim_state


def test_run_equals_repeated_update():
    svi, _, _, states, losses = fitted()
    result = svi.run(random.key(0), STEPS, X, progress_bar=False)
    assert_close(result.losses, jnp.stack(losses), root_eps("float32"))
    assert_close(numbers(result.state), numbers(states[-1]), root_eps("float32"))
    assert_close(result.params, svi.get_params(states[-1]), root_eps("float32"))


def test_progress_bar_and_resumed_run_take_the_same_steps():
    """The first half of the run has a bar; the second half continues from its state with ``stable_update``."""
    svi, _, _, states, losses = fitted()
    first = svi.run(random.key(0), STEPS // 2, X, progress_bar=True)
    second = svi.run(random.key(9), STEPS // 2, X, progress_bar=False, init_state=first.state, stable_update=True)
    assert_close(jnp.concatenate([first.losses, second.losses]), jnp.stack(losses), root_eps("float32"))
    assert_close(numbers(second.state), numbers(states[-1]), root_eps("float32"))


def test_evaluate_is_the_loss_at_the_returned_parameters():
    svi, _, _, states, _ = fitted()
    state = states[-1]
    expected = svi.loss.loss(random.split(state.rng_key)[1], svi.get_params(state), svi.model, svi.guide, X)
    assert_close(svi.evaluate(state, X), expected, root_eps("float32"))


def test_returned_loss_is_that_before_the_step():
    """The loss is evaluated at the iterate, not at its average."""
    svi, _, _, states, losses = fitted()
    for state, loss in zip(states, losses, strict=False):
        key, params = random.split(state.rng_key)[1], svi.constrain_fn(state.optim_state[1].params)
        assert_close(loss, svi.loss.loss(key, params, svi.model, svi.guide, X), root_eps("float32"))


def test_vmap_over_seeds_equals_a_loop():
    svi, _, _, (_, *_, start), _ = fitted()
    keys = random.split(random.key(7), 3)
    # (The state has taken steps: after the first step alone the memory is empty but for rounding.)
    states = [start._replace(rng_key=key) for key in keys]
    together, losses = jax.jit(jax.vmap(lambda key: svi.update(start._replace(rng_key=key), X)))(keys)
    for i, state in enumerate(states):
        alone, loss = fitted()[2](state, X)
        assert_close(jax.tree.map(lambda x, i=i: x[i], numbers(together)), numbers(alone), root_eps("float32"))
        assert_close(losses[i], loss, root_eps("float32"))


def test_update_is_compiled_once():
    """Neither a second update nor other data of the same shape trace the model again."""
    _, _, update, states, _ = fitted()
    before = len(TRACES)
    update(states[0], X)
    programs = update._cache_size()
    update(states[-1], X + 1)
    assert len(TRACES) == before
    assert update._cache_size() == programs <= 1


def test_number_of_traces_does_not_depend_on_the_length_of_a_run():
    svi, *_ = fitted()

    def traces(steps):
        before = len(TRACES)
        # Abstract: nothing is compiled.
        jax.eval_shape(lambda: lax.scan(lambda s, _: svi.update(s, X), fitted()[1], length=steps))
        return len(TRACES) - before

    assert traces(2) == traces(50)


def test_optimizer_and_state_survive_pickling():
    svi, start, update, states, _ = fitted()
    optimizer = pickle.loads(pickle.dumps(svi.optim))
    assert vars(optimizer).keys() == vars(svi.optim).keys() == vars(NaturalGradient()).keys()
    assert isinstance(optimizer, NaturalGradient)
    arrays = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, numbers(states[1]))))
    assert isinstance(arrays[1], NaturalGradientState)
    again = SVI(model, svi.guide, optimizer, svi.loss)
    again.constrain_fn = svi.constrain_fn
    state = states[1]._replace(optim_state=jax.tree.map(jnp.asarray, arrays))
    assert_close(numbers(jax.jit(again.update)(state, X)[0]), numbers(states[2]), root_eps("float32"))


def test_init_params_are_the_start():
    svi, *_ = fitted()
    given = {"mean_auto_loc": jnp.array(1.5), "scale_auto_scale": jnp.array(0.25)}
    state = svi.init(random.key(0), X, init_params=given)
    found = svi.get_params(state)
    assert_close({name: found[name] for name in given}, given, root_eps("float32"))
    moved = svi.get_params(fitted()[2](state, X)[0])
    assert not np.isclose(moved["mean_auto_loc"], 1.5)


def test_static_kwargs_reach_model_and_guide():
    svi, start, *_ = fitted()
    static = SVI(model, svi.guide, NaturalGradient(), svi.loss, width=2.0)
    static.constrain_fn = svi.constrain_fn
    state, loss = jax.jit(static.update)(start, X)
    key, params = random.split(start.rng_key)[1], svi.get_params(start)
    assert_close(loss, svi.loss.loss(key, params, model, svi.guide, X, width=2.0), root_eps("float32"))
    assert not static.optim.info(state).skipped
    assert not np.allclose(loss, fitted()[4][0])


# --- forward mode ---


def iterated(loop: bool):
    """A mean that is computed by iteration; with ``loop``, one that only forward mode differentiates."""

    def model(x: Any, steps: Any) -> None:
        a = numpyro.sample("a", dist.Normal(0, 1))
        b = numpyro.sample("b", dist.Normal(0, 1))
        body = lambda _, y: y + 0.3 * (jnp.sin(a) - 0.2 * y * b)
        if loop:
            y = lax.fori_loop(0, steps, body, 0.0 * a)
        else:
            y = 0.0 * a
            for i in range(3):
                y = body(i, y)
        numpyro.sample("x", dist.Normal(y, 0.5).expand(x.shape).to_event(1), obs=x)

    return model


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_forward_mode_takes_the_steps_of_reverse_mode(guide):
    def step(model, forward):
        svi = SVI(model, guide(model), NaturalGradient(), Trace_ELBO(num_particles=2))
        state = svi.init(random.key(0), X, 3)
        update = jax.jit(lambda s, steps: svi.update(s, X, steps, forward_mode_differentiation=forward))
        # (Three steps: after the first one alone the memory is empty but for rounding.)
        for _ in range(3):
            state, loss = update(state, 3)
        return numbers(state), loss

    backward, forward = step(iterated(loop=False), False), step(iterated(loop=True), True)
    assert not forward[0][1].info.skipped
    assert_close(forward, backward, root_eps("float32"))


# --- mutable state ---


def test_mutable_state_is_updated_once_a_step():
    """A counter in the model increases by one with every step, as under any optimizer."""

    def counting(x):
        count = numpyro.primitives.mutable("count", {"n": jnp.array(0.0)})
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(z, 1).expand(x.shape).to_event(1), obs=x)
        count["n"] = count["n"] + 1

    svi = SVI(counting, AutoNormal(counting), NaturalGradient(), Trace_ELBO())
    state = svi.init(random.key(0), X)
    update = jax.jit(svi.update)
    counts = [float(state.mutable_state["count"]["n"])]
    for _ in range(3):
        state, _ = update(state, X)
        counts.append(float(state.mutable_state["count"]["n"]))
    assert list(np.diff(counts)) == [1.0, 1.0, 1.0]
    assert not svi.optim.info(state).skipped


def test_no_parameters_are_accepted_as_by_numpyros_optimizers():
    """Steps evaluate the loss and change nothing; ``fit`` says that there is nothing to fit."""
    model = lambda: numpyro.sample("x", dist.Normal(0.0, 1.0), obs=1.0)
    svi = SVI(model, lambda: None, NaturalGradient(), Trace_ELBO())
    for stable in (False, True):
        result = svi.run(random.key(0), 3, progress_bar=False, stable_update=stable)
        np.testing.assert_allclose(result.losses, -dist.Normal(0.0, 1.0).log_prob(1.0), rtol=1e-6)
        assert result.params == {}
    assert svi.evaluate(svi.init(random.key(0))) == result.losses[0]
    assert svi.optim.report(svi, result.state).startswith("parameter")
    with pytest.raises(ValueError, match="nothing to fit"):
        fit(svi, random.key(0), progress_bar=False)
