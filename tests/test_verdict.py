# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Weights equal NumPyro's losses, weighted moments equal the posterior's, linear response is exact for Gaussians.

The recommendation follows from these figures.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
import scipy.stats
from jax import random
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuide,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from oracles import assert_close, root_eps, spd
from tables import positive

from numpyro_natgrad import (
    Estimate,
    NaturalGradient,
    StructureError,
    Verdict,
    fit,
    linear_response,
    to_arviz,
    verdict,
)
from numpyro_natgrad.diagnostics import importance, mixture
from numpyro_natgrad.diagnostics.importance import Moments, draw, fitted_guide, moments, smooth
from numpyro_natgrad.diagnostics.linear_response import NoMinimumError, gaussian_latents
from numpyro_natgrad.diagnostics.recommendation import Case, Move, recommend, threshold

D = 4
CENTRE, COVARIANCE = np.arange(1.0, D + 1), spd(3, D, low=0.5, high=8.0)
PRECISION = np.linalg.inv(COVARIANCE)
#: Evidence of the model below, nats.
LOG_EVIDENCE = -3.0


def gaussian() -> None:
    numpyro.sample("z", dist.MultivariateNormal(jnp.array(CENTRE, float), jnp.array(COVARIANCE, float)))
    numpyro.factor("evidence", LOG_EVIDENCE)


def hand_written() -> None:
    """The target is Gaussian in log z; the guide is a transform of two independent Gaussians."""
    loc, scale = numpyro.param("m", jnp.array([0.3, 0.1])), positive("s", jnp.array([0.5, 0.4]))
    numpyro.sample("z", dist.LogNormal(loc, scale).to_event(1))


def log_gaussian() -> None:
    base = dist.MultivariateNormal(jnp.zeros(2), jnp.array(COVARIANCE[:2, :2], float))
    numpyro.sample("z", dist.TransformedDistribution(base, dist.transforms.ExpTransform()))


def started(model: Any, guide: Any, **changed: Any) -> tuple[SVI, dict[str, Any]]:
    """An SVI and its parameters, some of them set."""
    svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    # An autoguide keeps what it traces; a function is initialised by one program.
    init = svi.init if isinstance(guide, AutoGuide) else jax.jit(svi.init)
    params = svi.get_params(init(random.key(0)))
    assert set(changed) <= set(params)
    return svi, {**params, **{name: jnp.asarray(x, params[name].dtype) for name, x in changed.items()}}


def full() -> tuple[SVI, dict[str, Any]]:
    """The posterior itself."""

    def guide() -> None:
        loc = numpyro.param("loc", jnp.zeros(D))
        scale_tril = numpyro.param("scale_tril", jnp.eye(D), constraint=constraints.lower_cholesky)
        numpyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))

    return started(gaussian, guide, loc=CENTRE, scale_tril=np.linalg.cholesky(COVARIANCE))


def test_log_weight_is_the_negative_loss_of_its_draw(x64):
    svi, params = started(log_gaussian, hand_written)
    found = draw(fitted_guide(svi, params, (), {}), random.key(1), 100)
    loss = lambda key: Trace_ELBO().loss(key, params, svi.model, svi.guide)
    assert_close(found.log_weights, -jax.jit(jax.vmap(loss))(random.split(random.key(1), 100)), 1e-10)


def test_exact_posterior_has_the_verdict_good():
    """Its weights differ by rounding alone, which is largest in single precision."""
    svi, params = full()
    found = verdict(svi, params, random.key(1), num_draws=1000)
    assert found.k_hat < 0.5
    assert_close(found.elbo.value, LOG_EVIDENCE, 100 * np.finfo(np.float32).eps)
    assert_close(found.log_evidence.value, LOG_EVIDENCE, 100 * np.finfo(np.float32).eps)
    assert found.ess > 990
    assert found.recommendation.startswith("The guide is good")
    assert_close(found.linear_response["z"], np.sqrt(np.diag(COVARIANCE)), 5 / math.sqrt(2 * 1000))


