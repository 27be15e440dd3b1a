# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Where the guide's family holds the posterior, the loss ends at −log p(data) at every draw, however models are written.

The models are rescaled, masked, conditioned, reparameterised, scanned, or have an improper prior. Every one is linear
and Gaussian, so that its evidence is a normal density; where a factor is raised to a power or the prior is improper,
the evidence is a Gaussian integral by quadrature.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from numpyro.infer.reparam import LocScaleReparam, TransformReparam
from scipy import integrate, stats
from tables import positive, tiers

from numpyro_natgrad import NaturalGradient

T, STEPS, DECAY = 5, 25, 0.8
Y = np.random.default_rng(0).normal(1, 1, T)
EYE, ONES = np.eye(T), np.ones((T, T))


def observe(loc: Any, scale: float) -> None:
    numpyro.sample("y", dist.Normal(loc, scale).expand([T]).to_event(1), obs=jnp.asarray(Y, float))


def rescaled() -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    with handlers.scale(scale=0.25):
        observe(mu, 1)


def half_seen() -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    with numpyro.plate("t", T), handlers.mask(mask=jnp.arange(T) < 3):
        numpyro.sample("y", dist.Normal(mu, 1), obs=jnp.asarray(Y, float))


def prior_predictive() -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    with numpyro.plate("t", T):
        numpyro.sample("y", dist.Normal(mu, 1))


def hierarchy() -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    with numpyro.plate("t", T):
        theta = numpyro.sample("theta", dist.Normal(mu, 0.7))
    observe(theta, 0.5)


def transformed() -> None:
    shift = dist.transforms.AffineTransform(0.5, 0.7)
    with numpyro.plate("t", T), handlers.reparam(config={"theta": TransformReparam()}):
        theta = numpyro.sample("theta", dist.TransformedDistribution(dist.Normal(0, 1), shift))
    observe(theta, 0.5)


def innovations() -> None:
    """A state-space model that draws all its shocks at once."""
    shocks = numpyro.sample("shocks", dist.Normal(0, 1).expand([T]).to_event(1))

    def step(x: Any, now: Any) -> tuple[Any, None]:
        x = DECAY * x + now[0]
        numpyro.sample("y", dist.Normal(x, 0.5), obs=now[1])
        return x, None

    scan(step, jnp.zeros(()), (shocks, jnp.asarray(Y, float)))


