# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""A fit with default options ends at the best ELBO of the guide's family.

This holds for every kind of guide, for any order of the latents, and for minibatches.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from oracles import assert_close, kl, root_eps, spd
from scipy import optimize, stats
from tables import DATA, GUIDES, positive, tiers
from test_estimators import TAU, full, mean_field, model

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.options import RuleConstants

# A Poisson regression whose posterior is strongly correlated: independent components lose 0.9 nats.
A = np.array([[1.0, 0.9], [0.8, 1.0], [0.9, 0.5]])
Y = np.array([4.0, 6.0, 2.0])
#: Steps of length ρ leave ½ v ρ/(2 − ρ) nats on average where v nats of noise are tolerated; 8 draws a step.
RHO = 8 / (8 + 2)
LEFT = 0.5 * RuleConstants().noise_threshold * RHO / (2 - RHO)


def elbo(m: np.ndarray, k: np.ndarray) -> float:
    """Of N(m, KKᵀ) for the Poisson regression, in closed form, up to a constant."""
    cov = k @ k.T
    rates = np.exp(A @ m + 0.5 * np.einsum("ni,ij,nj->n", A, cov, A))
    prior = (m @ m + np.trace(cov)) / (2 * TAU**2)
    return float(Y @ A @ m - rates.sum() - prior + np.log(np.abs(np.linalg.det(k))))


def factor(x: np.ndarray, diagonal: bool) -> np.ndarray:
    """K from the parameters that SciPy sees."""
    k = np.diag(np.exp(x[2:4]))
    if not diagonal:
        k[1, 0] = x[4]
    return k


def best(diagonal: bool) -> float:
    """The best ELBO that such a guide has, by SciPy."""
    x = np.zeros(4 if diagonal else 5)
    return -optimize.minimize(lambda x: -elbo(x[:2], factor(x, diagonal)), x, tol=1e-9).fun


def low_rank(a: Any, y: Any) -> None:
    """In two dimensions a factor of rank 1 is as good as a full covariance. NumPyro's own starts at zero, a saddle."""
    scale, w = positive("scale", jnp.full(2, 0.5)), numpyro.param("factor", jnp.zeros((2, 1)))
    w, d = w * scale[:, None], scale**2
    numpyro.sample("z", dist.LowRankMultivariateNormal(numpyro.param("loc", jnp.zeros(2)), cov_factor=w, cov_diag=d))


def conditional(a: Any, y: Any) -> None:
    """A full Gaussian, written as one Normal given another."""
    z0 = numpyro.sample("z0", dist.Normal(numpyro.param("m0", 0.0), positive("s0")), infer={"is_auxiliary": True})
    mean = numpyro.param("m1", 0.0) + numpyro.param("slope", 0.0) * z0
    z1 = numpyro.sample("z1", dist.Normal(mean, positive("s1")), infer={"is_auxiliary": True})
    numpyro.sample("z", dist.Delta(jnp.stack([z0, z1]), event_dim=1))


def of_tril(p: Any) -> tuple[Any, Any]:
    return p["loc"], p["cov"]


def of_scales(p: Any) -> tuple[Any, Any]:
    return p["loc"], np.diag(p["cov"])


def of_low_rank(p: Any) -> tuple[Any, Any]:
    scale, w = np.asarray(p["scale"]), np.asarray(p["factor"])
    return p["loc"], np.linalg.cholesky(np.diag(scale) @ (np.eye(2) + w @ w.T) @ np.diag(scale))


def of_conditional(p: Any) -> tuple[Any, Any]:
    k = np.array([[p["s0"], 0.0], [p["slope"] * p["s0"], p["s1"]]])
    return np.array([p["m0"], p["m1"] + p["slope"] * p["m0"]]), k


class Fit(NamedTuple):
    """A guide, its mean and a factor of its covariance, and how it is fitted; ``limit`` is the joint limit."""

    guide: Any
    moments: Any
    diagonal: bool = False
    options: dict[str, Any] = {}
    loss: Any = Trace_ELBO(num_particles=8)
    limit: int = 128


