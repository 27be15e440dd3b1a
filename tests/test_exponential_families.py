# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Every registered exponential family agrees with the density of its distribution, as NumPyro computes it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributions import CASES, DRAWS, support
from jax import random
from numpyro import distributions as dist
from numpyro.distributions import biject_to
from numpyro.distributions.transforms import ExpTransform
from oracles import root_eps
from scipy.special import polygamma

from numpyro_natgrad.distributions import exponential_family, wrappers
from numpyro_natgrad.distributions.builtin import trigamma_excess
from numpyro_natgrad.distributions.exponential_family import ExponentialFamily

# Densities with a kink, where the trapezoidal rule is of the first order in its spacing.
KINKED = {"Laplace": 5e-3}


def fisher(make: Any, x: jax.Array) -> jax.Array:
    """∇² of the closed form, in unconstrained arguments."""
    return jax.hessian(lambda y: jnp.sum(wrappers.closed_form_kl(make(y))))(x)


@pytest.mark.parametrize("name", CASES)
def test_registered_fisher_is_the_covariance_of_scores(name, x64):
    """The closed form exists. Draws are allowed five standard errors, because there are a few hundred entries."""
    case = CASES[name]
    x, make = case.start()

    @jax.jit
    def both(x: Any) -> Any:
        z, weights = support(case, make(x))
        scores = jax.jacfwd(lambda y: make(y).log_prob(z))(x)
        outer = scores[:, :, None] * scores[:, None, :]
        outer = jnp.where(weights[:, None, None] > 0, outer, 0.0)
        mean = jnp.tensordot(weights, outer, 1)
        error = jnp.sqrt(jnp.tensordot(weights, (outer - mean) ** 2, 1) / DRAWS)
        return fisher(make, x), mean, error, jnp.sum(weights)

    found, mean, error, total = (np.asarray(a) for a in both(x))
    np.testing.assert_allclose(total, 1.0, atol=1e-6 if case.over == "draws" else KINKED.get(name, 1e-6))
    exact = KINKED.get(name, 1e-6) * np.abs(mean).max()
    assert (np.abs(found - mean) <= (5 * error if case.over == "draws" else exact) + 1e-12).all()
    assert np.abs(found).max() > 0


@pytest.mark.parametrize(
    "name", ["Beta", "Geometric (logits)", "VonMises", "StudentT", "ZeroInflatedPoisson", "Weibull"]
)
def test_registered_fisher_in_float32_equals_float64(name):
    def at(precision: bool) -> np.ndarray:
        with jax.enable_x64(precision):
            x, make = CASES[name].start()
            return np.asarray(jax.jit(lambda x: fisher(make, x))(x))

    exact = at(True)
    np.testing.assert_allclose(at(False), exact, atol=3 * root_eps("float32") * np.abs(exact).max())


def families() -> list[str]:
    """Those of the table that are exponential families."""
    made = {name: make(x) for name, (x, make) in ((name, case.start()) for name, case in CASES.items())}
    return [
        name
        for name, fn in made.items()
        if exponential_family.find_exponential_family(type(wrappers.base_distribution(fn))) is not None
    ]


FAMILIES = families()


def natural(fn: Any) -> tuple[ExponentialFamily, jax.Array, dict[str, Any]]:
    base = wrappers.base_distribution(fn)
    family, arguments = exponential_family.find_exponential_family(type(base)), wrappers.distribution_arguments(base)
    assert family is not None
    fixed = {name: arguments[name] for name in family.fixed}
    return family, family.natural(**exponential_family.free_arguments(family, arguments)), fixed


