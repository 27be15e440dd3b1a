# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Draws come in antithetic pairs, and each column of the Hessian estimate is the mean over its own group of pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.infer.initialization import init_to_value
from numpyro.infer.util import potential_energy

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.blocks.gaussian.curvature import group_count
from numpyro_natgrad.blocks.partition import partition_parameters
from numpyro_natgrad.estimators.derivatives import evaluate_loss
from numpyro_natgrad.guide.handlers import with_copies
from numpyro_natgrad.options import CONSTANTS, checked

#: Latents of the model: two groups of pairs share 17 and 16 directions.
SIZES = {"a": 25, "b": 8}
D = sum(SIZES.values())


def _model(y, link=jnp.tanh):
    a = numpyro.sample("a", dist.Normal(0, 2).expand([SIZES["a"]]).to_event(1))
    with numpyro.plate("few", SIZES["b"]):
        b = numpyro.sample("b", dist.Normal(1, 1))
    numpyro.sample("y", dist.Normal(link(a).sum() + link(b).sum(), 0.5), obs=y)


def _linear(y):
    _model(y, link=lambda x: x)


def _partly_without_hessian(y):
    """The second derivative by the first entry of ``a`` is 0 · ∞ below 0.02, near the centre of :func:`_centred`."""
    _model(y, link=lambda x: jnp.append(x[1:], jnp.maximum(x[0] - 0.02, 0.0) ** 1.5))


def _centred(model):
    start = {"a": jnp.zeros(SIZES["a"]), "b": jnp.ones(SIZES["b"])}
    return AutoMultivariateNormal(model, init_loc_fn=init_to_value(values=start))


def _evaluated(guide, particles, model=_model, step_size=1.0):
    """The block of the Gaussian sites, the parameters, and a compiled function of a factor K.

    With a step size of the user's every particle is one draw; without, each may stand for several.

    The function returns the draw of every particle and what the block learns of the Hessian in the frame K.
    """
    auto, elbo = guide(model), Trace_ELBO(particles)
    svi = SVI(model, auto, NaturalGradient(), elbo)
    params = svi.optim.get_params(svi.init(random.key(0), 1.0).optim_state)
    fn = lambda x: (elbo.loss(random.key(5), svi.constrain_fn(x), model, auto, 1.0), None)
    partition = partition_parameters(fn, params, checked(step_size, "adaptive", None, True), False)
    (block,) = partition.blocks
    drawn, draws = with_copies(fn, partition.copies), particles * partition.copies

    @jax.jit
    def learned(factor):
        loss_info = evaluate_loss(drawn, params, partition.request, draws)
        products = block.curvature.whitened_hessian(block.latents, loss_info, block.latents.means(params), factor)
        return block.latents.draws(loss_info)[0], *products

    return block, params, learned


