# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The O(d r²) algebra of N(m, D(I + WWᵀ)D) agrees with dense algebra, and its fits are optima of the family."""

import itertools
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from jax.flatten_util import ravel_pytree
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoBatchedLowRankMultivariateNormal, AutoLowRankMultivariateNormal
from oracles import assert_close, kl, root_eps, spd
from scipy import optimize
from tables import tiers

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.distributions import exponential_family, low_rank_gaussian

D, R, MARGIN = 6, 2, 1e-6


def member(seed: int, d: int = D, r: int = R, size: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """m, s and W of a low-rank Gaussian."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=d), np.exp(rng.normal(size=d) / 2), size * rng.normal(size=(d, r))


def covariance(scale: Any, factor: Any) -> Any:
    return scale[:, None] * scale * (np.eye(len(scale)) + factor @ factor.T)


# --- Fisher and KL ---


@pytest.mark.parametrize("size", [0.0, 1.0, 30.0])
def test_registered_kl_has_the_hessian_of_the_dense_kl(size, x64):
    m, s, w = member(0, 4, size=size)
    x, unravel = ravel_pytree({"loc": m, "cov_factor": w, "cov_diag": s**2})

    def dense(y):
        at = unravel(y)
        return dist.MultivariateNormal(at["loc"], at["cov_factor"] @ at["cov_factor"].T + jnp.diag(at["cov_diag"]))

    expected = jax.jit(jax.hessian(lambda y: dist.kl_divergence(dense(x), dense(y))))(x)
    registered = lambda y: exponential_family.registered_kl(dist.LowRankMultivariateNormal, unravel(x), unravel(y))
    found = jax.jit(jax.hessian(lambda y: registered(y).sum()))(x)
    assert_close(found, expected, root_eps("float64"))


@pytest.mark.parametrize("size", [0.0, 1.0, 1e3])
def test_low_rank_kl_equals_numpyros_dense_kl(size, dtype):
    (m, s, w), (m_new, s_new, w_new) = member(1, size=size), member(2, size=1.0)
    arguments = (jnp.asarray(x) for x in (w, w_new, s_new / s, (m_new - m) / s))
    nats = jax.jit(low_rank_gaussian.forward_kl)(*arguments)
    assert_close(nats, kl((m, covariance(s, w)), (m_new, covariance(s_new, w_new))), root_eps(dtype))


def test_precision_products_equal_the_dense_inverse(dtype):
    w, x = member(3)[2], np.random.default_rng(4).normal(size=(D, 3))
    inverse = np.linalg.inv(np.eye(D) + w @ w.T)
    assert_close(low_rank_gaussian.precision_product(jnp.asarray(w), jnp.asarray(x)), inverse @ x, root_eps(dtype))
    assert_close(low_rank_gaussian.precision_diagonal(jnp.asarray(w)), np.diag(inverse), root_eps(dtype))


def test_procrustes_alignment_undoes_a_rotation(dtype):
    w, angle = member(5)[2], 2.0
    turned = w @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    assert_close(low_rank_gaussian.procrustes_align(jnp.asarray(turned), jnp.asarray(w)), w, root_eps(dtype))


# --- projections ---


def distance(at: Any, precision: Any) -> Any:
    """KL(N(0, Σ) ‖ N(0, S⁻¹)), by NumPyro."""
    scale, factor = at
    guide = dist.LowRankMultivariateNormal(jnp.zeros(len(scale)), scale[:, None] * factor, scale**2)
    target = dist.MultivariateNormal(jnp.zeros(len(scale)), precision_matrix=precision)
    return dist.kl_divergence(dist.MultivariateNormal(guide.loc, guide.covariance_matrix), target)


def assert_stationary(at: Any, precision: Any) -> None:
    for slope in jax.jit(jax.grad(distance))(at, precision):
        np.testing.assert_allclose(slope, 0.0, atol=root_eps("float64"))


def test_projection_of_a_family_member_is_itself(dtype):
    _, s, w = member(6)
    dense = jnp.linalg.cholesky(jnp.asarray(covariance(s, w)))
    project = jax.jit(low_rank_gaussian.project)
    assert_close(project(dense, jnp.asarray(s), jnp.asarray(w)), (s, w), root_eps(dtype) * 10)


def test_low_rank_projection_is_stationary_and_nearer_than_the_diagonal(x64):
    precision = jnp.asarray(spd(8, D))
    dense = jnp.linalg.cholesky(jnp.linalg.inv(precision))
    alone = 1 / jnp.sqrt(jnp.diag(precision)), jnp.zeros((D, 1))
    found = low_rank_gaussian.project(dense, *alone, sweeps=1000)
    assert_stationary(found, precision)
    assert distance(found, precision) < 0.8 * distance(alone, precision)


def test_full_steps_descend_to_a_stationary_point(x64):
    """The probes span the whole space; the target is a Gaussian outside of the family."""
    precision, (_, s, w) = spd(8, D), member(9, r=1)
    rest = np.random.default_rng(1).normal(size=(D, D - 1))

    def step(at, _):
        s, w = at
        basis = jnp.linalg.qr(jnp.concatenate([w, rest], axis=1))[0]
        hessian = s[:, None] * s * precision
        residual = jnp.diag(hessian) - low_rank_gaussian.precision_diagonal(w)
        new = low_rank_gaussian.step(
            low_rank_gaussian.tangent(w, jnp.zeros(D), residual, basis, hessian @ basis), 1.0, MARGIN
        )
        return (s * new.ratio, new.factor), distance(at, precision)

    at, path = jax.jit(lambda: jax.lax.scan(step, (jnp.asarray(s), jnp.asarray(w)), None, length=1000))()
    assert (np.diff(path) < root_eps("float64")).all()
    assert_stationary(at, precision)


# --- fits ---


def target(loc: np.ndarray, scale: np.ndarray, factor: np.ndarray) -> Any:
    """A low-rank Gaussian as a model, without a d × d matrix."""
    d = len(loc)

    def model() -> None:
        z = numpyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (d,)))
        density = dist.LowRankMultivariateNormal(
            jnp.asarray(loc), jnp.asarray(scale[:, None] * factor), jnp.asarray(scale**2)
        )
        numpyro.factor("f", density.log_prob(z))

    return model


def by_hand(d: int, r: int) -> Any:
    def guide() -> None:
        loc = numpyro.param("auto_loc", jnp.zeros(d))
        factor = numpyro.param("factor", jnp.zeros((d, r)))
        diag = numpyro.param("diag", jnp.full(d, 0.01), constraint=constraints.positive)
        numpyro.sample("z", dist.LowRankMultivariateNormal(loc, factor, diag))

    return guide


def fit(model: Any, guide: Any, steps: int, *args: Any, **options: Any) -> tuple[Any, list[Any]]:
    """The SVI, and the states after every step."""
    svi = SVI(model, guide, NaturalGradient(**options), Trace_ELBO(num_particles=8))
    state, update, states = svi.init(random.key(0), *args), jax.jit(svi.update), []
    for _ in range(steps):
        state, _ = update(state, *args)
        states.append(state)
    return svi, states


def gaussian(guide: Any, params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of a guide without batch axes."""
    if hasattr(guide, "get_posterior"):
        q = guide.get_posterior(params)
        return np.asarray(q.loc), np.asarray(q.covariance_matrix)
    factor = np.asarray(params["factor"], np.float64)
    return np.asarray(params["auto_loc"]), factor @ factor.T + np.diag(np.asarray(params["diag"], np.float64))


WIDE, NARROW = 150, 12


CASES = itertools.product([(WIDE, "auto"), (WIDE, "hand"), (NARROW, "auto")], ("float32", "float64"))


@pytest.mark.parametrize(
    ("d", "make", "dtype"),
    tiers([(*case, dtype) for case, dtype in CASES], (NARROW, "auto", "float32")),
    indirect=["dtype"],
)
def test_low_rank_fit_reaches_a_member_of_the_family(d, make, dtype):
    """The fit leaves W = 0, a saddle, and ends within 0.01 nats: 16 of 20 starts within 40 steps, all within 80."""
    m, s, w = member(10, d, 2, 1.5)
    model = target(m, s, w)
    guide = AutoLowRankMultivariateNormal(model, rank=3) if make == "auto" else by_hand(d, 3)
    svi, states = fit(model, guide, 100)
    assert "closed form, " in svi.optim.report(svi, states[-1])
    assert np.abs(states[0].optim_state[1].params["auto_cov_factor" if make == "auto" else "factor"]).max() > 0
    assert kl(gaussian(guide, svi.get_params(states[-1])), (m, covariance(s, w))) < 0.01


@pytest.mark.slow
def test_low_rank_fit_is_an_optimum_of_the_family(x64):
    """The target has four common directions, the guide rank 2: from the fit SciPy gains less than 0.01 nats."""
    m, s, w = member(16, WIDE, 4)
    w = np.linalg.qr(w)[0] * np.array([10.0, 6.0, 3.0, 2.0])
    guide = AutoLowRankMultivariateNormal(target(m, s, w), rank=2)
    svi, states = fit(target(m, s, w), guide, 60)
    params = svi.get_params(states[-1])
    start, unravel = ravel_pytree((params["auto_scale"], params["auto_cov_factor"]))
    precision = jnp.linalg.inv(covariance(s, w))
    objective = jax.jit(jax.value_and_grad(lambda x: distance(unravel(x), precision)))
    found = optimize.minimize(lambda x: [np.asarray(y) for y in objective(x)], start, jac=True, method="L-BFGS-B")
    assert kl(gaussian(guide, params), (m, covariance(s, w))) < found.fun + 0.01


def test_no_value_has_d_squared_entries():
    d = 600
    model = target(*member(11, d, 1))
    svi = SVI(model, AutoLowRankMultivariateNormal(model, rank=1), NaturalGradient(), Trace_ELBO(num_particles=8))
    state = svi.init(random.key(0))
    assert max(sizes(jax.make_jaxpr(svi.update)(state).jaxpr)) < d * d / 2


def sizes(jaxpr: Any) -> Any:
    """Sizes of all values in a program and in the programs within it."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars if hasattr(v.aval, "size"))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            body = getattr(inner, "jaxpr", inner)
            if hasattr(body, "eqns"):
                yield from sizes(body)


@pytest.mark.slow
def test_batched_low_rank_fit_reaches_every_rows_posterior(dtype):
    """Of two latents in each of 100 rows every posterior is a member of the family."""
    x = np.random.default_rng(12).normal(size=100) * 3

    def model(x: Any) -> None:
        with numpyro.plate("n", len(x)):
            z = numpyro.sample("z", dist.Normal(0, jnp.array([1.0, 3.0])).to_event(1))
            numpyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)

    guide = AutoBatchedLowRankMultivariateNormal(model, batch_ndim=1, rank=1)
    svi, states = fit(model, guide, 40, jnp.asarray(x))
    params = svi.get_params(states[-1])
    exact = np.linalg.inv(np.diag([1, 1 / 9]) + 4 * np.ones((2, 2)))
    rows = zip(params["auto_loc"], params["auto_scale"], params["auto_cov_factor"], x, strict=True)
    nats = [
        kl((m, covariance(np.asarray(s), np.asarray(w))), (exact @ np.full(2, 4 * y), exact)) for m, s, w, y in rows
    ]
    assert sum(nats) < 0.01


@pytest.mark.slow
def test_permuting_the_latents_permutes_the_fit():
    m, s, w = member(13, WIDE, 2, 1.5)
    order = np.random.default_rng(14).permutation(WIDE)
    answers = []
    for at in ((m, s, w), (m[order], s[order], w[order])):
        guide = AutoLowRankMultivariateNormal(target(*at), rank=2)
        svi, states = fit(target(*at), guide, 40)
        answers.append(gaussian(guide, svi.get_params(states[-1])))
    (mean, cov), (mean_p, cov_p) = answers
    assert kl((mean[order], cov[np.ix_(order, order)]), (mean_p, cov_p)) < 0.01


@pytest.mark.parametrize("d", tiers([WIDE, NARROW], NARROW))
def test_max_kl_bounds_every_low_rank_step(d, x64):
    m, s, w = member(15, d, 2)
    guide = AutoLowRankMultivariateNormal(target(m, s, w), rank=2)
    svi, states = fit(target(m, s, w), guide, 6, max_kl=0.5)
    path = [gaussian(guide, svi.constrain_fn(state.optim_state[1].params)) for state in states]
    moved = [kl(p, q) for p, q in pairwise(path)]
    assert max(moved) < 0.5 * (1 + root_eps("float64"))
    assert min(moved) > 0.45


def test_skipped_low_rank_step_keeps_parameters_and_is_counted():
    def model(bad: Any) -> None:
        z = numpyro.sample("z", dist.Normal(0, 1).expand([WIDE]).to_event(1))
        numpyro.factor("f", jnp.where(bad, jnp.nan, 0.0) * z.sum())

    svi = SVI(model, AutoLowRankMultivariateNormal(model, rank=2), NaturalGradient(), Trace_ELBO(num_particles=2))
    state, update = svi.init(random.key(0), False), jax.jit(svi.update)
    before, _ = update(state, False)
    after, _ = update(before, True)
    assert_close(after.optim_state[1].params, before.optim_state[1].params, 0.0)
    assert svi.optim.info(after).skipped_total == 1
