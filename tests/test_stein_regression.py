# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The regression of gradients on draws is exact for quadratics, and its sums can change their frame."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.estimators import stein_regression
from numpyro_natgrad.guide.handlers import DensityMode, PathGradient
from numpyro_natgrad.options import CONSTANTS

D, DRAWS = 5, 12


def _frame(key, d=D):
    """(m, C) of a Gaussian, C lower triangular."""
    loc, lower = random.normal(key, (d,)), jnp.tril(random.normal(random.fold_in(key, 1), (d, d)))
    return loc, lower - jnp.diag(jnp.diagonal(lower)) + jnp.diag(1 + jnp.abs(jnp.diagonal(lower)))


def _symmetric(key, d=D):
    a = random.normal(key, (d, d))
    return a @ a.T + jnp.eye(d)


def _sums(key, z, gradients, loc, factor):
    """Of draws z and gradients there, in the frame of N(loc, factor factorᵀ)."""
    x = jax.scipy.linalg.solve_triangular(factor, (z - loc).T, lower=True).T
    empty = stein_regression.empty_sums(D, z.dtype)._replace(loc=loc, factor=factor)
    # The precision of the quadratic explains every gradient, so that no draw is an outlier.
    return stein_regression.add_draws(empty, x, gradients @ factor, jnp.eye(D)), x


@pytest.mark.parametrize("seed", range(3))
def test_regression_is_exact_for_a_quadratic(x64, seed):
    key = random.key(seed)
    loc, factor = _frame(key)
    hessian, slope = _symmetric(random.fold_in(key, 2)), random.normal(random.fold_in(key, 3), (D,))
    z = loc + random.normal(random.fold_in(key, 4), (DRAWS, D)) @ factor.T
    sums, _ = _sums(key, z, (z - loc) @ hessian + slope, loc, factor)
    # The ridge has the weight of a fifth of a draw; more draws make its effect small.
    many = sums._replace(gram=1e9 * sums.gram, cross=1e9 * sums.cross)
    found, curvature = stein_regression.fit(many, jnp.eye(D))
    np.testing.assert_allclose(curvature, factor.T @ hessian @ factor - jnp.eye(D), atol=1e-6)
    np.testing.assert_allclose(found, factor.T @ slope, atol=1e-6)


def test_nan_gradient_makes_the_regression_nan():
    """No eigensolver is called on it, which might not terminate."""
    loc, factor = _frame(random.key(0))
    sums, _ = _sums(random.key(0), jnp.ones((DRAWS, D)), jnp.ones((DRAWS, D)).at[0, 0].set(jnp.nan), loc, factor)
    slope, _ = stein_regression.fit(sums, jnp.eye(D))
    assert np.isnan(slope).all()


