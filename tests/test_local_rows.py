# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Latents of their own for each row of the data, of which a step draws a minibatch."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax, random
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_natgrad import NaturalGradient, fit
from numpyro_natgrad.blocks.gaussian.local_rows import solve_rows
from numpyro_natgrad.estimators.derivatives import evaluate_loss
from numpyro_natgrad.guide.handlers import with_copies
from numpyro_natgrad.infer.fisher import _loss

GROUPS, BATCH, NOISE = 600, 60, 0.6
Y = np.random.default_rng(2).normal(0.5, 0.7, GROUPS) + NOISE * np.random.default_rng(3).normal(size=GROUPS)


def hierarchy(batch=BATCH):
    """Normal groups around a mean, with one value each."""
    data = jnp.asarray(Y)

    def model():
        mean, sd = numpyro.sample("mean", dist.Normal(0, 5)), numpyro.sample("sd", dist.LogNormal(0, 1))
        with numpyro.plate("groups", GROUPS, subsample_size=batch) as rows:
            theta = numpyro.sample("theta", dist.Normal(mean, sd))
            numpyro.sample("y", dist.Normal(theta, NOISE), obs=data[rows])

    return model, lambda: numpyro.plate("groups", GROUPS, subsample_size=batch)


def minus_log_evidence(z):
    """−log p(y, mean, log sd), with the rows integrated out."""
    mean, variance = z[0], jnp.exp(2 * z[1]) + NOISE**2
    return jnp.sum((jnp.asarray(Y) - mean) ** 2 / variance + jnp.log(variance)) / 2 + mean**2 / 50 + z[1] ** 2 / 2


def started(values=None, particles=1, elbo=Trace_ELBO, batch=BATCH):
    model, plates = hierarchy(batch)
    svi = SVI(model, AutoNormal(model, create_plates=plates), NaturalGradient(), elbo(num_particles=particles))
    state = svi.init(random.key(0))
    optim_state = svi.optim.init({**svi.optim.get_params(state.optim_state), **unconstrained(svi, values or {})})
    return svi, state._replace(optim_state=optim_state)


def unconstrained(svi, values):
    return svi.constrain_fn({p: jnp.asarray(x) for p, x in values.items()}, invert=True) if values else {}


def run(svi, state, steps):
    return jax.jit(lambda s: lax.fori_loop(0, steps, lambda _, s: svi.update(s)[0], s))(state)


@pytest.mark.slow
@pytest.mark.parametrize("particles", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_visit_takes_a_row_to_its_optimum(particles):
    """The rows that a step draws have their exact posterior afterwards, and the others what they had before."""
    svi, state = started({"mean_auto_scale": 1e-4, "sd_auto_scale": 1e-4, "mean_auto_loc": 0.5}, particles)
    before, after = svi.get_params(state), svi.get_params(jax.jit(svi.update)(state)[0])
    moved = np.asarray(before["theta_auto_scale"] != after["theta_auto_scale"])
    assert BATCH <= moved.sum() <= particles * BATCH
    assert np.array_equal(before["theta_auto_loc"][~moved], after["theta_auto_loc"][~moved])
    # The rows then follow the means of the global latents.
    mean, sd = float(after["mean_auto_loc"]), float(jnp.exp(after["sd_auto_loc"]))
    precision = 1 / sd**2 + 1 / NOISE**2
    exact = (mean / sd**2 + Y / NOISE**2) / precision
    assert np.allclose(after["theta_auto_scale"][moved], precision**-0.5, rtol=0.1)
    assert np.max(np.abs(after["theta_auto_loc"][moved] - exact[moved])) < 0.3 * precision**-0.5


@pytest.mark.slow
@pytest.mark.parametrize("sd", [0.1, 2.0])
def test_curvature_of_the_global_latents_is_that_of_the_marginal_likelihood(x64, sd):
    """With all groups but one in the batch, the profile over optimal rows is the evidence of a Normal hierarchy."""
    at = np.array([0.3, np.log(sd)])
    precision = 1 / sd**2 + 1 / NOISE**2
    rows = {
        "theta_auto_loc": (at[0] / sd**2 + Y / NOISE**2) / precision,
        "theta_auto_scale": np.full(GROUPS, precision**-0.5),
    }
    narrow = {"mean_auto_loc": at[0], "sd_auto_loc": at[1], "mean_auto_scale": 1e-5, "sd_auto_scale": 1e-5}
    svi, state = started({**rows, **narrow}, batch=GROUPS - 1)
    params = state.optim_state[1].params
    fn = _loss(svi, params, state, (), {})
    partition = svi.optim._partition(fn, params, False)
    loss_info = evaluate_loss(with_copies(fn, partition.copies), params, partition.request, partition.particles)
    (block,) = partition.blocks
    v = block.natural_gradient(
        loss_info, params, state.optim_state[1].memory._replace(joint=_exact(state, partition)), None
    )
    root = np.linalg.inv(v.factor)
    found = root.T @ (np.asarray(v.estimate.curvature) + np.eye(2)) @ root
    expected = np.asarray(jax.hessian(minus_log_evidence)(jnp.asarray(at)))
    # One group is not in the batch. Its share of the complete data's curvature is 1/600, and that of the evidence is
    # less than a hundredth of that in the neck.
    complete = np.diag(np.asarray(v.estimate.coupling) + found)
    assert np.allclose(found, expected, atol=0.03 * np.sqrt(np.outer(complete, complete)))


@pytest.mark.slow
def test_the_neck_of_a_centred_hierarchy_is_left():
    """From a spread of 0.1, where a row says next to nothing of the spread; EM multiplies it by 1.02 a step."""
    svi, state = started({"mean_auto_loc": -1.5, "sd_auto_loc": np.log(0.1)})
    params = svi.get_params(run(svi, state, 60))
    best = np.array([Y.mean(), np.log(np.sqrt(Y.var() - NOISE**2))])
    hessian = np.asarray(jax.hessian(minus_log_evidence)(jnp.asarray(best)))
    sd = np.sqrt(np.diag(np.linalg.inv(hessian)))
    assert abs(float(params["mean_auto_loc"]) - best[0]) < 4 * sd[0]
    assert abs(float(params["sd_auto_loc"]) - best[1]) < 4 * sd[1]


@pytest.mark.slow
def test_fit_of_local_rows_converges_with_an_exact_kl():
    svi, _ = started(elbo=TraceMeanField_ELBO, particles=8)
    result = fit(svi, random.key(1), tolerance=1.0, max_steps=300, progress_bar=False)
    assert result.converged
    assert len(result.losses) <= 100


@pytest.mark.slow
def test_rows_without_global_latents_converge():
    def model():
        with numpyro.plate("rows", GROUPS, subsample_size=BATCH) as rows:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(z, NOISE), obs=jnp.asarray(Y)[rows])

    guide = AutoNormal(model, create_plates=lambda: numpyro.plate("rows", GROUPS, subsample_size=BATCH))
    svi = SVI(model, guide, NaturalGradient(), Trace_ELBO(num_particles=8))
    result = fit(svi, random.key(1), tolerance=1.0, max_steps=300, progress_bar=False)
    assert result.converged
    assert np.allclose(result.params["z_auto_loc"], Y / (1 + NOISE**2), atol=0.02)


