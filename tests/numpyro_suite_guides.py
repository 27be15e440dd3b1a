# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Rows of :mod:`numpyro_suite` that stand for NumPyro's tests of autoguides, reparameterizations, modules and compilation."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import lax, random
from jax.example_libraries.stax import Dense
from numpy.testing import assert_allclose
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import flax_module, nnx_module
from numpyro.distributions import constraints
from numpyro.infer import (
    SVI,
    Predictive,
    Trace_ELBO,
    TraceMeanField_ELBO,
    init_to_median,
    init_to_value,
)
from numpyro.infer import autoguide as auto
from numpyro.infer.reparam import NeuTraReparam, TransformReparam
from numpyro_suite_svi import fit

Optimizer = Any
median_start = init_to_median(num_samples=2)


def auto_beta_bernoulli(family: type, optimizer: Optimizer) -> None:
    data = jnp.array([[1.0] * 8 + [0.0] * 2, [1.0] * 4 + [0.0] * 6]).T

    def model(data: Any) -> None:
        f = numpyro.sample("beta", dist.Beta(jnp.ones(2), jnp.ones(2)).to_event())
        with numpyro.plate("N", 10):
            numpyro.sample("obs", dist.Bernoulli(f).to_event(1), obs=data)

    options = {"base_dist": "cholesky"} if family is auto.AutoDAIS else {}
    guide = family(model, init_loc_fn=median_start, **options)
    params = fit(optimizer, model, guide, 3000, data, seed=1).params
    draws = guide.sample_posterior(random.PRNGKey(1), params, sample_shape=(1000,))
    assert_allclose(draws["beta"].mean(0), (data.sum(0) + 1) / 12, atol=0.05)
    if family not in (auto.AutoDAIS, auto.AutoDelta, auto.AutoIAFNormal, auto.AutoBNAFNormal):
        assert guide.quantiles(params, [0.2, 0.5, 0.8])["beta"].shape == (3, 2)
    assert Predictive(model, posterior_samples=draws)(random.PRNGKey(1), None)["obs"].shape == (1000, 10, 2)
    drawn = Predictive(model, guide=guide, params=params, num_samples=11)(random.PRNGKey(1), None)
    assert drawn["obs"].shape == (11, 10, 2)


def logistic_data() -> tuple[jax.Array, jax.Array]:
    x = random.normal(random.PRNGKey(0), (3000, 3))
    return x, dist.Bernoulli(logits=x @ jnp.arange(1.0, 4.0)).sample(random.PRNGKey(1))


def logistic(data: Any = None, labels: Any = None) -> None:
    coefs = numpyro.sample("coefs", dist.Normal(0, 1).expand([3]).to_event())
    if data is None:
        return
    logits = numpyro.deterministic("logits", jnp.sum(coefs * data, axis=-1))
    with numpyro.plate("N", len(data)):
        numpyro.sample("obs", dist.Bernoulli(logits=logits), obs=labels)


def auto_logistic(family: type, loss: type, optimizer: Optimizer) -> None:
    guide = family(logistic, init_loc_fn=median_start)
    if family is auto.AutoNormal and loss is TraceMeanField_ELBO:
        svi = SVI(logistic, guide, optimizer, loss())
        state = svi.init(random.PRNGKey(1), *logistic_data())
        closed_form = svi.update(state, *logistic_data())[1]
        svi.loss = Trace_ELBO()
        assert abs(closed_form - svi.update(state, *logistic_data())[1]) > 0.5
    params = fit(optimizer, logistic, guide, 2000, *logistic_data(), loss=loss(), seed=1).params
    if family not in (auto.AutoDAIS, auto.AutoIAFNormal, auto.AutoBNAFNormal):
        assert_allclose(guide.median(params)["coefs"], [1, 2, 3], rtol=0.1)
        if family is not auto.AutoDelta:
            assert_allclose(guide.quantiles(params, [0.2, 0.5])["coefs"][1], [1, 2, 3], rtol=0.1)
    draws = guide.sample_posterior(random.PRNGKey(1), params, sample_shape=(1000,))
    assert_allclose(draws["coefs"].mean(0), [0.97, 2.05, 3.18], rtol=0.1)


def scaled_uniform(data: Any) -> None:
    alpha = numpyro.sample("alpha", dist.Uniform(0, 1))
    with handlers.reparam(config={"loc": TransformReparam()}):
        transform = dist.transforms.AffineTransform(0, alpha)
        loc = numpyro.sample("loc", dist.TransformedDistribution(dist.Uniform(0, 1), transform))
    with numpyro.plate("N", len(data)):
        numpyro.sample("obs", dist.Normal(loc, 0.1), obs=data)