@pytest.mark.slow
def test_weighted_moments_of_a_mean_field_guide_equal_the_posteriors():
    """Standard errors in closed form: E_q[(p/q)² h²] = c·E[h²] under N(0, V), V = (2Λ − diag Λ)⁻¹, where V exists.

    Λ has a unit diagonal and least eigenvalue 0.7, along whose eigenvector the guide is the most wrong.
    """
    precision = 1.1 * np.eye(D) - 0.1
    covariance, heavy = np.linalg.inv(precision), np.linalg.inv(2 * precision - np.eye(D))
    c = np.linalg.det(precision) * math.sqrt(np.linalg.det(heavy))
    along = {"z": np.eye(D), "total": np.ones((1, D))}  # the last is the direction of that eigenvalue

    def model() -> None:
        z = numpyro.sample("z", dist.MultivariateNormal(jnp.array(CENTRE, float), jnp.array(covariance, float)))
        numpyro.deterministic("total", jnp.sum(z))
        numpyro.factor("evidence", LOG_EVIDENCE)

    svi, params = started(model, AutoNormal(model), z_auto_loc=CENTRE, z_auto_scale=np.ones(D))
    found = verdict(svi, params, random.key(1), num_draws=4000, num_chains=0, sites=list(along))
    assert found.k_hat < 0.5
    for name, a in along.items():
        v, s = (np.sum(a @ m * a, axis=1) for m in (covariance, heavy))
        sd, moments = np.sqrt(v), found.importance_weighted[name]
        assert np.all(np.abs(moments.mean - a @ CENTRE) < 4 * np.sqrt(c * s / 4000))
        error = np.sqrt(c * (3 * s**2 - 2 * s * v + v**2) / 4000) / (2 * sd)  # of an sd, by the delta method
        assert np.all(np.abs(moments.sd - sd) < 4 * error)
        assert_close(np.ravel(found.linear_response[name]), sd, 4 / math.sqrt(2 * 4000))
    assert found.guide["total"].sd < sd - 4 * error
    assert "Its standard deviation of `total` is too small" in found.recommendation
    assert abs(found.log_evidence.value - LOG_EVIDENCE) < 4 * math.sqrt((c - 1) / 4000)
    gap = -0.5 * np.linalg.slogdet(precision)[1]  # KL(q ‖ p)
    assert abs(LOG_EVIDENCE - gap - found.elbo.value) < 4 * found.elbo.standard_error


@pytest.mark.parametrize(
    "guide", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]
)
def test_linear_response_is_exact_for_a_gaussian(guide):
    """The precision of a Gaussian is the same everywhere, and so at every guide."""
    svi, params = started(gaussian, guide(gaussian, init_scale=0.5))
    found = linear_response(svi, params, random.key(1), num_particles=32)
    assert found.names == tuple(f"z[{i}]" for i in range(D))
    assert_close(found.covariance, COVARIANCE, 10 * root_eps(np.float32))
    assert_close(found.sd, np.sqrt(np.diag(COVARIANCE)), 10 * root_eps(np.float32))


def test_linear_response_is_exact_through_transforms_of_the_guide(x64, monkeypatch):
    svi, params = started(log_gaussian, hand_written)
    dense = linear_response(svi, params, random.key(1), num_particles=32).covariance
    assert_close(dense, COVARIANCE[:2, :2], 1e-8)
    monkeypatch.setattr("numpyro_natgrad.diagnostics.linear_response.DENSE_HESSIAN_LIMIT", 0)
    assert_close(linear_response(svi, params, random.key(1), num_particles=32).covariance, dense, 1e-4)


def test_newton_decrement_equals_the_gain_of_a_newton_step(x64):
    """The gain is half of the squared Mahalanobis distance of a guide with the right variances."""
    away = np.array([2.0, -1.0, 0.5, 1.0])
    svi, params = full()
    params["loc"] = params["loc"] + away
    found = verdict(svi, params, random.key(1), num_draws=500, num_chains=0, progress_bar=False)
    exact = 0.5 * away @ PRECISION @ away
    assert abs(found.newton_decrement - exact) < 4 * found.newton_decrement_error + 0.01 * exact


def test_linear_response_raises_without_a_minimum():
    def wells() -> None:
        z = numpyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        numpyro.factor("f", -8 * (z**2 - 1) ** 2)

    svi, params = started(wells, AutoNormal(wells), z_auto_loc=0.0, z_auto_scale=0.1)
    with pytest.raises(NoMinimumError, match=r"smallest curvature found is -.*Take more steps"):
        linear_response(svi, params, random.key(1))


