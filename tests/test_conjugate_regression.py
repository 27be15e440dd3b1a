# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""One step of length 1 reaches the posterior of a linear regression, or its projection onto the guide's family.

With known noise the posterior is N(m*, H⁻¹), H = XᵀX/s² + prior precision. The member of a smaller family with the
least KL to it has the same mean and the diagonal blocks of H.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from numpyro.infer.autoguide import (
    AutoBatchedMultivariateNormal,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
)
from oracles import kl
from tables import positive, tiers

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.options import RuleConstants

GROUPS, NOISE, PRIOR = 2, 0.5, 2.0
RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 6)) @ np.diag([1, 3, 1, 0.3, 1, 1])
Y = X @ RNG.normal(size=6) + NOISE * RNG.normal(size=12)
# Latents are numbered v₁ v₂, then w₁₁ w₁₂ w₂₁ w₂₂.


def model(x: Any, y: Any) -> None:
    with numpyro.plate("group", GROUPS):
        v = numpyro.sample("v", dist.Normal(0, PRIOR))
        w = numpyro.sample("w", dist.Normal(0, PRIOR).expand([2]).to_event(1))
    mean = x @ jnp.concatenate([v, w.ravel()])
    numpyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=y)


def pieces(model: Any) -> Any:
    guide = AutoGuideList(model)
    guide.append(AutoNormal(handlers.block(handlers.seed(model, 0), hide=["w"])))
    guide.append(AutoMultivariateNormal(handlers.block(handlers.seed(model, 0), hide=["v"])))
    return guide


def mixed(x: Any, y: Any) -> None:
    """A covariance matrix for w and scales for v; every parameter has the plate's shape."""
    cov = numpyro.param("cov", jnp.tile(jnp.eye(2), (GROUPS, 1, 1)), constraint=constraints.positive_definite)
    loc, means = numpyro.param("loc", jnp.zeros((GROUPS, 2))), numpyro.param("means", jnp.ones(GROUPS))
    with numpyro.plate("group", GROUPS):
        numpyro.sample("v", dist.Normal(means, positive("scales", jnp.ones(GROUPS))))
        numpyro.sample("w", dist.MultivariateNormal(loc, covariance_matrix=cov))


def order(guide: Any, params: Any) -> np.ndarray:
    """Where an autoguide's flat vector keeps v₁ v₂ w₁₁ … (its median at a mean of 0, 1, 2, … says so)."""
    mean = params["auto_loc"]
    places = guide.median({**params, "auto_loc": jnp.arange(float(mean.size)).reshape(mean.shape)})
    return np.concatenate([np.ravel(places["v"]), np.ravel(places["w"])]).astype(int)


def flat(guide: Any, params: Any) -> tuple[Any, Any]:
    """Mean and covariance of v and w in an autoguide with one vector."""
    i, mean = order(guide, params), np.ravel(params["auto_loc"])
    if "auto_scale" in params:
        cov = variances(params["auto_scale"])
    else:
        k = np.asarray(params["auto_scale_tril"], float)
        k = k.reshape(-1, *k.shape[-2:])
        cov = jax.scipy.linalg.block_diag(*(k @ np.swapaxes(k, 1, 2)))
    return mean[i], np.asarray(cov)[np.ix_(i, i)]


def dense(means: list[Any], blocks: list[Any]) -> tuple[Any, Any]:
    return np.concatenate([np.ravel(m) for m in means]), jax.scipy.linalg.block_diag(*blocks)


def variances(scale: Any) -> np.ndarray:
    return np.diag(np.ravel(scale).astype(float) ** 2)


def of_sites(_: Any, p: Any) -> tuple[Any, Any]:
    """... of one Normal for each site."""
    return dense([p["v_auto_loc"], p["w_auto_loc"]], [variances(p["v_auto_scale"]), variances(p["w_auto_scale"])])


def of_list(_: Any, p: Any) -> tuple[Any, Any]:
    """... of a Normal for v and a multivariate Normal for w."""
    k = np.asarray(p["auto_scale_tril"], float)
    return dense([p["v_auto_loc"], p["auto_loc"]], [variances(p["v_auto_scale"]), k @ k.T])


def of_mixed(_: Any, p: Any) -> tuple[Any, Any]:
    return dense([p["means"], p["loc"]], [variances(p["scales"]), *np.asarray(p["cov"], float)])


def owned(*groups: list[int]) -> np.ndarray:
    """The entries of the precision that a family represents: those within a group of latents."""
    mask = np.zeros((6, 6))
    for group in groups:
        mask[np.ix_(group, group)] = 1
    return mask


ALONE = owned(*[[i] for i in range(6)])


class Exact(NamedTuple):
    """A guide, its parameters as mean and covariance, and the entries of the precision that its family represents."""

    make: Callable[[Any], Any]
    dense: Callable[[Any, Any], tuple[Any, Any]]
    owned: np.ndarray