def _potential(z):
    """−log p of all latents, in the order of the guides' sites."""
    return potential_energy(_model, (1.0,), {}, {"a": z[: SIZES["a"]], "b": z[SIZES["a"] :]})


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("particles", [4, 9])
def test_each_column_uses_the_mean_hessian_of_its_group_of_pairs(x64, guide, particles):
    block, params, learned = _evaluated(guide, particles)
    loc, factor = block.latents.means(params), jnp.tril(random.normal(random.key(1), (D, D)))
    draws, curvature, correction = learned(factor)
    hessians, groups = jax.jit(jax.vmap(jax.hessian(_potential)))(draws), group_count(D, particles, CONSTANTS)
    assert groups == 2
    group = np.arange(particles) % (particles // 2) % groups
    for i in range(D):
        mine = jnp.mean(hessians[group == i % groups], axis=0)
        np.testing.assert_allclose(curvature[i], factor.T @ mine @ factor[:, i], atol=1e-8)
    last = (draws[-1] - loc) / particles if particles % 2 else jnp.zeros(D)
    np.testing.assert_allclose(correction, -factor.T @ hessians[:-1].mean(0) @ last, atol=1e-8)


def test_draws_without_a_finite_hessian_are_left_out(x64):
    particles, latents = 8, lambda z: {"a": z[: SIZES["a"]], "b": z[SIZES["a"] :]}
    _, _, learned = _evaluated(_centred, particles, _partly_without_hessian)
    draws, curvature, _ = learned(jnp.eye(D))
    potential = lambda z: potential_energy(_partly_without_hessian, (1.0,), {}, latents(z))
    hessians = np.asarray(jax.jit(jax.vmap(jax.hessian(potential)))(draws))
    known, group = np.isfinite(hessians).all((1, 2)), np.arange(particles) % 4 % 2
    assert 0 < known.sum() < particles
    for i in range(D):
        mine = hessians[known & (group == i % 2)]
        np.testing.assert_allclose(curvature[i], mine.mean(0)[:, i], atol=1e-8)


@pytest.mark.parametrize(
    ("particles", "step_size", "draws"),
    [(2, 1.0, 2), (5, 1.0, 5), (1, None, 8), (2, None, 8), (3, None, 12), (8, None, 8)],
)
@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_draws_are_antithetic_pairs(guide, particles, step_size, draws):
    """So are the independent draws that each of a few particles stands for: at least eight in all."""
    block, params, learned = _evaluated(guide, particles, step_size=step_size)
    offsets, half = learned(jnp.eye(D))[0] - block.latents.means(params), draws // 2
    assert len(offsets) == draws
    np.testing.assert_allclose(offsets[:half], -offsets[half : 2 * half], rtol=1e-5, atol=1e-6)
    apart = offsets[:, None] - offsets
    assert float(jnp.min(jnp.abs(apart).max(-1) + jnp.eye(draws))) > 1e-3


def test_curvature_of_copies_is_that_of_their_draws(x64):
    """Two particles with four copies each: the batch of batches is one of eight draws."""
    _, _, learned = _evaluated(AutoNormal, 2, step_size=None)
    draws, curvature, _ = learned(jnp.eye(D))
    hessians, group = jax.jit(jax.vmap(jax.hessian(_potential)))(draws), np.arange(8) % 4 % 2
    for i in range(D):
        np.testing.assert_allclose(curvature[i], jnp.mean(hessians[group == i % 2], axis=0)[:, i], atol=1e-8)


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_full_step_with_antithetic_draws_is_exact_for_a_gaussian_posterior(x64, guide):
    auto = guide(_linear)
    svi = SVI(_linear, auto, NaturalGradient(step_size=1.0, max_kl=None), Trace_ELBO(6))
    params = svi.run(random.key(0), 1, 1.0, progress_bar=False).params
    mean = jnp.concatenate([jnp.zeros(SIZES["a"]), jnp.ones(SIZES["b"])])
    prior = jnp.concatenate([jnp.full(SIZES["a"], 4.0), jnp.ones(SIZES["b"])])
    precision = jnp.diag(1 / prior) + 4.0
    expected = jnp.linalg.solve(precision, mean / prior + 4.0)
    if guide is AutoMultivariateNormal:
        factor = params["auto_scale_tril"]
        np.testing.assert_allclose(params["auto_loc"], expected, atol=1e-6)
        np.testing.assert_allclose(factor @ factor.T, jnp.linalg.inv(precision), atol=1e-6)
    else:
        found = [jnp.concatenate([params[f"{n}_auto_{part}"] for n in SIZES]) for part in ("loc", "scale")]
        np.testing.assert_allclose(found[0], expected, atol=1e-6)
        np.testing.assert_allclose(found[1], 1 / jnp.sqrt(jnp.diagonal(precision)), atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "products"),
    [
        (Trace_ELBO(8), 17),
        (Trace_ELBO(4), 17),
        (Trace_ELBO(3), 17),
        (Trace_ELBO(5), 17),
        (Trace_ELBO(1), 17),
        (Trace_ELBO(8, vectorize_particles=False), 33),
        (TraceMeanField_ELBO(8), 33),
    ],
)
def test_number_of_hessian_products_follows_from_loss_and_particles(loss, products):
    svi = SVI(_model, AutoNormal(_model), NaturalGradient(), loss)
    state = svi.init(random.key(0), 1.0)
    assert f" {products} Hessian-vector products" in svi.optim.report(svi, state, 1.0)
