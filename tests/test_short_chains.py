# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Short chains leave the posterior's moments as they are, find them from elsewhere, and say when they have not."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
import scipy.stats
from jax import random
from numpyro import distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from oracles import spd

from numpyro_natgrad import to_arviz, verdict
from numpyro_natgrad.diagnostics import short_chains
from numpyro_natgrad.diagnostics.importance import Moments, draw, fitted_guide
from numpyro_natgrad.diagnostics.short_chains import CHAINS, ShortChains

D = 3
CENTRE, COVARIANCE = np.arange(1.0, D + 1), spd(3, D, low=0.5, high=8.0)


def gaussian() -> None:
    numpyro.sample("z", dist.MultivariateNormal(jnp.array(CENTRE, float), jnp.array(COVARIANCE, float)))


def supports() -> None:
    """Independent latents of several supports, so that each moment is known."""
    numpyro.sample("rate", dist.Gamma(3.0, 2.0))
    numpyro.sample("share", dist.Beta(2.0, 5.0))
    numpyro.sample("shares", dist.Dirichlet(jnp.array([2.0, 3.0, 4.0])))
    numpyro.sample("level", dist.TruncatedNormal(0.5, 1.0, low=0.0))


#: Mean and standard deviation of each site of ``supports``, by SciPy.
EXACT = {
    "rate": (scipy.stats.gamma(3, scale=0.5).mean(), scipy.stats.gamma(3, scale=0.5).std()),
    "share": (scipy.stats.beta(2, 5).mean(), scipy.stats.beta(2, 5).std()),
    "shares": (np.array([2, 3, 4]) / 9, np.sqrt(np.array([2 * 7, 3 * 6, 4 * 5]) / 81 / 10)),
    "level": (scipy.stats.truncnorm(-0.5, np.inf, 0.5).mean(), scipy.stats.truncnorm(-0.5, np.inf, 0.5).std()),
}


def started(model: Any, guide: Any, *args: Any, **changed: Any) -> tuple[SVI, dict[str, Any]]:
    svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    params = svi.get_params(svi.init(random.key(0), *args))
    return svi, {**params, **{name: jnp.asarray(x, params[name].dtype) for name, x in changed.items()}}


def chains(model: Any, guide: Any, *args: Any, seed: int = 1, **changed: Any) -> ShortChains | str:
    """Short chains that start from draws of a guide, without weights."""
    fitted = fitted_guide(*started(model, guide, *args, **changed), args, {})
    drawn = draw(fitted, random.key(seed), 1000, unconstrain=True)
    return short_chains.run(fitted, drawn, np.full(1000, 1e-3), random.key(seed + 1), 200)


def errors(found: ShortChains, name: str, mean: Any, sd: Any) -> np.ndarray:
    """Errors of means and log standard deviations, in their standard errors."""
    moments, sd_error = found.moments(name)
    return np.ravel([(moments.mean - mean) / moments.standard_error, np.log(moments.sd / sd) / sd_error])


@pytest.mark.parametrize("scale", [1.0, 0.4, 1.5])
def test_chains_find_the_moments_from_draws_that_are_too_near_or_too_far(dtype, scale):
    """From N(m, Σ) itself, and from another mean and spread, to the posterior: within four standard errors of each."""
    factor = scale * np.linalg.cholesky(COVARIANCE)
    guide = AutoMultivariateNormal(gaussian)
    found = chains(
        gaussian, guide, auto_loc=CENTRE + (scale != 1) * np.sqrt(np.diag(COVARIANCE)), auto_scale_tril=factor
    )
    assert np.abs(errors(found, "z", CENTRE, np.sqrt(np.diag(COVARIANCE)))).max() < 4
    assert abs(found.acceptance - CHAINS.acceptance) < 0.1
    assert found.draws["z"].shape == (200, CHAINS.recorded, D)
    assert found.have_mixed()


def test_chains_find_the_moments_on_every_support(dtype):
    found = chains(supports, AutoNormal(supports, init_scale=0.3))
    worst = max(np.abs(errors(found, name, *moments)).max() for name, moments in EXACT.items())
    assert worst < 4
    assert np.all(found.draws["rate"] > 0)
    np.testing.assert_allclose(found.draws["shares"].sum(-1), 1.0, rtol=1e-5)


def test_standard_errors_are_those_of_repetitions():
    """z-scores of 12 means and log standard deviations of 6 seeds: mean square 1 within four of its errors."""
    factor = np.linalg.cholesky(COVARIANCE)
    found = [
        chains(gaussian, AutoMultivariateNormal(gaussian), seed=seed, auto_loc=CENTRE, auto_scale_tril=factor)
        for seed in range(6)
    ]
    scores = np.concatenate([errors(x, "z", CENTRE, np.sqrt(np.diag(COVARIANCE))) for x in found])
    assert abs(np.mean(scores**2) - 1) < 4 * math.sqrt(2 / scores.size)


def test_a_tail_that_no_draw_has_reached_is_found():
    """Student's t with 2.5 degrees of freedom has a standard deviation of √5; the guide and its weights less."""

    def heavy() -> None:
        numpyro.sample("z", dist.StudentT(2.5, 0.0, 1.0))

    found = chains(heavy, AutoNormal(heavy), z_auto_loc=0.0, z_auto_scale=0.8)
    narrow = {"z": Moments(np.array(0.0), np.array(0.8), np.array(0.01))}
    move = found.largest_move(narrow)
    assert move.moment == "standard deviation"
    assert move.by > math.log(1.5)


