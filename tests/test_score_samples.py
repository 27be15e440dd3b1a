# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Where no KL is known, the Fisher matrix is the covariance of the scores of fresh draws, for every ELBO.

Flows, mixtures and annealed guides are such guides; at the end, their fits reduce the loss.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from jax.flatten_util import ravel_pytree
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from numpyro.infer.autoguide import (
    AutoBNAFNormal,
    AutoDAIS,
    AutoIAFNormal,
    AutoNormal,
    AutoSemiDAIS,
    AutoSurrogateLikelihoodDAIS,
)
from oracles import assert_close, captured_loss, form, root_eps
from scipy import stats
from tables import tiers

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.blocks.fisher.metrics import FisherSite, ScoreSamples
from numpyro_natgrad.blocks.fisher.solvers import woodbury_solve
from numpyro_natgrad.distributions import wrappers
from numpyro_natgrad.distributions.surrogate import FisherEstimate, kl_surrogate
from numpyro_natgrad.estimators import score_samples
from numpyro_natgrad.estimators.derivatives import LossInfo
from numpyro_natgrad.guide.handlers import Frozen
from numpyro_natgrad.options import CONSTANTS


def banana() -> None:
    z = numpyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    numpyro.factor("bend", dist.Normal(0, 1).log_prob(z[0]) + dist.Normal(z[0] ** 2, 0.5).log_prob(z[1]))


# --- the score of a flow ---


def test_score_at_a_flows_own_draw_equals_that_by_its_inverse(x64):
    guide = AutoIAFNormal(banana, num_flows=1)
    params = SVI(banana, guide, NaturalGradient(), Trace_ELBO()).init(random.key(0)).optim_state[1].params
    value, noted = flow(guide, params).sample_with_intermediates(random.key(1), (4,))

    def score(inverts: bool) -> Any:
        def log_q(changed: Any) -> jax.Array:
            q = flow(guide, changed)
            each = (q if inverts else wrappers.without_flow_inverse(q, noted)).log_prob(value)
            return each @ jnp.array([1.0, -0.4, 2.0, 0.3])

        return jax.jit(jax.value_and_grad(log_q))(params)

    assert_close(score(False), score(True), root_eps(value.dtype))


def flow(guide: AutoIAFNormal, params: Any) -> Any:
    with numpyro.handlers.substitute(data=params):
        return guide._get_posterior()


# --- fresh draws ---

ROWS, DRAWS = 1500, CONSTANTS.score_draws


def gaussian_guide() -> None:
    """A Gaussian under a scale of 3, which stands for three copies of the site."""
    loc = numpyro.param("loc", jnp.array([0.5, -1.0]))
    scale = numpyro.param("scale", jnp.array([0.4, 2.0]), constraint=constraints.positive)
    with numpyro.handlers.scale(scale=3.0):
        numpyro.sample("z", dist.Normal(loc, scale).to_event(1))


def gaussian_model() -> None:
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


@pytest.mark.parametrize(("particles", "batched"), [(1, True), (5, True), (5, False)])
def test_score_samples_are_unbiased_for_the_fisher(particles, batched):
    """In the unconstrained (loc, log σ) the Fisher is 3 diag(1/σ², 2): three copies, of every particle's own draw."""
    loss = Trace_ELBO(particles, vectorize_particles=batched)
    at, params = captured_loss(gaussian_model, gaussian_guide, loss)
    fn = at(random.key(3))

    def row(number: jax.Array) -> jax.Array:
        each = score_samples.sample_scores(fn, params, params, frozenset({"z"}), particles, number)
        flat = jax.vmap(lambda tree: ravel_pytree(tree)[0])(each)
        return particles * flat.T @ flat

    samples = np.asarray(jax.jit(jax.vmap(row))(jnp.arange(ROWS)), np.float64)
    fisher = 3 * np.diag([1 / 0.4**2, 1 / 2.0**2, 2.0, 2.0])
    error = samples.std(axis=0) / np.sqrt(ROWS)
    assert np.all(np.abs(samples.mean(axis=0) - fisher) < 5 * error)
    assert np.all(np.linalg.eigvalsh(samples) > -1e-3)


@pytest.mark.parametrize("particles", [1, 5, 100])
def test_number_of_score_samples_does_not_depend_on_particles(particles):
    at, params = captured_loss(gaussian_model, gaussian_guide, Trace_ELBO(particles))
    metric = ScoreSamples((FisherSite("z", "Normal", FisherEstimate.MONTE_CARLO),), DRAWS)
    nothing: dict[str, Any] = dict.fromkeys(LossInfo._fields)
    loss_info = LossInfo(**{**nothing, "fn": at(random.key(0)), "particles": particles})
    shape = jax.eval_shape(lambda p: metric.scores(loss_info, p, p), params).shape
    assert shape[0] == 4
    assert DRAWS <= shape[1] < DRAWS + particles


