# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The Hessian of the guide's KL to itself, computed through the loss, is the Fisher matrix JᵀFJ of the textbook.

It is exact where NumPyro knows the KL, and right in the mean over draws where it does not.
"""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from jax.flatten_util import ravel_pytree
from numpyro import distributions as dist
from numpyro.distributions import biject_to, constraints
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from oracles import assert_close, captured_loss, form, root_eps, spd
from scipy.special import polygamma
from tables import GUIDES, started

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.blocks.fisher.solvers import Cholesky, ConjugateGradients, FisherOperator, RowCholesky
from numpyro_natgrad.distributions.surrogate import fisher_surrogate, kl_surrogate, squared_score_surrogate
from numpyro_natgrad.guide.handlers import Frozen
from numpyro_natgrad.guide.trace import trace_loss
from numpyro_natgrad.options import CONSTANTS

real, positive = constraints.real, constraints.positive


def trigamma(x: Any) -> Any:
    return polygamma(1, np.asarray(x, float))


def gamma_block(a: float, b: float) -> np.ndarray:
    return np.array([[trigamma(a), -1 / b], [-1 / b, a / b**2]])


class Block(NamedTuple):
    """A distribution, its arguments with constraints and values, and their Fisher matrix in closed form."""

    cls: Any
    arguments: dict[str, tuple[Any, Any]]
    fisher: np.ndarray
    exact: bool = True


CONCENTRATION = np.array([0.8, 2.0, 3.5])
NU, SCALE = 5.0, 1.4
FAMILIES = {
    "Normal": Block(dist.Normal, {"loc": (real, 0.3), "scale": (positive, 0.7)}, np.diag([1, 2]) / 0.7**2),
    "LogNormal": Block(dist.LogNormal, {"loc": (real, 0.3), "scale": (positive, 0.7)}, np.diag([1, 2]) / 0.7**2),
    "Gamma": Block(dist.Gamma, {"concentration": (positive, 2.3), "rate": (positive, 1.7)}, gamma_block(2.3, 1.7)),
    "Beta": Block(
        dist.Beta,
        {"concentration1": (positive, 2.5), "concentration0": (positive, 0.9)},
        np.diag(trigamma([2.5, 0.9])) - trigamma(3.4),
    ),
    "Dirichlet": Block(
        dist.Dirichlet,
        {"concentration": (positive, CONCENTRATION)},
        np.diag(trigamma(CONCENTRATION)) - trigamma(CONCENTRATION.sum()),
    ),
    "Exponential": Block(dist.Exponential, {"rate": (positive, 1.7)}, np.array([[1 / 1.7**2]]), exact=False),
    "Laplace": Block(dist.Laplace, {"loc": (real, 0.3), "scale": (positive, 0.7)}, np.eye(2) / 0.7**2, exact=False),
    "InverseGamma": Block(
        dist.InverseGamma,
        {"concentration": (positive, 2.3), "rate": (positive, 1.7)},
        gamma_block(2.3, 1.7),
        exact=False,
    ),
    "StudentT": Block(
        lambda loc, scale: dist.StudentT(NU, loc, scale),
        {"loc": (real, 0.3), "scale": (positive, SCALE)},
        np.diag([NU + 1, 2 * NU]) / ((NU + 3) * SCALE**2),
        exact=False,
    ),
}
EXACT = [name for name, family in FAMILIES.items() if family.exact]
SAMPLED = [name for name, family in FAMILIES.items() if not family.exact]


def model() -> None:
    """Any model with the same latents: the Hessian of KL does not depend on it."""
    for name, family in FAMILIES.items():
        support = family.cls(**{a: v for a, (_, v) in family.arguments.items()}).support
        size = (len(CONCENTRATION),) if name == "Dirichlet" else ()
        z = numpyro.sample(name, dist.ImproperUniform(support, (), size))
        numpyro.factor(f"{name}_factor", -jnp.sum(jnp.exp(z)))


def guide() -> None:
    for name, family in FAMILIES.items():
        arguments = {
            a: numpyro.param(f"{name}/{a}", jnp.asarray(value), constraint=constraint)
            for a, (constraint, value) in family.arguments.items()
        }
        numpyro.sample(name, family.cls(**arguments))


def textbook(name: str, params: Any) -> np.ndarray:
    """JᵀFJ in NumPyro's unconstrained parameters."""
    family = FAMILIES[name]
    blocks = []
    for a, (constraint, _) in family.arguments.items():
        x = jnp.atleast_1d(params[f"{name}/{a}"])
        blocks.append(np.diag(np.asarray(jax.vmap(jax.grad(biject_to(constraint)))(x))))
    jacobian = jax.scipy.linalg.block_diag(*blocks)
    return np.asarray(jacobian.T @ family.fisher @ jacobian)


