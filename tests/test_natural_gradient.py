# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Law: the velocity of the guide in NumPyro's own parameters is −F⁻¹∇L, with F the Hessian of NumPyro's KL.

    F (dφ/dρ)|_{ρ=0} = −∇L,      ‖v‖² = ∇Lᵀ F⁻¹ ∇L,      JᵀFJ = ∇² KL

whatever the form that the covariance is written in. One guide holds a site of every form. The target is Gaussian, so
that ∇L is known: gradients of first order are compared with NumPyro's own gradient of the same draws, those of second
order with ∇ KL(q ‖ p), because two draws are as good as all where the loss is quadratic.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from numpyro import distributions as dist
from numpyro.infer import Trace_ELBO
from oracles import assert_close, captured_loss, root_eps, spd
from tables import FORMS, GaussianForm

from numpyro_natgrad import NaturalGradient

LENGTHS = np.array([0.0, 1e-1, 1e-3, 1e-4])
ESTIMATORS = ["first_order", "second_order"]

Site = tuple[jax.Array, jax.Array]  # mean and covariance parameter, unconstrained


class Probe(NamedTuple):
    """The outcome of one step, raveled, for every form.

    :ivar start: φ.  :ivar moved: φ(ρ) at ``LENGTHS``.  :ivar velocity: dφ/dρ at ρ = 0.
    :ivar gradient: NumPyro's gradient of the same draws (first order only).  :ivar norm: ‖v‖, of all forms together.
    """

    start: dict[str, np.ndarray]
    moved: dict[str, np.ndarray]
    velocity: dict[str, np.ndarray]
    gradient: dict[str, np.ndarray]
    norm: float


class Exact(NamedTuple):
    """NumPyro's KLs in double precision, form by form: ∇² KL(q_φ ‖ q_φ') and ∇ KL(q ‖ p)."""

    fisher: dict[str, np.ndarray]
    gradient: dict[str, np.ndarray]


def target(form: GaussianForm) -> Any:
    d = int(np.prod(form.shape))
    return dist.MultivariateNormal(jnp.linspace(1, -1, d), jnp.asarray(spd(9, d, low=0.2, high=2.0)))


def model() -> None:
    for name, form in FORMS.items():
        z = numpyro.sample(name, dist.ImproperUniform(dist.constraints.real, (), form.shape))
        numpyro.factor(f"{name}_target", target(form).log_prob(z.ravel()))


def guide() -> None:
    for name, form in FORMS.items():
        form.sample(name)


def of(params: Any, name: str) -> Site:
    return params[f"{name}_loc"], params[f"{name}_cov"]


def flat(site: Site) -> jax.Array:
    return jnp.concatenate([x.ravel() for x in site])


def unflat(vector: jax.Array, like: Site) -> Site:
    return vector[: like[0].size].reshape(like[0].shape), vector[like[0].size :].reshape(like[1].shape)


def joint(form: GaussianForm, site: Site) -> Any:
    """All components of a draw as one multivariate Normal."""
    q = form.at(*site)
    base = q.base_dist if isinstance(q, dist.Independent) else q
    if form.diagonal:
        return dist.MultivariateNormal(base.mean.ravel(), jnp.diag(base.variance.ravel()))
    d = base.event_shape[-1]
    blocks = base.covariance_matrix.reshape(-1, d, d)
    return dist.MultivariateNormal(base.mean.ravel(), jax.scipy.linalg.block_diag(*blocks))


@cache
def probe(estimator: str, precision: str) -> Probe:
    at, params = captured_loss(model, guide, Trace_ELBO(num_particles=2))
    fn = at(random.key(1))
    by_form = lambda tree: {name: flat(of(tree, name)) for name in FORMS}

    def move(rho):
        optimizer = NaturalGradient(lambda step: rho, max_kl=None, estimator=estimator, path_gradient=False)
        _, (_, state) = optimizer.eval_and_update(fn, optimizer.init(params))
        return by_form(state.params), state.info.natural_gradient_norm

    @jax.jit
    def measure():
        one = jnp.ones(())
        (moved, norm), (velocity, _) = jax.lax.map(lambda r: jax.jvp(move, (r,), (one,)), jnp.asarray(LENGTHS, float))
        sampled = jax.grad(lambda p: fn(p)[0])(params) if estimator == "first_order" else params
        return Probe(by_form(params), moved, jax.tree.map(lambda v: v[0], velocity), by_form(sampled), norm[0])

    return jax.tree.map(np.asarray, measure())


