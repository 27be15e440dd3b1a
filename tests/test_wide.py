# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Guides with more than 128 latents reach their optimum from every start, with few particles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import lax, random
from numpyro import distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.blocks.gaussian.diagonal import decoupled
from numpyro_natgrad.blocks.partition import partition_parameters
from numpyro_natgrad.estimators.derivatives import evaluate_loss
from numpyro_natgrad.guide.handlers import with_copies
from numpyro_natgrad.options import checked

D, STARTS = 140, 4
RNG = np.random.default_rng(0)
#: Precision of a Gaussian posterior: scales over a decade, four common directions.
SD = 10 ** RNG.uniform(-0.5, 0.5, D)
COMMON = 2 * np.linalg.qr(RNG.normal(size=(D, 4)))[0]
PRECISION = (np.eye(D) + COMMON @ COMMON.T) / SD[:, None] / SD
EVIDENCE = 0.5 * np.linalg.slogdet(PRECISION / (2 * np.pi))[1]
GROUP = np.repeat(np.arange(D - 2), RNG.integers(1, 5, D - 2))
Y = 1 + RNG.normal(size=D - 2)[GROUP] + RNG.normal(size=len(GROUP))


def gaussian():
    """Normalized: the log evidence is 0."""
    z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (D,)))
    numpyro.factor("f", EVIDENCE - 0.5 * z @ jnp.asarray(PRECISION, jnp.float32) @ z)


def hierarchy():
    mean, sd = numpyro.sample("mean", dist.Normal(0, 5)), numpyro.sample("sd", dist.HalfNormal(2))
    effect = numpyro.sample("effect", dist.Normal(mean, sd).expand([D - 2]).to_event(1))
    numpyro.sample("y", dist.Normal(effect[GROUP], 1).to_event(1), obs=Y)


def elbos(model, make_guide, particles, marks, **options):
    """ELBO from each start after each number of steps, nats, ``(marks, starts)``."""
    svi = SVI(model, guide := make_guide(model), NaturalGradient(**options), Trace_ELBO(particles))
    fresh, judge = svi.init(random.key(0)), Trace_ELBO(500)
    name = f"{guide.prefix}_loc"
    starts = fresh.optim_state[1].params[name] + 3 * random.normal(random.key(1), (STARTS, D))

    def run(start, key):
        params = {**fresh.optim_state[1].params, name: start}
        state, found, taken = fresh._replace(optim_state=svi.optim.init(params), rng_key=key), [], 0
        for mark in marks:
            state = lax.fori_loop(taken, mark, lambda _, s: svi.update(s)[0], state)
            found.append(-judge.loss(random.key(2), svi.get_params(state), model, guide))
            taken = mark
        return jnp.stack(found)

    return np.asarray(jax.jit(jax.vmap(run))(starts, random.split(random.key(3), STARTS))).T


def evaluated(make_guide, particles, rows=None, step_size=None):
    """Partition, and the gradient by the mean of one evaluation, beside that of the expected loss: −log p is quadratic.

    :param rows: of a minibatch, if there is one.
    """

    def model():
        z = numpyro.sample("z", dist.Normal(0, 1).expand([D]).to_event(1))
        with numpyro.plate("rows", D, subsample_size=rows) as n:
            numpyro.sample(
                "y", dist.Normal(jnp.asarray(COMMON.sum(1), jnp.float32)[n] * z.sum(), 1), obs=jnp.ones(D)[n]
            )

    guide, elbo = make_guide(model), Trace_ELBO(particles)
    svi = SVI(model, guide, NaturalGradient(step_size=step_size), elbo)
    params = svi.optim.get_params(svi.init(random.key(0)).optim_state)
    params = {**params, "auto_loc": jnp.linspace(-1, 1, D)}
    loss = lambda key: lambda x: (elbo.loss(key, svi.constrain_fn(x), model, guide), None)
    partition = partition_parameters(loss(random.key(1)), params, checked(step_size, "adaptive", None, True), False)
    drawn = with_copies(loss(random.key(2)), partition.copies)
    gradient = jax.jit(lambda x: evaluate_loss(drawn, x, partition.request, partition.particles).gradient)(params)
    slopes = COMMON.sum(1)
    exact = params["auto_loc"] + np.sum(slopes * (slopes * params["auto_loc"].sum() - 1))
    return partition, gradient["auto_loc"], exact