def fisher(fn: Any, params: Any, names: list[str], densities: Any) -> jax.Array:
    """F of the loss with lengths in the place of the given sites' densities: its derivative along d is ½ dᵀFd."""
    flat, unravel = ravel_pytree([params[name] for name in names])

    def length(x: jax.Array) -> jax.Array:
        with Frozen(densities):
            return fn({**params, **dict(zip(names, unravel(x), strict=True))})[0]

    return form(length, flat)


@cache
def fishers(precision: str, particles: int) -> tuple[Any, Any]:
    """Of every family, at 40 keys."""
    at, params = captured_loss(model, guide, Trace_ELBO(num_particles=particles))

    @jax.jit
    def all_of(key):
        return {
            name: fisher(
                at(key),
                params,
                [f"{name}/{a}" for a in family.arguments],
                {name: kl_surrogate if family.exact else squared_score_surrogate},
            )
            for name, family in FAMILIES.items()
        }

    found = [jax.tree.map(np.asarray, all_of(key)) for key in random.split(random.key(0), 40)]
    return params, {name: np.stack([f[name] for f in found]) for name in FAMILIES}


@pytest.mark.parametrize("name", EXACT)
def test_hessian_of_kl_equals_the_textbook_fisher_matrix(name, dtype):
    params, found = fishers(dtype, 1)
    assert_close(found[name][0], textbook(name, params), root_eps(dtype))
    assert np.ptp(found[name], axis=0).max() <= root_eps(dtype) * np.abs(found[name]).max()


@pytest.mark.parametrize("particles", [1, 400])
@pytest.mark.parametrize("name", SAMPLED)
def test_outer_product_of_scores_is_unbiased_for_the_fisher_matrix(name, particles, x64):
    """The mean over 40 keys is the textbook's within 4.5 standard errors, which shrink as n^(−1/2)."""
    params, found = fishers("float64", particles)
    sample, expected = found[name], textbook(name, params)
    error = sample.std(0) / np.sqrt(len(sample))
    assert (np.abs(sample.mean(0) - expected) <= 4.5 * error + root_eps("float64")).all()
    # Every sample is positive semidefinite, even that of a single draw.
    assert np.linalg.eigvalsh(sample).min() >= -root_eps("float64") * np.abs(sample).max()


@pytest.mark.parametrize("name", SAMPLED)
def test_error_of_the_score_estimate_falls_as_one_over_root_draws(name, x64):
    """Spread over keys, 1 draw against 400: 20 times less, within a factor of 3 for a heavy-tailed square of scores."""
    one, many = fishers("float64", 1)[1][name], fishers("float64", 400)[1][name]
    ratio = np.sqrt((one.std(0) ** 2).sum() / (many.std(0) ** 2).sum())
    assert 20 / 3 <= ratio <= 20 * 3


# --- structured guides ---

N = 2000
LOSSES = {"Trace_ELBO": Trace_ELBO, "TraceGraph_ELBO": TraceGraph_ELBO, "TraceMeanField_ELBO": TraceMeanField_ELBO}


