# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""A step has the length that its options fix, at most ``max_kl`` nats, and unusable options are quoted in the error."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from jax import lax, random
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO
from numpyro.infer.svi import SVIState
from numpyro.optim import Minimize
from oracles import assert_close, root_eps, spd
from tables import positive

from numpyro_natgrad import NaturalGradient, fit
from numpyro_natgrad.options import checked

D, STEPS = 3, 25
PRECISION, CENTRE = spd(0, D, low=1.0, high=100.0), np.arange(1.0, D + 1)


def gaussian() -> None:
    """A correlated Gaussian, far from where the guides start."""
    z = numpyro.sample("z", dist.ImproperUniform(constraints.real, (), (D,)))
    numpyro.factor(
        "f",
        dist.MultivariateNormal(jnp.asarray(CENTRE, float), precision_matrix=jnp.asarray(PRECISION, float)).log_prob(z),
    )


def full() -> None:
    tril = numpyro.param("tril", 0.1 * jnp.eye(D), constraint=constraints.lower_cholesky)
    numpyro.sample("z", dist.MultivariateNormal(numpyro.param("loc", jnp.zeros(D)), scale_tril=tril))


def independent() -> None:
    loc, scale = numpyro.param("loc", jnp.zeros(D)), positive("scale", jnp.full(D, 0.1))
    numpyro.sample("z", dist.Normal(loc, scale).to_event(1))


def rates() -> None:
    z = numpyro.sample("z", dist.Gamma(2.0, 0.5))
    numpyro.sample("n", dist.Poisson(z), obs=40)


def gamma() -> None:
    numpyro.sample("z", dist.Gamma(positive("a", 2.0), positive("b", 1.0)))


class Walk(NamedTuple):
    """The iterates, the start included, in constrained space, and the ``StepInfo`` of each step."""

    params: dict[str, np.ndarray]
    info: Any


def walk(model: Any, guide: Any, optimizer: NaturalGradient, loss: Any = None, steps: int = STEPS) -> Walk:
    svi = SVI(model, guide, optimizer, loss or Trace_ELBO(num_particles=4))
    start = svi.init(random.key(0))

    def step(state, _):
        new, _ = svi.update(state)
        return new, (state.optim_state[1].params, svi.optim.info(new))

    last, (params, info) = jax.jit(lambda s: lax.scan(step, s, length=steps))(start)
    params = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), params, last.optim_state[1].params)
    return jax.tree.map(np.asarray, Walk(svi.constrain_fn(params), info))


def nats(guide: Any, params: dict[str, np.ndarray]) -> np.ndarray:
    """KL(q ‖ q₊) of each step, by NumPyro."""
    make = {
        full: lambda p: dist.MultivariateNormal(p["loc"], scale_tril=p["tril"]),
        independent: lambda p: dist.Normal(p["loc"], p["scale"]).to_event(1),
        gamma: lambda p: dist.Gamma(p["a"], p["b"]),
    }[guide]
    before, after = make({n: x[:-1] for n, x in params.items()}), make({n: x[1:] for n, x in params.items()})
    return np.asarray(dist.kl_divergence(before, after))


class Bounded(NamedTuple):
    """A fit with a fixed KL limit; ``excess`` is the relative excess that is allowed."""

    model: Any
    guide: Any
    options: dict[str, Any]
    max_kl: float
    excess: float


# Where KL has a closed form, so has its limit; the quadratic model of it is good to O(δ^½), relative.
LIMITS = {
    "full": Bounded(gaussian, full, {}, 0.5, 1e-8),
    "full, first order": Bounded(gaussian, full, {"estimator": "first_order"}, 0.5, 1e-8),
    "independent": Bounded(gaussian, independent, {}, 0.5, 1e-8),
    "independent, first order": Bounded(gaussian, independent, {"estimator": "first_order"}, 0.5, 1e-8),
    "natural parameters": Bounded(rates, gamma, {}, 1e-4, 3e-2),
    "curvature of KL": Bounded(rates, gamma, {"fisher": "kl_hessian"}, 1e-4, 3e-2),
}


