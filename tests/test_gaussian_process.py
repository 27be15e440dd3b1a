# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""With a Gaussian likelihood one step of length 1 is Titsias' (2009) optimal q(u); classification nears its optimum.

"VGP and SVGP with a natural-gradient step of length 1 are GPR and SGPR": Salimbeni, Eleftheriadis & Hensman (2018).
"""

import runpy
import sys
from functools import cache
from typing import Any

import _common
import gp_classification as gp
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from jax import random
from numpyro import distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from oracles import assert_close, best_logistic_gaussian, kl, logistic_bound, root_eps, walk
from tables import tiers

from numpyro_natgrad import NaturalGradient

RNG = np.random.default_rng(0)
X, Z = RNG.uniform(-2, 2, (40, 2)), RNG.uniform(-2, 2, (6, 2))
Y = np.sin(2 * X[:, 0]) + 0.3 * RNG.normal(size=40)
VARIANCE, LENGTHSCALE, NOISE = 1.5, np.array([0.8, 1.3]), 0.3


def covariance(a: Any, b: Any, variance: float = VARIANCE, lengthscale: Any = LENGTHSCALE) -> np.ndarray:
    return variance * np.exp(-0.5 * (((a[:, None] - b) / lengthscale) ** 2).sum(-1))


def prior(z: Any, variance: float = VARIANCE, lengthscale: Any = LENGTHSCALE) -> np.ndarray:
    return covariance(z, z, variance, lengthscale) + gp.JITTER * variance * np.eye(len(z))


def regression(whitened: bool) -> Any:
    """Sparse GP regression; f given u is integrated: E log N(y | f, σ²) = log N(y | E f, σ²) − var f / 2σ²."""

    def model(x: Any, y: Any, z: Any) -> None:
        weights, rest = gp.conditional(x, z, VARIANCE, jnp.asarray(LENGTHSCALE, float))
        root = jnp.linalg.cholesky(jnp.asarray(prior(Z)))
        if whitened:
            v = numpyro.sample("v", dist.Normal(0, 1).expand([len(Z)]).to_event(1))
        else:
            u = numpyro.sample("u", dist.MultivariateNormal(jnp.zeros(len(Z)), scale_tril=root))
            v = jax.scipy.linalg.solve_triangular(root, u, lower=True)
        numpyro.factor("rest", -jnp.sum(rest) / (2 * NOISE**2))
        numpyro.sample("y", dist.Normal(weights @ v, NOISE).to_event(1), obs=y)

    return model


def titsias() -> tuple[np.ndarray, np.ndarray]:
    """q(u): with A = K_zz + K_zx K_xz/σ², N(K_zz A⁻¹ K_zx y/σ², K_zz A⁻¹ K_zz)."""
    k, cross = prior(Z), covariance(Z, X)
    a = k + cross @ cross.T / NOISE**2
    return k @ np.linalg.solve(a, cross @ Y) / NOISE**2, k @ np.linalg.solve(a, k)


@pytest.mark.parametrize("whitened", [True, False])
def test_one_step_is_titsias_optimal_posterior(whitened, dtype):
    model = regression(whitened)
    svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(1.0, max_kl=None), Trace_ELBO(num_particles=2))
    args = tuple(map(jnp.asarray, (X, Y, Z)))
    state, _ = jax.jit(svi.update)(svi.init(random.key(0), *args), *args)
    found = {name: np.asarray(x, float) for name, x in svi.get_params(state).items()}
    root = np.linalg.cholesky(prior(Z)) if whitened else np.eye(len(Z))
    mean, tril = root @ found["auto_loc"], root @ found["auto_scale_tril"]
    expected = titsias()
    if dtype == "float64":
        np.testing.assert_allclose(mean, expected[0], atol=1e-8)
        np.testing.assert_allclose(tril @ tril.T, expected[1], atol=1e-8)
    assert kl((mean, tril @ tril.T), expected) < {"float64": 1e-8, "float32": 1e-4}[dtype]


def small(batch: int | None = None) -> tuple[gp.Problem, gp.Split, gp.Split, jax.Array]:
    train, test = gp.digits(150)
    inducing = train.x[:12]
    return gp.problem(train, inducing, batch), train, test, inducing


@pytest.mark.slow
def test_hyperparameters_take_the_steps_of_optax_alone():
    """Adam takes the same steps on the gradients that NumPyro computes at the iterates."""
    problem, *_ = small()
    adam = optax.adam(0.1)
    iterates, slopes = walk(problem.svi(NaturalGradient(fallback_optimizer=adam)), problem.args, 4)
    names = "variance", "lengthscale"
    mine = {name: iterates[0][name] for name in names}
    state = adam.init(mine)
    for slope, after in zip(slopes, iterates[1:], strict=True):
        updates, state = adam.update({name: slope[name] for name in names}, state)
        mine = optax.apply_updates(mine, updates)
        assert_close({name: after[name] for name in names}, mine, root_eps("float32"))
    assert not np.isclose(mine["variance"], iterates[0]["variance"])


#: The minibatch and Adam's rate for the hyperparameters.
FITS = {"fixed": (None, 0.0), "adapted": (None, 0.1), "minibatches": (50, 0.1)}


@cache
def fitted(name: str) -> dict[str, Any]:
    batch, rate = FITS[name]
    problem, *_ = small(batch)
    svi = problem.svi(NaturalGradient(fallback_optimizer=optax.adam(rate)))
    return svi.run(random.key(0), 150, *problem.args, progress_bar=False).params


def gap(params: Any) -> float:
    """Nats between a fit's q(v) and the best one at its hyper-parameters."""
    _, train, _, inducing = small()
    p = {name: np.asarray(x, float) for name, x in params.items()}
    x, y, z = (np.asarray(a, float) for a in (*train, inducing))
    kernel = p["variance"], p["lengthscale"]
    weights = np.linalg.solve(np.linalg.cholesky(prior(z, *kernel)), covariance(z, x, *kernel)).T
    rest, tril = p["variance"] - np.sum(weights**2, 1), p["auto_scale_tril"]
    reached, *_ = logistic_bound(weights, rest, y, p["auto_loc"], tril @ tril.T)
    return best_logistic_gaussian(weights, rest, y)[0] - reached


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "nats"), tiers([("fixed", 0.05), ("adapted", 0.5), ("minibatches", 1.0)], ("fixed", 0.05))
)
def test_gp_classification_approaches_the_best_gaussian(name, nats):
    assert -1e-3 < gap(fitted(name)) < nats


