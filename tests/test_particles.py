# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Law: inside of a mean over particles each particle has its own row, whatever transformation of JAX is around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random

from numpyro_natgrad.guide.handlers import antithetic_key, antithetic_signs, per_particle

PARTICLES = 5
COPIES = jnp.arange(15.0).reshape(PARTICLES, 3)
#: Of five particles the third and fourth have the keys of the first two.
PARTNERS = [0, 1, 0, 1, 4]
KEYS = {"typed": random.split(random.key(0), PARTICLES), "raw": random.split(random.PRNGKey(0), PARTICLES)}


def loss(copies, keys, over=jax.vmap):
    """The mean of Σ z⁴/4 over particles z = copy + ε."""

    def one(key):
        z = per_particle(copies, key) + random.normal(antithetic_key(PARTICLES, key), (3,))
        return jnp.sum(z**4) / 4

    return jnp.mean(over(one)(keys))


def draws(keys):
    return COPIES + jnp.stack([random.normal(keys[i], (3,)) for i in PARTNERS])


@pytest.fixture(params=list(KEYS))
def keys(request):
    return KEYS[request.param]


@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.checkpoint])
def test_value_and_gradient_are_those_of_each_particle(keys, around, x64):
    z = draws(keys)
    value, gradient = jax.value_and_grad(around(lambda copies: loss(copies, keys)))(COPIES)
    np.testing.assert_allclose(value, jnp.sum(z**4) / 4 / PARTICLES, rtol=1e-5)
    np.testing.assert_allclose(gradient, z**3 / PARTICLES, rtol=1e-5)


def test_second_derivatives_are_those_of_each_particle(keys, x64):
    gradient, expected = jax.grad(lambda copies: loss(copies, keys)), 3 * draws(keys) ** 2 * COPIES / PARTICLES
    np.testing.assert_allclose(jax.jvp(gradient, (COPIES,), (COPIES,))[1], expected, rtol=1e-5)
    linear = jax.linearize(gradient, COPIES)[1]
    np.testing.assert_allclose(jax.vmap(linear)(jnp.stack([COPIES, 2 * COPIES]))[1], 2 * expected, rtol=1e-5)


def test_a_scan_and_a_batch_of_losses_keep_particles_apart(keys, x64):
    gradient, expected = jax.grad(loss), draws(keys) ** 3 / PARTICLES
    scanned = lax.scan(lambda carry, _: (carry, gradient(COPIES, keys)), 0.0, None, length=2)[1]
    np.testing.assert_allclose(scanned[1], expected, rtol=1e-5)
    batched = jax.vmap(gradient, in_axes=(None, 0))(COPIES, jnp.stack([keys, keys[::-1]]))
    np.testing.assert_allclose(batched[0], expected, rtol=1e-5)


def test_particles_in_a_loop_share_the_first_row(keys, x64):
    one_by_one = lambda function: lambda xs: lax.map(function, xs)
    gradient = jax.grad(lambda copies: loss(copies, keys, one_by_one))(COPIES)
    z = COPIES[0] + jax.vmap(lambda key: random.normal(key, (3,)))(keys)
    np.testing.assert_allclose(gradient[0], jnp.mean(z**3, axis=0), rtol=1e-5)
    assert not gradient[1:].any()


def test_a_batch_of_another_size_is_no_batch_of_particles(keys, x64):
    rows = jax.vmap(lambda key: per_particle(COPIES, key))(keys[:2])
    np.testing.assert_array_equal(rows, jnp.stack([COPIES[0], COPIES[0]]))


def test_a_batch_of_batches_is_one_batch_if_its_size_is_that_of_all_particles(keys, x64):
    """The outer batch counts first; partners are half of all particles apart."""
    copies, few = jnp.arange(24.0).reshape(8, 3), keys[:2]

    def one(number, key):
        key = random.fold_in(key, number)
        return per_particle(copies, key), antithetic_key(8, key)

    rows, found = jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))(jnp.arange(4), few)
    np.testing.assert_array_equal(rows.reshape(8, 3), copies)
    words = lambda key: random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    own = [[words(random.fold_in(key, number)) for key in few] for number in (0, 1, 0, 1)]
    np.testing.assert_array_equal(words(found), jnp.array(own))


@pytest.mark.parametrize("particles", [1, 2, 5, 8])
def test_partners_have_the_same_key_and_opposite_signs(particles):
    keys, half = random.split(random.key(1), particles), particles // 2
    found = random.key_data(jax.vmap(lambda key: antithetic_key(particles, key))(keys))
    signs = antithetic_signs(particles)
    np.testing.assert_array_equal(found[:half], found[half : 2 * half])
    np.testing.assert_array_equal(found[2 * half :], random.key_data(keys)[2 * half :])
    np.testing.assert_array_equal(signs[:half], -signs[half : 2 * half])
    assert (signs[2 * half :] == 1).all()