@pytest.mark.parametrize("seed", range(3))
def test_regression_sums_change_frame_exactly(x64, seed):
    key = random.key(seed)
    (loc, factor), (far, wide) = _frame(key), _frame(random.fold_in(key, 7))
    z = loc + random.normal(random.fold_in(key, 4), (DRAWS, D)) @ factor.T
    gradients = random.normal(random.fold_in(key, 5), (DRAWS, D))
    sums, x = _sums(key, z, gradients, loc, factor)
    moved = stein_regression.change_frame(sums, far, wide)
    # The same draws summed in the new frame, with the weights that they were given in the old one.
    influence = jnp.sum((gradients @ factor - x) ** 2, 1) * (1 + jnp.sum(x**2, 1))
    bound = jnp.maximum(CONSTANTS.influence_max * DRAWS * jnp.median(influence), 1.0)
    weight = jnp.sqrt(jnp.minimum(1.0, bound / influence))[:, None]
    y = jax.scipy.linalg.solve_triangular(wide, (z - far).T, lower=True).T
    g, share = gradients @ wide, moved.weight / sums.weight
    assert 0 < share <= 1
    u = jnp.column_stack([jnp.ones(DRAWS), y])
    np.testing.assert_allclose(moved.gram, share * (weight * u).T @ u, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(moved.cross, share * (weight * g).T @ u, rtol=1e-9, atol=1e-9)


def test_earlier_draws_of_the_same_gaussian_keep_their_weight(x64):
    loc, factor = _frame(random.key(0))
    z = loc + random.normal(random.key(1), (4000, D)) @ factor.T
    sums, _ = _sums(random.key(2), z, (z - loc) @ _symmetric(random.key(3)), loc, factor)
    np.testing.assert_allclose(stein_regression.change_frame(sums, loc, factor).weight, sums.weight)


def test_regression_slope_is_steins_expectation(x64):
    """f = Σ log cosh(a z): E[∇²f] = Σ a aᵀ E[1 − tanh²(a z)], by quadrature along each a."""
    rows = 0.2 * random.normal(random.key(0), (6, D))
    loc, factor = _frame(random.key(1))
    n = 200_000
    z = loc + random.normal(random.key(2), (n, D)) @ factor.T
    sums, _ = _sums(random.key(3), z, jnp.tanh(z @ rows.T) @ rows, loc, factor)
    slope, curvature = stein_regression.fit(sums, jnp.eye(D))
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    along = (rows @ loc)[:, None] + jnp.linalg.norm(rows @ factor, axis=1)[:, None] * nodes
    mean = lambda values: values @ (weights / weights.sum())
    expected = (rows.T * mean(1 - jnp.tanh(along) ** 2)) @ rows
    # Gradients are of size ‖Cᵀaᵀ‖ at most, so that an entry of the fit has a standard error below size/√n: five of them.
    error = 5 * float(jnp.sum(jnp.linalg.norm(rows @ factor, axis=1))) / np.sqrt(n)
    np.testing.assert_allclose(curvature + jnp.eye(D), factor.T @ expected @ factor, atol=error)
    np.testing.assert_allclose(slope, factor.T @ rows.T @ mean(jnp.tanh(along)), atol=error)


def _model(y):
    a = numpyro.sample("a", dist.Normal(0, 2).expand([2]).to_event(1))
    b = numpyro.sample("b", dist.HalfNormal(1.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.StudentT(4, a.sum(), b), obs=y)


def _fitted(loss, model=_model, guide=AutoNormal, **options):
    svi = SVI(model, guide(model), NaturalGradient(**options), loss)
    y = jnp.array([0.5, -1.0, 2.0])
    return svi.optim.report(svi, svi.init(random.key(0), y), y)


def test_every_particle_has_its_draw_and_its_gradient(x64):
    """The oracle is the gradient of the model's log density at the draws that the loss reports."""
    y, n = jnp.array([0.5, -1.0, 2.0]), 4
    guide = AutoNormal(_model)
    svi = SVI(_model, guide, NaturalGradient(), Trace_ELBO(n))
    params = svi.optim.get_params(svi.init(random.key(0), y).optim_state)
    shapes = {"a": (2,), "b": ()}
    perturbations = {name: jnp.zeros((2, n, *shape)) for name, shape in shapes.items()}

    def loss(perturbations):
        with PathGradient(dict.fromkeys(shapes, DensityMode.PER_PARTICLE), 0, perturbations):
            return Trace_ELBO(n).loss(random.key(5), svi.constrain_fn(params), _model, guide, y)

    split = {name: n * x for name, x in jax.jit(jax.grad(loss))(perturbations).items()}
    slope = jax.jit(jax.grad(lambda z: numpyro.infer.util.potential_energy(_model, (y,), {}, z)))
    for s in range(n):
        z = {name: x[0, s] for name, x in split.items()}
        for name, expected in slope(z).items():
            np.testing.assert_allclose(split[name][1, s], expected, rtol=1e-10)


def _subsampled(y):
    z = numpyro.sample("z", dist.Normal(0, 2))
    with numpyro.plate("rows", len(y), subsample_size=2):
        numpyro.sample("y", dist.Normal(z, 1), obs=numpyro.subsample(y, 0))


@pytest.mark.parametrize(
    ("taken", "loss", "changes"),
    [
        (True, Trace_ELBO(8), {}),
        (True, Trace_ELBO(3), {}),
        (True, Trace_ELBO(2), {}),
        (True, Trace_ELBO(8), {"guide": AutoMultivariateNormal}),
        (True, Trace_ELBO(1), {}),
        (False, Trace_ELBO(8, vectorize_particles=False), {}),
        (False, TraceMeanField_ELBO(8), {}),
        (False, Trace_ELBO(8), {"model": _subsampled}),
        (False, Trace_ELBO(8), {"estimator": "second_order"}),
        (False, Trace_ELBO(8), {"step_size": 0.5}),
    ],
)
def test_regression_is_used_only_for_separable_particles(taken, loss, changes):
    assert ("regression of gradients" in _fitted(loss, **changes)) is taken


@pytest.mark.slow
def test_batched_regression_equals_a_loop(x64):
    """Particles are separated inside of ``vmap`` too."""
    y = jnp.array([0.5, -1.0, 2.0])
    svi = SVI(_model, AutoMultivariateNormal(_model), NaturalGradient(), Trace_ELBO(4))
    start = svi.init(random.key(0), y)

    def after_five(key):
        state = jax.lax.fori_loop(0, 5, lambda _, state: svi.update(state, y)[0], svi.init(key, y))
        return svi.get_params(state)

    keys = random.split(random.key(0), 2)
    together, alone = jax.jit(jax.vmap(after_five))(keys), jax.jit(after_five)(keys[1])
    assert "regression of gradients" in svi.optim.report(svi, start, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-8), together, alone)


def test_number_of_remembered_draws_grows_as_root_steps(dtype):
    """The first d + 1 draws count in full; then n² = 2 (d + 1) S t, to 10 % because steps are discrete."""
    d, new = 4, 8
    sums, grown = stein_regression.empty_sums(d, jnp.zeros(()).dtype), []
    for _ in range(400):
        kept = stein_regression.forget(sums, new, d)
        sums = kept._replace(gram=kept.gram.at[0, 0].add(new))
        grown.append(float(sums.weight))
    assert grown[0] == new
    np.testing.assert_allclose(grown[-1] ** 2, 2 * (d + 1) * new * 400, rtol=0.1)


@pytest.mark.slow
def test_curved_valley_is_followed_to_its_optimum():
    """The scale of grouped counts decreases where the loss is flatter than the Fisher matrix: within a nat of Hessian steps.

    (By draws that count for ever two and a half are left.)
    """
    rates = np.exp(1 + 0.7 * np.random.default_rng(3).normal(size=(10, 1)))
    counts = jnp.array(np.random.default_rng(2).poisson(rates, (10, 3)))

    def model():
        mu, sigma = numpyro.sample("mu", dist.Normal(0, 3)), numpyro.sample("sigma", dist.HalfNormal(2))
        with numpyro.plate("groups", 10):
            a = numpyro.sample("a", dist.Normal(0, 1))
            numpyro.sample("y", dist.Poisson(jnp.exp(mu + sigma * a)[:, None]).to_event(1), obs=counts)

    losses = []
    for options in ({}, {"estimator": "second_order"}):
        svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(**options), Trace_ELBO(32))
        losses.append(svi.run(random.key(0), 120, progress_bar=False).losses[-20:].mean())
    assert losses[0] < losses[1] + 1.0
