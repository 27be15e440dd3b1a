# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""One step of length 1 is the textbook's posterior for every conjugate pair, in every layout of its sites."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from oracles import assert_close, root_eps, spd
from scipy import special
from tables import tiers

from numpyro_natgrad import NaturalGradient

#: The number of models in a batch, observations of each, and draws a step. The first natural gradient is a regression on the draws,
#: which needs as many numbers as a site has natural parameters: four at most, of a Wishart, and a draw is one number.
GROUPS, N, PARTICLES = 3, 6, 8
RNG = np.random.default_rng(0)
D = 2
PRIOR_MATRIX = spd(1, D)
POINTS = RNG.normal(size=(N, GROUPS, D)) @ np.array([[1.0, 0.4], [0.0, 0.7]])
SCATTER = np.einsum("ngi,ngj->gij", POINTS, POINTS)


class Pair(NamedTuple):
    """A conjugate prior and its likelihood.

    :ivar family: the distribution of the latent, of prior, guide and posterior.
    :ivar prior: its arguments in the prior.  :ivar start: and in the guide, before the step.
    :ivar likelihood: the distribution of one observation.
    :ivar data: ``(N, GROUPS, ...)``.
    :ivar posterior: its arguments in the posterior, each ``(GROUPS, ...)``.
    :ivar constraints: of arguments whose constraint NumPyro does not fix.
    """

    family: Any
    prior: dict[str, Any]
    start: dict[str, Any]
    likelihood: Callable[[Any], Any]
    data: np.ndarray
    posterior: dict[str, np.ndarray]
    constraints: dict[str, Any] = {}


FLIPS = RNG.binomial(1, 0.7, (N, GROUPS))
COUNTS = RNG.binomial(5, 0.3, (N, GROUPS))
WAITS = RNG.geometric(0.4, (N, GROUPS)) - 1
EVENTS = RNG.poisson(3.0, (N, GROUPS))
TIMES = RNG.exponential(0.5, (N, GROUPS))
REALS = 1 + RNG.normal(size=(N, GROUPS))
WORDS = RNG.multinomial(4, [0.2, 0.5, 0.3], (N, GROUPS))
CLASSES = RNG.integers(0, 3, (N, GROUPS))
SQUARES = np.sum(REALS**2, 0)
CENTRED = np.sum((REALS - 0.5) ** 2, 0)
BETA, BETA_START = {"concentration1": 2.0, "concentration0": 1.5}, {"concentration1": 1.0, "concentration0": 4.0}
GAMMA, GAMMA_START = {"concentration": 2.0, "rate": 1.5}, {"concentration": 3.0, "rate": 0.5}
DIRICHLET, DIRICHLET_START = {"concentration": [0.5, 1.0, 2.0]}, {"concentration": [3.0, 1.0, 0.7]}
ABOVE = {"concentration": constraints.greater_than(D - 1.0)}


def beta(successes: Any, failures: Any) -> dict[str, Any]:
    return {"concentration1": 2.0 + successes * np.ones(GROUPS), "concentration0": 1.5 + failures}


def gamma(shape: Any, rate: Any) -> dict[str, Any]:
    return {"concentration": 2.0 + shape * np.ones(GROUPS), "rate": 1.5 + rate * np.ones(GROUPS)}