GUIDES = {
    "AutoMultivariateNormal": Exact(AutoMultivariateNormal, flat, np.ones((6, 6))),
    "AutoDiagonalNormal": Exact(AutoDiagonalNormal, flat, ALONE),
    "AutoNormal": Exact(AutoNormal, of_sites, ALONE),
    "AutoBatchedMultivariateNormal": Exact(
        # NumPyro cuts this guide's flat vector v, w into rows, whatever they hold.
        lambda m: AutoBatchedMultivariateNormal(m, batch_ndim=1),
        flat,
        owned([0, 1, 2], [3, 4, 5]),
    ),
    "AutoGuideList": Exact(pieces, of_list, owned([0], [1], [2, 3, 4, 5])),
    "by hand": Exact(lambda m: mixed, of_mixed, owned([0], [1], [2, 3], [4, 5])),
}
TOLERANCE = {"float32": 1e-4, "float64": 1e-10}  # nats


def gap(guide: str, objective: Any, steps: int = 1, x: Any = X, **options: Any) -> float:
    """Nats between the guide after some steps of length 1 and the nearest member of its family."""
    case = GUIDES[guide]
    made = case.make(model)
    svi = SVI(model, made, NaturalGradient(1.0, max_kl=None, **options), objective)
    args = jnp.asarray(x), jnp.asarray(Y, float)
    state = svi.init(random.key(0), *args)
    update = jax.jit(svi.update)
    for _ in range(steps):
        state, _ = update(state, *args)
    hessian = x.T @ x / NOISE**2 + np.eye(6) / PRIOR**2
    mean = np.linalg.solve(hessian, x.T @ Y / NOISE**2)
    nearest = mean, np.linalg.inv(hessian * case.owned)
    return kl(case.dense(made, svi.get_params(state)), nearest)


@pytest.mark.parametrize("guide", GUIDES)
def test_one_step_reaches_the_projected_posterior(guide, x64):
    assert gap(guide, Trace_ELBO(num_particles=2)) < TOLERANCE["float64"]


@pytest.mark.parametrize(
    "guide", tiers(["AutoMultivariateNormal", "AutoDiagonalNormal", "by hand"], "AutoMultivariateNormal")
)
def test_one_step_reaches_the_projected_posterior_in_float32(guide):
    assert gap(guide, Trace_ELBO(num_particles=2)) < TOLERANCE["float32"]


def test_one_step_is_exact_for_any_number_of_particles_and_other_elbos(x64):
    assert gap("AutoMultivariateNormal", TraceGraph_ELBO(num_particles=5)) < TOLERANCE["float64"]


def test_one_particle_is_exact_after_two_steps(x64):
    """The first step leaves the noise of its draw in the mean; at the posterior's precision the second has none."""
    assert gap("AutoMultivariateNormal", Trace_ELBO(), steps=2) < TOLERANCE["float64"]


def test_full_gaussian_above_the_joint_limit_is_exact_with_enough_probes(x64, monkeypatch):
    monkeypatch.setattr("numpyro_natgrad.options.CONSTANTS", RuleConstants(joint_limit=2, full_joint_limit=2))
    assert gap("AutoMultivariateNormal", Trace_ELBO(num_particles=2)) < TOLERANCE["float64"]


def test_mean_field_above_the_joint_limit_is_exact_after_two_steps_on_independent_latents(x64, monkeypatch):
    """Random probes estimate a diagonal Hessian without noise; the path gradient then has none either."""
    monkeypatch.setattr("numpyro_natgrad.options.CONSTANTS", RuleConstants(joint_limit=2, full_joint_limit=2))
    orthogonal = np.linalg.qr(X)[0] * np.array([1, 3, 1, 0.3, 1, 1])
    options = {"steps": 2, "x": orthogonal, "estimator": "second_order"}
    assert gap("AutoDiagonalNormal", Trace_ELBO(num_particles=2), **options) < TOLERANCE["float64"]


@pytest.mark.parametrize("guide", tiers([AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal], AutoNormal))
def test_constrained_sites_are_exact_after_one_step(guide, x64):
    """The logarithm is Gaussian: the prior is N(1, ½²), and one observation is 2 ± 1."""

    def positive_site() -> None:
        rate = numpyro.sample("rate", dist.LogNormal(1.0, 0.5))
        numpyro.sample("y", dist.Normal(jnp.log(rate), 1.0), obs=2.0)

    svi = SVI(positive_site, made := guide(positive_site), NaturalGradient(1.0, estimator="second_order", max_kl=None),
              Trace_ELBO(num_particles=2))  # fmt: skip
    params = svi.run(random.key(0), 1, progress_bar=False).params
    median, (low, high) = (made.quantiles(params, q)["rate"] for q in (0.5, [0.1, 0.9]))
    np.testing.assert_allclose(np.log(median), 1.2, rtol=TOLERANCE["float64"])
    np.testing.assert_allclose(np.log(high / low), 2 * 1.2815515655446004 / np.sqrt(5), rtol=TOLERANCE["float64"])
