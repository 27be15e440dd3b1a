# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Without latents a step is Fisher scoring, and every parameter uses the Fisher method that was chosen for it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from jax import random
from numpyro import distributions as dist
from numpyro.distributions import constraints, transforms
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal
from oracles import assert_close, root_eps
from scipy import optimize, special
from tables import positive

from numpyro_natgrad import NaturalGradient, StructureError

rng = np.random.default_rng(0)
N, D = 200, 4
X = np.column_stack([np.ones(N), rng.normal(size=(N, D - 1))])
TRUTH = np.array([0.3, 1.0, -0.5, 0.8])
ETA = X @ TRUTH
DATA = {
    "logistic": rng.binomial(1, special.expit(ETA)),
    "Poisson": rng.poisson(np.exp(ETA)),
    "Gamma": rng.gamma(3.0, np.exp(ETA) / 3),
    "linear": ETA + 0.5 * rng.normal(size=N),
}


def predictor(x: Any) -> Any:
    return x @ numpyro.param("w", jnp.zeros(x.shape[-1]))


OBSERVED: dict[str, Callable[[Any], Any]] = {
    "logistic": lambda eta: dist.Bernoulli(logits=eta),
    "Poisson": lambda eta: dist.Poisson(jnp.exp(eta)),
    "Gamma": lambda eta: dist.Gamma(3.0, 3.0 * jnp.exp(-eta)),
    "linear": lambda eta: dist.Normal(eta, positive("noise", 2.0)),
}
# −log p and IRLS weights of one observation, up to a constant, as functions of η.
DEVIANCE = {
    "logistic": (lambda y, eta: np.logaddexp(0, eta) - y * eta, lambda eta: special.expit(eta) * special.expit(-eta)),
    "Poisson": (lambda y, eta: np.exp(eta) - y * eta, np.exp),
    "Gamma": (lambda y, eta: 3 * (eta + y * np.exp(-eta)), lambda eta: np.full_like(eta, 3.0)),
}


def regression(name: str) -> Callable:
    def model(x: Any, y: Any) -> None:
        numpyro.sample("y", OBSERVED[name](predictor(x)), obs=y)

    return model


def nothing(*args: Any) -> None:
    """No guide at all."""


class Fit(NamedTuple):
    params: list[dict[str, np.ndarray]]
    losses: np.ndarray
    info: list[Any]
    report: str


def fit(model: Any, guide: Any, steps: int, *data: Any, start: Any = None, loss: Any = None, **options: Any) -> Fit:
    svi = SVI(model, guide, NaturalGradient(**options), loss or Trace_ELBO())
    data = tuple(jnp.asarray(x, jnp.result_type(float)) for x in data)
    state, update = svi.init(random.key(0), *data, init_params=start), jax.jit(svi.update)
    params, losses, info = [svi.get_params(state)], [], []
    for _ in range(steps):
        state, value = update(state, *data)
        params.append(svi.get_params(state))
        losses.append(value)
        info.append(svi.optim.info(state))
    return Fit(jax.tree.map(np.asarray, params), np.asarray(losses), info, svi.optim.report(svi, state, *data))


@pytest.mark.parametrize("name", DEVIANCE)
def test_maximum_likelihood_step_equals_irls(name, x64):
    """w₊ = (XᵀWX)⁻¹ Xᵀ(W η − ∂(−log p)): iteratively reweighted least squares, at SciPy's optimum after 8 steps."""
    deviance, weights = DEVIANCE[name]
    y = DATA[name]
    one = fit(regression(name), nothing, 1, X, y, step_size=1.0, max_kl=None, start={"w": 0.3 * TRUTH})
    eta = 0.3 * ETA
    slope = [optimize.approx_fprime(e, lambda t, i=i: deviance(y[i], t), 1e-7)[0] for i, e in enumerate(eta[:, None])]
    hessian = X.T @ (weights(eta)[:, None] * X)
    np.testing.assert_allclose(one.params[1]["w"], 0.3 * TRUTH - np.linalg.solve(hessian, X.T @ slope), rtol=1e-5)
    all_eight = fit(regression(name), nothing, 8, X, y)
    best = optimize.minimize(lambda w: np.sum(deviance(y, X @ w)), np.zeros(D), method="BFGS", tol=1e-9)
    np.testing.assert_allclose(all_eight.params[-1]["w"], best.x, atol=1e-5)
    assert "Fisher of the likelihood (closed form)" in all_eight.report