@cache
def exact() -> Exact:
    with jax.enable_x64(True):
        sites = {name: parameters(form) for name, form in FORMS.items()}
        starts = {name: flat(site) for name, site in sites.items()}

        def to_self(name, x):
            form, site = FORMS[name], sites[name]
            return jnp.sum(dist.kl_divergence(form.at(*site), form.at(*unflat(x, site))))

        def to_target(name, x):
            return dist.kl_divergence(joint(FORMS[name], unflat(x, sites[name])), target(FORMS[name]))

        @jax.jit
        def measure():
            fisher = {name: jax.hessian(partial(to_self, name))(x) for name, x in starts.items()}
            return Exact(fisher, {name: jax.grad(partial(to_target, name))(x) for name, x in starts.items()})

        return jax.tree.map(np.asarray, measure())


def parameters(form: GaussianForm) -> Site:
    value = dist.biject_to(form.constraint).inv(jnp.asarray(form.value(form.factor)))
    return jnp.asarray(form.loc), value


def gradient(form: str, estimator: str, precision: str) -> np.ndarray:
    source = probe(estimator, precision) if estimator == "first_order" else exact()
    return np.asarray(source.gradient[form], np.float64)


# Second order in single precision is held to exactness on conjugate models elsewhere.
CELLS = [("first_order", "float64"), ("first_order", "float32"), ("second_order", "float64")]


@pytest.fixture(params=CELLS, ids="-".join)
def cell(request):
    estimator, precision = request.param
    with jax.enable_x64(precision == "float64"):
        yield estimator, precision


forms = pytest.mark.parametrize("form", FORMS)
estimators = pytest.mark.parametrize("estimator", ESTIMATORS)


@forms
def test_fisher_matrix_times_velocity_is_the_gradient(form, cell):
    p, (_, precision) = probe(*cell), cell
    assert p.velocity[form].dtype == precision
    assert_close(exact().fisher[form] @ p.velocity[form], -gradient(form, *cell), root_eps(precision))


def test_squared_norm_of_a_step_equals_the_hessian_form_of_kl(dtype):
    p = probe("first_order", dtype)
    slopes = {form: gradient(form, "first_order", dtype) for form in FORMS}
    squares = [g @ np.linalg.solve(exact().fisher[form], g) for form, g in slopes.items()]
    assert_close(p.norm**2, sum(squares), root_eps(dtype))


def test_second_order_norm_is_that_of_the_full_gaussian(x64):
    """The norm is that of the full-covariance proxy: with p = N(μ, P⁻¹), ‖v‖² = ∇_mᵀ Σ ∇_m + ½ tr((ΣP − I)²)."""
    expected = 0.0
    for form in FORMS.values():
        q, goal = joint(form, parameters(form)), target(form)
        slope = goal.precision_matrix @ (q.mean - goal.mean)
        apart = q.covariance_matrix @ goal.precision_matrix - jnp.eye(q.event_shape[0])
        expected += float(slope @ q.covariance_matrix @ slope + 0.5 * jnp.trace(apart @ apart))
    assert_close(probe("second_order", "float64").norm ** 2, np.float64(expected), root_eps("float64"))


@forms
@estimators
def test_natural_and_additive_steps_agree_to_second_order(form, estimator, x64):
    """φ(ρ) = φ − ρF⁻¹∇L + O(ρ²): the difference falls by 100 where ρ falls by 10."""
    p = probe(estimator, "float64")
    velocity = -np.linalg.solve(exact().fisher[form], gradient(form, estimator, "float64"))
    additive = p.start[form] + LENGTHS[:, None] * velocity
    apart = np.linalg.norm(p.moved[form] - additive, axis=1)
    assert apart[0] <= root_eps("float64") * np.linalg.norm(p.start[form])
    np.testing.assert_allclose(apart[2] / apart[3], 100, rtol=0.1)


GROUPS = {
    "Normal": ["scale, softplus", "scale, exp"],
    "MultivariateNormal": [n for n, f in FORMS.items() if f.shape == (3,) and not f.diagonal],
}


@pytest.mark.parametrize("group", GROUPS)
def test_step_is_invariant_to_the_parameterisation_of_the_scale(group, x64):
    """Without noise all forms of the scale have the same mean and covariance after a step."""

    def reached(name):
        form, moved = FORMS[name], probe("second_order", "float64").moved[name]
        q = joint(form, unflat(jnp.asarray(moved[1]), parameters(form)))
        return q.mean, q.covariance_matrix

    first, *others = map(reached, GROUPS[group])
    assert len(others) >= 1
    for other in others:
        assert_close(other, first, root_eps("float64"))
