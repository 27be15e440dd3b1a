# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``fit_many`` takes the steps of single fits, stops by their rule, and returns their answers."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import SVI, Trace_ELBO, init_to_sample
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal

from numpyro_natgrad import FitResult, NaturalGradient, StructureError, fit, fit_many, verdict

#: More than eight fits: jaxlib 0.10 miscompiles a ``cond`` of nine predicates.
COUNT = 10
X = jnp.linspace(-1.0, 1.0, 8)
SETS = jnp.array(np.random.default_rng(0).poisson(np.exp(1.0 + np.outer(np.linspace(-1, 1, COUNT), X))), float)


def model(x, y):
    level = numpyro.sample("level", dist.Normal(0.0, 2.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 2.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Poisson(jnp.exp(level + slope * x)), obs=y)


def make(guide=AutoMultivariateNormal):
    return SVI(model, guide(model), NaturalGradient(), Trace_ELBO(num_particles=4))


KEYS = random.split(random.key(0), COUNT)


@pytest.fixture(scope="module")
def many():
    svi = make()
    return svi, fit_many(svi, KEYS, X, SETS, in_axes=(None, 0), tolerance=0.05, max_steps=300, progress_bar=False)


def test_all_fits_converge_and_keep_the_state_in_which_they_did(many):
    _, result = many
    assert len(result) == len(result.fits) == COUNT
    assert result.converged.all()
    assert len(set(result.steps.tolist())) > 1, "all stop at once, so that this test shows nothing"
    np.testing.assert_array_equal(result.state.optim_state[0], result.steps)
    for i, one in enumerate(result):
        assert isinstance(one, FitResult)
        assert one.history.steps == len(one.losses) == one.state.optim_state[0] == result.steps[i]
        assert one.judgement.grants(0.05)
        for name, x in one.params.items():
            np.testing.assert_array_equal(x, result.params[name][i])


@pytest.mark.slow
def test_fits_are_those_of_fit_with_the_same_key(many):
    """The steps of the first chunk are the same up to rounding; the end is within the noise that the tolerance leaves.

    A gain of 0.05 nats is 0.32 posterior standard deviations; two of them differ by at most 0.64.
    """
    _, result = many
    for i in (0, COUNT - 1):
        alone = fit(make(), KEYS[i], X, SETS[i], tolerance=0.05, max_steps=300, progress_bar=False)
        np.testing.assert_allclose(result[i].losses[:5], alone.losses[:5], rtol=2e-3)
        apart = result[i].params["auto_loc"] - alone.params["auto_loc"]
        whitened = np.linalg.solve(alone.params["auto_scale_tril"], apart)
        assert np.linalg.norm(whitened) < 0.64
        error = 3 * np.hypot(result.elbo_error[i], 0.05)
        elbo = -Trace_ELBO(2048).loss(random.key(1), alone.params, model, many[0].guide, X, SETS[i])
        assert abs(result.elbo[i] - elbo) < error


@pytest.mark.slow
def test_a_result_of_one_fit_is_judged_and_resumed_like_any_other(many):
    svi, result = many
    assert np.isfinite(verdict(svi, result[3], random.key(1), X, SETS[3], num_draws=200, num_chains=0).elbo.value)
    longer = fit(svi, KEYS[3], X, SETS[3], resume=result[3], max_steps=5, tolerance=0, progress_bar=False)
    assert longer.history.steps == result[3].history.steps + 5


def test_the_table_has_a_row_for_each_fit(many):
    _, result = many
    lines = str(result).splitlines()
    assert lines[0].split() == ["fit", "steps", "ELBO", "nats", "to", "gain", "end"]
    assert len(lines) == COUNT + 2
    for i, line in enumerate(lines[2:]):
        assert line.split()[:2] == [str(i), str(result.steps[i])]
        assert line.endswith("converged")
    assert repr(result).startswith(f"FitManyResult(fits={COUNT}, converged={COUNT}, steps up to")


@pytest.mark.slow
def test_starts_of_one_fit_are_random_and_share_their_data():
    """``in_axes=None``; latents drawn near 50 and −50 in the order of the model."""

    def two_sites():
        numpyro.sample("b", dist.Normal(-50.0, 1.0))
        numpyro.sample("a", dist.Normal(50.0, 1.0))

    guide = AutoDiagonalNormal(two_sites, init_loc_fn=init_to_sample)
    svi = SVI(two_sites, guide, NaturalGradient(), Trace_ELBO())
    result = fit_many(svi, random.split(random.key(1), 3), in_axes=None, max_steps=3, tolerance=0, progress_bar=False)
    assert len(set(result.params["auto_loc"][:, 0].tolist())) == 3
    medians = jax.vmap(guide.median)(result.params)
    assert np.all(np.abs(medians["a"] - 50) < 10)
    assert np.all(np.abs(medians["b"] + 50) < 10)


@pytest.mark.slow
def test_natural_parameters_of_many_conjugate_fits_are_exact():
    """Gamma sites have a ``cond`` in their steps; ten data sets have ten known posteriors."""

    def rates(y):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        numpyro.sample("y", dist.Poisson(rate).expand(y.shape).to_event(1), obs=y)

    def guide(y):
        positive = dist.constraints.positive
        shape = numpyro.param("shape", 1.0, constraint=positive)
        numpyro.sample("rate", dist.Gamma(shape, numpyro.param("inverse", 1.0, constraint=positive)))

    svi = SVI(rates, guide, NaturalGradient(), Trace_ELBO(num_particles=16))
    result = fit_many(svi, KEYS, SETS, tolerance=0.01, max_steps=300, progress_bar=False)
    shape, inverse = 2.0 + SETS.sum(1), 1.0 + SETS.shape[1]
    np.testing.assert_allclose(result.params["shape"] / result.params["inverse"], shape / inverse, rtol=0.1)
    assert result.converged.all()


@pytest.mark.slow
def test_axes_other_than_the_first_and_raw_keys():
    svi = make(AutoNormal)
    keys = random.split(random.PRNGKey(0), 2)
    options = {"max_steps": 2, "tolerance": 0, "progress_bar": False}
    result = fit_many(svi, keys, X, SETS[:2].T, in_axes=(None, 1), **options)
    other = fit_many(svi, keys, jnp.stack([X, X]), SETS[:2], **options)
    np.testing.assert_array_equal(result[1].losses, other[1].losses)
    assert not result.converged.any()
    assert "`max_steps` was reached" in result.table()


@pytest.mark.parametrize(
    ("error", "match", "keys", "args", "options"),
    [
        (ValueError, r"`rng_keys=key<fry>\(\)`: expected one key for each fit", KEYS[0], (X, SETS), {}),
        (ValueError, r"`rng_keys=<int>`", 3, (X, SETS), {}),
        (
            ValueError,
            r"`args\[0\]` has the shape \(8,\): expected an array with 10 entries along axis 0",
            KEYS,
            (X, SETS),
            {},
        ),
        (ValueError, r"`in_axes=\(0, 0, 0\)`: .*each of the 2 positional", KEYS, (X, SETS), {"in_axes": (0, 0, 0)}),
        (ValueError, r"`args\[1\]` is a `float`", KEYS, (X, 2.0), {"in_axes": (None, 0)}),
        (TypeError, r"`max_steps='9'`", KEYS, (X, SETS), {"max_steps": "9"}),
    ],
)
def test_arguments_that_cannot_be_used_are_quoted(error, match, keys, args, options):
    with pytest.raises(error, match=match):
        fit_many(make(AutoNormal), keys, *args, progress_bar=False, **options)


def test_sizes_cannot_be_mapped():
    def sized(count):
        with numpyro.plate("rows", int(count)):
            numpyro.sample("z", dist.Normal(0, 1))

    svi = SVI(sized, AutoNormal(sized), NaturalGradient(), Trace_ELBO())
    with pytest.raises(StructureError, match="needs the values of 1 of the mapped arguments"):
        fit_many(svi, KEYS[:2], jnp.array([3, 4]), progress_bar=False)


def test_mutable_state_is_refused():
    def counting(y):
        numpyro.primitives.mutable("count", jnp.zeros(()))
        numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0, 1)), 1), obs=y)

    svi = SVI(counting, AutoNormal(counting), NaturalGradient(), Trace_ELBO(num_particles=1))
    with pytest.raises(StructureError, match="expected a model without mutable state"):
        fit_many(svi, KEYS[:2], jnp.ones(2), progress_bar=False)