@pytest.mark.parametrize(("p", "s"), [(7, 4), (4, 9)])
def test_woodbury_solve_equals_the_dense_solve(p, s, dtype):
    u, g = random.normal(random.key(0), (p, s)), random.normal(random.key(1), (p,))
    dense = np.linalg.solve(np.asarray(u @ u.T) + 0.3 * np.eye(p), np.asarray(g))
    assert_close(woodbury_solve(u, jnp.array(0.3), g), dense.astype(u.dtype), root_eps(u.dtype))


# --- mixtures ---

WEIGHTS, LOCS, SCALES = np.array([0.3, 0.7]), np.array([-2.0, 1.5]), np.array([0.5, 0.8])


def mixture_model() -> None:
    numpyro.sample("z", dist.MixtureSameFamily(dist.Categorical(WEIGHTS), dist.Normal(LOCS, SCALES)))


def pieces() -> tuple[Any, Any, Any]:
    weights = numpyro.param("weights", jnp.array([0.4, 0.6]), constraint=constraints.simplex)
    locs = numpyro.param("locs", jnp.array([-1.0, 1.0]))
    scales = numpyro.param("scales", jnp.array([0.9, 1.1]), constraint=constraints.positive)
    return weights, locs, scales


def marginal_guide() -> None:
    weights, locs, scales = pieces()
    numpyro.sample("z", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, scales)))


def general_guide() -> None:
    weights, locs, scales = pieces()
    components = [dist.Normal(locs[k], scales[k]) for k in range(2)]
    numpyro.sample("z", dist.MixtureGeneral(dist.Categorical(weights), components))


def joint_model() -> None:
    w = numpyro.sample("w", dist.Categorical(jnp.array(WEIGHTS, float)))
    numpyro.sample("z", dist.Normal(jnp.array(LOCS, float)[w], jnp.array(SCALES, float)[w]))


def joint_guide() -> None:
    weights, locs, scales = pieces()
    w = numpyro.sample("w", dist.Categorical(weights), infer={"enumerate": "parallel"})
    numpyro.sample("z", dist.Normal(locs[w], scales[w]))


def joint_fisher(params: Any, jacobian: np.ndarray) -> np.ndarray:
    """Lin, Khan & Schmidt (2019): diag(F_weights, π_c F_c) of the joint of assignment and value, in (loc, log σ)."""
    pi, scales = np.array([0.4, 0.6]), np.array([0.9, 1.1])
    weights = jacobian.T @ np.diag(1 / pi) @ jacobian
    blocks = {"locs": np.diag(pi / scales**2), "scales": np.diag(2 * pi), "weights": weights}
    return np.asarray(jax.scipy.linalg.block_diag(*(blocks[name] for name in sorted(params))))


@pytest.fixture(scope="module")
def mixture():
    """The enumerated loss, its parameters, and the Fisher of the joint in closed form."""
    at, params = captured_loss(joint_model, joint_guide, TraceEnum_ELBO())
    jacobian = jax.jacfwd(numpyro.distributions.biject_to(constraints.simplex))(params["weights"])
    return at(random.key(0)), params, joint_fisher(params, np.asarray(jacobian))


def test_enumerated_mixture_has_the_fisher_of_the_joint(mixture):
    fn, params, expected = mixture
    flat, unravel = ravel_pytree(params)

    def length(x: jax.Array) -> jax.Array:
        with Frozen({"w": kl_surrogate, "z": kl_surrogate}):
            return fn(unravel(x))[0]

    assert_close(jax.jit(lambda x: form(length, x))(flat), expected.astype(np.float32), 1e-4)


@pytest.mark.parametrize("guide", [marginal_guide, general_guide])
def test_fisher_of_a_marginal_mixture_is_at_most_that_of_the_joint(mixture, guide):
    """The oracle is numerical integration; the information in the assignment is positive semidefinite."""
    _, params, joint = mixture
    at, _ = captured_loss(mixture_model, guide, TraceGraph_ELBO(num_particles=8))
    fn = at(random.key(2))

    def rows(number: jax.Array) -> jax.Array:
        each = score_samples.sample_scores(fn, params, params, frozenset({"z"}), 8, number)
        flat = 8 * jax.vmap(lambda tree: ravel_pytree(tree)[0])(each)
        return flat.T @ flat / 8

    samples = np.asarray(jax.jit(jax.vmap(rows))(jnp.arange(ROWS)), np.float64)
    error = samples.std(axis=0) / np.sqrt(ROWS)
    assert np.all(np.abs(samples.mean(axis=0) - marginal_fisher(params)) < 5 * error)
    assert np.linalg.eigvalsh(joint - marginal_fisher(params)).min() > -1e-4


