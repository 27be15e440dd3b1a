# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The whitened closed forms of a Gaussian step agree with dense algebra and with NumPyro's KL.

S₊ = S + ρ K⁻ᵀ M K⁻¹,   m₊ = m − ρ S₊⁻¹ K⁻ᵀ g
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_close, kl, root_eps, spd

from numpyro_natgrad.distributions import gaussian
from numpyro_natgrad.distributions.gaussian import GaussianTangent

D, RANK, MARGIN = 6, 4, 0.05
# Eigenvalues of M: a variance that grows tenfold at ρ = 1, and one that shrinks to a thirtieth.
SPECTRUM = np.array([-0.9, -0.3, 0.0, 0.7, 4.0, 30.0])


class Case(NamedTuple):
    """A tangent, with the dense M that it stands for."""

    tangent: GaussianTangent
    curvature: np.ndarray


def dense() -> Case:
    curvature = rotation(D, 1) * SPECTRUM @ rotation(D, 1).T
    return Case(gaussian.tangent(jnp.asarray(slope()), jnp.asarray(curvature)), curvature)


def diagonal() -> Case:
    return Case(GaussianTangent(jnp.asarray(slope()), jnp.asarray(SPECTRUM, float), None), np.diag(SPECTRUM))


def sketched() -> Case:
    vectors, values = rotation(D, 2)[:, :RANK], SPECTRUM[[0, 1, 4, 5]]
    curvature = vectors * values @ vectors.T
    return Case(GaussianTangent(jnp.asarray(slope()), jnp.asarray(values), jnp.asarray(vectors)), curvature)


