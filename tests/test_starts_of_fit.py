# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``fit(num_starts=…)``: the best of several starts, and the same steps as of each alone."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import SVI, Trace_ELBO, init_to_sample, init_to_value
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

from numpyro_natgrad import NaturalGradient, fit
from numpyro_natgrad.compilation.data import split
from numpyro_natgrad.infer.fitting.starts import SeveralStarts, _summary
from numpyro_natgrad.infer.loop import STEPS_PER_CHUNK, program_of
from numpyro_natgrad.options import StructureError

#: Log weights of two modes that no draw of a fitted guide connects: the ELBO of the best mode is 0, of the other −4.
LOG_WEIGHTS = jnp.array([0.0, -4.0])


def model():
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.factor("modes", jax.nn.logsumexp(LOG_WEIGHTS + dist.Normal(jnp.array([-5.0, 5.0]), 0.5).log_prob(x)))


def _svi(**options):
    return SVI(model, AutoNormal(model, **options), NaturalGradient(), Trace_ELBO(num_particles=8))


@pytest.mark.parametrize("x64", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_best_mode_is_found_where_single_starts_end_in_the_other(x64):
    with jax.enable_x64(x64):
        result = fit(_svi(), random.key(1), num_starts=8, tolerance=0.05, max_steps=200, progress_bar=False)
    starts = result.starts
    assert len(result.losses) == result.history.steps >= starts.steps > 0
    assert 1 <= starts.near < 8, "all starts end in the best mode, so that this test shows nothing"
    assert starts.elbo.min() < starts.elbo.max() - 3
    assert "best of 8 starts" in result.reason
    np.testing.assert_allclose(result.params["x_auto_loc"], -5.0, atol=0.3)


def _states(svi, first, count):
    return SeveralStarts(svi, random.key(1), first, program_of(svi, False), count, split(svi, (), {})).states()


def test_starts_keep_the_order_of_the_latents():
    """``init_to_sample`` draws ``b`` near −50 and ``a`` near 50, in the order of the model in each start."""

    def two_sites():
        numpyro.sample("b", dist.Normal(-50.0, 1.0))
        numpyro.sample("a", dist.Normal(50.0, 1.0))

    guide = AutoDiagonalNormal(two_sites, init_loc_fn=init_to_sample)
    svi = SVI(two_sites, guide, NaturalGradient(), Trace_ELBO())
    states = _states(svi, svi.init(random.key(0)), 4)
    found = jax.vmap(lambda state: guide.median(svi.get_params(state)))(states)
    assert np.all(np.abs(found["a"] - 50) < 10)
    assert np.all(np.abs(found["b"] + 50) < 10)


@pytest.mark.slow
def test_steps_of_all_starts_together_are_those_of_each_alone():
    svi = _svi()
    first = svi.init(random.key(0))
    data = split(svi, (), {})
    chunk = lambda state: program_of(svi, False).steps(state, STEPS_PER_CHUNK, (), data, [])[0]
    states = _states(svi, first, 3)
    together = jax.jit(jax.vmap(chunk))(states)
    together = svi.optim.get_params(together.optim_state)
    for i in range(3):
        alone = jax.jit(chunk)(jax.tree.map(lambda x, i=i: x[i], states))
        for name, x in svi.optim.get_params(alone.optim_state).items():
            np.testing.assert_allclose(together[name][i], x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("num_starts", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError), ("8", TypeError)]
)
def test_a_number_of_starts_that_cannot_be_used(num_starts, error):
    with pytest.raises(error, match=f"`num_starts={num_starts!r}`: expected a positive integer"):
        fit(_svi(), random.key(0), num_starts=num_starts, progress_bar=False)


def test_several_starts_beside_a_given_one():
    with pytest.raises(ValueError, match="`num_starts=4` and `batches` and `init_params` were given"):
        fit(_svi(), random.key(0), batches=[()], init_params={}, num_starts=4, progress_bar=False)


def test_equal_starts_are_warned_of():
    svi = _svi(init_loc_fn=init_to_value(values={"x": 1.0}))
    with pytest.warns(UserWarning, match="all starts have the same parameters"):
        fit(svi, random.key(0), num_starts=3, max_steps=30, progress_bar=False)


def test_mutable_state_is_refused():
    def counting(y):
        numpyro.primitives.mutable("count", jnp.zeros(()))
        numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0, 1)), 1), obs=y)

    svi = SVI(counting, AutoNormal(counting), NaturalGradient(), Trace_ELBO(num_particles=1))
    with pytest.raises(StructureError, match="`num_starts=2`: expected a model without mutable state"):
        fit(svi, random.key(0), jnp.array(1.0), num_starts=2, progress_bar=False)


def test_a_start_without_a_finite_loss_has_no_error_and_no_warning():
    found = _summary(np.array([[1.0, 1.1], [np.inf, 2.0]]), np.ones(2, bool), 5)
    assert found.chosen == 0
    assert np.isnan(found.elbo_error).tolist() == [False, True]
    assert str(found).endswith("1 not finite")
