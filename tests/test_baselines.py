# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""On a correlated Gaussian the baselines reach what their papers promise, and count the gradients they take."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import kl, root_eps, spd
from scipy import optimize

from benchmarks.posteriordb import adam_estimators, batch_and_match, deterministic_advi
from benchmarks.posteriordb.path import Path

D = 5
MEAN = np.linspace(-1.0, 2.0, D)
COVARIANCE = np.asarray(spd(3, D))
PRECISION = np.linalg.inv(COVARIANCE)
KEY = jax.random.key(0)


def f(z: Any) -> Any:
    """−log p up to a constant."""
    x = z - jnp.asarray(MEAN, z.dtype)
    return 0.5 * x @ jnp.asarray(PRECISION, z.dtype) @ x


def nowhere(z: Any) -> Any:
    """A density that is not a number."""
    return jnp.nan * z.sum()


def start() -> jax.Array:
    return jnp.zeros(D)


class Counted(NamedTuple):
    """A potential with the list that grows by one with each gradient, of one draw, that is evaluated."""

    potential: Any
    calls: list[None]


def counted() -> Counted:
    calls: list[None] = []
    potential = jax.custom_vjp(lambda z: f(z))

    def backward(z: jax.Array, tangent: jax.Array) -> tuple[jax.Array]:
        jax.debug.callback(lambda _: calls.append(None), z)
        return (tangent * (jnp.asarray(PRECISION, z.dtype) @ (z - jnp.asarray(MEAN, z.dtype))),)

    potential.defvjp(lambda z: (f(z), z), backward)
    return Counted(potential, calls)


def loss(path: Path) -> float:
    """KL to the target at the path's end, nats, in double precision."""
    factor = np.asarray(path.factor[-1], float)
    factor = np.diag(factor) if factor.ndim == 1 else factor
    return float(kl((np.asarray(path.loc[-1], float), factor @ factor.T), (MEAN, COVARIANCE)))


def assert_sound(path: Path, dtype: str) -> None:
    """One row for each step, costs that grow, factors that are lower triangular with a positive diagonal."""
    assert len({len(x) for x in path[:5]}) == 1
    assert path.loc.dtype == path.factor.dtype == dtype
    assert all((np.diff(x) > 0).all() for x in path[2:5])
    factor = path.factor[-1]
    np.testing.assert_array_equal(factor, factor if factor.ndim == 1 else np.tril(factor))
    assert (np.diagonal(factor, axis1=-2, axis2=-1) > 0).all() if factor.ndim == 2 else (factor > 0).all()


# --- Batch and match ---


def test_batch_and_match_update_solves_its_quadratic_matrix_equation(x64: Any) -> None:
    """Σ'UΣ' + Σ' = V and the mean, as the paper states them, with fewer and with more draws than dimensions."""
    rng = np.random.default_rng(0)
    for batch, rate in ((3, 15.0), (12, 0.2)):
        z, g = rng.normal(size=(2, batch, D))
        loc, sigma = rng.normal(size=D), np.asarray(spd(1, D))
        new = batch_and_match.match(
            batch_and_match.Gaussian(jnp.asarray(loc), jnp.linalg.cholesky(sigma)), jnp.asarray(z), jnp.asarray(g), rate
        )
        share, shift = rate / (1 + rate), loc - z.mean(0)
        U = rate * np.cov(g.T, bias=True) + share * np.outer(g.mean(0), g.mean(0))
        V = sigma + rate * np.cov(z.T, bias=True) + share * np.outer(shift, shift)
        S = np.asarray(new.factor @ new.factor.T)
        np.testing.assert_allclose(S @ U @ S + S, V, rtol=root_eps("float64"), atol=root_eps("float64"))
        mean = loc / (1 + rate) + share * (S @ g.mean(0) + z.mean(0))
        np.testing.assert_allclose(new.loc, mean, rtol=root_eps("float64"), atol=root_eps("float64"))


def test_batch_and_match_is_exact_on_a_gaussian(dtype: str) -> None:
    path = batch_and_match.fit(f, start(), 0.1, KEY, batch=8, steps=40)
    assert_sound(path, dtype)
    assert loss(path) < root_eps(dtype)


def test_batch_and_match_counts_its_gradients() -> None:
    target = counted()
    path = batch_and_match.fit(target.potential, start(), 0.1, KEY, batch=4, steps=3)
    jax.effects_barrier()
    assert path.gradients.tolist() == [4, 8, 12]
    assert len(target.calls) == 12


