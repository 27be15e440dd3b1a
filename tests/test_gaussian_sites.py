# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Gaussian sites are read and written in NumPyro's own parameters, and projections are the nearest family members."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from jax.flatten_util import ravel_pytree
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import Trace_ELBO
from oracles import assert_close, captured_loss, root_eps, spd
from scipy import optimize
from tables import FORMS, gram

from numpyro_natgrad import CovarianceForm, NaturalGradient, register_gaussian
from numpyro_natgrad.guide import gaussian_sites
from numpyro_natgrad.guide.trace import trace_loss
from numpyro_natgrad.infer.optimizer import table


def model() -> None:
    for name, form in FORMS.items():
        numpyro.sample(name, dist.Normal(0, 1).expand(form.shape).to_event(len(form.shape)))


def guide() -> None:
    for name, form in FORMS.items():
        form.sample(name)


@cache
def traced_sites(precision: str):
    at, params = captured_loss(model, guide, Trace_ELBO())
    trace = trace_loss(at(random.key(0)), params)
    return {name: gaussian_sites.read_gaussian_site(name, trace) for name in FORMS}, params


@pytest.mark.parametrize("form", FORMS)
def test_site_moments_equal_numpyros_mean_and_covariance(form, dtype):
    sites, params = traced_sites(dtype)
    loc, factor = sites[form].read(params)
    cov = factor**2 if FORMS[form].diagonal else gram(np.asarray(factor, np.float64))
    q = FORMS[form].at(params[f"{form}_loc"], params[f"{form}_cov"])
    base = q.base_dist if isinstance(q, dist.Independent) else q
    assert_close(
        (loc, cov), (q.mean, base.variance if FORMS[form].diagonal else base.covariance_matrix), root_eps(dtype)
    )
    assert loc.dtype == factor.dtype == dtype


@pytest.mark.parametrize("form", FORMS)
def test_parameters_survive_a_round_trip_through_moments(form, dtype):
    sites, params = traced_sites(dtype)
    blank = {name: jnp.zeros_like(x) for name, x in params.items()}
    written = sites[form].write(blank, *sites[form].read(params))
    mine = {f"{form}_loc", f"{form}_cov"}
    for name in params:
        assert_close(written[name], params[name] if name in mine else blank[name], root_eps(dtype))
        assert written[name].dtype == params[name].dtype


@pytest.mark.parametrize("form", FORMS)
def test_moments_survive_a_round_trip_through_parameters(form, dtype):
    """At another point than the start; a covariance or precision matrix squares the condition number of K."""
    site, params = traced_sites(dtype)[0][form], traced_sites(dtype)[1]
    widest = 3.0 if "matrix" in form else 1e3
    spread = np.geomspace(1 / widest, widest, site.size).reshape(site.shape)
    factor = spread if FORMS[form].diagonal else np.tril(spread[..., None] * FORMS[form].factor)
    loc = jnp.asarray(np.arange(site.size).reshape(site.shape), dtype)
    read = site.read(site.write(params, loc, jnp.asarray(factor, dtype)))
    assert_close(read[0], loc, root_eps(dtype))
    rows = np.abs(factor) if FORMS[form].diagonal else np.abs(factor).max(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(read[1]) / rows, factor / rows, atol=root_eps(dtype))


# --- project ---

PROJECTED = {"scale, exp": (2, 2), "covariance_matrix": (3,), "scale_tril, batch": (2, 2)}


def covariances(factors):
    """The covariance of all sites from their K, block by block."""
    blocks = []
    for (name, shape), k in zip(PROJECTED.items(), factors, strict=True):
        if FORMS[name].diagonal:
            blocks.append(jnp.diag(k.ravel() ** 2))
        else:
            blocks += [b @ b.T for b in k.reshape(-1, shape[-1], shape[-1])]
    return jax.scipy.linalg.block_diag(*blocks)


def nats(factors, precision):
    """KL(guide ‖ N(0, S⁻¹)), by NumPyro."""
    zero = jnp.zeros(len(precision))
    guide = dist.MultivariateNormal(zero, covariances(factors))
    return dist.kl_divergence(guide, dist.MultivariateNormal(zero, precision_matrix=precision))


def within(factors):
    """Lower triangles of what is a triangle."""
    names = zip(PROJECTED, factors, strict=True)
    return [k if FORMS[name].diagonal else jnp.tril(k) for name, k in names]