def uniform_normal(optimizer: Optimizer) -> None:
    data = 0.9 + random.normal(random.PRNGKey(0), (1000,))
    guide = auto.AutoDiagonalNormal(scaled_uniform)
    params = fit(optimizer, scaled_uniform, guide, 1000, data, seed=1).params
    assert_allclose(guide.median(params)["loc"], 0.9, rtol=0.05)
    assert_allclose(guide.quantiles(params, [0.2, 0.5])["loc"][1], 0.9, rtol=0.1)


def dynamic_supports(optimizer: Optimizer) -> None:
    data = 0.9 + random.normal(random.PRNGKey(0), (1000,))

    def product(data: Any) -> None:
        alpha = numpyro.sample("alpha", dist.Uniform(0, 1))
        loc = numpyro.sample("loc", dist.Uniform(0, 1)) * alpha
        with numpyro.plate("N", len(data)):
            numpyro.sample("obs", dist.Normal(loc, 0.1), obs=data)

    found = []
    for model, name in ((scaled_uniform, "loc_base"), (product, "loc")):
        guide = auto.AutoDiagonalNormal(model)
        svi = SVI(model, guide, optimizer, Trace_ELBO())
        state = svi.init(random.PRNGKey(1), data)
        median = guide.median(svi.get_params(state))
        unconstrained = svi.optim.get_params(state.optim_state)
        found.append((unconstrained, median["alpha"], median[name], svi.evaluate(state, data)))
    jax.tree.map(assert_allclose, *found)


def laplace_warning(optimizer: Optimizer) -> None:
    def model(x: Any, y: Any) -> None:
        a = numpyro.sample("a", dist.Normal(0, 10))
        b = numpyro.sample("b", dist.Normal(0, 10).expand([3]).to_event())
        with numpyro.plate("N", 3):
            numpyro.sample("y", dist.Normal(a + b[0] * x + b[1] * x**2 + b[2] * x**3, 0.001), obs=y)

    x = random.normal(random.PRNGKey(0), (3,))
    guide = auto.AutoLaplaceApproximation(model)
    params = fit(optimizer, model, guide, 10_000, x=x, y=1 + 2 * x + 3 * x**2 + 4 * x**3).params
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guide.sample_posterior(random.PRNGKey(1), params)
    assert any("Hessian of log posterior" in str(w.message) for w in caught)


def laplace_hessian(optimizer: Optimizer) -> None:
    def model(x: Any, y: Any) -> None:
        a, b = numpyro.sample("a", dist.Normal(0, 10)), numpyro.sample("b", dist.Normal(0, 10))
        with numpyro.plate("N", 100):
            numpyro.sample("y", dist.Normal(a + b * x, 1), obs=y)

    x = random.normal(random.PRNGKey(0), (100,))
    guide = auto.AutoLaplaceApproximation(model, hessian_fn=lambda f, x: jax.jacobian(jax.jacobian(f))(x))
    guide.get_transform(fit(optimizer, model, guide, 10_000, x=x, y=1 + 2 * x).params)


def improper(optimizer: Optimizer) -> None:
    """λ₁ and λ₂ enter by their sum alone: their posterior is improper, and NumPyro asserts nothing but an end."""

    def model(y: Any) -> None:
        flat = partial(dist.ImproperUniform, batch_shape=(), event_shape=())
        mu = sum(numpyro.sample(name, flat(constraints.real)) for name in ("lambda1", "lambda2"))
        sigma = numpyro.sample("sigma", flat(constraints.positive))
        with numpyro.plate("N", 100):
            numpyro.sample("y", dist.Normal(mu, sigma), obs=y)

    guide = auto.AutoDiagonalNormal(model)
    found = fit(optimizer, model, guide, 10_000, y=random.normal(random.PRNGKey(0), (100,)), seed=2)
    assert np.isfinite(found.losses[-1])


def auto_module(optimizer: Optimizer) -> None:
    x, y = random.normal(random.PRNGKey(0), (100, 10)), random.normal(random.PRNGKey(1), (100,))

    def model(x: Any, y: Any) -> None:
        mu = numpyro.module("nn", Dense(1), (10,))(x).squeeze(-1)
        sigma = numpyro.sample("sigma", dist.HalfNormal(1))
        with numpyro.plate("N", 100):
            numpyro.sample("y", dist.Normal(mu, sigma), obs=y)

    found = fit(optimizer, model, auto.AutoDiagonalNormal(model), 1000, x=x, y=y, seed=2)
    assert np.isfinite(found.losses[-1])