@pytest.mark.parametrize("particles", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("make_guide", [AutoDiagonalNormal, partial(AutoLowRankMultivariateNormal, rank=2)])
def test_draws_of_wide_guides_are_antithetic_pairs(make_guide, particles):
    """So the slope has no noise where −log p is quadratic. Few particles stand for two or four draws each."""
    partition, slope, exact = evaluated(make_guide, particles)
    assert partition.copies == {1: 4, 2: 2, 3: 2}.get(particles, 1)
    np.testing.assert_allclose(slope, exact, rtol=1e-4, atol=1e-4 * np.abs(exact).max())


@pytest.mark.parametrize("choice", [{"rows": D // 4}, {"step_size": 0.1}, {"particles": 5}])
def test_particles_are_the_draws_in_minibatches_with_a_chosen_step_size_or_if_they_have_no_partners(choice):
    partition, slope, exact = evaluated(AutoDiagonalNormal, **{"particles": 1, **choice})
    assert partition.copies == 1
    assert np.abs(slope - exact).max() > 0.01 * np.abs(exact).max()


@pytest.mark.parametrize("particles", [1, 2])
def test_wide_mean_field_reaches_the_optimum_with_few_particles(particles):
    """Where the scales are 1/√Hᵢᵢ. A draw's own scale gradients would widen the guide without bound."""
    best = EVIDENCE - 0.5 * np.sum(np.log(np.diag(PRECISION) / (2 * np.pi)))
    (found,) = elbos(gaussian, AutoDiagonalNormal, particles, [200])
    assert (np.abs(found - best) < 0.5).all(), found - best


@pytest.mark.slow
def test_wide_full_gaussian_agrees_from_all_starts_of_a_centred_hierarchy():
    early, late = elbos(hierarchy, AutoMultivariateNormal, 8, [30, 50])
    assert np.ptp(late) < 0.1
    assert (early > late.max() - 0.1).all(), late.max() - early


@pytest.mark.parametrize("particles", [1, 8])
def test_negative_curvature_widens_no_further_than_none(particles):
    """Where −log p is concave, a step of size ρ leaves 1 − ρ of every precision, as where it is flat."""

    def double_wells():
        z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (D,)))
        numpyro.factor("f", jnp.sum(50 * z**2 - z**4))

    rho = 0.5
    optimizer = NaturalGradient(step_size=rho, max_kl=None, estimator="second_order")
    guide = AutoDiagonalNormal(double_wells, init_loc_fn=numpyro.infer.init_to_value(values={"z": jnp.zeros(D)}))
    svi = SVI(double_wells, guide, optimizer, Trace_ELBO(particles))
    state = svi.init(random.key(0))
    before = svi.get_params(state)["auto_scale"]
    after = svi.get_params(svi.update(state)[0])["auto_scale"]
    np.testing.assert_allclose((before / after) ** 2, 1 - rho, rtol=1e-4)


#: A Gaussian with a factor that all latents share: D⁻¹H has an eigenvalue of 70.5, and 139 of ½.

FACTOR_PRECISION = 0.5 * np.diag(1 / SD**2) + 0.5 * np.outer(1 / SD, 1 / SD)


@pytest.mark.parametrize("particles", [1, 8])
def test_a_factor_common_to_all_latents_does_not_slow_a_mean_field(particles):
    """An elementwise unit step is 35 times too long along the factor, and cut to that it is too short elsewhere."""
    log_evidence = 0.5 * np.linalg.slogdet(FACTOR_PRECISION / (2 * np.pi))[1]

    def shared_factor():
        z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (D,)))
        numpyro.factor("f", log_evidence - 0.5 * z @ jnp.asarray(FACTOR_PRECISION, jnp.float32) @ z)

    best = log_evidence - 0.5 * np.sum(np.log(np.diag(FACTOR_PRECISION) / (2 * np.pi)))
    (found,) = elbos(shared_factor, AutoDiagonalNormal, particles, [50])
    assert (best - found < 0.1 * D).all(), best - found


@pytest.mark.parametrize("stiffness", [50.0, 1e-3])
def test_two_directions_decouple_a_hessian_of_rank_one_beside_its_diagonal(stiffness):
    """The step is H⁻¹g, and the estimates have the mean diag H. Where the coupling is weak nothing changes."""
    rng = np.random.default_rng(1)
    diagonal, u = 10 ** rng.uniform(-0.5, 0.5, D), rng.normal(size=D)
    u = np.sqrt(diagonal) * u / np.linalg.norm(u)
    hessian, g = np.diag(diagonal) + stiffness * np.outer(u, u), rng.normal(size=D)
    probes = rng.choice([-1.0, 1.0], (4000, D))
    given = (jnp.array(x, float) for x in (g, diagonal, probes, probes @ hessian))
    slope, diagonals, _ = decoupled(lambda v: jnp.array(hessian, float) @ v, *given, jnp.zeros(2))
    if stiffness < 1:
        np.testing.assert_array_equal(slope, jnp.array(g, float))
    else:
        np.testing.assert_allclose(slope / diagonal, np.linalg.solve(hessian, g), rtol=1e-2, atol=1e-3)
        plain = np.var(probes * (probes @ hessian), axis=0).sum()
        assert np.var(np.asarray(diagonals), axis=0).sum() < 0.05 * plain
    np.testing.assert_allclose(np.mean(np.asarray(diagonals, float), axis=0), np.diag(hessian), rtol=0.02)


def test_a_stiff_direction_is_known_from_earlier_steps_where_no_probe_sees_it():
    """Two probes orthogonal to it differ by nothing. The elementwise step would be as much too long as it is stiff."""
    u = np.full(D, D**-0.5)
    hessian = np.eye(D) + 50 * np.outer(u, u)
    signs = np.repeat([1.0, -1.0], D // 2)
    probes = np.stack([signs, np.random.default_rng(2).permutation(signs)])
    g = 3 * u
    product = lambda v: jnp.array(hessian, float) @ v
    given = [jnp.array(x, float) for x in (g, np.ones(D), probes, probes @ hessian)]
    unseen, _, none = decoupled(product, *given, jnp.zeros(2))
    seen, _, _ = decoupled(product, *given, jnp.array([2500.0, 1.0]))
    np.testing.assert_allclose(none, 0, atol=1e-3)
    np.testing.assert_allclose(unseen, g, rtol=1e-5)
    np.testing.assert_allclose(seen, g / 51, rtol=1e-4)
