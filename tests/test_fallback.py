# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The fallback optimizer steps the parameters without a Fisher matrix, exactly as it does alone, and no others."""

from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from jax import random
from numpyro import distributions as dist
from numpyro import optim
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal
from oracles import assert_close, root_eps, walk
from tables import DATA, school, with_model_param

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.step.fallback import fallback_optimizer

STEPS = 30
X = jnp.asarray(DATA, jnp.float32)
OPTIMIZERS = {
    "optax": (optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.5)),) * 2,
    "numpyro": (optim.Adam(5e-2), optim.Adam(5e-2)),
}


@cache
def delta() -> AutoDelta:
    return AutoDelta(school)


def fit(optimizer: Any) -> tuple[dict[str, Any], Any]:
    """Parameters that ``svi.get_params`` returns, and losses."""
    svi = SVI(school, delta(), optimizer, Trace_ELBO())
    result = svi.run(random.key(0), STEPS, X, progress_bar=False)
    return result.params, result.losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_point_guide_is_fitted_by_the_fallback_optimizer(name):
    given, alone = OPTIMIZERS[name]
    params, losses = fit(NaturalGradient(fallback_optimizer=given))
    expected, expected_losses = fit(alone)
    assert_close(losses, expected_losses, root_eps("float32"))
    assert_close(params, expected, root_eps("float32"))


@cache
def beside(name: str) -> tuple[list[Any], list[Any]]:
    """Iterates of a guide beside a ``param`` of the model, and NumPyro's gradients there."""
    optimizer = NaturalGradient(fallback_optimizer=OTHERS[name])
    return walk(SVI(with_model_param, AutoNormal(with_model_param), optimizer, Trace_ELBO(8)), (X,), 5)


OTHERS = {"adam": optax.adam(1e-2), "still": optax.sgd(0.0)}


def test_model_parameter_takes_the_steps_of_the_fallback_optimizer_alone():
    """Adam takes the same steps on the gradients that NumPyro computes at the iterates."""
    params, slopes = beside("adam")
    mine, adam = {"noise": params[0]["noise"]}, optax.adam(1e-2)
    state = adam.init(mine)
    for slope, after in zip(slopes, params[1:], strict=True):
        updates, state = adam.update({"noise": slope["noise"]}, state)
        mine = optax.apply_updates(mine, updates)
        np.testing.assert_allclose(after["noise"], mine["noise"], rtol=root_eps("float32"))
    assert not np.isclose(mine["noise"], params[0]["noise"])


def test_fallback_optimizer_does_not_change_parameters_of_gaussian_sites():
    """In the first step, where the model is the same, they are those of a fit whose fallback optimizer does nothing."""
    with_adam, without = beside("adam")[0], beside("still")[0]
    for name in with_adam[0]:
        if name != "noise":
            assert_close(with_adam[1][name], without[1][name], root_eps("float32"))
            assert not np.isclose(with_adam[1][name], with_adam[0][name])
    assert without[-1]["noise"] == without[0]["noise"]


def test_gradients_whose_squares_overflow_do_not_stay_in_the_fallback_optimizer():
    """In single precision Adam's second moment would be infinite, and its steps zero, ever after."""
    wrapped = fallback_optimizer(optax.adam(0.1))
    params = {"x": jnp.array(1.0)}
    after, state = wrapped.step(params, {"x": jnp.array(1e25)}, wrapped.init(params), ("x",))
    assert after == params
    moved, _ = wrapped.step(params, {"x": jnp.array(1.0)}, state, ("x",))
    np.testing.assert_allclose(moved["x"], 0.9, rtol=1e-5)


def coin_flips() -> None:
    """A sum over one discrete site beside a Gamma, and a parameter."""
    p = numpyro.param("p", 0.5, constraint=dist.constraints.unit_interval)
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    z = numpyro.sample("z", dist.Bernoulli(p), infer={"enumerate": "parallel"})
    numpyro.sample("x", dist.Normal(z * rate, 1.0), obs=0.7)


def gamma() -> None:
    positive = lambda name: numpyro.param(name, 1.0, constraint=dist.constraints.positive)
    numpyro.sample("rate", dist.Gamma(positive("alpha"), positive("beta")))


def factored() -> None:
    numpyro.factor("f", -jnp.sum((numpyro.param("a", jnp.ones(200)) - 2.0) ** 2))
    numpyro.param("unused", 1.0)
    numpyro.param("b", 1.0)


@pytest.mark.parametrize(
    ("target", "guide", "loss", "named"),
    [
        (coin_flips, gamma, TraceEnum_ELBO(), r"\['p'\].*sums over discrete sites"),
        (factored, lambda: None, Trace_ELBO(), r"\['a'\]"),
    ],
    ids=["enumerated", "factor"],
)
def test_parameters_of_the_default_optimizer_are_named_unless_their_gradient_is_zero(target, guide, loss, named):
    """Parameters beside a guide that is no Gaussian, or more than a joint block has. Any other warning fails a test."""
    with pytest.warns(UserWarning, match=named):
        SVI(target, guide, NaturalGradient(), loss).run(random.key(0), 2, progress_bar=False)
    chosen = NaturalGradient(fallback_optimizer=optax.adam(1e-2))
    SVI(target, guide, chosen, loss).run(random.key(0), 2, progress_bar=False)


def test_parameters_with_a_fisher_matrix_are_not_named():
    SVI(school, delta(), NaturalGradient(), Trace_ELBO()).run(random.key(0), 2, X, progress_bar=False)