def test_unfinished_fit_is_advised_to_continue():
    """The posterior is a Student t, and σ = 0.3 is far below the scale of the best ELBO."""

    def heavy() -> None:
        numpyro.sample("z", dist.StudentT(2.0, jnp.zeros(2), 1.0).to_event(1))

    svi, params = started(heavy, AutoNormal(heavy), z_auto_loc=np.zeros(2), z_auto_scale=np.full(2, 0.3))
    found = verdict(svi, params, random.key(1), num_draws=1000)
    assert found.k_hat > 0.7
    assert found.recommendation.startswith("The fit has not converged")


def test_too_small_family_is_advised_a_larger_one():
    """The posterior has correlations of 0.99, and the guide is the best mean-field one."""
    covariance = 0.01 * np.eye(D) + 0.99
    scale = np.diag(np.linalg.inv(covariance)) ** -0.5

    def ridge() -> None:
        numpyro.sample("z", dist.MultivariateNormal(jnp.zeros(D), jnp.array(covariance, float)))

    svi, params = started(ridge, AutoNormal(ridge), z_auto_loc=np.zeros(D), z_auto_scale=scale)
    found = verdict(svi, params, random.key(1), num_draws=1000)
    assert found.k_hat > 0.7
    assert found.recommendation.endswith("try `AutoMultivariateNormal`.")
    assert_close(found.linear_response["z"], np.ones(D), 4 / math.sqrt(2 * 500))
    # Its linear response is the posterior, so that weighted draws of the mixture know it.
    assert found.weighted_k_hat < 0.7
    assert_close(found.importance_weighted["z"].sd, np.ones(D), 5 / math.sqrt(2 * found.ess))
    assert np.all(np.abs(found.importance_weighted["z"].mean) < 5 / math.sqrt(found.ess))
    assert abs(found.log_evidence.value) < 5 * found.log_evidence.standard_error
    assert "usable for importance sampling" in found.recommendation
    resampled = to_arviz(found, random.key(2))["posterior"]["z"].values
    assert_close(resampled.std((0, 1)), np.ones(D), 0.2)


def test_mixture_weights_are_the_densities_of_its_components(x64):
    """A quarter of the draws has the density of the guide, half that of the linear response, a quarter Student's t."""
    heavy = scipy.stats.multivariate_t(CENTRE, COVARIANCE, df=5)
    normal = scipy.stats.multivariate_normal
    svi, params = started(gaussian, AutoNormal(gaussian), z_auto_loc=CENTRE, z_auto_scale=np.diag(PRECISION) ** -0.5)
    fitted = fitted_guide(svi, params, (), {})
    sites = draw(fitted, random.key(0), 100).sites
    found = mixture.draw(gaussian_latents(fitted, random.key(0)), jnp.array(COVARIANCE), random.key(1), 400, sites)
    z = found.drawn.values["z"]
    narrow = normal(CENTRE, np.diag(1 / np.diag(PRECISION))).pdf(z)
    density = narrow / 4 + normal(CENTRE, COVARIANCE).pdf(z) / 2 + heavy.pdf(z) / 4
    expected = LOG_EVIDENCE + normal(CENTRE, COVARIANCE).logpdf(z) - np.log(density)
    assert_close(found.drawn.log_weights, expected, 1e-9)
    assert found.drawn.log_weights.max() <= LOG_EVIDENCE + math.log(2)
    distance = np.sum((z - CENTRE) @ PRECISION * (z - CENTRE), axis=1)
    parts = np.split(distance, [found.response.start, found.response.stop])
    assert [len(x) for x in parts] == [100, 200, 100]
    assert parts[1].mean() < parts[2].mean()
    assert abs(parts[1].mean() - D) < 4 * math.sqrt(2 * D / 200)


@pytest.mark.parametrize(("count", "most"), [(1, 4), (4, 4), (5, 4), (7, 3), (12, 5), (12, None)])
def test_map_in_batches_is_a_map_that_traces_its_function_once(count, most):
    traced = []
    found = importance.map_in_batches(
        lambda x: traced.append(x) or (x**2, jnp.sum(x)), jnp.arange(2.0 * count).reshape(-1, 2), most
    )
    x = np.arange(2.0 * count).reshape(-1, 2)
    np.testing.assert_array_equal(found[0], x**2)
    np.testing.assert_array_equal(found[1], x.sum(1))
    assert len(traced) == 1


