# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Many sites are one operation: programs grow no faster than Adam's, and steps are those of the sites one by one."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.optim import Adam

from benchmarks.scale.sites import equations, problem, traced
from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.blocks import partition
from numpyro_natgrad.estimators.equation_batches import map_stacked
from numpyro_natgrad.estimators.partial_evaluation import partially_evaluated
from numpyro_natgrad.guide.exponential_sites import stack_sites

#: Families whose arguments are positive, with their number and a prior of the same support.
FAMILIES = {
    "Exponential": (dist.Exponential, 1, dist.LogNormal(0.0, 1.0)),
    "Gamma": (dist.Gamma, 2, dist.LogNormal(0.0, 1.0)),
    "Beta": (dist.Beta, 2, dist.Beta(2.0, 3.0)),
}


def sites_of(name, numbers):
    """A model and a guide with a numbered site for each number; draws depend on the number, not on the order."""
    cls, count, prior = FAMILIES[name]

    def model():
        z = {k: numpyro.sample(f"z{k}", prior) for k in numbers}
        numpyro.factor("f", -sum(0.3 * z[k] * (1 + k) for k in sorted(numbers)))

    def guide():
        for k in numbers:
            start = jnp.asarray(2.0 + k / 4, float)
            arguments = [numpyro.param(f"{x}{k}", start, constraint=constraints.positive) for x in "ab"[:count]]
            numpyro.sample(f"z{k}", cls(*arguments), rng_key=random.key(k))

    return SVI(model, guide, NaturalGradient(), Trace_ELBO())


def stepped(svi, steps=4):
    """Parameters and step report after some steps."""
    state = svi.init(random.key(0))
    update = jax.jit(svi.update)
    for _ in range(steps):
        state, _ = update(state)
    return svi.get_params(state), svi.optim.info(state)


def assert_equal_steps(first, second, rtol):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sites"), [("AutoNormal", 16), pytest.param("mixed families", 32, marks=pytest.mark.release)]
)
def test_programs_grow_no_faster_than_those_of_adam(kind, sites):
    """Equations of one step, also of inner programs: those that twice as many sites add, and all of them."""

    def growth(optimizer):
        svis = [problem(kind, n, optimizer()) for n in (sites, 2 * sites)]
        fewer, more = (equations(traced(svi, svi.init(random.key(0))).jaxpr.jaxpr) for svi in svis)
        return np.array([more - fewer, more])

    assert (growth(NaturalGradient) <= 1.5 * growth(partial(Adam, 0.01))).all()


LONG = [pytest.param(*case, marks=pytest.mark.release) for case in (("Gamma", True), ("Beta", False))]


@pytest.mark.parametrize(("name", "x64"), [("Exponential", False), *LONG])
def test_stacked_sites_step_as_single_ones(name, x64, monkeypatch):
    with jax.enable_x64(x64):
        stacked = stepped(sites_of(name, range(3)))
        monkeypatch.setattr(partition, "stack_sites", lambda sites: [x for s in sites for x in stack_sites([s])])
        assert_equal_steps(stacked, stepped(sites_of(name, range(3))), 1e-10 if x64 else 1e-4)


def test_the_order_of_sites_does_not_matter():
    first, again = (stepped(sites_of("Exponential", order)) for order in ([*range(9)], [*range(4, 9), *range(4)]))
    assert_equal_steps(first, again, 1e-4)


def test_batched_equations_are_the_equations_one_by_one():
    """A chain of keys, two kinds of sites in turn, a shared operand, a chain of sums, and operands in another order."""

    def loss(params):
        key, total, values = random.key(0), 0.0, []
        for k in range(40):
            key, own = random.split(key)
            z = params["loc"][k] + jnp.exp(params["scale"][k]) * random.normal(own)
            values.append(jnp.exp(z) if k % 2 else jnp.sin(z) * params["shared"])
            total = total + values[-1] ** 2 / (1 + z**2)
        pairs = zip(values, values[7:] + values[:7], strict=True)
        return total + sum(jnp.tanh(a * b) for a, b in pairs)

    x = jnp.linspace(-1.0, 1.0, 40)
    params = {"loc": list(x), "scale": list(x[::-1] / 2), "shared": jnp.array(0.7)}
    batched = partially_evaluated(loss, params)
    assert len(jax.make_jaxpr(batched)(params).eqns) < len(jax.make_jaxpr(loss)(params).eqns) / 4
    expected, found = (jax.jit(jax.value_and_grad(f))(params) for f in (loss, batched))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_small_mean_field_sites_beyond_the_joint_block_share_one_and_reach_the_posterior():
    """Conjugate, so that the posterior is known: N(y/2, 1/2) for each site; a limit of 16 stands for that of 128."""
    y = jnp.linspace(-2.0, 2.0, 20)

    def model():
        z = jnp.stack([numpyro.sample(f"z{i}", dist.Normal(0, 1)) for i in range(20)])
        numpyro.sample("y", dist.Normal(z, 1), obs=y)

    optimizer = NaturalGradient()
    optimizer._options = optimizer._options._replace(constants=optimizer._options.constants._replace(joint_limit=16))
    svi = SVI(model, AutoNormal(model), optimizer, Trace_ELBO(num_particles=2))
    state = svi.init(random.key(0))
    update = jax.jit(lambda s: jax.lax.fori_loop(0, 40, lambda _, s: svi.update(s)[0], s))
    params = svi.get_params(update(state))
    mean, scale = (np.stack([params[f"z{i}_auto_{x}"] for i in range(20)]) for x in ("loc", "scale"))
    np.testing.assert_allclose(mean, y / 2, atol=0.05)
    np.testing.assert_allclose(scale, math.sqrt(0.5), rtol=0.02)
    table = optimizer.report(svi, state).splitlines()
    assert sum("z19" in line and "Hessian-vector products" in line for line in table) == 2
    assert len(table) == 2 + 40


def test_a_map_by_stacks_is_the_map():
    a = {"x": [jnp.full(2, float(k)) for k in range(20)], "y": jnp.arange(3.0), "z": jnp.array(2.0)}
    b = jax.tree.map(lambda x: x + 1, a)
    found = map_stacked(lambda x, y: x * y, a, b)
    assert jax.tree.structure(found) == jax.tree.structure(a)
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda x, y: x * y, a, b))