def subsample_guide(optimizer: Optimizer) -> None:
    def rows(batch: Any, subsample: Any, full_size: int) -> Any:
        with handlers.substitute(data={"data": subsample}):
            return numpyro.plate("data", full_size, subsample_size=len(subsample))

    def model(batch: Any, subsample: Any, full_size: int) -> Any:
        drift = numpyro.sample("drift", dist.LogNormal(-1, 0.5))
        plate = rows(batch, subsample, full_size)

        def transition(z: Any, y: Any) -> Any:
            with plate:
                z = numpyro.sample("state", dist.Normal(z, drift))
                y = numpyro.sample("obs", dist.Bernoulli(logits=z), obs=y)
            return z, y

        return scan(transition, jnp.zeros(len(subsample)), batch, length=8)[1]

    with handlers.seed(rng_seed=0):
        data = model(None, jnp.arange(50), 50)
    svi = SVI(model, auto.AutoNormal(model, create_plates=rows), optimizer, Trace_ELBO())
    state = svi.init(random.PRNGKey(0), data[:, :20], jnp.arange(20), full_size=50)
    update = jax.jit(svi.update, static_argnums=(3,))
    for _ in range(2):
        for start in range(0, 50, 20):
            stop = min(50, start + 20)
            state, loss = update(state, data[:, start:stop], jnp.arange(start, stop), 50)
            assert np.isfinite(loss)


def auto_deterministic(family: type, optimizer: Optimizer) -> None:
    def model(y: Any = None) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        sigma = numpyro.param("sigma", 1.0, constraint=constraints.positive)
        with numpyro.plate("N", 1 if y is None else len(y)):
            y = numpyro.sample("y", dist.Normal(mu, sigma), obs=y)
        numpyro.deterministic("z", (y - mu) / sigma)

    y = 2 + 3 * random.normal(random.PRNGKey(0), (300,))
    guide = family(model)
    params = fit(optimizer, model, guide, 500, y=y[:200]).params
    draws = guide.sample_posterior(random.PRNGKey(0), params, sample_shape=(1000,))
    predicted = Predictive(model, draws, params=params)(random.PRNGKey(0), y[200:])
    assert predicted["z"].shape == (1000, 100)
    assert_allclose((predicted["y"] - draws["mu"][..., None]) / params["sigma"], predicted["z"], atol=0.05)


def plate_inconsistent(optimizer: Optimizer) -> None:
    for size, dim in ((10, -2), (5, -1)):

        def model(size: int = size, dim: int = dim) -> None:
            with numpyro.plate("a", 10, dim=-1):
                numpyro.sample("x", dist.Normal(0, 1))
            with numpyro.plate("a", size, dim=dim):
                numpyro.sample("y", dist.Normal(0, 1))

        try:
            fit(optimizer, model, auto.AutoDelta(model), 10)
        except AssertionError as error:
            assert "has inconsistent dim or size" in str(error)  # noqa: PT017
        else:
            raise RuntimeError("expected an AssertionError about the plate")


def subsample_deterministic(optimizer: Optimizer) -> None:
    def model() -> None:
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.deterministic("x2", x * 2)
        with numpyro.plate("N", 10, subsample_size=5):
            numpyro.sample("obs", dist.Normal(x, 1), obs=jnp.ones(5))

    guide = auto.AutoNormal(model)
    assert "x2" in guide.sample_posterior(random.PRNGKey(1), fit(optimizer, model, guide, 10).params)


def init_to_scalar(optimizer: Optimizer) -> None:
    def model() -> None:
        numpyro.sample("x", dist.Normal(0, 1))

    guide = auto.AutoDiagonalNormal(model, init_loc_fn=init_to_value(values={"x": 1.0}))
    SVI(model, guide, optimizer, Trace_ELBO()).init(random.PRNGKey(0))


def delta_sample_shape(optimizer: Optimizer) -> None:
    for shape in ((), (1,), (2, 3)):

        def model(shape: tuple[int, ...] = shape) -> None:
            numpyro.deterministic("x2", numpyro.sample("x", dist.Normal().expand(shape)) ** 2)

        guide = auto.AutoDelta(model)
        params = fit(optimizer, model, guide, 1000).params
        for sample_shape in ((), (1,), (2, 3)):
            draws = guide.sample_posterior(random.PRNGKey(1), params, sample_shape=sample_shape)
            assert draws["x"].shape == draws["x2"].shape == sample_shape + shape


# Annealed guides.

ROWS = np.random.RandomState(0).randn(18, 3)
RESPONSE = ROWS[:, 0] - 0.5 * ROWS[:, 1] + 0.1 * np.random.RandomState(1).randn(18)