PAIRS = {
    "Beta, Bernoulli": Pair(dist.Beta, BETA, BETA_START, dist.Bernoulli, FLIPS, beta(FLIPS.sum(0), (1 - FLIPS).sum(0))),
    "Beta, Binomial": Pair(
        dist.Beta, BETA, BETA_START, lambda p: dist.Binomial(5, p), COUNTS, beta(COUNTS.sum(0), (5 - COUNTS).sum(0))
    ),
    "Beta, Geometric": Pair(dist.Beta, BETA, BETA_START, dist.Geometric, WAITS, beta(N, WAITS.sum(0))),
    "Gamma, Poisson": Pair(dist.Gamma, GAMMA, GAMMA_START, dist.Poisson, EVENTS, gamma(EVENTS.sum(0), N)),
    "Gamma, Exponential": Pair(dist.Gamma, GAMMA, GAMMA_START, dist.Exponential, TIMES, gamma(N, TIMES.sum(0))),
    "Gamma, Normal (precision)": Pair(
        dist.Gamma, GAMMA, GAMMA_START, lambda t: dist.Normal(0.5, t**-0.5), REALS, gamma(N / 2, CENTRED / 2)
    ),
    "InverseGamma, Normal (variance)": Pair(
        dist.InverseGamma, GAMMA, GAMMA_START, lambda v: dist.Normal(0.5, v**0.5), REALS, gamma(N / 2, CENTRED / 2)
    ),
    "Normal, Normal (mean)": Pair(
        dist.Normal,
        {"loc": 0.0, "scale": 2.0},
        {"loc": -3.0, "scale": 0.3},
        lambda m: dist.Normal(m, 0.5),
        REALS,
        {"loc": REALS.sum(0) * 4 / (1 / 4 + 4 * N), "scale": np.full(GROUPS, (1 / 4 + 4 * N) ** -0.5)},
    ),
    "Dirichlet, Multinomial": Pair(
        dist.Dirichlet,
        DIRICHLET,
        DIRICHLET_START,
        lambda p: dist.Multinomial(4, p, total_count_max=4),
        WORDS,
        {"concentration": np.array(DIRICHLET["concentration"]) + WORDS.sum(0)},
    ),
    "Dirichlet, Categorical": Pair(
        dist.Dirichlet,
        DIRICHLET,
        DIRICHLET_START,
        dist.Categorical,
        CLASSES,
        {"concentration": np.array(DIRICHLET["concentration"]) + np.eye(3)[CLASSES].sum(0)},
    ),
    "Wishart, MultivariateNormal (precision)": Pair(
        dist.Wishart,
        {"concentration": 3.5, "rate_matrix": PRIOR_MATRIX},
        {"concentration": 5.0, "rate_matrix": np.eye(D)},
        lambda p: dist.MultivariateNormal(jnp.zeros(D), precision_matrix=p),
        POINTS,
        {"concentration": np.full(GROUPS, 3.5 + N), "rate_matrix": PRIOR_MATRIX + SCATTER},
        ABOVE,
    ),
    "Wishart (scale), MultivariateNormal (precision)": Pair(
        dist.Wishart,
        {"concentration": 3.5, "scale_matrix": np.linalg.inv(PRIOR_MATRIX)},
        {"concentration": 5.0, "scale_matrix": np.eye(D)},
        lambda p: dist.MultivariateNormal(jnp.zeros(D), precision_matrix=p),
        POINTS,
        {"concentration": np.full(GROUPS, 3.5 + N), "scale_matrix": np.linalg.inv(PRIOR_MATRIX + SCATTER)},
        ABOVE,
    ),
    "InverseWishart, MultivariateNormal (covariance)": Pair(
        dist.InverseWishart,
        {"concentration": 3.5, "scale_matrix": PRIOR_MATRIX},
        {"concentration": 5.0, "scale_matrix": np.eye(D)},
        lambda c: dist.MultivariateNormal(jnp.zeros(D), c),
        POINTS,
        {"concentration": np.full(GROUPS, 3.5 + N), "scale_matrix": PRIOR_MATRIX + SCATTER},
        ABOVE,
    ),
}


class Layout(NamedTuple):
    """How one site of guide and model is written.

    :ivar rows: batch shape of the guide's parameters.
    :ivar draws: batch shape of the draws, one model each; models that share parameters share their data.
    :ivar wrapped: a function of the site's distribution.
    :ivar plated: whether the site is in a plate.
    """

    rows: tuple[int, ...] = (GROUPS,)
    draws: tuple[int, ...] = (GROUPS,)
    wrapped: Callable[[Any], Any] = lambda fn: fn
    plated: bool = False


LAYOUTS = {
    "one": Layout((), ()),
    "plate": Layout(plated=True),
    "plate, shared parameters": Layout((), plated=True),
    "to_event": Layout(wrapped=lambda fn: fn.to_event(1)),
    "expand": Layout((), wrapped=lambda fn: fn.expand([GROUPS]).to_event(1)),
    "mask": Layout(wrapped=lambda fn: fn.mask(SEEN)),
    "mask, to_event": Layout(wrapped=lambda fn: fn.mask(SEEN).to_event(1)),
}
SEEN = np.array([True, False, True])


def floats(given: dict[str, Any], rows: tuple[int, ...]) -> dict[str, jax.Array]:
    arrays = {a: jnp.asarray(x, jnp.result_type(float)) for a, x in given.items()}
    return {a: jnp.broadcast_to(x, (*rows, *x.shape)) for a, x in arrays.items()}


class Fit(NamedTuple):
    start: dict[str, Any]
    found: dict[str, Any]
    report: str