@pytest.mark.parametrize("loss", LOSSES)
def test_fisher_of_a_dependent_site_is_averaged_over_its_parent(loss, x64):
    """z₂ | z₁ ~ N(shift + slope z₁, s₂): F(shift, slope) = E[(1, z₁)ᵀ(1, z₁)]/s₂², and 2 for log s₂.

    The mean of z₁ and of z₁² over 2000 draws have standard errors s₁/√n and √(2s₁⁴ + 4m₁²s₁²)/√n.
    """
    at, params = started("structured", "float64")
    fn = at(random.key(0), LOSSES[loss](num_particles=N))
    names = ["shift", "slope", "s2"]
    found = jax.jit(lambda: fisher(fn, params, names, {"z2": kl_surrogate}))()
    m, s, s2 = 0.1, 0.5, 0.5
    expected = np.array([[1, m, 0], [m, m**2 + s**2, 0], [0, 0, 2 * s2**2]]) / s2**2
    errors = np.array([[0, s, 0], [s, np.sqrt(2 * s**4 + 4 * m**2 * s**2), 0], [0, 0, 0]]) / s2**2 / np.sqrt(N)
    assert (np.abs(found - expected) <= 4.5 * errors + root_eps("float64")).all()


def test_cross_terms_between_parent_and_child_vanish(x64):
    """Cross terms vanish: a conditional score has mean zero given what it is conditioned on, draw by draw."""
    at, params = started("structured", "float64")
    names = ["m1", "s1", "shift", "slope", "s2"]
    found = jax.jit(lambda: fisher(at(random.key(0)), params, names, dict.fromkeys(["z1", "z2"], kl_surrogate)))()
    np.testing.assert_allclose(found[:2, 2:], 0.0, atol=root_eps("float64"))
    assert_close(found[:2, :2], np.diag([1 / 0.5**2, 2.0]), root_eps("float64"))


@pytest.mark.parametrize("guide", [name for name, case in GUIDES.items() if case.kl_hessian])
def test_fisher_matrix_is_symmetric_positive_semidefinite(guide, x64):
    at, params = started(guide, "float64")
    fn = at(random.key(0), Trace_ELBO(num_particles=2))
    densities = {name: fisher_surrogate(site.fisher_estimate) for name, site in trace_loss(fn, params).sites.items()}
    found = np.asarray(jax.jit(lambda: fisher(fn, params, sorted(GUIDES[guide].kl_hessian), densities))())
    assert np.abs(found).max() > 0
    assert_close(found, found.T, root_eps("float64"))
    assert np.linalg.eigvalsh(found).min() >= -root_eps("float64") * np.abs(found).max()


# --- solvers ---


DAMPING, TOLERANCE = CONSTANTS.fisher_damping, CONSTANTS.fisher_cg_tolerance
SOLVERS = {
    "dense": Cholesky(DAMPING, by_array=True),
    "conjugate gradients": ConjugateGradients(DAMPING, TOLERANCE, CONSTANTS.fisher_cg_steps),
}


def operator_of(matrix: np.ndarray) -> FisherOperator:
    """The operator of a dense matrix, of one array of parameters."""
    f = jnp.asarray(matrix)
    return FisherOperator({"x": jnp.ones(len(matrix))}, lambda x: f @ x, random.key(0))