FITS = {
    "full": Fit(full, of_tril),
    "full, analytic KL": Fit(full, of_tril, loss=TraceMeanField_ELBO(num_particles=8)),
    "full, first order": Fit(full, of_tril, options={"estimator": "first_order"}),
    "full, wide": Fit(full, of_tril, limit=1),
    "independent": Fit(mean_field, of_scales, True),
    "independent, first order": Fit(mean_field, of_scales, True, {"estimator": "first_order"}),
    "low rank": Fit(low_rank, of_low_rank),
    "conditional": Fit(conditional, of_conditional),
}


@pytest.mark.parametrize("name", tiers(FITS, "full", "independent", "low rank"))
def test_default_options_reach_the_best_elbo_of_the_guide(name, x64, monkeypatch):
    """Over the last 500 of 1000 steps the mean gap to the best ELBO is below the nats that the rule promises."""
    fit = FITS[name]
    monkeypatch.setattr(
        "numpyro_natgrad.options.CONSTANTS", RuleConstants(joint_limit=fit.limit, full_joint_limit=fit.limit)
    )
    svi, args = (
        SVI(model, fit.guide, NaturalGradient(**fit.options), fit.loss),
        (jnp.asarray(A, float), jnp.asarray(Y, float)),
    )

    def step(state, _):
        state, _ = svi.update(state, *args)
        return state, svi.get_params(state)

    start = svi.init(random.key(0), *args)
    walk = jax.tree.map(np.asarray, jax.jit(lambda s: jax.lax.scan(step, s, length=1000)[1])(start))
    late = [fit.moments({name: x[t] for name, x in walk.items()}) for t in range(500, 1000)]
    assert best(fit.diagonal) - np.mean([elbo(np.asarray(m), np.asarray(k)) for m, k in late]) < LEFT


# --- NumPyro's own example ---


@pytest.mark.slow
def test_beta_bernoulli_example_of_svi_reaches_the_exact_posterior():
    """The model is that of ``SVI``'s docstring; its posterior is Beta(10 + 6, 10 + 4)."""

    def coin(data):
        f = numpyro.sample("latent_fairness", dist.Beta(10, 10))
        with numpyro.plate("N", data.shape[0] if data is not None else 10):
            numpyro.sample("obs", dist.Bernoulli(f), obs=data)

    def guide(data):
        alpha_q = numpyro.param("alpha_q", 15.0, constraint=constraints.positive)
        beta_q = numpyro.param("beta_q", lambda key: random.exponential(key), constraint=constraints.positive)
        numpyro.sample("latent_fairness", dist.Beta(alpha_q, beta_q))

    data = jnp.concatenate([jnp.ones(6), jnp.zeros(4)])
    svi = SVI(coin, guide, NaturalGradient(), loss=Trace_ELBO())
    params = svi.run(random.key(0), 500, data, progress_bar=False).params
    fitted, exact = dist.Beta(params["alpha_q"], params["beta_q"]), dist.Beta(16.0, 14.0)
    assert dist.kl_divergence(fitted, exact) < LEFT
    draws = Predictive(guide, params=params, num_samples=2000)(random.key(1), data=None)["latent_fairness"]
    # Four standard errors of the mean of 2000 draws, beside the bias that ``LEFT`` nats allow: √(2 LEFT) standard deviations.
    sd = np.sqrt(exact.variance)
    assert abs(draws.mean() - exact.mean) < sd * (4 / np.sqrt(2000) + np.sqrt(2 * LEFT))


# --- minibatches ---