def rotation(d: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def slope() -> np.ndarray:
    return np.random.default_rng(3).normal(size=D)


CASES = {"dense": dense, "diagonal": diagonal, "sketched": sketched}
LENGTHS = [0.01, 0.3, 1.0]
M, K = np.linspace(-1, 2, D), np.linalg.cholesky(spd(4, D, low=0.01, high=3.0))


@pytest.fixture(params=CASES)
def case(request, dtype) -> Case:
    return CASES[request.param]()


def natural_step(case: Case, rho: float) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(mean, covariance) before and after, by dense algebra in double precision."""
    back = np.linalg.inv(K)
    precision = back.T @ back + rho * back.T @ case.curvature @ back
    covariance = np.linalg.inv(precision)
    mean = M - rho * covariance @ back.T @ np.asarray(case.tangent.slope, np.float64)
    return (M, K @ K.T), (mean, covariance)


def matrix(contraction: jax.Array) -> np.ndarray:
    return np.diag(contraction) if contraction.ndim == 1 else np.asarray(contraction)


@pytest.mark.parametrize("rho", LENGTHS)
def test_gaussian_step_adds_rho_times_the_gradient_to_natural_parameters(case, dtype, rho):
    _, (mean, covariance) = natural_step(case, rho)
    factor = K @ matrix(gaussian.relative_factor(case.tangent, rho, MARGIN))
    shift = K @ np.asarray(gaussian.mean_shift(case.tangent, rho, MARGIN))
    assert_close(M + shift, mean, root_eps(dtype))
    assert_close(factor @ factor.T, covariance, root_eps(dtype))


@pytest.mark.parametrize("rho", LENGTHS)
@pytest.mark.parametrize("limit", [0.01, 1.0, 1e9])
def test_a_step_whose_widening_waits_moves_the_mean_alike_and_widens_by_a_fraction(case, dtype, rho, limit):
    """The precision changes by ρM whose negative eigenvalues are scaled by limit/δ², and the mean by the whole step."""
    waiting = gaussian.wait(case.tangent, rho, limit, MARGIN)
    before, after = natural_step(case, rho)
    values, vectors = np.linalg.eigh(case.curvature)
    moved = np.linalg.inv(K) @ (after[0] - before[0])
    squares = (vectors.T @ moved) ** 2 * (1 + rho * values)
    fractions = np.minimum(1.0, limit / squares)
    held = vectors * np.where(values < 0, fractions * values, values) @ vectors.T
    covariance = K @ np.linalg.inv(np.eye(D) + rho * held) @ K.T
    assert_close(gaussian.mean_shift(waiting, rho, MARGIN), moved, root_eps(dtype))
    factor = K @ matrix(gaussian.relative_factor(waiting, rho, MARGIN))
    assert_close(factor @ factor.T, covariance, root_eps(dtype))
    new = after[0], covariance
    assert_close(gaussian.kl(waiting, rho, MARGIN).forward, kl(before, new), root_eps(dtype))
    assert_close(gaussian.kl(waiting, rho, MARGIN).reverse, kl(new, before), root_eps(dtype))


@pytest.mark.parametrize("rho", LENGTHS)
def test_a_step_that_does_not_wait_promises_its_kl_over_rho(case, dtype, rho):
    promised = gaussian.kl(case.tangent, rho, MARGIN).predicted
    assert_close(promised, gaussian.kl(case.tangent, rho, MARGIN).forward / rho, root_eps(dtype))


@pytest.mark.parametrize("rho", LENGTHS)
def test_forward_and_reverse_kl_equal_numpyros(case, dtype, rho):
    before, after = natural_step(case, rho)
    assert_close(gaussian.kl(case.tangent, rho, MARGIN).forward, kl(before, after), root_eps(dtype))
    assert_close(gaussian.kl(case.tangent, rho, MARGIN).reverse, kl(after, before), root_eps(dtype))


@pytest.mark.parametrize("rho", LENGTHS)
@pytest.mark.parametrize("make", [dense, sketched])
def test_precision_change_is_rho_times_the_curvature(make, dtype, rho):
    case = make()
    assert_close(gaussian.precision_change(case.tangent, rho, MARGIN), rho * case.curvature, root_eps(dtype))


def test_new_scale_is_a_cholesky_factor(case, dtype):
    factor = matrix(gaussian.relative_factor(case.tangent, 1.0, MARGIN))
    assert_close(np.triu(factor, 1), np.zeros((D, D)), 0.0)
    assert (np.diag(factor) > 0).all()


def test_step_of_length_zero_changes_nothing(case, dtype):
    assert_close(gaussian.mean_shift(case.tangent, 0.0, MARGIN), np.zeros(D), 0.0)
    assert_close(matrix(gaussian.relative_factor(case.tangent, 0.0, MARGIN)), np.eye(D), root_eps(dtype))
    assert abs(float(gaussian.kl(case.tangent, 0.0, MARGIN).forward)) <= root_eps(dtype) ** 2 * D


def test_squared_norm_is_twice_the_kl_of_a_short_step(case, x64):
    """KL(ρv) = ½ρ²‖v‖² + O(ρ³): the remainder falls by 8 where ρ falls by 2."""
    rhos = np.array([4e-3, 2e-3, 1e-3])
    short = 0.5 * rhos**2 * float(gaussian.squared_norm(case.tangent))
    for direction in (0, 1):
        remainder = np.abs(np.array([float(gaussian.kl(case.tangent, r, MARGIN)[direction]) for r in rhos]) - short)
        np.testing.assert_allclose(remainder[:-1] / remainder[1:], 8.0, rtol=0.1)


def test_squared_norm_equals_dense_algebra(case, dtype):
    expected = np.sum(slope() ** 2) + 0.5 * np.sum(case.curvature**2)
    assert_close(gaussian.squared_norm(case.tangent), expected, root_eps(dtype))


def test_batched_step_equals_a_loop(dtype):
    curvatures = np.stack([spd(seed, 3) - np.eye(3) for seed in range(2)])
    slopes = np.random.default_rng(5).normal(size=(2, 3))
    together = gaussian.tangent(jnp.asarray(slopes), jnp.asarray(curvatures))
    alone = [gaussian.tangent(jnp.asarray(g), jnp.asarray(c)) for g, c in zip(slopes, curvatures, strict=True)]
    for whole in (gaussian.mean_shift, gaussian.relative_factor, gaussian.precision_change):
        expected = np.stack([np.asarray(whole(t, 0.5, MARGIN)) for t in alone])
        assert_close(whole(together, 0.5, MARGIN), expected, root_eps(dtype))
    for total, *each in zip(*(gaussian.kl(t, 0.5, MARGIN) for t in (together, *alone)), strict=True):
        assert_close(total, sum(map(float, each)), root_eps(dtype))
    assert_close(gaussian.squared_norm(together), sum(float(gaussian.squared_norm(t)) for t in alone), root_eps(dtype))


@pytest.mark.parametrize("k", [1, 3, D])
def test_sketched_curvature_equals_the_matrix_on_its_probes(dtype, k):
    curvature, v = rotation(D, 1) * SPECTRUM @ rotation(D, 1).T, rotation(D, 6)[:, :k]
    image = curvature @ v
    sketch = gaussian.sketched_tangent(jnp.asarray(slope()), jnp.asarray(v), jnp.asarray(image))
    seen = np.asarray(sketch.vectors * sketch.values @ sketch.vectors.T)
    assert_close(seen @ v, image, root_eps(dtype) * np.linalg.norm(SPECTRUM))
    rest = np.eye(D) - v @ v.T
    np.testing.assert_allclose(rest @ seen @ rest, 0.0, atol=root_eps(dtype) * np.abs(SPECTRUM).max())
    gram = np.asarray(sketch.vectors.T @ sketch.vectors)
    assert_close(gram, np.eye(len(gram)), root_eps(dtype))


margins = st.sampled_from([0.05, 0.25, 1e-6])


@given(x=st.floats(-1e6, 1e6), margin=margins)
def test_eigenvalue_continuation_is_positive_increasing_and_exact_above_the_margin(x, margin):
    with jax.enable_x64(True):
        value, slope = jax.value_and_grad(gaussian.positive_ratio)(x, margin)
        assert value > 0
        assert slope > 0
        if x >= margin - 1:
            assert value == 1 + x


@given(margin=margins)
def test_eigenvalue_continuation_is_continuously_differentiable(margin):
    """One-sided secants at the joint: value margin and slope 1 from both sides."""
    with jax.enable_x64(True):
        joint, h = margin - 1, margin * 1e-4
        assert_close(gaussian.positive_ratio(joint, margin), margin, 1e-9)
        for side in (-h, h):
            secant = (float(gaussian.positive_ratio(joint + side, margin)) - margin) / side
            np.testing.assert_allclose(secant, 1.0, atol=1e-3)
            slope = jax.grad(gaussian.positive_ratio)(joint + side, margin)
            np.testing.assert_allclose(slope, 1.0, atol=1e-3)


spectra = st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4)


@jax.jit
def everything(slope, values, rho):
    t = GaussianTangent(slope, values, jnp.asarray(rotation(4, 7), values.dtype))
    factor = gaussian.relative_factor(t, rho, MARGIN)
    return factor, gaussian.mean_shift(t, rho, MARGIN), gaussian.kl(t, rho, MARGIN).forward, gaussian.squared_norm(t)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@given(values=spectra, slope=st.floats(-1e3, 1e3, width=32), rho=st.sampled_from([1e-3, 0.3, 1.0]))
def test_step_with_any_curvature_keeps_the_covariance_positive_definite(precision, values, slope, rho):
    with jax.enable_x64(precision == "float64"):
        dtype = jnp.dtype(precision)
        slopes = jnp.full(4, slope, dtype)
        factor, shift, nats, squared_norm = everything(slopes, jnp.asarray(values, dtype), jnp.asarray(rho, dtype))
        assert factor.dtype == shift.dtype == nats.dtype == dtype
        assert (jnp.diagonal(factor) > 0).all()
        assert bool(jnp.isfinite(factor).all() & jnp.isfinite(shift).all() & jnp.isfinite(nats))
        assert nats >= -4 * jnp.finfo(dtype).eps
        # No variance grows by more than 1/margin where eigenvalues stay in the exact range.
        if min(values) * rho >= MARGIN - 1:
            assert np.linalg.norm(factor, 2) ** 2 <= (1 + root_eps(precision)) / MARGIN


@given(values=spectra, slope=st.floats(-1e3, 1e3, width=32))
def test_kl_of_a_step_increases_with_rho(values, slope):
    with jax.enable_x64(True):
        nats = [
            float(everything(jnp.full(4, slope, float), jnp.asarray(values, float), rho)[2])
            for rho in np.geomspace(1e-6, 1.0, 25)
        ]
        assert (np.diff(nats) >= -1e-12 * np.array(nats[1:])).all()


# --- linear algebra ---


@pytest.mark.parametrize("damping", [0.0, 0.3, np.linspace(0.1, 1.0, D)], ids=["none", "one", "each"])
@pytest.mark.parametrize("with_scale", [False, True])
def test_scaled_cholesky_solve_is_the_dense_solve_at_any_scale(damping, with_scale, dtype):
    """Parameters differ by twelve orders of magnitude; the errors are relative to each entry's own scale."""
    units = np.geomspace(1e-6, 1e6, D)
    scale = units**2 * np.linspace(0.5, 2.0, D) if with_scale else None
    unit, b = spd(11, D), np.random.default_rng(12).normal(size=D)
    diagonal = np.diag(unit) if scale is None else scale / units**2
    expected = np.linalg.solve(unit + np.diag(damping * diagonal), b)
    found = gaussian.scaled_cholesky_solve(
        jnp.asarray(unit * units[:, None] * units),
        jnp.asarray(b * units),
        damping=damping if np.ndim(damping) == 0 else jnp.asarray(damping),
        scale=None if scale is None else jnp.asarray(scale),
    )
    assert_close(np.asarray(found) * units, expected, root_eps(dtype))
