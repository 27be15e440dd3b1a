# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Networks in the guide and parameters of the model reach their closed-form optima, through minibatches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
import vae
from flax import linen, nnx
from jax import random
from numpyro import distributions as dist
from numpyro.contrib.module import flax_module, nnx_module
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDAIS, AutoNormal
from numpyro.optim import Adam
from oracles import assert_close, root_eps, spd
from tables import positive, tiers

from benchmarks.scale.network_tasks import TASKS
from benchmarks.scale.networks import by_svi, scored
from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.blocks.fisher.solvers import conjugate_gradients

ROWS, BATCH, PIXELS, LATENTS, HIDDEN, NOISE = 256, 32, 10, 2, 64, 0.5
RNG = np.random.default_rng(0)
LOADINGS = RNG.normal(size=(LATENTS, PIXELS))
DATA = RNG.normal(size=(ROWS, LATENTS)) @ LOADINGS + NOISE * RNG.normal(size=(ROWS, PIXELS))


def factors(x: Any) -> None:
    """Factor analysis with known loadings: the posterior of each row is a Gaussian whose mean is linear in the row."""
    with numpyro.plate("rows", ROWS, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([LATENTS]).to_event(1))
        numpyro.sample("x", dist.Normal(z @ LOADINGS, NOISE).to_event(1), obs=x)


def posterior() -> tuple[np.ndarray, np.ndarray]:
    """The best mean field: the posterior's means, ``(ROWS, LATENTS)``, and the precision's diagonal^(−1/2)."""
    precision = LOADINGS @ LOADINGS.T / NOISE**2 + np.eye(LATENTS)
    return DATA @ LOADINGS.T / NOISE**2 @ np.linalg.inv(precision), np.diag(precision) ** -0.5


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        h = jnp.tanh(linen.Dense(HIDDEN)(x))
        return linen.Dense(LATENTS)(h), jax.nn.softplus(linen.Dense(LATENTS)(h))


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(PIXELS, HIDDEN, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, 2 * LATENTS, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        loc, scale = jnp.split(self.out(jnp.tanh(self.hidden(x))), 2, axis=-1)
        return loc, jax.nn.softplus(scale)


def plain(x: Any) -> Any:
    first = numpyro.param("first", lambda key: random.normal(key, (PIXELS, HIDDEN)) / PIXELS**0.5)
    shift = numpyro.param("shift", jnp.zeros(HIDDEN))
    last = numpyro.param("last", lambda key: random.normal(key, (HIDDEN, 2 * LATENTS)) / HIDDEN**0.5)
    loc, scale = jnp.split(jnp.tanh(x @ first + shift) @ last, 2, axis=-1)
    return loc, jax.nn.softplus(scale)


NNX = Nnx(nnx.Rngs(0))
ENCODERS: dict[str, Callable[[Any], Any]] = {
    "flax.linen": lambda x: flax_module("encoder", Linen(), input_shape=(1, PIXELS))(x),
    "flax.nnx": lambda x: nnx_module("encoder", NNX)(x),
    "param": plain,
}


def fitted(
    encode: Callable[[Any], Any], optimizer: Any, steps: int, size: int = BATCH
) -> tuple[float, float, SVI, Any]:
    """Errors of the means in posterior sd, and of the log scales, both root mean squares over rows; after some steps."""

    def guide(x: Any) -> None:
        with numpyro.plate("rows", ROWS, subsample_size=len(x)):
            numpyro.sample("z", dist.Normal(*encode(x)).to_event(1))

    svi, data = SVI(factors, guide, optimizer, Trace_ELBO()), jnp.asarray(DATA, jnp.float32)
    batches = data[random.randint(random.key(1), (steps, size), 0, ROWS)]
    run = jax.jit(lambda state: jax.lax.scan(lambda s, x: svi.update(s, x), state, batches)[0])
    state = run(svi.init(random.key(0), batches[0]))
    params = svi.get_params(state)
    found = numpyro.handlers.trace(numpyro.handlers.substitute(numpyro.handlers.seed(guide, 0), params))
    q = found.get_trace(data)["z"]["fn"].base_dist
    mean, scale = posterior()
    rms = lambda x: float(np.sqrt(np.mean(np.square(x))))
    return rms((q.loc - mean) / scale), rms(np.log(q.scale / scale)), svi, state


@pytest.mark.parametrize("name", tiers(ENCODERS, "param"))
def test_amortised_guide_approaches_every_rows_posterior(name):
    """100 steps on an eighth of the rows bring the means within a posterior standard deviation."""
    loc, scale, svi, state = fitted(ENCODERS[name], NaturalGradient(), 100)
    assert loc < 1
    assert scale < 0.5
    assert "Hessian of KL (closed form), conjugate gradients" in svi.optim.report(
        svi, state, jnp.asarray(DATA[:BATCH], jnp.float32)
    )


@pytest.mark.slow
def test_amortised_guide_is_nearer_to_every_posterior_than_with_adam():
    loc, scale, *_ = fitted(plain, NaturalGradient(), 200)
    adams = [fitted(plain, Adam(rate), 200)[:2] for rate in (0.03, 0.01, 0.003)]
    assert loc < min(theirs for theirs, _ in adams)
    assert scale < min(theirs for _, theirs in adams)


@pytest.mark.slow
def test_amortised_guide_is_fitted_on_all_rows():
    assert fitted(plain, NaturalGradient(), 100, ROWS)[0] < 0.4


# --- parameters of the model ---

SEEN = 3.0 + np.random.default_rng(3).normal(size=100) * np.sqrt(1 + 0.7**2)


def random_effects(x: Any) -> None:
    center, noise = numpyro.param("center", 0.0), positive("noise", 2.0)
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Normal(center, 1))
        numpyro.sample("x", dist.Normal(z, noise), obs=x)