def test_location_and_scale_reach_least_squares(dtype):
    found = fit(regression("linear"), nothing, 10, X, DATA["linear"]).params[-1]
    w, residual, *_ = np.linalg.lstsq(X, DATA["linear"])
    assert_close(found["w"], w, 10 * root_eps(dtype))
    np.testing.assert_allclose(found["noise"], np.sqrt(residual[0] / N), rtol=10 * root_eps(dtype))


def ridge(x: Any, y: Any) -> None:
    w = numpyro.sample("w", dist.Normal(0, 0.5).expand([x.shape[-1]]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def test_point_guide_reaches_the_posterior_mode(dtype):
    y, deviance = DATA["logistic"], DEVIANCE["logistic"][0]
    found = fit(ridge, AutoDelta(ridge), 8, X, y).params[-1]["w_auto_loc"]
    penalised = lambda w: np.sum(deviance(y, X @ w)) + 2 * w @ w
    np.testing.assert_allclose(found, optimize.minimize(penalised, np.zeros(D), tol=1e-9).x, atol=root_eps(dtype))


def test_fisher_scoring_is_invariant_to_column_scales():
    """In float32 the losses with features from 1e-6 to 1e6 are those of standardised features."""
    scales = np.array([1.0, 1e-6, 1e6, 1e3])
    plain, scaled = (fit(regression("logistic"), nothing, 8, x, DATA["logistic"]).losses for x in (X, X * scales))
    np.testing.assert_allclose(scaled, plain, rtol=1e-3)


def test_separable_data_keep_parameters_finite(dtype):
    result = fit(regression("logistic"), nothing, 40, X, X[:, 1] > 0)
    assert np.isfinite(result.params[-1]["w"]).all()
    assert np.isfinite(result.losses).all()
    assert result.losses[-1] < 0.01 * result.losses[0]


def test_empirical_fisher_step_uses_observed_gradients(x64):
    """v = (Σ gᵢgᵢᵀ + damping)⁻¹ Σ gᵢ, with a damping of 3e-3 relative to the diagonal."""
    y, start = DATA["logistic"], 0.3 * TRUTH
    step = fit(
        regression("logistic"), nothing, 1, X, y, step_size=1.0, max_kl=None, fisher="empirical", start={"w": start}
    )
    slopes = X * (special.expit(X @ start) - y)[:, None]
    outer = slopes.T @ slopes
    damped = outer + 3e-3 * np.diag(np.diag(outer) + np.mean(np.diag(outer)))
    expected = start - np.linalg.solve(damped, slopes.sum(0))
    np.testing.assert_allclose(step.params[1]["w"], expected, rtol=1e-6)
    assert "empirical" in step.report


def test_monte_carlo_fisher_reaches_the_optimum_of_the_closed_form(x64):
    """Both end at the same optimum: a metric changes the path, not the optimum."""
    closed, drawn = (
        fit(regression("Poisson"), nothing, n, X, DATA["Poisson"], fisher=f).params[-1]["w"]
        for n, f in ((8, "closed_form"), (25, "monte_carlo"))
    )
    np.testing.assert_allclose(drawn, closed, atol=1e-3)


def batched(x: Any, y: Any) -> None:
    with numpyro.plate("rows", N, subsample_size=50) as rows:
        numpyro.sample("y", dist.Bernoulli(logits=predictor(x[rows])), obs=y[rows])


def test_minibatch_fisher_scoring_averages_to_the_full_data_optimum():
    """A quarter of the rows a step: 200 steps of 50 rows have a tenth of the optimum's own standard error."""
    full = fit(regression("logistic"), nothing, 8, X, DATA["logistic"]).params[-1]["w"]
    hessian = X.T @ (DEVIANCE["logistic"][1](X @ full)[:, None] * X)
    error = np.sqrt(np.diag(np.linalg.inv(hessian)))
    found = fit(batched, nothing, 200, X, DATA["logistic"])
    assert (np.abs(found.params[-1]["w"] - full) < 4 * 0.15 * error).all()


def latent(x: Any, y: Any) -> None:
    numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(0, 1)), positive("noise", 1.0)), obs=y)