def semi_global() -> Any:
    return numpyro.sample("theta", dist.Normal(jnp.zeros(3), 1).to_event(1))


def semi_local(batch: int, theta: Any) -> None:
    with numpyro.plate("N", 18, subsample_size=batch):
        x = numpyro.subsample(jnp.array(ROWS, float), event_dim=1)
        y = numpyro.subsample(jnp.array(RESPONSE, float), event_dim=0)
        tau = numpyro.sample("tau", dist.Gamma(5.0, 5.0))
        numpyro.sample("obs", dist.Normal(x @ theta, 0.1 / jnp.sqrt(tau)), obs=y)


def semi_model(batch: int) -> None:
    semi_local(batch, semi_global())


def elbo(params: Any, model: Any, guide: Any, draws: int, seed: int = 0) -> float:
    return -float(Trace_ELBO(num_particles=draws).loss(random.PRNGKey(seed), params, model, guide))


def semi_dais(optimizer: Optimizer) -> None:
    model, steps = partial(semi_model, 16), 45_000
    options = {"K": 4, "eta_max": 0.25, "eta_init": 0.005}
    base = auto.AutoNormal(semi_global)
    guide = auto.AutoSemiDAIS(model, partial(semi_local, 16), base, **options)
    params = fit(optimizer, model, guide, steps).params
    assert params["auto_eta_coeff"].mean() > 0.2
    draws = guide.sample_posterior(random.PRNGKey(1), params)
    assert draws["theta"].shape == (3,)
    assert draws["tau"].shape == (16,)
    smaller = partial(semi_model, 12)
    other = auto.AutoSemiDAIS(smaller, partial(semi_local, 12), base, **options)
    with handlers.seed(rng_seed=0):
        other()
    annealed = elbo(params, model, guide, 5000)
    assert_allclose(elbo(params, smaller, other, 5000), annealed, atol=0.05)
    mean_field = auto.AutoNormal(model, create_plates=lambda: numpyro.plate("N", 18, subsample_size=16))
    plain = fit(optimizer, model, mean_field, steps).params
    assert annealed > elbo(plain, model, mean_field, 5000) + 0.1


def surrogate_dais(optimizer: Optimizer) -> None:
    x = np.random.RandomState(0).randn(64, 3)
    x[:, 2] = x[:, 0] + x[:, 1]
    rows = jnp.array(x, float)
    y = dist.Bernoulli(logits=rows[:, 0] - 0.5 * rows[:, 1]).sample(random.PRNGKey(0))

    def theta() -> Any:
        return numpyro.sample("theta", dist.Normal(jnp.zeros(3), jnp.ones(3)).to_event(1))

    def model() -> None:
        coefs = theta()
        with numpyro.plate("N", 64, subsample_size=48):
            batch, labels = numpyro.subsample(rows, event_dim=1), numpyro.subsample(y, event_dim=0)
            numpyro.sample("obs", dist.Bernoulli(logits=coefs @ batch.T), obs=labels)

    def surrogate() -> None:
        coefs = theta()
        weights = numpyro.param("omegas", 2.0 * jnp.ones(32), constraint=constraints.positive)
        with numpyro.plate("N", 32), handlers.scale(scale=weights):
            numpyro.sample("obs", dist.Bernoulli(logits=coefs @ rows[:32].T), obs=y[:32])

    guide = auto.AutoSurrogateLikelihoodDAIS(model, surrogate, K=3, eta_max=0.25, eta_init=0.005)
    params = fit(optimizer, model, guide, 40_000, seed=1).params
    assert guide.sample_posterior(random.PRNGKey(2), params)["theta"].shape == (3,)
    mean_field = auto.AutoNormal(model, create_plates=lambda: numpyro.plate("N", 64, subsample_size=48))
    plain = fit(optimizer, model, mean_field, 40_000).params
    assert elbo(params, model, guide, 2000) > elbo(plain, model, mean_field, 2000, 1) + 0.1