@pytest.mark.slow
def test_minibatch_steps_reach_the_posterior_of_all_data(x64):
    """Linear regression with 40 of 800 rows a step.

    The estimate of one step has N/B times the posterior's covariance, and the returned average is over half of the T
    steps: 2 KL ~ 2N/(BT) χ², with as many degrees of freedom as the guide has parameters.
    """
    n, b, d, steps = 800, 40, 3, 2000
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d))
    y = x @ np.array([1.0, -2.0, 0.5]) + rng.normal(size=n)

    def regression(x, y):
        beta = numpyro.sample("beta", dist.Normal(0, 10).expand([d]).to_event(1))
        with numpyro.plate("data", n, subsample_size=b) as i:
            numpyro.sample("y", dist.Normal(x[i] @ beta, 1), obs=y[i])

    svi = SVI(regression, AutoMultivariateNormal(regression), NaturalGradient(), Trace_ELBO(num_particles=4))
    params = svi.run(random.key(0), steps, jnp.asarray(x), jnp.asarray(y), progress_bar=False).params
    precision = x.T @ x + np.eye(d) / 100
    exact = np.linalg.solve(precision, x.T @ y), np.linalg.inv(precision)
    gap = kl((params["auto_loc"], params["auto_scale_tril"] @ params["auto_scale_tril"].T), exact)
    assert gap < 0.5 * 2 * n / (b * steps) * stats.chi2.ppf(0.999, d + d * (d + 1) / 2)


def test_parameters_of_rows_outside_the_minibatch_do_not_change():
    case = GUIDES["subsampled"]
    svi = SVI(case.model, case.make(case.model), NaturalGradient(), Trace_ELBO(num_particles=1))
    data = jnp.asarray(DATA, jnp.float32)
    state = svi.init(random.key(0), data)
    before = svi.get_params(state)
    after = svi.get_params(jax.jit(svi.update)(state, data)[0])
    moved = np.abs(np.asarray(after["loc"] - before["loc"])).max(1) > 0
    assert moved.sum() == 2
    np.testing.assert_array_equal(np.asarray(after["scale"] != before["scale"]).any(1), moved)


# --- permutations ---

D = 4


def gaussian(centre: Any, precision: Any) -> None:
    z = numpyro.sample("z", dist.ImproperUniform(constraints.real, (), (D,)))
    numpyro.factor("f", -0.5 * (z - centre) @ precision @ (z - centre))


def unordered(centre: Any, precision: Any) -> None:
    tril = numpyro.param("cov", 0.5 * jnp.eye(D), constraint=constraints.lower_cholesky)
    numpyro.sample("z", dist.MultivariateNormal(numpyro.param("loc", jnp.zeros(D)), scale_tril=tril))


def independent(centre: Any, precision: Any) -> None:
    scale = positive("cov", jnp.full(D, 0.5))
    numpyro.sample("z", dist.Normal(numpyro.param("loc", jnp.zeros(D)), scale).to_event(1))


@pytest.mark.parametrize("guide", [unordered, independent])
def test_permuting_the_latents_permutes_the_fit(guide, x64):
    """Steps of length 1/2 on a Gaussian target, where two draws leave no noise."""
    svi = SVI(gaussian, guide, NaturalGradient(0.5, max_kl=None), Trace_ELBO(num_particles=2))
    centre, precision, order = np.arange(D) - 1.0, spd(5, D, low=0.3, high=10.0), np.array([2, 0, 3, 1])
    start = svi.init(random.key(0), centre, precision)

    @jax.jit
    def walk(centre, precision):
        step = lambda _, state: svi.update(state, centre, precision)[0]
        return svi.get_params(jax.lax.fori_loop(0, 3, step, start))

    def moments(params):
        k = params["cov"]
        return params["loc"], k @ k.T if k.ndim == 2 else jnp.diag(k**2)

    mean, cov = moments(walk(jnp.asarray(centre), jnp.asarray(precision)))
    permuted = moments(walk(jnp.asarray(centre[order]), jnp.asarray(precision[np.ix_(order, order)])))
    assert_close(permuted, (mean[order], cov[np.ix_(order, order)]), root_eps("float64"))
    assert not np.allclose(mean, centre, atol=1e-3)