@pytest.mark.slow
def test_sites_of_one_row_move_together_and_a_written_guide_is_read():
    """Intercept and slope of every group, correlated in the data, by indexed parameters."""
    x = jnp.arange(4.0)
    rng = np.random.default_rng(5)
    y = jnp.asarray(
        rng.normal(size=(GROUPS, 1)) + rng.normal(size=(GROUPS, 1)) * x + 0.5 * rng.normal(size=(GROUPS, 4))
    )

    def model():
        with numpyro.plate("groups", GROUPS, subsample_size=BATCH) as rows:
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            b = numpyro.sample("b", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(a[:, None] + b[:, None] * x, 0.5).to_event(1), obs=y[rows])

    def guide():
        names = ("a", "b")
        means = [numpyro.param(f"{n}_mean", jnp.zeros(GROUPS)) for n in names]
        sds = [numpyro.param(f"{n}_sd", jnp.full(GROUPS, 0.1), constraint=constraints.positive) for n in names]
        with numpyro.plate("groups", GROUPS, subsample_size=BATCH) as rows:
            for name, mean, sd in zip(names, means, sds, strict=True):
                numpyro.sample(name, dist.Normal(mean[rows], sd[rows]))

    svi = SVI(model, guide, NaturalGradient(), Trace_ELBO(num_particles=2))
    state = svi.init(random.key(0))
    assert svi.optim.report(svi, state).count("local rows, 2 Hessian-vector products") == 4
    params = svi.get_params(run(svi, state, 60))
    design = np.stack([np.ones(4), np.arange(4.0)], axis=1)
    precision = np.eye(2) + design.T @ design / 0.25
    exact = np.linalg.solve(precision, design.T @ np.asarray(y).T / 0.25)
    found = np.stack([params["a_mean"], params["b_mean"]])
    assert np.max(np.abs(found - exact)) < 0.05
    assert np.allclose(params["a_sd"], precision[0, 0] ** -0.5, rtol=0.02)
    assert np.allclose(params["b_sd"], precision[1, 1] ** -0.5, rtol=0.02)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_solve_rows_agrees_with_numpy(x64, size):
    rng = np.random.default_rng(size)
    root = rng.normal(size=(20, size, size))
    matrix = root @ np.swapaxes(root, 1, 2) + np.eye(size)
    right = rng.normal(size=(20, size))
    diagonal = np.einsum("nee->ne", matrix)
    found = solve_rows(jnp.asarray(diagonal), jnp.asarray(matrix), jnp.asarray(right), 0.05)
    assert np.allclose(found, np.linalg.solve(matrix, right[..., None])[..., 0], rtol=1e-8)


def test_solve_rows_descends_where_a_matrix_is_indefinite(x64):
    rng = np.random.default_rng(1)
    off = rng.normal(size=(200, 3, 3)) * 5
    right = rng.normal(size=(200, 3))
    found = solve_rows(jnp.ones((200, 3)), jnp.asarray(off + np.swapaxes(off, 1, 2)), jnp.asarray(right), 0.05)
    assert np.all(np.isfinite(found))
    assert np.all(np.sum(np.asarray(found) * right, axis=1) > 0)


def _exact(state, partition):
    """The joint block's memory, cut to the latents of the partition."""
    joint, d = state.optim_state[1].memory.joint, partition.joint_latents
    cut = {n: getattr(joint, n)[:d, :d] for n in ("factor", "curvature", "coupling")}
    return joint._replace(slope=joint.slope[:d], **cut)