def states() -> None:
    """The same model, which draws its states one after the other."""

    def step(x: Any, y: Any) -> tuple[Any, None]:
        x = numpyro.sample("x", dist.Normal(DECAY * x, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        return x, None

    scan(step, jnp.zeros(()), jnp.asarray(Y, float))


def autoregression() -> None:
    """y_t on y_{t−1}, with unknown level and slope."""
    level, slope = (numpyro.sample(name, dist.Normal(0, 1)) for name in ("level", "slope"))

    def step(before: Any, y: Any) -> tuple[Any, None]:
        numpyro.sample("y", dist.Normal(level + slope * before, 0.5), obs=y)
        return y, None

    scan(step, jnp.asarray(Y[0], float), jnp.asarray(Y[1:], float))


def flat_prior() -> None:
    observe(numpyro.sample("mu", dist.ImproperUniform(constraints.real, (), ())), 1)


def factors() -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    numpyro.factor("likelihood", jnp.sum(dist.Normal(mu, 1).log_prob(jnp.asarray(Y, float))))


def normal(y: np.ndarray, loc: float, cov: np.ndarray) -> float:
    return float(stats.multivariate_normal(np.full(len(y), loc), cov).logpdf(y))


def integral(prior: Any, power: float) -> float:
    likelihood = lambda m: np.exp(power * stats.norm(m, 1).logpdf(Y).sum())
    return float(np.log(integrate.quad(lambda m: prior(m) * likelihood(m), -20, 20, points=[Y.mean()])[0]))


RESPONSE = np.linalg.inv(EYE - DECAY * np.eye(T, k=-1))  # of the states to the shocks
STATES = RESPONSE @ RESPONSE.T + 0.25 * EYE
DESIGN = np.column_stack([np.ones(T - 1), Y[:-1]])


class Model(NamedTuple):
    model: Any
    log_evidence: float  # its logarithm
    guide: Any = AutoMultivariateNormal


CENTRED = 0.74 * EYE + 4 * ONES  # of the hierarchy's data: 0.7² + 0.5², and 2² in common
MODELS = {
    "scale": Model(rescaled, integral(stats.norm(0, 2).pdf, 0.25), AutoNormal),
    "mask": Model(half_seen, normal(Y[:3], 0, np.eye(3) + 4), AutoNormal),
    "condition": Model(
        handlers.condition(prior_predictive, {"y": jnp.asarray(Y, float)}), normal(Y, 0, EYE + 4), AutoNormal
    ),
    "factor": Model(factors, normal(Y, 0, EYE + 4)),
    "improper": Model(flat_prior, integral(lambda m: 1.0, 1), AutoNormal),
    "LocScaleReparam": Model(handlers.reparam(hierarchy, {"theta": LocScaleReparam(0.0)}), normal(Y, 0, CENTRED)),
    "TransformReparam": Model(transformed, normal(Y, 0.5, 0.74 * EYE), AutoNormal),
    "scan, shocks outside": Model(innovations, normal(Y, 0, STATES)),
    "scan, states inside": Model(states, normal(Y, 0, STATES)),
    "scan, autoregression": Model(autoregression, normal(Y[1:], 0, 0.25 * np.eye(T - 1) + DESIGN @ DESIGN.T)),
}


def fitted(model: Any, guide: Any, steps: int, **options: Any) -> tuple[dict[str, Any], float, str]:
    """Parameters, the loss at the last step, and the report."""
    svi = SVI(model, guide, NaturalGradient(**options), Trace_ELBO(num_particles=8))
    state, update = svi.init(random.key(0)), jax.jit(svi.update)
    for _ in range(steps):
        state, loss = update(state)
    return svi.get_params(state), float(loss), svi.optim.report(svi, state)


#: Models in the second tier: each has a relative in the first, LocScaleReparam and scan over states.
SECOND = ("TransformReparam", "scan, shocks outside")


@pytest.mark.parametrize("name", tiers(MODELS, *(name for name in MODELS if name not in SECOND)))
def test_loss_ends_at_the_negative_log_evidence(name):
    case = MODELS[name]
    _, loss, report = fitted(case.model, case.guide(case.model), STEPS)
    # The loss adds up to twenty log-densities of a few nats each: 1e-4 is a thousand roundings of their sum.
    assert abs(loss + case.log_evidence) < 1e-4
    assert "closed form, " in report


def test_point_guide_of_a_scanned_model_reaches_the_smoothed_mean():
    """The smoothed mean comes from dense algebra."""
    params, _, report = fitted(states, AutoDelta(states), 20)
    prior = RESPONSE @ RESPONSE.T
    np.testing.assert_allclose(params["x_auto_loc"], prior @ np.linalg.solve(STATES, Y), atol=1e-3)
    assert "Fisher of the likelihood" in report


def scanned_guide() -> None:
    def step(_: Any, at: Any) -> tuple[Any, None]:
        numpyro.sample("x", dist.Normal(*at))
        return _, None

    scan(step, 0.0, (numpyro.param("loc", jnp.zeros(T)), positive("scale", jnp.ones(T))))


@pytest.mark.filterwarnings("ignore:NaturalGradient. no distribution that it can read owns")
def test_warns_about_draws_of_the_guide_inside_of_scan():
    with pytest.warns(UserWarning, match=r"\['x'\] inside of `scan`.*fallback optimizer"):
        _, _, report = fitted(states, scanned_guide, 1)
    assert report.count("none: fallback optimizer") == 2


# --- guides made of parts ---


def parts_model() -> None:
    """Two Gaussian latents that depend on each other, a rate, and a Gaussian latent of its own."""
    a = numpyro.sample("a", dist.Normal(0, 1))
    b = numpyro.sample("b", dist.Normal(a, 1))
    rate, c = numpyro.sample("rate", dist.Gamma(2.0, 1.0)), numpyro.sample("c", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(b, 0.5), obs=1.2)
    numpyro.sample("n", dist.Poisson(rate).expand([3]).to_event(1), obs=jnp.array([2, 4, 3]))
    numpyro.sample("w", dist.Normal(c, 0.5), obs=-1.0)


def rate_guide() -> dict[str, Any]:
    return {"rate": numpyro.sample("rate", dist.Gamma(positive("alpha", 1.0), positive("beta", 1.0)))}


def test_mixed_guide_reaches_exact_posteriors_and_the_mode():
    """The Gaussian and the Gamma end at their exact posteriors, and the point at its mode."""
    guide = AutoGuideList(parts_model)
    only = lambda *hidden: handlers.block(handlers.seed(parts_model, 0), hide=[*hidden])
    guide.append(AutoMultivariateNormal(only("rate", "c")))
    guide.append(rate_guide)
    guide.append(AutoDelta(only("a", "b", "rate"), prefix="point"))
    params, _, report = fitted(parts_model, guide, 40)
    precision = np.array([[2.0, -1.0], [-1.0, 1 + 1 / 0.25]])
    tril = np.asarray(params["auto_scale_tril"])
    np.testing.assert_allclose(params["auto_loc"], np.linalg.solve(precision, [0, 1.2 / 0.25]), atol=1e-3)
    np.testing.assert_allclose(tril @ tril.T, np.linalg.inv(precision), atol=1e-3)
    np.testing.assert_allclose([params["alpha"], params["beta"]], [2 + 9, 1 + 3], rtol=1e-2)
    np.testing.assert_allclose(params["c_point_loc"], -1.0 / 0.25 / (1 + 1 / 0.25), rtol=1e-2)
    assert report.count("Hessian of the loss") == 1


def uneven() -> None:
    numpyro.sample("x", dist.Normal(1.0, 0.5))
    numpyro.sample("z", dist.Normal(-1.0, 2.0))


def same_scale() -> None:
    scale = positive("scale", 1.0)
    numpyro.sample("x", dist.Normal(numpyro.param("m", 0.0), scale))
    numpyro.sample("z", dist.Normal(numpyro.param("l", 0.0), scale))


def test_parameter_shared_by_two_sites_minimises_the_sum_of_kls():
    """Σ KL(N(m, s) ‖ N(m_i, s_i)) is least where 2/s² = Σ 1/s_i²; the fit may be 0.05 nats above."""
    params, _, _ = fitted(uneven, same_scale, 200)

    def nats(x: float, z: float, s: float) -> float:
        terms = ((x, 1.0, 0.5), (z, -1.0, 2.0))
        return sum(np.log(sd / s) + (s**2 + (m - loc) ** 2) / (2 * sd**2) - 0.5 for m, loc, sd in terms)

    best = nats(1.0, -1.0, (2 / (1 / 0.25 + 1 / 4)) ** 0.5)
    assert best <= nats(*(float(params[n]) for n in ("m", "l", "scale"))) < best + 0.05