def test_dense_and_iterative_solvers_solve_the_damped_system(dtype):
    """Dense damping is relative to the diagonal, that of conjugate gradients to the rows, by the same factor."""
    matrix, slope = spd(3, 12, low=1.0, high=10.0), np.linspace(-1, 1, 12)
    expected = np.linalg.solve(matrix, slope)
    size = np.sqrt(expected @ matrix @ expected)
    for solver in SOLVERS.values():
        v = np.asarray(solver.solve(operator_of(matrix), jnp.asarray(slope)), np.float64)
        error = v - expected
        # In the Fisher norm, where a residual of 1 % and a condition number of 10 leave at most √10 %.
        assert np.sqrt(error @ matrix @ error) <= np.sqrt(10) * TOLERANCE * size


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_are_solved_each_for_itself(axis, dtype):
    """Three rows with three parameters each, in two arrays; the oracle solves with the blocks of the whole matrix."""
    rows = 3
    params = {"a": jnp.ones((rows, 2) if axis == 0 else (2, rows)), "b": jnp.ones(rows)}
    each = jnp.arange(rows)
    numbers = np.asarray(ravel_pytree({"a": jnp.stack([each, each], axis=1 - axis), "b": each})[0])  # of the rows
    same = numbers[:, None] == numbers
    matrix = spd(4, 9, low=1.0, high=100.0) * same
    slope = np.linspace(-1, 2, 9)
    # One row has collapsed, and the batch lacks another.
    scale = np.select([numbers == 0, numbers == 1], [1e5, 0.0], 1.0)
    matrix, slope = matrix * np.outer(scale, scale), slope * scale
    solver = RowCholesky(DAMPING, {"a": axis, "b": 0})
    found = solver.solve(operator_of(matrix)._replace(params=params), jnp.asarray(slope, dtype))
    damped = matrix + np.diag(DAMPING * np.diag(matrix) + (np.diag(matrix) == 0))
    expected = np.linalg.solve(damped, slope)
    np.testing.assert_allclose(
        np.asarray(found) * np.maximum(scale, 1), expected * np.maximum(scale, 1), rtol=100 * root_eps(dtype)
    )


def test_one_collapsed_parameter_does_not_damp_the_others(dtype):
    """A local row of scale 1e-5 has an entry of 1e10 in the Fisher matrix, and a gradient to match."""
    matrix, slope = np.diag([1e10, 4.0, 0.0, 1.0]), np.array([1e5, 1.0, 0.0, 1.0])
    v = np.asarray(SOLVERS["conjugate gradients"].solve(operator_of(matrix), jnp.asarray(slope, dtype)), np.float64)
    np.testing.assert_allclose(v, [1e-5, 0.25, 0.0, 1.0], rtol=TOLERANCE)


def test_zero_row_of_the_fisher_matrix_leaves_other_parameters_finite(dtype):
    matrix = np.diag([4.0, 0.0, 1.0])
    v = SOLVERS["dense"].solve(operator_of(matrix), jnp.asarray([1.0, 0.0, 1.0]))
    # Damping lengthens the diagonal (4, 0, 1) by ε (4, 0, 1) + ε times its mean 5/3.
    damped = np.diag(matrix) * (1 + DAMPING) + DAMPING * 5 / 3
    np.testing.assert_allclose(v, [1.0, 0.0, 1.0] / damped, rtol=root_eps(dtype))


# --- fits ---


def poisson(y: Any) -> None:
    rate = numpyro.sample("rate", dist.Gamma(2.0, 0.5))
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Poisson(rate), obs=y)


def gamma_guide(y: Any) -> None:
    a = numpyro.param("a", 2.0, constraint=positive)
    b = numpyro.param("b", 0.5, constraint=positive)
    numpyro.sample("rate", dist.Gamma(a, b))


@pytest.mark.parametrize("solver", SOLVERS)
def test_gamma_guide_by_kl_hessian_reaches_the_poisson_posterior(solver, x64, monkeypatch):
    """Gamma(2 + Σy, 1/2 + n). The path gradient has no noise at the posterior, so that the fit converges to any precision."""
    monkeypatch.setattr("numpyro_natgrad.blocks.partition.damped_solver", lambda *_, **__: SOLVERS[solver])
    y = jnp.array([3.0, 5.0, 4.0, 7.0, 2.0, 6.0])
    svi = SVI(poisson, gamma_guide, NaturalGradient(fisher="kl_hessian"), Trace_ELBO(num_particles=8))
    result = svi.run(random.key(0), 200, y, progress_bar=False)
    assert f"Hessian of KL (closed form), {solver}" in svi.optim.report(svi, result.state, y)
    fitted = dist.Gamma(result.params["a"], result.params["b"])
    assert dist.kl_divergence(fitted, dist.Gamma(2.0 + y.sum(), 0.5 + len(y))) < 1e-6