@cache
def limited(name: str) -> Walk:
    case = LIMITS[name]
    with jax.enable_x64(True):
        return walk(case.model, case.guide, NaturalGradient(1.0, max_kl=case.max_kl, **case.options))


@pytest.mark.parametrize("name", LIMITS)
def test_no_step_has_more_kl_than_max_kl(name, x64):
    case, (params, _) = LIMITS[name], limited(name)
    assert nats(case.guide, params).max() <= case.max_kl * (1 + case.excess)


@pytest.mark.parametrize("name", LIMITS)
def test_limited_step_uses_max_kl_in_full(name, x64):
    """Bisection finds ρ to 1 %, hence KL to 2 % where it is quadratic, and to 5 % where a growing variance makes it steeper."""
    case, (params, info) = LIMITS[name], limited(name)
    moved = nats(case.guide, params)
    assert info.limited[:5].all()
    assert (moved[info.limited] >= case.max_kl * (0.95 - case.excess)).all()
    assert (info.radius == case.max_kl).all()


@pytest.mark.parametrize("name", LIMITS)
def test_reported_kl_is_that_of_the_step(name, x64):
    case, (params, info) = LIMITS[name], limited(name)
    np.testing.assert_allclose(
        info.kl, nats(case.guide, params), rtol=max(root_eps("float64"), case.excess), atol=1e-12
    )


RULES = {
    "number": (0.3, lambda t: 0.3),
    "optax schedule": (optax.exponential_decay(0.8, 5, 0.5), lambda t: 0.8 * 0.5 ** (t / 5)),
}


@pytest.mark.parametrize("rule", RULES)
def test_fixed_step_size_is_used_as_given(rule, x64):
    """ρ is reported, and on a Gaussian target the precision is S ← (1−ρ) S + ρ H."""
    given, expected = RULES[rule]
    params, info = walk(gaussian, full, NaturalGradient(given, max_kl=None))
    rho = np.array([expected(t) for t in range(STEPS)])
    assert_close(info.step_size, rho, root_eps("float64"))
    precision = np.linalg.inv(params["tril"] @ np.swapaxes(params["tril"], 1, 2))
    assert_close(
        precision[1:], (1 - rho[:, None, None]) * precision[:-1] + rho[:, None, None] * PRECISION, root_eps("float64")
    )
    assert not info.limited.any()
    assert not info.skipped.any()


@pytest.mark.parametrize(
    ("estimator", "loss", "whole"),
    [
        (None, Trace_ELBO(4), 1.0),
        ("second_order", Trace_ELBO(4), 1.0),
        ("second_order", Trace_ELBO(1), 1.0),
        ("second_order", Trace_ELBO(3, vectorize_particles=False), 3 / (3 + 2)),
        ("second_order", Trace_ELBO(2, vectorize_particles=False), 2 / (2 + 2)),
    ],
)
def test_default_step_size_stays_between_zero_and_one(x64, estimator, loss, whole):
    """The largest step is 1 for a regression and for antithetic draws, and S/(S + 2) for S independent draws."""
    params, info = walk(gaussian, full, NaturalGradient(estimator=estimator), loss)
    assert (info.step_size[~info.skipped] > 0).all()
    assert (info.step_size <= whole + root_eps("float64")).all()
    assert info.step_size.max() > whole - 1e-3
    # A Gaussian target has no noise with two draws or more: S approaches H at the full rate.
    factor = params["tril"][-1]
    assert_close(factor @ factor.T, np.linalg.inv(PRECISION), 1e-3)


def test_warns_and_uses_first_order_when_the_loss_is_no_elbo(x64):
    with pytest.warns(UserWarning, match="not affine"):
        _, info = walk(gaussian, full, NaturalGradient(), RenyiELBO(alpha=0.5, num_particles=8))
    assert not info.skipped.all()
    assert np.isfinite(info.natural_gradient_norm).all()