def states(moved: float = 0.0, *, stuck: float = 0.0, seed: int = 0) -> ShortChains:
    """States with mean ``moved`` and unit variance, of which ``stuck`` is the same at all times of a chain."""
    rng = np.random.default_rng(seed)
    own, common = rng.normal(size=(200, 10, 2)), rng.normal(size=(200, 1, 2))
    return ShortChains({"z": moved + math.sqrt(1 - stuck) * own + math.sqrt(stuck) * common}, 0.8)


STANDARD = {"z": Moments(np.zeros(2), np.ones(2), np.zeros(2))}


def test_a_move_is_reported_beyond_its_size_and_its_noise():
    assert states().largest_move(STANDARD) is None
    assert states(0.1).largest_move(STANDARD) is None
    found = states(0.3).largest_move(STANDARD)
    assert found[:2] in (("mean", "z[0]"), ("mean", "z[1]"))
    assert abs(found.by - 0.3) < 4 * found.error
    wide = {"z": Moments(np.zeros(2), np.array([1.0, 2.0]), np.zeros(2))}
    found = states().largest_move(wide)
    assert found[:2] == ("standard deviation", "z[1]")
    assert abs(found.by + math.log(2)) < 4 * found.error
    # A mean over chains that hardly move has a standard error of 1/√200, so that 0.2 may be noise.
    assert states(0.2).largest_move(STANDARD) is not None
    assert (
        states(0.2, stuck=0.99).largest_move(STANDARD) is None
        or states(0.2, stuck=0.99).largest_move(STANDARD).by > 0.2
    )


def test_constant_entries_do_not_move():
    found = ShortChains({"z": np.full((200, 10, 1), 3.0)}, 0.8)
    assert found.largest_move({"z": Moments(np.array([3.0]), np.array([0.0]), np.array([0.0]))}) is None
    assert found.have_mixed()


def test_chains_that_remember_their_start_have_not_mixed():
    assert states().have_mixed()
    assert not states(stuck=0.8).have_mixed()
    drifting = states().draws["z"].copy()
    drifting[:, 5:, 0] += 0.5
    assert not ShortChains({"z": drifting}, 0.8).have_mixed()
    assert not ShortChains({"z": np.full((200, 10, 1), np.nan)}, 0.8).have_mixed()


def test_one_draw_with_all_of_the_weight_is_no_start():
    fitted = fitted_guide(*started(gaussian, AutoNormal(gaussian)), (), {})
    drawn = draw(fitted, random.key(1), 100, unconstrain=True)
    weights = np.full(100, 1e-300)
    weights[3] = 1.0
    assert "no spread" in short_chains.run(fitted, drawn, weights, random.key(2), 200)


@pytest.mark.slow
def test_where_no_chain_runs_the_verdict_says_why():
    def model(y: Any) -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(y), subsample_size=2 if len(y) == 7 else None) as rows:
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])

    y = jnp.arange(6.0)
    svi, params = started(model, AutoNormal(model), y)
    quiet = {"num_draws": 200, "progress_bar": False}
    assert verdict(svi, params, random.key(1), y, num_chains=0, **quiet).short_chains_note == "`num_chains=0`"
    large = verdict(svi, params, random.key(1), jnp.zeros(100_001), **quiet)
    assert large.short_chains == {}
    assert "short chains: data and latents have 100,002 entries; `num_chains=200` runs them" in str(large)
    svi, params = started(model, AutoDelta(model), y)
    assert "single value" in verdict(svi, params, random.key(1), y, **quiet).short_chains_note
    svi, params = started(model, AutoNormal(model), jnp.arange(7.0))
    with pytest.warns(UserWarning, match="see a minibatch"):
        found = verdict(svi, params, random.key(1), jnp.arange(7.0), **quiet)
    assert "minibatch" in found.short_chains_note


@pytest.mark.slow
def test_the_answer_of_a_verdict_is_mended_by_chains_and_its_draws_are_theirs():
    """Weights have a small k-hat, and the guide has no draw in the neck of a hierarchy."""

    def hierarchy() -> None:
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.8))
        with numpyro.plate("group", 4):
            numpyro.sample("theta", dist.Normal(0.0, scale))

    # The marginal of the scale is its prior: no group has data.
    exact = scipy.stats.lognorm(0.8)
    svi, params = started(
        hierarchy,
        AutoNormal(hierarchy),
        scale_auto_loc=0.5,
        scale_auto_scale=0.3,
        theta_auto_loc=np.zeros(4),
        theta_auto_scale=np.full(4, 1.2),
    )
    found = verdict(svi, params, random.key(1), progress_bar=False)
    log_scale = np.log(found.source.chains.draws["scale"])
    assert abs(log_scale.mean()) < 4 * log_scale.mean(1).std(ddof=1) / math.sqrt(200) + 0.15 * 0.8
    assert found.short_chains["scale"].mean == pytest.approx(exact.mean(), abs=0.3 * exact.std())
    if found.answer == "short_chains":
        posterior = to_arviz(found, random.key(2))["posterior"]["scale"].values
        np.testing.assert_array_equal(posterior.ravel(), found.source.chains.draws["scale"].ravel())
    assert found.answer != "guide"


def test_chains_that_have_not_mixed_go_on():
    """The guide is a tenth as wide as the posterior in one direction, and the step size adapts to the other."""
    scales = np.array([1.0, 30.0])

    def stretched() -> None:
        numpyro.sample("z", dist.Normal(0.0, jnp.array(scales, float)).to_event(1))

    found = chains(stretched, AutoNormal(stretched), z_auto_loc=np.zeros(2), z_auto_scale=np.array([1.0, 1.0]))
    assert found.draws["z"].shape == (200, CHAINS.recorded, 2)
    assert not found.have_mixed() or np.abs(errors(found, "z", np.zeros(2), scales)).max() < 4