def shortfall(center: float, noise: float) -> float:
    """Nats between the marginal likelihood of x ~ N(center, 1 + noise²) and its maximum."""
    log_likelihood = lambda mean, variance: float(np.sum(dist.Normal(mean, variance**0.5).log_prob(SEEN)))
    return log_likelihood(SEEN.mean(), SEEN.var()) - log_likelihood(center, 1 + noise**2)


@pytest.mark.slow
def test_model_parameters_reach_the_maximum_marginal_likelihood(dtype):
    """The guide is exact, so that the maximum of the ELBO is that of the likelihood. The fit starts 50 nats below."""
    svi = SVI(random_effects, AutoNormal(random_effects), NaturalGradient(), Trace_ELBO(8))
    result = svi.run(random.key(0), 150, jnp.asarray(SEEN, dtype), progress_bar=False)
    assert shortfall(0.0, 2.0) > 50
    assert shortfall(float(result.params["center"]), float(result.params["noise"])) < 0.1
    assert "Hessian of the loss" in svi.optim.report(svi, result.state, jnp.asarray(SEEN, dtype))


def test_annealing_parameters_of_dais_stay_with_the_fallback_optimizer():
    """The chain of an annealed guide computes the latents from its own parameters, which are none of the model's."""

    def model() -> None:
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z, positive("noise", 1.0)).to_event(1), obs=jnp.ones(2))

    svi = SVI(model, AutoDAIS(model, K=2), NaturalGradient(), Trace_ELBO())
    with pytest.warns(UserWarning, match="'auto_gamma'.* have no Fisher matrix"):
        report = svi.optim.report(svi, svi.init(random.key(0)))
    method = {line.split()[0]: line for line in report.splitlines()[2:]}
    assert "Fisher of the likelihood" in method["noise"]
    assert all(
        "fallback optimizer" in method[p] for p in method if p.split("auto_")[-1] in ("eta0", "eta_coeff", "gamma")
    )
    assert sum("fallback optimizer" in line for line in method.values()) >= 3


# --- conjugate gradients ---


def test_conjugate_gradients_solve_in_as_many_products_as_dimensions(dtype):
    matrix, slope = spd(3, 8, low=1.0, high=10.0), np.linspace(-1, 1, 8)
    found, left = conjugate_gradients(lambda v: jnp.asarray(matrix, dtype) @ v, jnp.asarray(slope, dtype), 8)
    assert_close(found, np.linalg.solve(matrix, slope), 10 * root_eps(dtype))
    np.testing.assert_allclose(left, 0, atol=10 * root_eps(dtype))


def test_conjugate_gradients_of_zero_are_zero(dtype):
    zero = jnp.zeros(5, dtype)
    assert (conjugate_gradients(lambda v: 0 * v, zero, 3)[0] == 0).all()


# --- networks in the model and in the guide ---


@pytest.mark.slow
def test_vae_example_needs_a_quarter_of_adams_steps():
    """On 512 digits 60 natural steps reach a higher ELBO than 240 steps of Adam at the best of its rates."""
    data = vae.Digits(*(images[:512] for images in vae.digits()))
    ours = vae.natural(data, 60, every=60)
    theirs = max(curve.train[-1] for curve in vae.adams(data, 240, every=240))
    assert ours.train[-1] > theirs


@pytest.mark.slow
def test_scales_of_a_network_in_minibatches_stay_near_the_prior():
    """One particle: curvatures of single draws are indefinite, and scales grew to a hundred times the prior's."""
    task = TASKS["digits"]()
    method = by_svi(task, NaturalGradient())
    trained = jax.jit(lambda state, batches: jax.lax.scan(lambda s, b: (method.step(s, b), None), state, batches)[0])
    state = method.start(random.key(0))
    for epoch in range(20):
        state = trained(state, task.epoch(random.key(epoch)))
    scales = {k: jax.nn.softplus(x) for k, x in state.optim_state[1].params.items() if k.endswith("_scale")}
    assert max(float(x.max()) for x in scales.values()) < 2
    assert scored(task, method, state)[0] > -0.25
