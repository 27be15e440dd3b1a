# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Law: the state has exact shapes within a step and fixed ones between steps, and probes follow the key of the run."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.blocks.base import Randomness
from numpyro_natgrad.options import RuleConstants
from numpyro_natgrad.step.natural_step import run_seed
from numpyro_natgrad.step.state import allocated, pack, unpack


def model(y):
    """Three latents, and a parameter of the model."""
    noise = numpyro.param("noise", 1.0, constraint=dist.constraints.positive)
    z = numpyro.sample("z", dist.Normal(0, 1).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(z, noise).to_event(1), obs=y)


Y = np.array([1.0, -2.0, 0.5])


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_packing_undoes_unpacking(guide, dtype):
    svi = SVI(model, guide(model), NaturalGradient(), Trace_ELBO(num_particles=2))
    state = svi.init(random.key(0), Y)
    numbered = lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape).astype(x.dtype)
    carried = jax.tree.map(numbered, state.optim_state[1])
    fn = lambda params: (Trace_ELBO(2).loss(random.key(1), svi.constrain_fn(params), model, svi.guide, Y), None)
    partition = svi.optim._partition(fn, carried.params, False)
    exact = unpack(carried, partition, RuleConstants())
    assert partition.joint_latents == 4
    assert exact.memory.joint.slope.shape == (4,)
    assert exact.memory.joint.curvature.shape == (4, 4)
    assert exact.statistics.noise.shape == exact.decrement.visible.shape == (len(partition.blocks),)
    jax.tree.map(np.testing.assert_array_equal, pack(exact, carried), carried)


def test_the_state_has_room_for_every_partition(dtype):
    """One block for a parameter at most, and a joint block of at most as many latents as there are numbers."""
    small, large = (allocated(*shape, RuleConstants(), jnp.result_type(float)) for shape in ((3, 2), (5, 4)))
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
        assert all(m <= n for m, n in zip(a.shape, b.shape, strict=True))


def seeded(key):
    """A loss function that closes over ``rng_key``, as NumPyro's."""
    rng_key = key
    return lambda params: (random.normal(rng_key), None)


@pytest.mark.parametrize("make", [random.key, random.PRNGKey])
def test_the_seed_is_a_word_of_the_first_key_and_stays(make):
    zero = jnp.array(0, jnp.uint32)
    first, other = (run_seed(seeded(make(k)), jnp.array(jnp.nan), jnp.array(0), zero) for k in (7, 8))
    assert first == 7
    assert other == 8
    assert run_seed(seeded(make(9)), jnp.array(-7.0), jnp.array(1), first) == first


def test_without_a_key_the_seed_is_the_bits_of_the_first_loss():
    first = run_seed(lambda params: params, jnp.array(-3.25), jnp.array(0), jnp.array(0, jnp.uint32))
    assert first == np.float32(-3.25).view(np.uint32)
    assert run_seed(lambda params: params, jnp.array(-7.0), jnp.array(1), first) == first


@pytest.mark.slow
def test_rounding_of_the_loss_does_not_change_the_probes():
    """Sums over spread rows round otherwise: here the same data in another order."""
    svi = SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO(num_particles=2))
    state = svi.init(random.key(0), Y)
    seeds = [int(svi.update(state, y)[0].optim_state[1].seed) for y in (Y, Y * (1 + 1e-6))]
    assert seeds[0] == seeds[1]


def test_runs_of_different_keys_have_different_probes():
    svi = SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO(num_particles=2))
    svi.init(random.key(0), Y)
    seed = jax.jit(lambda key: svi.update(svi.init(key, Y), Y)[0].optim_state[1].seed)
    seeds = [int(seed(random.key(k))) for k in (0, 1, 0)]
    assert seeds[0] == seeds[2] != seeds[1]
    draws = [random.normal(Randomness(random.key(s), jnp.array(3)).key, (4,)) for s in seeds[:2]]
    assert not np.allclose(*draws)
