# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Unusual guides, losses and starts keep the laws that the usual ones keep."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import lax, random
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from numpyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal
from oracles import kl
from tables import positive

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.guide.trace import trace_loss
from numpyro_natgrad.options import RuleConstants

MEAN, SD = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.5, 2.0, 1.0])
EXACT = {"step_size": 1.0, "max_kl": None}


def target() -> None:
    """Two sites, so that a guide may have two blocks of every kind."""
    numpyro.sample("x", dist.Normal(MEAN, SD).to_event(1))
    numpyro.sample("y", dist.Normal(-MEAN, SD).to_event(1))


def run(model: Any, guide: Any, steps: int, loss: Any = None, **options: Any) -> tuple[dict[str, Any], str]:
    """The parameters after some steps, and the report."""
    optimizer = NaturalGradient(**options)
    svi = SVI(model, guide, optimizer, loss or Trace_ELBO(num_particles=4))
    result = svi.run(random.key(0), steps, progress_bar=False)
    return result.params, optimizer.report(svi, result.state)


@pytest.mark.slow
def test_two_full_gaussians_above_the_joint_limit_are_exact_after_one_step(x64, monkeypatch):
    monkeypatch.setattr("numpyro_natgrad.options.CONSTANTS", RuleConstants(joint_limit=1, full_joint_limit=1))
    guide = AutoGuideList(target)
    for name in "xy":
        one = numpyro.handlers.block(target, expose=[name])
        guide.append(AutoMultivariateNormal(numpyro.handlers.seed(one, random.key(0)), prefix=name))
    params, _ = run(target, guide, 1, **EXACT)
    for name, mean in (("x", MEAN), ("y", -MEAN)):
        found = np.asarray(params[f"{name}_loc"]), np.asarray(params[f"{name}_scale_tril"])
        assert kl((found[0], found[1] @ found[1].T), (np.asarray(mean), np.diag(np.asarray(SD) ** 2))) < 1e-10


def test_two_mean_fields_above_the_joint_limit_are_exact_after_one_second_order_step(x64, monkeypatch):
    monkeypatch.setattr("numpyro_natgrad.options.CONSTANTS", RuleConstants(joint_limit=1, full_joint_limit=1))
    params, _ = run(target, AutoNormal(target), 1, estimator="second_order", **EXACT)
    # The Hessian is diagonal: one random probe determines it.
    np.testing.assert_allclose(params["x_auto_scale"], SD, rtol=1e-8)
    np.testing.assert_allclose(params["y_auto_scale"], SD, rtol=1e-8)


def test_parameter_with_a_positive_lower_bound_stays_at_its_bound():
    """The optimum, 0.05, is outside of the constraint: the scale ends at its bound, and the mean converges all the same."""

    def guide() -> None:
        s = numpyro.param("s", 0.5, constraint=constraints.greater_than(0.1))
        numpyro.sample("z", dist.Normal(numpyro.param("m", 0.0), s))

    params, report = run(lambda: numpyro.sample("z", dist.Normal(1.0, 0.05)), guide, 200)
    assert "Hessian of KL" in report
    assert abs(params["m"] - 1) < 0.02
    # In single precision the value is the bound itself once its excess is below a rounding.
    assert np.float32(0.1) <= params["s"] < 0.11


def test_scalar_mean_of_a_multivariate_normal_is_fitted(x64):
    """NumPyro's KL of a MultivariateNormal does not broadcast its mean, though the distribution is valid."""
    cov = np.array([[2.0, 0.5], [0.5, 1.0]])
    model = lambda: numpyro.sample("z", dist.MultivariateNormal(1.0, jnp.asarray(cov)))

    def guide() -> None:
        tril = numpyro.param("tril", jnp.eye(2), constraint=constraints.lower_cholesky)
        numpyro.sample("z", dist.MultivariateNormal(numpyro.param("loc", 0.0), scale_tril=tril))

    params, _ = run(model, guide, 100)
    found = np.full(2, params["loc"]), np.asarray(params["tril"] @ params["tril"].T)
    assert kl(found, (np.ones(2), cov)) < 1e-4


def test_permuted_parameters_are_fitted_in_their_own_order(x64):
    order = jnp.array([2, 0, 1])

    def guide() -> None:
        loc, scale = numpyro.param("loc", jnp.zeros(3)), positive("scale", jnp.ones(3))
        numpyro.sample("z", dist.Normal(loc[order], scale[order]).to_event(1))

    params, _ = run(lambda: numpyro.sample("z", dist.Normal(MEAN, SD).to_event(1)), guide, 100)
    np.testing.assert_allclose(params["loc"][order], MEAN, atol=1e-3)
    np.testing.assert_allclose(params["scale"][order], SD, atol=1e-3)