def test_tails_that_the_guide_lacks_are_in_the_weighted_moments():
    """Student's t with 5 degrees of freedom at the optimum of its Gaussian guide: a variance of 5/3."""

    def model() -> None:
        numpyro.sample("z", dist.StudentT(5.0).expand([2]).to_event(1))

    svi, params = started(model, AutoNormal(model), z_auto_loc=np.zeros(2), z_auto_scale=np.full(2, 1.08))
    found = verdict(svi, params, random.key(1), num_draws=4000, num_chains=0, progress_bar=False)
    sd = math.sqrt(5 / 3)
    assert np.all(found.guide["z"].sd < 0.9 * sd)
    assert_close(found.importance_weighted["z"].sd, np.full(2, sd), 0.06 * sd)


def test_equal_weights_have_no_pareto_tail(dtype):
    eps = float(jnp.finfo(jnp.zeros(()).dtype).eps)
    rounding = 1e3 * (1 + eps * np.random.default_rng(0).integers(-1, 2, 500))
    found = smooth(rounding, jnp.zeros(()).dtype)
    assert found.k_hat == 0.0
    assert_close(found.ess, 500.0, 1e-10)
    assert_close(found.log_evidence.value, 1e3, 1e-3)


def test_smoothed_log_evidence_equals_that_of_log_normal_weights():
    """log w ~ N(μ, s²): E[w] = exp(μ + s²/2)."""
    log_weights = -5 + 0.5 * np.random.default_rng(1).standard_normal(4000)
    found = smooth(np.append(log_weights, -np.inf), np.float64)
    assert found.normalised[-1] == 0
    assert_close(np.sum(found.normalised), 1.0, 1e-10)
    assert abs(found.log_evidence.value - (-5 + 0.125)) < 4 * found.log_evidence.standard_error
    assert_close(found.log_evidence.standard_error, math.sqrt(math.expm1(0.25) / 4000), 0.1)


def test_verdict_of_a_point_guide_suggests_a_distribution():
    svi, params = started(gaussian, AutoDelta(gaussian))
    found = verdict(svi, params, random.key(1), num_draws=100)
    assert math.isnan(found.k_hat)
    assert found.recommendation == "The guide is a point and has no uncertainty: try `AutoNormal`."
    assert "linear response needs Gaussian sites" in str(found)


def test_verdict_warns_about_minibatches():
    def model() -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", 10, subsample_size=2) as rows:
            numpyro.sample("y", dist.Normal(z, 1.0), obs=jnp.arange(10.0)[rows])

    svi, params = started(model, lambda: numpyro.sample("z", dist.Cauchy(numpyro.param("m", 0.0), 1.0)))
    with pytest.warns(UserWarning, match=r"plates \['rows'\] see a minibatch"):
        found = verdict(svi, params, random.key(1), num_draws=100)
    assert found.recommendation.startswith("The plates `rows` saw a minibatch")


def test_draws_with_nonfinite_weights_are_counted():
    def model() -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("edge", jnp.where(z > 1.0, -jnp.inf, 0.0))

    svi, params = started(model, AutoNormal(model), z_auto_loc=0.0, z_auto_scale=1.0)
    found = verdict(svi, params, random.key(1), num_draws=1000, num_chains=0)
    lost = int(np.sum(found.draws["z"] > 1.0))
    assert found.recommendation.startswith(f"{lost} of 1000 draws have a non-finite log weight")
    assert found.elbo.value == -np.inf
    kept = float(jax.scipy.stats.norm.cdf(1.0))
    assert abs(found.log_evidence.value - math.log(kept)) < 4 * math.sqrt((1 - kept) / kept / 1000)


def test_site_whose_support_the_draws_leave_is_named():
    def model() -> None:
        numpyro.sample("share", dist.Uniform(0.0, 1.0))

    def guide() -> None:
        numpyro.sample("share", dist.Normal(numpyro.param("m", 0.5), positive("s", jnp.array(0.3))))

    svi, params = started(model, guide)
    found = verdict(svi, params, random.key(1), num_draws=500, num_chains=0, progress_bar=False)
    assert "of the guide's draws of `share` lie outside of its support" in found.recommendation