@pytest.mark.slow
def test_gp_classification_predicts_as_well_as_laplace():
    """Log predictive densities differ by less than two standard errors of their mean difference, or are better.

    Four of five rows are classified correctly, to two standard errors (at the optimum 79.96 % of 1647 are).
    """
    _, train, test, inducing = small()
    ours = np.asarray(gp.probability(fitted("adapted"), test.x, inducing), float)
    theirs = gp.laplace(train).predict_proba(np.asarray(test.x, float))[:, 1]
    y = np.asarray(test.y)
    density = lambda p: np.log(np.where(y == 1, p, 1 - p))
    difference = density(ours) - density(theirs)
    assert difference.mean() > -2 * difference.std() / np.sqrt(len(y))
    assert np.mean((ours > 0.5) == y) > 0.8 - 2 * np.sqrt(0.8 * 0.2 / len(y))


@pytest.mark.slow
def test_gp_classification_is_near_nuts(monkeypatch):
    """Means of f at ten images within a fifth of its standard deviation, and these within a fifth.

    The optimum of this family is not the posterior; errors of 1000 draws by NUTS are a few hundredths.
    """
    monkeypatch.setattr(_common, "WARMUP", 300)
    monkeypatch.setattr(_common, "SAMPLES", 500)
    _, train, _, inducing = small()
    params = fitted("fixed")
    v = gp.nuts(gp.best_posterior, params, train, inducing)["v"]
    ours, theirs = (np.asarray(gp.log_odds(x, params, inducing)) for x in (gp.draws(params), v))
    np.testing.assert_array_less(np.abs(ours.mean(0) - theirs.mean(0)) / theirs.std(0), 0.2)
    np.testing.assert_array_less(np.abs(np.log(ours.std(0) / theirs.std(0))), np.log(1.2))


@pytest.mark.slow
def test_gp_classification_example_runs(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "gp.png"
    chosen = {"steps": 3, "adam-steps": 3, "size": 60, "inducing": 5, "batch": 20, "output": picture}
    monkeypatch.setattr(_common, "WARMUP", 20)
    monkeypatch.setattr(_common, "SAMPLES", 20)
    monkeypatch.setattr(sys, "argv", ["gp_classification.py", *(f"--{k}={v}" for k, v in chosen.items())])
    runpy.run_path(gp.__file__, run_name="__main__")
    assert "Hessian of the loss" in capsys.readouterr().out
    assert picture.stat().st_size > 10_000