# --- unusable options ---

BAD = {
    "negative step": (ValueError, {"step_size": -0.5}, "-0.5"),
    "a step that is true": (ValueError, {"step_size": True}, "step_size=True"),
    "true nats": (ValueError, {"max_kl": True}, "max_kl=True"),
    "no step": (ValueError, {"step_size": 0}, "step_size=0"),
    "infinite step": (ValueError, {"step_size": float("inf")}, "inf"),
    "step in words": (ValueError, {"step_size": "fast"}, "'fast'"),
    "many steps": (ValueError, {"step_size": [0.1, 0.2]}, "[0.1, 0.2]"),
    "negative nats": (ValueError, {"max_kl": -1.0}, "-1.0"),
    "no nats": (ValueError, {"max_kl": 0.0}, "max_kl=0.0"),
    "no number": (ValueError, {"max_kl": float("nan")}, "nan"),
    "nats in words": (ValueError, {"max_kl": "adaptiv"}, "'adaptiv'"),
    "estimator": (ValueError, {"estimator": "third_order"}, "'third_order'"),
    "path gradient": (TypeError, {"path_gradient": "yes"}, "'yes'"),
    "fallback optimizer": (TypeError, {"fallback_optimizer": "adam"}, "'adam'"),
    "fallback optimizer of losses": (TypeError, {"fallback_optimizer": Minimize()}, "Minimize"),
    "natural fallback optimizer": (TypeError, {"fallback_optimizer": NaturalGradient()}, "NaturalGradient"),
    "fallback optimizer's rate": (TypeError, {"fallback_optimizer": 0.01}, "0.01"),
    "unknown": (TypeError, {"learning_rate": 0.1}, "learning_rate"),
}


@pytest.mark.parametrize("name", BAD)
def test_option_errors_quote_the_argument(name):
    error, options, typed = BAD[name]
    with pytest.raises(error) as caught:
        NaturalGradient(**options)
    assert typed in str(caught.value)
    if error is ValueError:
        assert f"`{next(iter(options))}=" in str(caught.value)


@pytest.mark.parametrize(
    "x", [1, 0.5, np.float32(0.5), jnp.asarray(0.5), optax.constant_schedule(0.1), None], ids=lambda x: type(x).__name__
)
def test_numbers_of_any_type_schedules_and_none_are_kept_as_given(x):
    assert checked(x, "adaptive", None, True).step_size is x
    if not callable(x):
        assert checked(None, x, None, True).max_kl is x


def test_options_but_the_step_size_are_keyword_only():
    with pytest.raises(TypeError):
        NaturalGradient(0.1, 0.5)


def test_update_by_gradient_alone_is_refused():
    optimizer = NaturalGradient()
    state = optimizer.init({"x": jnp.zeros(2)})
    with pytest.raises(TypeError, match="eval_and_update"):
        optimizer.update({"x": jnp.ones(2)}, state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "start",
    [lambda svi: svi.init(random.key(0)), lambda svi: svi.run(random.key(0), 1), lambda svi: fit(svi, random.key(0))],
)
def test_half_precision_is_refused_by_name(dtype, start):
    """By `svi.init` (and `svi.update` needs its state), `svi.run` and `fit`."""

    def guide() -> None:
        loc, scale = numpyro.param("loc", jnp.zeros(D, dtype)), positive("scale", jnp.full(D, 0.1))
        numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    with pytest.raises(ValueError, match=rf"'loc': '{dtype}'}}.*expected float32 or float64.*jnp.float32"):
        start(SVI(gaussian, guide, NaturalGradient(), Trace_ELBO()))


def test_report_of_an_uninitialised_svi_raises():
    svi = SVI(gaussian, full, NaturalGradient(), Trace_ELBO())
    with pytest.raises(ValueError, match="svi.init"):
        svi.optim.report(svi, SVIState(None, None, random.key(0)))