def test_a_guide_that_was_set_up_with_a_minibatch_is_told_from_one_of_all_rows():
    """An autoguide draws as many local latents as it was set up with, and the model sees their rows alone."""

    def model(y: Any, rows: int | None = None) -> None:
        with numpyro.plate("rows", len(y), subsample_size=rows) as some:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y[some])

    y = jnp.arange(6.0)
    for rows, expected in ((None, ()), (2, ("rows",))):
        svi = SVI(model, AutoNormal(model), optax.sgd(0.1), Trace_ELBO())
        params = svi.get_params(svi.init(random.key(0), y, rows=rows))
        found = draw(fitted_guide(svi, params, (y,), {}), random.key(1), 100)
        assert found.sites.subsampled == expected


def test_centred_hierarchy_is_told_from_a_plain_one():
    def funnel() -> None:
        v = numpyro.sample("v", dist.Normal(0.0, 3.0))
        numpyro.sample("z", dist.Normal(jnp.zeros(5), jnp.exp(v / 2)).to_event(1))

    svi, params = started(funnel, AutoNormal(funnel), v_auto_scale=1.5, z_auto_scale=np.ones(5))
    found = verdict(svi, params, random.key(1), num_draws=500, progress_bar=False)
    assert "The scale of `z` varies with other latents" in found.recommendation or found.newton_decrement > 0.5


def test_an_elbo_without_a_variance_is_reported(capfd):
    """log w = −exp(1.5 |z|) has all moments; −|z|^-1.2 near zero has no second one."""

    def model() -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("spike", -(jnp.abs(z) ** -0.9))

    svi, params = started(model, AutoNormal(model), z_auto_loc=0.0, z_auto_scale=1.0)
    found = verdict(svi, params, random.key(1), num_draws=4000, num_chains=0, progress_bar=False)
    assert "The ELBO has no finite variance" in found.recommendation
    assert capfd.readouterr() == ("", "")


def test_no_negative_gain_is_printed():
    printed = str(by_hand()._replace(newton_decrement=-0.03, newton_decrement_error=0.04))
    assert "0 within 0.04" in printed


def test_lost_draws_forbid_the_use_of_the_guide():
    said = recommend(_case(nonfinite=2000, k_hat=0.1)).text
    assert said.endswith(
        "Use the importance-weighted moments, in which draws with a non-finite log weight have weight zero."
    )


def test_one_finite_weight_gives_no_estimate():
    found = smooth(np.r_[0.0, np.full(3999, -np.inf)], np.float64)
    assert found.k_hat == np.inf
    assert found.ess == 1


def test_values_of_zero_weight_may_be_nan():
    found = moments(np.array([np.inf, 1.0, 3.0]), np.array([0.0, 0.5, 0.5]))
    assert (found.mean, found.sd) == (2.0, 1.0)


@pytest.mark.slow
def test_tabulated_sites_do_not_change_the_verdict():
    """A tabulated constant is no point of the guide, and a latent outside of the table still counts."""

    def model() -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.deterministic("c", jnp.full(2, 0.3) + 0 * z)

    svi, params = started(model, AutoNormal(model), z_auto_loc=0.0, z_auto_scale=0.5)
    ways = (None, "c", ["c", "z"])
    found = [verdict(svi, params, random.key(1), num_draws=500, num_chains=0, sites=sites) for sites in ways]
    assert [list(v.guide) for v in found] == [["z"], ["c"], ["c", "z"]] == [list(v.draws) for v in found]
    assert len({v.recommendation for v in found}) == 1
    assert "point" not in found[0].recommendation
    assert "c[0]" not in found[2].recommendation
    assert repr(found[1]) == str(found[1])
    rows = str(found[2]).splitlines()
    linear = {row.split()[0]: float(row.split()[-1]) for row in rows if row.startswith(("z", "c["))}
    assert_close(linear["z"], 1.0, 5 / math.sqrt(2 * 500))
    assert linear["c[0]"] < 1e-6


def test_latents_that_the_guide_does_not_draw_are_named():
    def mixture() -> None:
        numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    svi, params = full()
    svi.model, svi.guide = mixture, lambda: numpyro.sample("z", dist.Normal(0.0, 1.0))
    with pytest.raises(StructureError, match=r"does not draw \['c'\].*TraceEnum_ELBO"):
        verdict(svi, params, random.key(1))