@pytest.mark.parametrize("name", FAMILIES)
def test_registered_family_has_the_density_of_an_exponential_family(name, x64):
    """∇_η log q(z) + ∇A(η) = T(z) whatever η; η ↔ arguments is a bijection; KL is the mean log-ratio.

    KL is a sum over the support where that is possible, and else uses E[T] = ∇A.
    """
    case = CASES[name]
    x, make = case.start()
    fns = make(x), make(x + 0.3 * jnp.cos(jnp.arange(x.size)))
    (family, eta, fixed), (_, other, _) = (natural(fn) for fn in fns)
    base = wrappers.base_distribution(fns[0])
    z = (
        base.sample(random.key(2), (5,))
        if case.over == "draws"
        else wrappers.base_distribution(fns[0]).sample(random.key(2), (50,))
    )

    @jax.jit
    def statistic(at: jax.Array) -> Any:
        made = lambda e: type(base)(**family.arguments(e), **fixed, validate_args=False)
        return jax.jacfwd(lambda e: made(e).log_prob(z))(at) + family.mean(at, **fixed)

    @jax.jit
    def laws(eta: jax.Array, other: jax.Array) -> Any:
        rebuilt = type(base)(**family.arguments(eta), **fixed, validate_args=False)
        again = family.natural(**exponential_family.free_arguments(family, wrappers.distribution_arguments(rebuilt)))
        if fixed:
            return again, 0.0, 0.0, 0.0
        if case.over == "draws":
            ratio = family.mean(eta) @ (eta - other) + family.log_normalizer(other) - family.log_normalizer(eta)
        else:
            points, weights = support(case, make(x))
            ratio = weights @ jnp.where(weights > 0, fns[0].log_prob(points) - fns[1].log_prob(points), 0.0)
        return again, ratio, family.kl(eta, other - eta)[0], family.kl(other, eta - other)[1]

    (one, two), (again, ratio, *nats) = (statistic(eta), statistic(other)), laws(eta, other)
    np.testing.assert_allclose(one, two, atol=1e-9 * np.abs(one).max())
    np.testing.assert_allclose(again, eta, rtol=1e-9)
    np.testing.assert_allclose(nats, [ratio, ratio], rtol=1e-6)


def test_bregman_kl_equals_numpyros(x64):
    """Between points of the table and others beside them."""
    found = 0
    for name in ("Gamma", "Beta", "Dirichlet", "Exponential", "Bernoulli (logits)", "Categorical (probs)"):
        x, make = CASES[name].start()
        old, new = make(x), make(x + 0.3 * jnp.cos(jnp.arange(x.size)))
        (family, eta, _), (_, other, _) = natural(old), natural(new)
        try:
            expected = dist.kl_divergence(old, new)
        except NotImplementedError:
            continue
        np.testing.assert_allclose(jax.jit(family.kl)(eta, other - eta)[0], expected, rtol=1e-6)
        found += 1
    assert found >= 3


@pytest.mark.parametrize(("ratio", "error"), [(0.125, 3e-3), (0.25, 6e-5), (0.5, 4e-8), (2.0, 4e-8), (4.0, 6e-5)])
def test_quadrature_of_kl_has_the_error_that_its_constant_states(ratio, error, x64):
    """For an exponential distribution whose rate is multiplied by ``ratio``: KL = ratio − 1 − log ratio."""
    family, eta = exponential_family.find_exponential_family(dist.Exponential), jnp.array([0.7])
    change = (ratio - 1) * eta
    forward, reverse = ratio - 1 - np.log(ratio), 1 / ratio - 1 + np.log(ratio)
    np.testing.assert_allclose(family.kl(eta, change), [forward, reverse], rtol=error)


def test_trigamma_excess_has_the_error_that_its_constant_states(x64):
    """On both sides of the switch to the series; below it SciPy's trigamma loses a factor of 16 in precision."""
    x = np.array([0.1, 1.0, 7.9, 8.1, 9.0, 20.0])
    np.testing.assert_allclose(trigamma_excess(jnp.asarray(x)), x * polygamma(1, x) - 1, rtol=1e-9)


EXTREMES = np.geomspace(1e-6, 1e6, 60)