def factored(x: Any, y: Any) -> None:
    numpyro.factor("f", -jnp.sum((predictor(x) - y) ** 2))


@pytest.mark.filterwarnings("ignore:NaturalGradient. no distribution that it can read owns the parameters ..w")
def test_method_of_each_parameter_follows_from_model_and_options():
    """Parameters outside of all sites use the fallback optimizer, as do all where it is given; others Fisher scoring.

    Beside a guide of Gaussians they take second-order steps with its latents.
    """
    y, given = DATA["logistic"], {"fallback_optimizer": optax.adam(0.1)}
    for model, guide, options, method in (
        (latent, AutoNormal(latent), {}, "Hessian of the loss"),
        (latent, AutoNormal(latent), {"estimator": "first_order"}, "Fisher of the likelihood"),
        (latent, AutoNormal(latent), given, "none: fallback optimizer"),
        (latent, AutoNormal(latent), {**given, "fisher": "closed_form"}, "none: fallback optimizer"),
        (factored, nothing, {}, "Hessian of the loss"),
        (factored, nothing, {"estimator": "first_order"}, "none: fallback optimizer"),
        (regression("logistic"), nothing, given, "none: fallback optimizer"),
        (regression("logistic"), nothing, {**given, "fisher": "closed_form"}, "Fisher of the likelihood"),
    ):
        assert method in fit(model, guide, 1, X, y, **options).report


def cauchy_mixture(x: Any, y: Any) -> None:
    parts = [dist.Normal(predictor(x), 1.0), dist.Normal(0.0, 1.0)]
    numpyro.sample("y", dist.MixtureGeneral(dist.Categorical(jnp.array([0.5, 0.5])), parts), obs=y)


class OneWay(transforms.ParameterFreeTransform):
    """x + x³ without its inverse: the density is known at draws and nowhere else."""

    domain = codomain = constraints.real

    def __call__(self, x: Any) -> Any:
        return x + x**3

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Any:
        return jnp.log1p(3 * x**2)


def one_way(x: Any, y: Any) -> None:
    base = dist.Normal(numpyro.param("m", 0.0), positive("s", 1.0))
    numpyro.sample("z", dist.TransformedDistribution(base, OneWay()))


REFUSED = {
    "no closed form": (cauchy_mixture, nothing, "closed_form", "`y` \\(.*Mixture.*\\).*register_exponential"),
    "no known KL": (cauchy_mixture, nothing, "kl_hessian", "`y` \\(.*Mixture.*\\).*monte_carlo"),
    "a guide that draws": (latent, AutoNormal(latent), "empirical", "draws \\['z'\\].*monte_carlo"),
    "no density": (latent, one_way, "monte_carlo", "`z` \\(Normal\\) have no density.*fisher=None"),
    "no observation": (factored, nothing, "empirical", "no observed site.*obs="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unavailable_fisher_method_is_refused_by_name(case):
    model, guide, method, message = REFUSED[case]
    with pytest.raises(StructureError, match=f"fisher='{method}'.*{message}"):
        fit(model, guide, 1, X, DATA["logistic"], fisher=method)


def test_unknown_fisher_method_is_quoted_in_the_error():
    with pytest.raises(ValueError, match="fisher='diagonal'.*'closed_form', 'kl_hessian', 'monte_carlo', 'empirical'"):
        NaturalGradient(fisher="diagonal")


@pytest.mark.parametrize("method", ["closed_form", "kl_hessian", "monte_carlo"])
def test_forced_fisher_method_reaches_the_conjugate_posterior(method):
    """The posterior of the conjugate model has mean Σy/(1 + N) and precision 1 + N."""

    def known(x: Any, y: Any) -> None:
        numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(0, 1)), 1.0).expand([N]), obs=y)

    y = DATA["linear"]
    result = fit(known, AutoNormal(known), 60, X, y, fisher=method, loss=Trace_ELBO(16))
    word = {"closed_form": "closed form", "kl_hessian": "Hessian of KL (closed form)", "monte_carlo": "Monte Carlo"}
    assert word[method] in result.report
    scale = 1 / np.sqrt(1 + N)
    np.testing.assert_allclose(result.params[-1]["z_auto_loc"], y.sum() / (1 + N), atol=0.2 * scale)
    np.testing.assert_allclose(result.params[-1]["z_auto_scale"], scale, rtol=0.2)