def test_arguments_of_verdict_are_checked():
    svi, params = full()
    with pytest.raises(ValueError, match="num_draws=10"):
        verdict(svi, params, random.key(1), num_draws=10)
    with pytest.raises(TypeError, match=r"num_draws=1000\.0.*an integer"):
        verdict(svi, params, random.key(1), num_draws=1e3)
    with pytest.raises(TypeError, match=r"`result` is of type `int`: expected what `svi\.run`"):
        verdict(svi, 3, random.key(1))
    with pytest.raises(ValueError, match="`num_chains=10`: expected 25 or more, such as 200"):
        verdict(svi, params, random.key(1), num_chains=10)
    with pytest.raises(TypeError, match="`num_chains=True`: expected an integer"):
        verdict(svi, params, random.key(1), num_chains=True)
    for typed in (["y"], "y"):
        with pytest.raises(StructureError, match=rf"`sites={re.escape(repr(typed))}`: .* no \['y'\]; expected some of"):
            verdict(svi, params, random.key(1), sites=typed)
    with pytest.raises(ValueError, match=r"call `svi\.init"):
        linear_response(SVI(gaussian, svi.guide, optax.sgd(0.1), Trace_ELBO()), params, random.key(1))


def _case(**changed: Any) -> Case:
    usual = Case(
        guide=("AutoNormal",),
        latents=4,
        draws=4000,
        nonfinite=0,
        k_hat=1.2,
        ess=1000.0,
        gap=3.0,
        rounding=0.0,
        newton_decrement=math.nan,
        no_maximum=False,
        points=(),
        only_points=False,
        subsampled=(),
        worst=("z", 1.0),
    )
    return usual._replace(**changed)