def wide(family: ExponentialFamily, eta: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """n starts over twelve orders of magnitude, where there is a bound, and changes over twenty-four."""
    rng = np.random.default_rng(0)
    lower = np.broadcast_to(np.asarray(family.lower, float), eta.shape)
    spread = rng.choice(EXTREMES, (n, eta.size))
    free = rng.normal(size=(n, eta.size)) * 10
    starts = np.where(np.isfinite(lower), np.where(np.isfinite(lower), lower, 0) + spread, free)
    changes = rng.choice([-1.0, 1.0], (n, eta.size)) * np.exp(rng.uniform(-27, 27, (n, eta.size)))
    return jnp.asarray(starts, jnp.result_type(float)), jnp.asarray(changes, jnp.result_type(float))


@pytest.mark.parametrize("name", [n for n in FAMILIES if "Wishart" not in n])
def test_natural_step_stays_in_the_domain(name, dtype):
    """For 3000 starts and changes each the new arguments and their unconstrained values are valid.

    The gradient of the transform does not vanish there, so that later steps can leave them.
    """
    x, make = CASES[name].start()
    base = wrappers.base_distribution(make(x))
    family, eta, _ = natural(base)

    @jax.jit
    def moved(starts: Any, changes: Any) -> Any:
        values = family.arguments(family.step(starts, changes, 0.05))
        known = {argument: type(base).arg_constraints[argument] for argument in values}
        maps = {a: biject_to(known[a]) for a in values}
        unconstrained = {a: maps[a].inv(v) for a, v in values.items()}
        slopes = {a: slope(maps[a], x) for a, x in unconstrained.items()}
        return values, {a: (known[a](v), unconstrained[a], slopes[a]) for a, v in values.items()}

    def slope(transform: Any, x: jax.Array) -> jax.Array:
        basis = jnp.eye(x.shape[-1], dtype=x.dtype) if x.ndim > 1 else jnp.ones(1, x.dtype)
        each = lambda e: jax.jvp(transform, (x,), (jnp.broadcast_to(e, x.shape),))[1]
        return jnp.abs(jax.vmap(each)(basis)).reshape(len(basis), len(x), -1).max(-1)

    values, checks = moved(*wide(family, eta, 3000))
    for argument, value in values.items():
        valid, unconstrained, slopes = checks[argument]
        assert np.isfinite(value).all()
        assert np.asarray(valid).all()
        assert np.isfinite(unconstrained).all()
        assert (np.asarray(slopes) > 0).all()


@pytest.mark.parametrize("name", ["Wishart", "InverseWishart"])
def test_natural_step_keeps_matrices_positive_definite(name, dtype):
    x, make = CASES[name].start()
    family, eta, _ = natural(make(x))
    rng = np.random.default_rng(0)
    changes = rng.normal(size=(3000, eta.size)) * np.exp(rng.uniform(-20, 20, (3000, 1)))
    made = jax.jit(lambda change: family.arguments(family.step(jnp.broadcast_to(eta, change.shape), change, 0.05)))(
        jnp.asarray(changes, eta.dtype)
    )
    matrix = next(np.asarray(x, float) for a, x in made.items() if a.endswith("matrix"))
    assert (np.asarray(made["concentration"]) > 1).all()
    assert np.isfinite(matrix).all()
    assert (np.linalg.eigvalsh(matrix / np.abs(matrix).max((1, 2), keepdims=True)) > -10 * np.finfo(dtype).eps).all()


@pytest.mark.parametrize("name", ["Gamma", "Beta", "Dirichlet", "Chi2"])
def test_inverse_fisher_product_does_not_cancel_in_float32(name):
    """In single precision, over concentrations from 1e-3 to 1e4: F⁻¹g against a dense solve in double precision."""
    x, make = CASES[name].start()
    family, eta, _ = natural(make(x))
    rng = np.random.default_rng(0)
    size = np.exp(rng.uniform(np.log(1e-3), np.log(1e4), (500, 1)))
    points = jnp.asarray(size * rng.uniform(0.5, 2, (500, eta.size)), eta.dtype)
    gradient = jnp.asarray(rng.normal(size=points.shape), eta.dtype)
    v = jax.jit(family.natural_gradient)(points, gradient)
    with jax.enable_x64(True):
        dense = jax.jit(family.fisher)(jnp.asarray(np.asarray(points, float)))
        exact = np.linalg.solve(dense, np.asarray(gradient, float)[..., None])[..., 0]
    error = np.abs(v - exact).max(-1) / np.abs(exact).max(-1)
    assert error.max() < root_eps("float32")


@pytest.mark.parametrize("degrees", [5.0, 1e2, 1e4, 1e6])
def test_inverse_fisher_product_of_a_wishart_does_not_cancel(degrees):
    """Single precision against a dense solve in double precision, whose smallest relative eigenvalue is 10⁻¹² at n = 10⁶."""
    family = exponential_family.find_exponential_family(dist.WishartCholesky)
    eta = np.r_[degrees, degrees * np.array([1.0, 0.3, 2.0, -0.2, 0.5, 1.5])]
    gradient = np.array([0.3, 1.0, -0.4, 0.2, 0.7, -1.0, 0.5])
    v = jax.jit(family.natural_gradient)(jnp.asarray(eta, jnp.float32), jnp.asarray(gradient, jnp.float32))
    with jax.enable_x64(True):
        exact = np.linalg.solve(jax.jit(family.fisher)(jnp.asarray(eta)), gradient)
    np.testing.assert_allclose(v, exact, atol=root_eps("float32") * np.abs(exact).max())


@pytest.mark.parametrize("kappa", [1e2, 1e3, 1e4])
def test_concentrated_von_mises_keeps_its_fisher(kappa, dtype):
    """A″ = 1/(2κ²) + 1/(4κ³) + O(κ⁻⁴) beside A′/κ, whose rounding is 2κ times as large relative to A″."""
    r = np.array([np.cos(0.7), np.sin(0.7)])
    family, eta = exponential_family.find_exponential_family(dist.VonMises), jnp.asarray(kappa * r)
    curvature = 1 / (2 * kappa**2) + 1 / (4 * kappa**3)
    allowed = 1 / kappa**2 + 8 * kappa * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(r @ np.asarray(family.fisher(eta), float) @ r, curvature, rtol=allowed)
    v = np.asarray(family.natural_gradient(eta, jnp.asarray(curvature * r)), float)
    np.testing.assert_allclose(v @ r, 1.0, rtol=allowed)


WRAPPED = {
    "expand": lambda a, b: dist.Cauchy(a, b).expand([4, 3]),
    "mask": lambda a, b: dist.Cauchy(a * jnp.ones(3), b).mask(jnp.array([True, False, True])),
    "to_event": lambda a, b: dist.Cauchy(a * jnp.ones((2, 3)), b).to_event(1),
    "all": lambda a, b: (
        dist.TransformedDistribution(dist.Cauchy(a * jnp.ones(3), b), ExpTransform())
        .expand([2, 3])
        .mask(False)
        .to_event(1)
    ),
    "batch": lambda a, b: dist.Cauchy(a * jnp.ones((2, 1)), b * jnp.ones(3)),
}
COPIES = {"expand": 12, "mask": 2, "to_event": 6, "all": 0, "batch": 6}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_multiply_the_fisher_of_their_base(name, x64):
    """The Fisher matrix is that of one element times the number of unmasked elements; KL has the wrapper's batch shape."""
    made, at = WRAPPED[name](0.3, 0.7), jnp.array([0.3, 0.7])
    assert jax.eval_shape(lambda: wrappers.closed_form_kl(WRAPPED[name](0.3, 0.7))).shape == made.batch_shape
    single = jax.jit(jax.hessian(lambda x: wrappers.closed_form_kl(dist.Cauchy(*x))))(at)
    many = jax.jit(jax.hessian(lambda x: jnp.sum(wrappers.closed_form_kl(WRAPPED[name](*x)))))(at)
    np.testing.assert_allclose(many, COPIES[name] * single, rtol=1e-10, atol=1e-12)


def test_delta_has_no_fisher():
    for fn in (dist.Delta(1.0), dist.Delta(jnp.ones(3)).to_event(1)):
        np.testing.assert_array_equal(wrappers.closed_form_kl(fn), jnp.zeros(fn.batch_shape))