@pytest.mark.parametrize("batch", [3, 4, 10])
def test_particles_evaluated_in_batches_are_counted(batch):
    loss = Trace_ELBO(10, vectorize_particles=lambda f, x: lax.map(f, x, batch_size=batch))
    svi = SVI(target, AutoNormal(target), NaturalGradient(), loss)
    params = svi.init(random.key(0)).optim_state[1].params
    fn = lambda p: (loss.loss(random.key(0), svi.constrain_fn(p), svi.model, svi.guide), None)
    assert trace_loss(fn, params).particles == 10


@pytest.mark.parametrize("sd", [1e-5, 1e-6])
def test_max_kl_bounds_the_step_towards_a_narrow_posterior(sd):
    """A full step would have 5e11 nats; the KL of the step is computed in closed form."""
    start, limit = 0.1, 0.5

    def guide() -> None:
        numpyro.sample("z", dist.Normal(numpyro.param("m", 0.0), positive("s", start)))

    model = lambda: numpyro.sample("z", dist.Normal(1.0, sd))
    params, _ = run(model, guide, 1, step_size=1.0, max_kl=limit)
    moved = dist.kl_divergence(dist.Normal(0.0, start), dist.Normal(params["m"], params["s"]))
    assert 0.9 * limit < moved <= 1.01 * limit


def test_discrete_guide_takes_natural_steps_within_max_kl():
    """A Bernoulli by its logit: ``max_kl`` bounds the exact KL, which the quadratic model would miss."""

    def model() -> None:
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=2.0)

    guide = lambda: numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", 0.0)))
    with pytest.warns(UserWarning, match="score functions"):
        params, _ = run(model, guide, 1, TraceGraph_ELBO(4), max_kl=0.1, step_size=1.0)
    q = jax.nn.sigmoid(params["logit"])
    moved = -0.5 * (jnp.log(2 * q) + jnp.log(2 * (1 - q)))  # KL(Bernoulli(½) ‖ Bernoulli(q))
    assert 0.09 <= moved <= 0.1 * (1 + 1e-3)
    with pytest.warns(UserWarning, match="score functions"):
        params, _ = run(model, guide, 300, TraceGraph_ELBO(32))
    exact = 2.0 - 0.5  # log N(2 | 1, 1) − log N(2 | 0, 1)
    assert abs(params["logit"] - exact) < 0.3


def test_forward_mode_differentiates_a_while_loop_of_the_guide():
    def guide(n: Any) -> None:
        slope = numpyro.param("slope", 0.1)
        mean = lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] + slope), (0, 0.0))[1]
        numpyro.sample("z", dist.Normal(mean, positive("s", 1.0)))

    model = lambda n: numpyro.sample("z", dist.Normal(3.0, 0.5))
    svi = SVI(model, guide, NaturalGradient(), Trace_ELBO(num_particles=8))
    update = jax.jit(partial(svi.update, forward_mode_differentiation=True))
    state = svi.init(random.key(0), 3)
    for _ in range(60):
        state, _ = update(state, 3)
    params = svi.get_params(state)
    assert dist.kl_divergence(dist.Normal(3 * params["slope"], params["s"]), dist.Normal(3.0, 0.5)) < 0.01


def test_parameters_keep_their_own_dtypes(x64):
    def guide() -> None:
        loc, scale = numpyro.param("loc", np.zeros(3, np.float32)), positive("scale", np.ones(3))
        numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    params, _ = run(lambda: numpyro.sample("z", dist.Normal(MEAN, SD).to_event(1)), guide, 1, **EXACT)
    assert params["loc"].dtype == jnp.float32
    np.testing.assert_allclose(params["loc"], MEAN, rtol=1e-5)


def test_warns_when_second_order_falls_back_to_first_order():
    guide = lambda: numpyro.sample("z", dist.Gamma(positive("a", 2.0), positive("b", 1.0)))
    with pytest.warns(UserWarning, match="second_order.*first-order"):
        run(lambda: numpyro.sample("z", dist.Gamma(2.0, 3.0)), guide, 1, estimator="second_order")


def test_constraint_that_depends_on_data_uses_the_hessian_of_kl():
    """Whether the constraint admits every valid value is not known before there are data."""

    def guide(x):
        lower = dist.constraints.greater_than(0 * jnp.max(x))
        numpyro.sample("z", dist.Gamma(numpyro.param("a", 2.0, constraint=lower), 1.0))

    svi = SVI(lambda x: numpyro.sample("z", dist.Gamma(3.0, 1.0)), guide, NaturalGradient(), Trace_ELBO(2))
    state, x = svi.init(random.key(0), jnp.ones(3)), jnp.ones(3)
    state, loss = jax.jit(svi.update)(state, x)
    assert np.isfinite(loss)
    assert "Hessian of KL" in svi.optim.report(svi, state, x)