@cache
def projection():
    with jax.enable_x64(True):
        sites = tuple(traced_sites("float64")[0][name] for name in PROJECTED)
        precision = jnp.asarray(spd(11, sum(s.size for s in sites), low=0.1, high=20.0))
        root = jnp.linalg.cholesky(precision).T  # any P with PᵀP = S
        return gaussian_sites.project(
            root, sites, [site.read(traced_sites("float64")[1])[1] for site in sites]
        ), precision


def test_projection_keeps_the_diagonal_blocks_of_the_precision(x64):
    factors, precision = projection()
    inverse = jnp.linalg.inv(covariances(factors))
    assert_close(inverse, jnp.where(inverse != 0, precision, 0.0), root_eps("float64"))


def test_projection_is_stationary_in_kl(x64):
    factors, precision = projection()
    for slope in within(jax.jit(jax.grad(nats))(factors, precision)):
        np.testing.assert_allclose(slope, 0.0, atol=root_eps("float64") * jnp.abs(precision).max())


def test_projection_has_the_least_kl_of_the_family(x64):
    """SciPy, started elsewhere, finds the same KL."""
    factors, precision = projection()
    start, unravel = ravel_pytree([jnp.broadcast_to(jnp.eye(k.shape[-1]), k.shape) for k in factors])
    objective = jax.jit(jax.value_and_grad(lambda x: nats(within(unravel(x)), precision)))
    found = optimize.minimize(
        lambda x: [np.asarray(y) for y in objective(x)], start + 0.5, jac=True, options={"gtol": 1e-9}
    )
    np.testing.assert_allclose(nats(factors, precision), found.fun, rtol=root_eps("float64"))


def test_projection_of_a_family_member_is_itself(dtype):
    sites, params = traced_sites(dtype)
    chosen = tuple(sites[name] for name in PROJECTED)
    own = [site.read(params)[1] for site in chosen]
    root = jnp.linalg.inv(jnp.linalg.cholesky(covariances(own)))
    assert_close(gaussian_sites.project(root, chosen, own), own, root_eps(dtype))


# --- the registry is open ---


class PrecisionNormal(dist.Normal):
    """A Normal by its precision, known only after it has been registered."""

    arg_constraints = {"loc": constraints.real, "precision": constraints.positive}

    def __init__(self, loc, precision):
        self.precision = precision
        super().__init__(loc, precision**-0.5)


def test_registered_distribution_class_is_treated_as_gaussian(x64, monkeypatch):
    monkeypatch.setattr(gaussian_sites, "_REGISTRY", dict(gaussian_sites._REGISTRY))

    def model():
        numpyro.sample("z", dist.Normal(2.0, 0.1))

    def guide():
        loc = numpyro.param("loc", 0.0)
        numpyro.sample("z", PrecisionNormal(loc, numpyro.param("w", 1.0, constraint=constraints.positive)))

    at, params = captured_loss(model, guide, Trace_ELBO(num_particles=2))

    def step():
        optimizer = NaturalGradient(1.0, max_kl=None)
        _, (_, state) = jax.jit(lambda: optimizer.eval_and_update(at(random.key(0)), optimizer.init(params)))()
        return table(optimizer._partition(at(random.key(0)), params, False).rows()), state.params

    report, _ = step()
    assert "Hessian of KL" in report
    register_gaussian(
        PrecisionNormal, forms={"precision": CovarianceForm(lambda w: w**-0.5, lambda k: k**-2, diagonal=True)}
    )
    report, params = step()
    assert "closed form" in report
    assert_close(params, {"loc": np.float64(2.0), "w": np.log(100.0)}, root_eps("float64"))


@pytest.mark.parametrize("d", [1, 2, 6])
def test_visible_square_is_a_sum_over_diagonal_blocks(d, dtype):
    """Σ_b tr((S_bb⁻¹ ΔS_bb)²), by dense solves."""
    precision, change = spd(0, 6), spd(1, 6) - spd(2, 6)
    root = np.linalg.cholesky(precision).T
    whitened = np.linalg.solve(root.T, np.linalg.solve(root.T, change).T)
    seen = gaussian_sites.projected_square(jnp.asarray(root, dtype), jnp.asarray(whitened, dtype), d)
    blocks = [slice(i, i + d) for i in range(0, 6, d)]
    relative = [np.linalg.solve(precision[b, b], change[b, b]) for b in blocks]
    np.testing.assert_allclose(seen, sum(np.trace(x @ x) for x in relative), rtol=root_eps(dtype))