def fitted(pair: Pair, layout: Layout, steps: int, masked: Any = None, **options: Any) -> Fit:
    """The guide's arguments before and after some steps; ``masked``: the mask over models."""
    data = jnp.asarray(pair.data if layout.rows else pair.data[:, :1] if layout.draws else pair.data[:, 0])

    def site(arguments: dict[str, Any]) -> Any:
        make = lambda: numpyro.sample("z", layout.wrapped(pair.family(**arguments)))
        if not layout.plated:
            return make()
        with numpyro.plate("groups", GROUPS):
            return make()

    def model() -> None:
        fn = pair.likelihood(site(floats(pair.prior, layout.rows)))
        fn = fn.expand((N, *layout.draws)).mask(True if masked is None else masked)
        numpyro.sample("y", fn, obs=jnp.broadcast_to(data, fn.shape()))

    def guide() -> None:
        known = {**pair.family.arg_constraints, **pair.constraints}
        start = floats(pair.start, layout.rows)
        site({a: numpyro.param(a, x, constraint=known[a]) for a, x in start.items()})

    svi = SVI(model, guide, NaturalGradient(**options), Trace_ELBO(num_particles=PARTICLES))
    state, update = jax.jit(svi.init)(random.key(0)), jax.jit(svi.update)
    start = svi.get_params(state)
    for _ in range(steps):
        state, _ = update(state)
    return Fit(start, svi.get_params(state), svi.optim.report(svi, state))


def exact(pair: Pair, layout: Layout) -> dict[str, np.ndarray]:
    return {a: np.asarray(x) if layout.rows else np.asarray(x)[0] for a, x in pair.posterior.items()}


WHOLE = {"step_size": 1.0, "max_kl": None}


SCALAR, VECTOR, MATRIX = "Gamma, Poisson", "Dirichlet, Multinomial", "Wishart, MultivariateNormal (precision)"
REAL = "Normal, Normal (mean)"


#: One pair for each prior; other likelihoods and parameterisations are in the second tier.
FIRST = [
    "Beta, Bernoulli",
    SCALAR,
    "InverseGamma, Normal (variance)",
    REAL,
    VECTOR,
    MATRIX,
    "InverseWishart, MultivariateNormal (covariance)",
]


@pytest.mark.parametrize("name", tiers(PAIRS, *FIRST))
def test_one_step_is_the_conjugate_posterior(name, x64):
    pair, layout = PAIRS[name], LAYOUTS["one"]
    fit = fitted(pair, layout, 1, **WHOLE)
    assert_close(fit.found, exact(pair, layout), root_eps("float64"))
    assert fit.report.count("closed form") == len(pair.prior)


@pytest.mark.parametrize("name", tiers([SCALAR, VECTOR, MATRIX, REAL], SCALAR, MATRIX))
def test_one_step_is_the_conjugate_posterior_in_float32(name):
    pair, layout = PAIRS[name], LAYOUTS["one"]
    assert_close(fitted(pair, layout, 1, **WHOLE).found, exact(pair, layout), root_eps("float32"))


NESTED = [("plate", SCALAR), ("plate", MATRIX), ("plate, shared parameters", SCALAR), ("to_event", REAL)]
NESTED += [("to_event", VECTOR), ("expand", SCALAR), ("expand", VECTOR)]


@pytest.mark.parametrize(("how", "name"), tiers(NESTED, *(case for case in NESTED if case != ("plate", MATRIX))))
def test_one_step_is_the_conjugate_posterior_in_every_layout(how, name, x64):
    pair, layout = PAIRS[name], LAYOUTS[how]
    assert_close(fitted(pair, layout, 1, **WHOLE).found, exact(pair, layout), root_eps("float64"))


def nats(name: str, q: dict[str, Any], p: dict[str, Any]) -> np.ndarray:
    """KL(q ‖ p) of two members of a family, by NumPyro, or the textbook's formula for Wisharts."""
    pair = PAIRS[name]
    with jax.enable_x64(True):
        q, p = ({a: jnp.asarray(np.asarray(x), jnp.float64) for a, x in given.items()} for given in (q, p))
        if "Wishart" not in name:
            cls = {dist.InverseGamma: dist.Gamma}.get(pair.family, pair.family)
            return np.asarray(dist.kl_divergence(cls(**q), cls(**p)))
    (n, rate), (m, other) = (wishart(name, {a: np.asarray(x) for a, x in given.items()}) for given in (q, p))
    ratio = np.linalg.solve(rate, other)  # R_q⁻¹ R_p
    normalizers = special.multigammaln(m / 2, D) - special.multigammaln(n / 2, D)
    digamma = special.digamma(n / 2) + special.digamma((n - 1) / 2)
    return n / 2 * (np.trace(ratio) - D) - m / 2 * np.log(np.linalg.det(ratio)) + normalizers + (n - m) / 2 * digamma