MOVE, WIDER = Move("mean", "tau", -0.3, 0.04), Move("standard deviation", "tau", math.log(1.5), 0.04)
CASES = [
    ({"k_hat": 0.2}, "The guide is good: k-hat 0.20. Use it as it is."),
    ({"k_hat": 0.2, "worst": ("z[1]", 0.7)}, "Its standard deviation of `z[1]` is too small, 0.70 of the"),
    ({"k_hat": 0.6}, "The guide is usable: k-hat 0.60. Use the importance-weighted moments (1000 effective draws)."),
    ({"k_hat": 0.2, "farthest": ("z[1]", 0.4)}, "Its mean of `z[1]` is off by 0.40 standard deviations"),
    ({"k_hat": 0.6, "ess": 30.0}, "The family is too small"),
    ({"weighted_k_hat": 0.3}, "(k-hat 1.20), and usable for importance sampling. Use the importance-weighted moments"),
    ({"k_hat": 0.2, "weighted_k_hat": 0.9}, "The family is too small"),
    ({"k_hat": 0.6, "funnel": "theta"}, "use `LocScaleReparam(0)` for it"),
    ({"weighted_k_hat": 0.3, "funnel": "theta"}, "use `LocScaleReparam(0)` for it"),
    ({"k_hat": 0.6, "funnel": "theta", "chain_states": 2000}, "Use the importance-weighted moments (1000 effective"),
    (
        {"k_hat": 0.2, "guide_moves": MOVE},
        "Short chains that start from its draws move the mean of `tau` by 0.30 ± 0.04",
    ),
    (
        {"k_hat": 0.2, "guide_moves": MOVE, "weighted_moves": MOVE},
        "The family is too small: k-hat 0.20, but short chains",
    ),
    ({"k_hat": 0.6, "weighted_moves": MOVE, "chains_mixed": True, "chain_states": 2000}, "or their 2000 states"),
    ({"chains_mixed": True, "chain_states": 2000}, "Use the moments of the short chains"),
    ({"chains_mixed": True, "newton_decrement": 1.5}, "The fit has not converged"),
    ({"gap": 0.03, "gap_error": 0.005, "guide_moves": MOVE}, "The family is too small"),
    ({"weighted_moves": WIDER}, "The family is too small: k-hat 1.20, trustworthy below 0.70."),
    ({"k_hat": 0.6, "weighted_moves": WIDER}, "move the standard deviation of `tau` by a factor of 1.50 ± 0.06"),
    ({"k_hat": 0.6, "draws": 100}, "The family is too small: k-hat 0.60, trustworthy below 0.50."),
    ({"k_hat": 0.70004}, "The family is too small: k-hat 0.70004, trustworthy below 0.70000."),
    (
        {"gap": 0.03, "gap_error": 0.005},
        "good for means and standard deviations: KL(guide ‖ posterior) is 0.030 ± 0.005",
    ),
    ({"gap": 0.03, "gap_error": 0.009}, "The family is too small"),
    ({"gap": 0.03}, "The family is too small"),
    ({"k_hat": 0.699}, "The guide is usable: k-hat 0.699."),
    ({"k_hat": 0.7}, "The family is too small: k-hat 0.70, trustworthy below 0.70."),
    ({}, "The family is too small: k-hat 1.20, trustworthy below 0.70. Try `AutoMultivariateNormal`."),
    ({"latents": 5000}, "Try `AutoLowRankMultivariateNormal`."),
    ({"guide": ("Mine", "AutoDiagonalNormal")}, "Try `AutoMultivariateNormal`."),
    ({"guide": ("AutoMultivariateNormal",)}, "a flow (`AutoBNAFNormal`"),
    ({"guide": ("AutoLowRankMultivariateNormal",)}, "Try `AutoMultivariateNormal`."),
    ({"guide": ("AutoLowRankMultivariateNormal",), "latents": 5000}, "a flow (`AutoBNAFNormal`"),
    ({"guide": ("AutoBNAFNormal",)}, "NUTS"),
    ({"guide": ("function",)}, "latents depend on each other"),
    ({"newton_decrement": 1.5}, "The fit has not converged: its ELBO can rise by about 1.5 nats within this family"),
    ({"newton_decrement": 1.5, "gap": 1000.0}, "The family is too small"),
    ({"newton_decrement": 0.1}, "The family is too small"),
    ({"newton_decrement": 1.5, "no_maximum": True}, "try other starts (`fit(..., num_starts=8)`"),
    (
        {"newton_decrement": 1.5, "particles": 1},
        "Use more particles (`num_particles=8`; a step then costs up to 8 times",
    ),
    ({"newton_decrement": 1.5, "newton_decrement_error": 1.2}, "The family is too small"),
    ({"guide": ("AutoMultivariateNormal",)}, "Start NUTS from this fit (`to_nuts`), or try a flow"),
    ({"guide": ("AutoMultivariateNormal",), "no_maximum": True}, "try other starts (`fit(..., num_starts=8)`"),
    ({"correlated": False}, "Start NUTS from this fit (`to_nuts`)"),
    ({"correlated": False}, "other modes, try other starts (`fit(..., num_starts=8)`"),
    ({"funnel": "theta"}, "The scale of `theta` varies with other latents: use `LocScaleReparam(0)` for it"),
    ({"abstains": True, "cause": "draws of `c` are not differentiable"}, "by `TraceEnum_ELBO`, since draws of `c`"),
    ({"term_tail": 0.9}, "The ELBO has no finite variance: its lowest terms have the Pareto shape 0.90"),
    (
        {"nonfinite": 3, "cause": "the draws of `p` lie outside of its support"},
        "3 of 4000 draws have a non-finite log weight: the draws of `p` lie",
    ),
    ({"points": ("s",)}, "The guide gives `s` a single value"),
    ({"rounding": 0.5}, "numpyro.enable_x64()"),
]


@pytest.mark.parametrize(("changed", "said"), CASES)
def test_recommendation_follows_from_the_figures(changed, said):
    assert said in recommend(_case(**changed)).text


def test_k_hat_threshold_falls_with_few_draws():
    assert_close(threshold(100), 0.5, 1e-12)
    assert threshold(4000) == 0.7


@pytest.mark.slow
def test_flow_has_weights_and_a_decrement_and_no_linear_response():
    svi, params = started(gaussian, AutoIAFNormal(gaussian, num_flows=1, hidden_dims=[D]))
    found = verdict(svi, params, random.key(1), num_draws=100)
    assert np.isfinite(found.elbo.value)
    assert found.linear_response == {}
    assert np.isfinite(found.newton_decrement)


