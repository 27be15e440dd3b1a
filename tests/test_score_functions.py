# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Score functions: steps are unbiased, and independent draws take away the noise that has the size of the loss."""

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
from numpyro_natgrad.blocks.partition import partition_parameters
from numpyro_natgrad.estimators.derivatives import evaluate_loss
from numpyro_natgrad.options import checked

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


def counts() -> None:
    """Not conjugate, so that the loss differs from draw to draw at the optimum too."""
    z = numpyro.sample("z", ScoreNormal(0.0, 3.0))
    numpyro.sample("x", dist.Poisson(jnp.exp(z)), obs=4)


def best_gaussian() -> dict[str, float]:
    """The stationary point of the ELBO of ``counts``, which is known in closed form: E[eᶻ] = exp(m + s²/2)."""
    m, variance = 1.0, 0.2
    for _ in range(200):
        rate = np.exp(m + variance / 2)
        variance = 1 / (rate + 1 / 9)
        m += variance * (4 - rate - m / 9)
    return {"m": m, "log_s": 0.5 * np.log(variance)}


def steps_from(svi: SVI, start: dict[str, float], keys: int) -> dict[str, jax.Array]:
    """The next step at many keys, after 60 steps that went back to ``start``."""
    at = {name: jnp.array(x, float) for name, x in start.items()}
    state = svi.init(random.key(0), init_params=at)

    def stay(state: Any, _: None) -> tuple[Any, None]:
        step, new = svi.update(state)[0].optim_state
        return svi.update(state)[0]._replace(optim_state=(step, new._replace(params=at))), None

    def steps(key: Any) -> Any:
        settled = lax.scan(stay, state, None, length=60)[0]
        after = jax.vmap(lambda k: svi.update(settled._replace(rng_key=k))[0].optim_state[1].params)
        return jax.tree.map(jnp.subtract, after(random.split(key, keys)), at)

    return jax.jit(steps)(random.key(1))


@pytest.mark.parametrize("particles", [1, 2, 8])
def test_mean_step_at_the_optimum_is_zero(particles):
    svi = SVI(counts, guide, NaturalGradient(), TraceGraph_ELBO(particles))
    for name, step in steps_from(svi, best_gaussian(), KEYS).items():
        assert step.std() > 0
        assert abs(step.mean()) < 3.5 * step.std() / KEYS**0.5, name


@pytest.mark.parametrize("particles", [1, 8])
def test_no_step_at_the_exact_posterior(particles):
    """The cost of every draw is log p(x) there, and so is its baseline: what is left is rounding."""
    svi = SVI(model, guide, NaturalGradient(), TraceGraph_ELBO(particles))
    for step in steps_from(svi, EXACT, 500).values():
        assert abs(step).max() < 1e-4


def traced(model: Any, guide: Any, at: dict[str, Any]) -> tuple[Any, Any]:
    """The loss of one particle as a function of the key, and its partition."""
    loss = lambda key: lambda params: (TraceGraph_ELBO(1).loss(key, params, model, guide), None)
    return loss, partition_parameters(loss(random.key(0)), at, checked(None, "adaptive", None, True), False)


def test_baseline_leaves_the_mean_gradient_and_takes_away_most_of_its_noise():
    """Near the exact posterior; the gradients of KL(q ‖ p) are in closed form."""
    s, m = np.exp(EXACT["log_s"]), EXACT["m"]
    at = {"m": jnp.array(m + 0.2 * s), "log_s": jnp.array(np.log(1.1 * s))}
    loss, partition = traced(model, guide, at)
    ours = lambda key: evaluate_loss(loss(key), at, partition.request, 1).gradient
    theirs = lambda key: jax.grad(lambda params: loss(key)(params)[0])(at)
    ours, theirs = jax.jit(jax.vmap(lambda key: (ours(key), theirs(key))))(random.split(random.key(2), 8000))
    for name, exact in {"m": 0.2 / s, "log_s": 1.1**2 - 1}.items():
        assert abs(ours[name].mean() - exact) < 4 * ours[name].std() / 8000**0.5, name
        assert ours[name].std() < 0.5 * theirs[name].std(), name


def chain() -> None:
    z = numpyro.sample("z", ScoreNormal(0.0, 1.0))
    w = numpyro.sample("w", ScoreNormal(z, 1.0))
    numpyro.sample("x", dist.Normal(w, 1.0), obs=0.5)


def backwards() -> None:
    """A slope behind a draw: its Fisher matrix is E[w²]."""
    w = numpyro.sample("w", ScoreNormal(numpyro.param("mean", 0.3), 0.8))
    numpyro.sample("z", ScoreNormal(numpyro.param("slope", 0.2) * w, 0.7))


def test_fisher_matrix_behind_a_draw_is_never_near_zero():
    """At one draw it is (w/0.7)², a thousandth of its mean at one draw of forty, and steps are divided by it."""
    at = {"mean": jnp.array(0.3), "slope": jnp.array(0.2)}
    loss, partition = traced(chain, backwards, at)
    (block,) = (block for block in partition.blocks if "slope" in block.params)

    def fisher(key: Any) -> jax.Array:
        info = evaluate_loss(loss(key), at, partition.request, 1)
        return block.metric.operator(info, at, block.params, key).dense()[0, 0]

    found = jax.jit(jax.vmap(fisher))(random.split(random.key(3), 4000))
    mean = (0.3**2 + 0.8**2) / 0.7**2
    assert abs(found.mean() - mean) < 4 * found.std() / 4000**0.5
    assert found.min() > 0.03 * mean


def test_one_particle_does_not_run_away():
    """From near the exact posterior; a long step, once the draws are far from it, would be multiplied ever after."""
    svi = SVI(model, guide, NaturalGradient(), TraceGraph_ELBO(1))

    def fit(key: Any) -> Any:
        return svi.get_params(lax.scan(lambda s, _: svi.update(s), svi.init(key), None, length=4000)[0])

    end = jax.jit(jax.vmap(fit))(random.split(random.key(1), 32))
    assert abs(end["log_s"] - EXACT["log_s"]).max() < 0.7
    assert abs(np.median(end["log_s"]) - EXACT["log_s"]) < 0.15