def wishart(name: str, given: dict[str, Any]) -> tuple[float, np.ndarray]:
    """Degrees of freedom and rate of the Wishart, or of the Wishart of the inverse."""
    matrix = given.get("rate_matrix", given.get("scale_matrix"))
    return float(given["concentration"]), np.linalg.inv(matrix) if name.startswith("Wishart (scale)") else matrix


@pytest.mark.parametrize(
    "name",
    tiers(["Beta, Bernoulli", "InverseGamma, Normal (variance)", SCALAR, VECTOR, MATRIX, REAL], SCALAR, VECTOR),
)
def test_default_options_reach_the_conjugate_posterior_in_ten_steps(name):
    pair, layout = PAIRS[name], LAYOUTS["one"]
    assert nats(name, fitted(pair, layout, 10).found, exact(pair, layout)) < 0.01


@pytest.mark.parametrize(("method", "name"), [("kl_hessian", SCALAR), ("monte_carlo", VECTOR)])
def test_other_fisher_methods_reach_the_conjugate_posterior(method, name):
    """These methods step NumPyro's own parameters: 60 steps in single precision."""
    pair, layout = PAIRS[name], LAYOUTS["one"]
    fit = fitted(pair, layout, 60, fisher=method)
    assert nats(name, fit.found, exact(pair, layout)) < 0.01
    assert "natural parameters" not in fit.report


@pytest.mark.parametrize(("how", "name"), [("mask", SCALAR), ("mask, to_event", VECTOR)])
def test_masked_rows_do_not_change_and_the_others_are_exact(how, name, x64):
    pair, layout = PAIRS[name], LAYOUTS[how]
    fit, best = fitted(pair, layout, 1, SEEN, **WHOLE), exact(pair, layout)
    for a, x in fit.found.items():
        np.testing.assert_allclose(x[~SEEN], fit.start[a][~SEEN], rtol=1e-14)
        np.testing.assert_allclose(x[SEEN], best[a][SEEN], rtol=root_eps("float64"))


def test_masked_low_rank_gaussian_uses_the_hessian_of_kl():
    """Its masked density is not in the loss, so that Price's identity would widen it without bound.

    (With few particles scales run to 1e-16, where rounding decides whether the fit comes back.)
    """
    seen = jnp.array([True, False])

    def model():
        with numpyro.plate("rows", 2), numpyro.handlers.mask(mask=seen):
            numpyro.sample("z", dist.MultivariateNormal(jnp.ones(3), jnp.eye(3)))

    def guide():
        positive = dist.constraints.positive
        scale = numpyro.param("scale", jnp.full((2, 3), 0.5), constraint=positive)
        factor = numpyro.param("factor", 0.1 * jnp.ones((2, 3, 1)))
        with numpyro.plate("rows", 2), numpyro.handlers.mask(mask=seen):
            loc = numpyro.param("loc", jnp.zeros((2, 3)))
            numpyro.sample("z", dist.LowRankMultivariateNormal(loc, factor, scale))

    svi = SVI(model, guide, NaturalGradient(), Trace_ELBO(64))
    result = svi.run(random.key(0), 60, progress_bar=False)
    assert "Hessian of KL" in svi.optim.report(svi, result.state)
    np.testing.assert_array_equal(result.params["scale"][1], jnp.full(3, 0.5))
    np.testing.assert_allclose(result.params["loc"][0], 1.0, atol=0.3)


@pytest.mark.slow
def test_masked_rows_of_a_gaussian_do_not_change_and_the_others_converge():
    """A masked Gaussian uses the Hessian of KL; it starts fourteen standard deviations away."""
    pair, layout = PAIRS[REAL], LAYOUTS["mask"]
    fit, best = fitted(pair, layout, 200, SEEN), exact(pair, layout)
    for a, x in fit.found.items():
        np.testing.assert_array_equal(x[~SEEN], fit.start[a][~SEEN])
    row = lambda given: {a: np.asarray(x)[SEEN] for a, x in given.items()}
    assert (nats(REAL, row(fit.found), row(best)) < 0.01).all()