def by_hand() -> Verdict:
    moments = lambda mean, sd: Moments(np.array(mean), np.array(sd), np.zeros(np.shape(mean)))
    return Verdict(
        k_hat=1.204,
        threshold=0.7,
        elbo=Estimate(-12.345, 0.021),
        log_evidence=Estimate(-10.1, 0.3),
        ess=1.0,
        newton_decrement=0.04,
        newton_decrement_error=0.02,
        guide={"a": moments(1.0, 0.5), "b": moments([2.0, -300.25], [0.1, 20.0])},
        importance_weighted={"a": moments(1.1, 0.75), "b": moments([2.0, -310.0], [0.2, 33.3])},
        linear_response={"a": np.array(0.8), "b": np.array([0.21, 35.0])},
        linear_response_note="",
        draws={"a": np.array([1.0, 2.0]), "b": np.array([[0.0, 1.0], [2.0, 3.0]])},
        log_weights=np.array([0.0, -1.0]),
        weights=np.array([1.0, 0.0]),
        recommendation="Try something else.",
    )


TABLE = """\
k-hat                     1.20  too large; trustworthy below 0.70
ELBO             -12.35 ± 0.02  nats
log evidence     -10.10 ± 0.30  nats, Pareto-smoothed
effective draws              1  of 2
Newton decrement   0.04 ± 0.02  nats to gain in this family

                      guide    importance-weighted      linear
site        mean         sd        mean         sd    response
a              1        0.5         1.1       0.75         0.8
b[0]           2        0.1           2        0.2        0.21
b[1]      -300.2         20        -310       33.3          35

Try something else."""


def test_table_of_the_verdict():
    assert str(by_hand()) == TABLE


def test_table_prints_k_hat_beside_its_threshold():
    assert str(by_hand()._replace(k_hat=0.7004)).splitlines()[0].split(maxsplit=2) == [
        "k-hat",
        "0.7004",
        "too large; trustworthy below 0.7000",
    ]


def test_to_arviz_keeps_weights_or_resamples():
    judged = by_hand()
    weighted = to_arviz(judged, dims={"b": ["column"]})
    assert weighted["posterior"]["b"].dims == ("chain", "draw", "column")
    assert_close(np.asarray(weighted["sample_stats"]["lp_minus_lq"])[0], judged.log_weights, 1e-12)
    resampled = to_arviz(judged, random.key(0))
    assert np.all(np.asarray(resampled["posterior"]["a"]) == 1.0)  # the other draw has no weight


def test_draws_that_all_lie_outside_of_the_support_are_named_by_fit_and_verdict():
    """Nothing is known of the posterior then: no weight, no moment, and no family to recommend."""

    def model() -> None:
        numpyro.sample("share", dist.Uniform(0.0, 1.0))

    def guide() -> None:
        numpyro.sample("share", dist.Normal(numpyro.param("m", 9.0), positive("s", jnp.array(0.1))))

    svi = SVI(model, guide, NaturalGradient(), Trace_ELBO(4))
    result = fit(svi, random.key(0), max_steps=50, progress_bar=False)
    outside = "of the guide's draws of `share` lie outside of its support"
    assert result.reason.startswith("diverged")
    assert outside in result.reason
    found = verdict(svi, result, random.key(1), num_draws=200, num_chains=0, progress_bar=False)
    assert found.recommendation.startswith("200 of 200 draws have a non-finite log weight")
    assert outside in found.recommendation
    assert found.recommendation.endswith("nothing is known of the posterior yet.")
    assert found.ess == 0
    assert np.isnan(found.importance_weighted["share"].mean)
    assert "nan" in str(found)


def test_a_constant_likelihood_has_a_finite_elbo():
    """Log weights near zero that differ by rounding have no tail, and so a variance."""
    heavy = -np.abs(np.random.default_rng(0).standard_cauchy(2000))
    rounded = 1e-7 * heavy.clip(-30)
    assert importance.tail_of_terms(rounded, np.float32) == 0.0
    assert importance.tail_of_terms(heavy, np.float32) > 0.7


def test_standard_error_of_the_gap_is_its_scatter():
    """Log weights σ ε − σ²/2 of a posterior with log evidence 0: KL(q ‖ p) = σ²/2, over 200 repetitions.

    Smoothing of the largest weights biases it upwards, by less than half of its standard error.
    """
    sigma, draws = 0.3, 500
    log_weights = sigma * np.random.default_rng(0).standard_normal((200, draws)) - sigma**2 / 2
    found = [importance.gap(x, smooth(x, np.float64)) for x in log_weights]
    values = np.array([float(x.value) for x in found])
    errors = np.array([float(x.standard_error) for x in found])
    assert abs(values.mean() - sigma**2 / 2) < values.std() / 2
    assert abs(np.log(errors.mean() / values.std())) < 4 / math.sqrt(2 * len(values))
