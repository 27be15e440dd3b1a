# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Where draws do not follow the parameters, a step is unbiased: its size does not depend on the draws that it multiplies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import lax, random
from numpyro import distributions as dist
from numpyro.infer import SVI, TraceGraph_ELBO

from numpyro_natgrad import NaturalGradient

pytestmark = pytest.mark.filterwarnings("ignore:NaturalGradient. the loss is not affine")
KEYS = 4000
PRECISION = 1 / 9 + 25
EXACT = {"m": 0.3 * 25 / PRECISION, "log_s": -0.5 * np.log(PRECISION)}


class ScoreNormal(dist.Normal):
    """A Normal whose draws do not follow its parameters."""

    reparametrized_params: list[str] = []


def model() -> None:
    z = numpyro.sample("z", ScoreNormal(0.0, 3.0))
    numpyro.sample("x", dist.Normal(z, 0.2), obs=0.3)


def guide() -> None:
    numpyro.sample("z", ScoreNormal(numpyro.param("m", EXACT["m"]), jnp.exp(numpyro.param("log_s", EXACT["log_s"]))))


@pytest.mark.parametrize("particles", [1, 2, 8])
def test_mean_step_at_the_exact_posterior_is_zero(particles):
    svi = SVI(model, guide, NaturalGradient(), TraceGraph_ELBO(particles))
    start = svi.init(random.key(0))
    exact = start.optim_state[1].params

    def stay(state: Any, _: None) -> tuple[Any, None]:
        step, new = svi.update(state)[0].optim_state
        return svi.update(state)[0]._replace(optim_state=(step, new._replace(params=exact))), None

    def steps(key: Any) -> Any:
        state = lax.scan(stay, start, None, length=60)[0]
        after = jax.vmap(lambda k: svi.update(state._replace(rng_key=k))[0].optim_state[1].params)
        return jax.tree.map(jnp.subtract, after(random.split(key, KEYS)), exact)

    for name, step in jax.jit(steps)(random.key(1)).items():
        assert step.std() > 0
        assert abs(step.mean()) < 3.5 * step.std() / KEYS**0.5, name


def test_one_particle_does_not_run_away():
    """From near the exact posterior; a long step, once the draws are far from it, would be multiplied ever after."""
    svi = SVI(model, guide, NaturalGradient(), TraceGraph_ELBO(1))

    def fit(key: Any) -> Any:
        return svi.get_params(lax.scan(lambda s, _: svi.update(s), svi.init(key), None, length=4000)[0])

    end = jax.jit(jax.vmap(fit))(random.split(random.key(1), 32))
    assert abs(end["log_s"] - EXACT["log_s"]).max() < 0.7
    assert abs(np.median(end["log_s"]) - EXACT["log_s"]) < 0.15