def test_batch_and_match_keeps_its_state_when_the_gradient_is_nan() -> None:
    path = batch_and_match.fit(nowhere, start(), 0.1, KEY, steps=2)
    np.testing.assert_array_equal(path.loc, np.zeros((2, D)))
    np.testing.assert_allclose(path.factor, np.tile(0.1 * np.eye(D), (2, 1, 1)), rtol=1e-6)


# --- Deterministic ADVI ---


def moments(draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the fixed draws."""
    epsilon = np.asarray(deterministic_advi.fixed_draws(KEY, draws, start()), float)
    return epsilon.mean(0), np.cov(epsilon.T, bias=True)


def test_full_deterministic_advi_finds_the_minimum_on_its_draws(dtype: str) -> None:
    """With m = μ + Lε̄ and K the Cholesky factor of the draws' covariance the minimum has LK = chol(Σ), m the mean."""
    path = deterministic_advi.fit(f, start(), 0.1, KEY, draws=40, gtol=root_eps(dtype))
    assert_sound(path._replace(seconds=path.steps), dtype)
    mean, covariance = moments(40)
    L = np.linalg.cholesky(COVARIANCE) @ np.linalg.inv(np.linalg.cholesky(covariance))
    np.testing.assert_allclose(path.factor[-1], L, atol=10 * root_eps(dtype))
    np.testing.assert_allclose(path.loc[-1], MEAN - L @ mean, atol=10 * root_eps(dtype))


def test_loss_by_fixed_draws_equals_its_derivation(x64: Any) -> None:
    """The mean over keys is within four standard errors of d(d+3)/(4M), whose next term is smaller by D²/M."""
    draws = deterministic_advi.FULL.draws(D)
    keys = jax.random.split(KEY, 200)
    losses = []
    for key in keys:
        epsilon = np.asarray(deterministic_advi.fixed_draws(key, draws, start()))
        mean, covariance = epsilon.mean(0), np.cov(epsilon.T, bias=True)
        inverse = np.linalg.inv(covariance)
        losses.append(kl((-np.linalg.inv(np.linalg.cholesky(covariance)) @ mean, inverse), (np.zeros(D), np.eye(D))))
    expected, error = deterministic_advi.LOSS, np.std(losses) / np.sqrt(len(keys))
    assert abs(np.mean(losses) - expected) < 4 * error + expected * D**2 / draws


def test_mean_field_deterministic_advi_is_stationary_on_its_draws(dtype: str) -> None:
    """s_i Σ_j P_ij C_ij s_j = 1 for standard deviations s and the draws' covariance C."""
    path = deterministic_advi.mean_field(f, start(), 0.1, KEY, gtol=root_eps(dtype))
    assert_sound(path._replace(seconds=path.steps), dtype)
    (mean, covariance), s = moments(30), np.asarray(path.factor[-1], float)
    np.testing.assert_allclose(s * ((PRECISION * covariance) @ s), 1, atol=10 * root_eps(dtype))
    np.testing.assert_allclose(path.loc[-1], MEAN - s * mean, atol=10 * root_eps(dtype))


def test_deterministic_advi_counts_its_gradients(x64: Any) -> None:
    """The counts are those of the objective written by hand; a Hessian-vector product counts as two gradients."""
    target, M = counted(), 30
    path = deterministic_advi.mean_field(target.potential, start(), 0.1, KEY)
    jax.effects_barrier()
    mean, covariance = moments(M)
    second = covariance + np.outer(mean, mean)

    def objective(x: Any) -> Any:
        shift, s = x[:D] - MEAN, jnp.exp(x[D:])
        cross = (PRECISION @ shift) @ (s * mean)
        return 0.5 * shift @ PRECISION @ shift + cross + 0.5 * s @ (PRECISION * second) @ s - x[D:].sum()

    products: list[None] = []
    gradient, hessian = jax.jit(jax.grad(objective)), jax.jit(jax.hessian(objective))

    def product(x: Any, v: Any) -> Any:
        products.append(None)
        return np.asarray(hessian(x) @ v)

    x = np.r_[np.zeros(D), np.full(D, np.log(0.1))]
    result = optimize.minimize(objective, x, jac=gradient, hessp=product, method="trust-ncg")
    assert path.gradients[-1] == M * (result.nfev + 2 * len(products))
    assert path.steps[-1] == result.nit
    assert len(target.calls) == M * (result.nfev + len(products))


def test_deterministic_advi_stops_at_nan_and_at_its_budget(x64: Any) -> None:
    """Both return the iterates so far: where the density is NaN, and when the budget is spent."""
    np.testing.assert_array_equal(deterministic_advi.fit(nowhere, start(), 0.1, KEY, draws=30).loc, np.zeros((1, D)))
    path = deterministic_advi.mean_field(f, start(), 0.1, KEY, budget=200)
    assert path.gradients[-1] <= 200 + 2 * 30


# --- BlackJAX ---


# --- Adam with other estimators ---


ESTIMATORS = {"path": adam_estimators.path_gradient, "price": adam_estimators.price_gradient}


def test_estimators_agree_in_the_mean_and_path_gradients_vanish_at_the_posterior(x64: Any) -> None:
    """Of a quadratic f, Price's gradient in L has no variance, and the path gradient none where q is the posterior."""
    factor = np.tril(np.asarray(spd(4, D)))
    eps = jax.random.normal(KEY, (20_000, D))
    found = {name: estimator(f, jnp.ones(D), factor, eps) for name, estimator in ESTIMATORS.items()}
    exact = PRECISION @ (1 - MEAN), PRECISION @ factor - np.linalg.inv(factor).T
    np.testing.assert_allclose(found["price"][1], exact[1], atol=1e-10)
    for loc, _ in found.values():
        np.testing.assert_allclose(loc, exact[0], atol=5 * np.abs(PRECISION @ factor).sum(1).max() / np.sqrt(20_000))
    np.testing.assert_allclose(found["path"][1], exact[1], atol=10 * np.abs(exact[1]).max() / np.sqrt(20_000))
    for gradient in adam_estimators.path_gradient(f, jnp.asarray(MEAN, float), np.linalg.cholesky(COVARIANCE), eps[:8]):
        np.testing.assert_allclose(gradient, 0, atol=1e-10)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_adam_with_an_estimator_arrives_at_a_gaussian(name: str, dtype: str) -> None:
    """Only path gradients have no variance there; the mean's gradient by Price has that of ∇f at eight draws."""
    walk = adam_estimators._walk(f, ESTIMATORS[name], True, D, jnp.dtype(dtype), 0.1, 1000)
    path = walk(adam_estimators._initial(start(), True, 0.1, 1000), KEY, 8)
    assert_sound(path, dtype)
    assert loss(path) < {"path": 10 * root_eps(dtype), "price": 0.01}[name]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_adam_with_an_estimator_finds_the_best_diagonal_gaussian(name: str, x64: Any) -> None:
    walk = adam_estimators._walk(f, ESTIMATORS[name], False, D, jnp.dtype(float), 0.1, 2000)
    path = walk(adam_estimators._initial(start(), False, 0.1, 2000), KEY, 8)
    np.testing.assert_allclose(np.log(path.factor[-1] ** 2 * np.diag(PRECISION)), 0, atol=0.02)


@pytest.fixture
def blackjax_vi() -> Any:
    pytest.importorskip("blackjax")
    from benchmarks.posteriordb import blackjax_vi

    return blackjax_vi


def test_fullrank_vi_is_exact_on_a_gaussian(blackjax_vi: Any, dtype: str) -> None:
    path = blackjax_vi.fullrank_vi(f, start(), 0.1, KEY, rate=0.1, draws=20)
    assert_sound(path, dtype)
    assert loss(path) < root_eps(dtype)


def test_meanfield_vi_finds_the_best_diagonal_gaussian(blackjax_vi: Any, dtype: str) -> None:
    """Variances 1/P_ii. Noise does not vanish there: Adam at rate r fluctuates by about r in units of its parameters."""
    path = blackjax_vi.meanfield_vi(f, start(), 0.1, KEY, rate=0.03, draws=20)
    assert_sound(path, dtype)
    np.testing.assert_allclose(np.log(path.factor[-1] ** 2 * np.diag(PRECISION)), 0, atol=4 * 0.03)


def test_blackjax_counts_its_gradients(blackjax_vi: Any) -> None:
    for method in (blackjax_vi.fullrank_vi, blackjax_vi.meanfield_vi):
        target = counted()
        path = method(target.potential, start(), 0.1, KEY, draws=4, steps=3)
        jax.effects_barrier()
        assert path.gradients.tolist() == [4, 8, 12]
        assert len(target.calls) == 12


def test_pathfinder_approximates_a_gaussian(blackjax_vi: Any, x64: Any) -> None:
    """The moments of weighted draws lose d(d+3)/(4n) nats, n being their effective number; 200 of 2000 are required."""
    weighted = blackjax_vi.pathfinder_resampled(f, start(), 0.1, KEY)
    best = blackjax_vi.pathfinder(f, start(), 0.1, KEY)
    assert loss(weighted) < 4 * D * (D + 3) / (4 * 200)
    assert loss(weighted) < loss(best) < 1.0
    assert weighted.gradients[-1] - best.gradients[-1] == pytest.approx(20 * blackjax_vi.DRAWS / 3)