def marginal_fisher(params: Any) -> np.ndarray:
    """∫ q ∇log q ∇log qᵀ dz of the mixture, by the trapezoidal rule."""
    flat, unravel = ravel_pytree(params)
    grid = jnp.linspace(-9.0, 9.0, 2001)

    def log_q(x: jax.Array, z: jax.Array) -> jax.Array:
        p = unravel(x)
        weights = numpyro.distributions.biject_to(constraints.simplex)(p["weights"])
        parts = dist.Normal(p["locs"], jnp.exp(p["scales"])).log_prob(z)
        return jax.scipy.special.logsumexp(jnp.log(weights) + parts)

    value, score = jax.jit(jax.vmap(jax.value_and_grad(log_q), in_axes=(None, 0)))(flat, grid)
    return np.einsum("n,ni,nj->ij", np.exp(value), score, score) * float(grid[1] - grid[0])


# --- fits ---


def fitted(model: Any, guide: Any, steps: int, loss: Any) -> tuple[Any, np.ndarray, str]:
    """State, losses and report."""
    svi = SVI(model, guide, NaturalGradient(), loss)
    start = svi.init(random.key(1))
    run = jax.jit(lambda state: jax.lax.scan(lambda s, _: svi.update(s), state, length=steps))
    state, losses = run(start)
    return state, np.asarray(losses), svi.optim.report(svi, state)


GUIDES = {
    "IAF": (lambda model: AutoIAFNormal(model, num_flows=1), "scores of 64 draws", 0.5),
    "BNAF": (lambda model: AutoBNAFNormal(model, hidden_factors=[2]), "scores of 64 draws", 1.0),
    "DAIS": (lambda model: AutoDAIS(model, K=2), "Hessian of KL", 2.0),
}


@pytest.mark.parametrize("name", tiers(GUIDES, "IAF"))
@pytest.mark.filterwarnings("ignore:NaturalGradient. no distribution that it can read owns")
def test_fit_of_guides_without_closed_form_reduces_the_loss(name):
    make, method, gap = GUIDES[name]
    state, losses, report = fitted(banana, make(banana), 60, Trace_ELBO(8))
    assert method in report
    assert np.isfinite(ravel_pytree(state.optim_state)[0].astype(float)).all()
    assert losses[-10:].mean() < min(losses[:3].mean(), gap)  # the log evidence is zero


EVEN = np.linspace(0.0, 2.0, 6)


def located() -> jax.Array:
    return numpyro.sample("t", dist.Normal(0.0, 1.0))


def local(t: Any) -> None:
    with numpyro.plate("n", len(EVEN), subsample_size=3):
        y = numpyro.subsample(jnp.asarray(EVEN, float), event_dim=0)
        numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(t, 1.0)), 1.0), obs=y)


def known() -> None:
    numpyro.sample("y", dist.Normal(located(), 1.0).expand([len(EVEN)]).to_event(1), obs=jnp.asarray(EVEN, float))


def surrogate() -> None:
    """Every other observation, with weights that are parameters."""
    t, weight = located(), numpyro.param("weight", jnp.full(3, 2.0), constraint=constraints.positive)
    with numpyro.plate("n", 3), numpyro.handlers.scale(scale=weight):
        numpyro.sample("y", dist.Normal(t, 1.0), obs=jnp.asarray(EVEN[::2], float))


ANNEALED = {
    "AutoSemiDAIS": (
        lambda: local(located()),
        lambda model: AutoSemiDAIS(model, local, AutoNormal(located), K=2),
        np.eye(6) * 2 + 1,
    ),
    "AutoSurrogateLikelihoodDAIS": (
        known,
        lambda model: AutoSurrogateLikelihoodDAIS(model, surrogate, K=2),
        np.eye(6) + 1,
    ),
}


@pytest.mark.parametrize("name", ANNEALED)
@pytest.mark.filterwarnings("ignore:NaturalGradient. no distribution that it can read owns")
def test_base_of_an_annealed_guide_uses_the_hessian_of_kl(name):
    model, make, _ = ANNEALED[name]
    svi = SVI(model, make(model), NaturalGradient(), Trace_ELBO(8))
    report = svi.optim.report(svi, svi.init(random.key(1)))
    method = {line.split()[0]: line for line in report.splitlines()[2:]}
    assert {p for p in method if "Hessian of KL" in method[p]} == {"auto_z_0_loc", "auto_z_0_scale"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ANNEALED)
@pytest.mark.filterwarnings("ignore:NaturalGradient. no distribution that it can read owns")
def test_bound_of_an_annealed_guide_approaches_the_log_evidence(name):
    """The bound ends within 1.5 nats of the evidence, a normal density."""
    model, make, cov = ANNEALED[name]
    _, losses, _ = fitted(model, make(model), 40, Trace_ELBO(8))
    assert losses[-10:].mean() + stats.multivariate_normal(np.zeros(6), cov).logpdf(EVEN) < 1.5


@pytest.mark.parametrize("guide", tiers([marginal_guide, general_guide], marginal_guide))
def test_mixture_guide_reaches_the_mixture(guide):
    """Within 150 steps from each of four starts; most arrive after 40."""
    with pytest.warns(UserWarning, match="score functions"):
        _, losses, report = fitted(mixture_model, guide, 200, TraceGraph_ELBO(num_particles=32))
    assert report.count("scores of 64 draws") == 3
    assert abs(losses[-10:]).max() < 0.02