def semi_dais_smoke(outer: bool, optimizer: Optimizer) -> None:
    shape = (20, 5) if outer else (5,)

    def global_model() -> Any:
        theta = numpyro.sample("theta", dist.Normal(0, 1))
        return theta, numpyro.sample("tau", dist.LogNormal(jnp.zeros(2), 1).to_event(1)).mean()

    def rows(theta: Any, tau: Any) -> None:
        sigma = numpyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        vector = numpyro.sample("log_sigma", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        scale = tau * sigma * jnp.exp(vector.mean(-1))
        numpyro.sample("obs", dist.Normal(theta, scale), obs=jnp.ones(shape))

    def local_model(latents: Any) -> None:
        with numpyro.plate("inner", 10, subsample_size=5, dim=-1):
            if outer:
                with numpyro.plate("outer", 20, dim=-2):
                    return rows(*latents)
            rows(*latents)

    def model() -> None:
        local_model(global_model())

    guide = auto.AutoSemiDAIS(model, local_model, auto.AutoNormal(global_model))
    draws = guide.sample_posterior(random.PRNGKey(1), fit(optimizer, model, guide, 10).params)
    assert draws["sigma"].shape == shape
    assert draws["log_sigma"].shape == (*shape, 2)


def semi_dais_local(optimizer: Optimizer) -> None:
    def model() -> None:
        with numpyro.plate("N", 10, subsample_size=5, dim=-1):
            numpyro.sample("x", dist.Normal(numpyro.subsample(jnp.linspace(0, 1, 10), event_dim=0), 1))

    local = auto.AutoNormal(model, create_plates=lambda: numpyro.plate("N", 10, subsample_size=5, dim=-1))
    guide = auto.AutoSemiDAIS(model, model, None, local_guide=local)
    params = fit(optimizer, model, guide, 10).params
    assert guide.sample_posterior(random.PRNGKey(1), params, sample_shape=(100,))["x"].shape == (100, 5)


# Flows, networks, compilation.


def neals_funnel() -> None:
    y = numpyro.sample("y", dist.Normal(0, 3))
    with numpyro.plate("D", 10):
        numpyro.sample("x", dist.Normal(0, jnp.exp(y / 2)))


def funnel_flow(optimizer: Optimizer) -> None:
    """NumPyro goes on with NUTS, and asserts that the sites are there."""
    guide = auto.AutoIAFNormal(neals_funnel)
    params = fit(optimizer, neals_funnel, guide, 1000).params
    draw = NeuTraReparam(guide, params).transform_sample(jnp.zeros((2, 11)))
    assert all(np.isfinite(draw[name]).all() for name in "xy")


def flax_smoke(dropout: bool, batchnorm: bool, optimizer: Optimizer) -> None:
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = linen.Dense(10)(x)
            x = linen.Dropout(0.5, deterministic=False)(x) if dropout else x
            return linen.BatchNorm(momentum=0.999, use_running_average=False)(x) if batchnorm else x

    def model() -> None:
        mutable = ["batch_stats"] if batchnorm else None
        net = flax_module("nn", Net(), apply_rng=["dropout"] * dropout, mutable=mutable, input_shape=(4, 3))
        x = numpyro.sample("x", dist.Normal(0, 1).expand([4, 3]).to_event(2))
        numpyro.deterministic("y", net(x, rngs={"dropout": numpyro.prng_key()}) if dropout else net(x))

    fit(optimizer, model, auto.AutoDelta(model), 10, seed=100)


def nnx_smoke(optimizer: Optimizer) -> None:
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, *, rngs: Any) -> None:
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.norm(x)

    module = Net(rngs=nnx.Rngs(params=random.PRNGKey(0)))

    def model() -> None:
        net = nnx_module("nn", module)
        numpyro.deterministic("y", net(numpyro.sample("x", dist.Normal(0, 1).expand([4, 3]).to_event(2))))

    fit(optimizer, model, auto.AutoDelta(model), 10, seed=100)


def nnx_classifier(optimizer: Optimizer) -> None:
    """NumPyro has a transformer of 5,000 weights and a convolution of 200,000; ours is a dense layer of 7,850."""
    from flax import nnx

    module = nnx.Linear(784, 10, rngs=nnx.Rngs(params=random.PRNGKey(0)))

    def model(images: Any, labels: Any) -> None:
        logits = nnx_module("net", module)(images)
        with numpyro.plate("data", 4):
            numpyro.sample("obs", dist.Categorical(logits=logits), obs=labels)

    found = fit(optimizer, model, auto.AutoDelta(model), 2, jnp.ones((4, 784)), jnp.zeros(4, int))
    assert np.isfinite(found.losses).all()


CALLS = {"model": 0}


def compile_once(optimizer: Optimizer) -> None:
    """The number of times that the model is called while everything is traced."""

    def model() -> None:
        CALLS["model"] += 1
        numpyro.sample("x", dist.Normal())

    CALLS["model"] = 0
    guide = auto.AutoDiagonalNormal(model)
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    state = lax.fori_loop(0, 100, lambda i, state: svi.update(state)[0], svi.init(random.PRNGKey(0)))
    guide.sample_posterior(random.PRNGKey(1), svi.get_params(state), sample_shape=(100,))
    assert CALLS["model"] == 4
