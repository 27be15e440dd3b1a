# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Models on which a step size tuned elsewhere fails, each with its optimum if there is a closed form.

    y ~ N(X z, σ²), z_j ~ N(0, s_j²):    posterior N(P⁻¹Xᵀy/σ², P⁻¹),    P = S⁻² + XᵀX/σ²

The best Gaussian is the posterior, the best independent one has its mean and variances 1/P_jj (Bishop 2006, 10.1.2).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import init_to_uniform, init_to_value
from numpyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal

from .cases import eight_schools

GUIDES = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
}


class StressCase(NamedTuple):
    """A model with its data.

    :ivar batch: rows of a minibatch, if the plate is subsampled; ``None``: all rows.
    :ivar start: initial means of the guide (NumPyro's ``init_loc_fn``).
    :ivar optimum: parameters of the best guide of each name, in closed form; empty if there is none.
    """

    title: str
    model: Callable[..., Any]
    data: tuple[Any, ...]
    particles: int = 8
    batch: int | None = None
    start: Any = init_to_uniform
    optimum: Mapping[str, dict[str, Any]] = MappingProxyType({})
    guides: tuple[str, ...] = ("AutoNormal", "AutoMultivariateNormal")
    seeds: int = 5


def centred_schools() -> StressCase:
    """Rubin (1981), centred: the effects have scale τ given τ, which makes a funnel."""
    sigma = jnp.array([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model(y: Any, batch: int | None = None) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("schools", 8):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return StressCase("funnel: eight schools, centred", model, (jnp.array([28.0, 8, -3, 7, -1, 1, 18, 12]),))


def separated() -> StressCase:
    """Forty rows, separated by one covariate: the likelihood has no maximum; the prior N(0, 10²) bounds the slope."""
    draw = np.random.default_rng(3)
    x = np.column_stack([np.ones(40), draw.normal(size=(40, 2))])

    def model(x: Any, y: Any, batch: int | None = None) -> None:
        beta = numpyro.sample("beta", dist.Normal(0, 10).expand([3]).to_event(1))
        with numpyro.plate("rows", 40):
            numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)

    return StressCase("separation: logistic regression", model, (jnp.array(x), jnp.array(x[:, 1] > 0, float)))


def noncentred_schools(particles: int) -> StressCase:
    """Eight schools with this number of particles."""
    schools = eight_schools()

    def model(y: Any, batch: int | None = None) -> None:
        schools.model(y)

    many = "1 particle" if particles == 1 else f"{particles} particles"
    return StressCase(f"{many}: eight schools", model, schools.data, particles)


def regression(title: str, x: np.ndarray, prior: np.ndarray, **options: Any) -> StressCase:
    """Linear regression on ``x`` with prior standard deviations ``prior`` and noise ½, in closed form."""
    draw = np.random.default_rng(5)
    y = x @ (prior * draw.normal(size=prior.size)) + 0.5 * draw.normal(size=len(x))
    scale = jnp.array(prior)

    def model(x: Any, y: Any, batch: int | None = None) -> None:
        z = numpyro.sample("z", dist.Normal(0, scale).to_event(1))
        with numpyro.plate("rows", len(y), subsample_size=batch):
            rows, values = (numpyro.subsample(a, d) for a, d in ((x, 1), (y, 0)))
            numpyro.sample("y", dist.Normal(rows @ z, 0.5), obs=values)

    # In units of the prior's scales, since theirs may differ by 1e12.
    precision = np.eye(prior.size) + 4 * (x * prior).T @ (x * prior)
    mean = prior * np.linalg.solve(precision, 4 * (x * prior).T @ y)
    factor = prior[:, None] * np.linalg.cholesky(np.linalg.inv(precision))
    optimum = _optimum(mean, prior / np.sqrt(np.diag(precision)), factor)
    return StressCase(title, model, (jnp.array(x), jnp.array(y)), optimum=optimum, **options)


def _optimum(mean: np.ndarray, scale: np.ndarray, factor: np.ndarray) -> dict[str, dict[str, Any]]:
    """The best guides of a single site ``z``: mean, scales of the independent one, factor of the full one."""
    loc = jnp.array(mean)
    return {
        "AutoNormal": {"z_auto_loc": loc, "z_auto_scale": jnp.array(scale)},
        "AutoMultivariateNormal": {"auto_loc": loc, "auto_scale_tril": jnp.array(factor)},
    }


def wide(d: int = 1000) -> StressCase:
    """More coefficients than rows: only the prior informs half of the directions."""
    x = np.random.default_rng(7).normal(size=(d // 2, d)) / np.sqrt(d)
    guides = ("AutoNormal", "AutoLowRankMultivariateNormal", "AutoMultivariateNormal")
    return regression(f"{d} dimensions: linear regression", x, np.ones(d), guides=guides, seeds=2)


def scales() -> StressCase:
    """Coefficients of scales 1e-6, 1e-5, …, 1e6: a start within ±2 is a million scales away from the first."""
    prior = np.logspace(-6, 6, 13)
    x = np.random.default_rng(11).normal(size=(30, 13)) / prior
    return regression("scales 1e-6 to 1e6: linear regression", x, prior)


def subsampled() -> StressCase:
    """Each step uses one row of a hundred."""
    x = np.random.default_rng(13).normal(size=(10_000, 5))
    return regression("1 % of the data: linear regression", x, np.ones(5), batch=100)


def far() -> StressCase:
    """Poisson log-rates that start 20 posterior standard deviations above each coefficient."""
    draw = np.random.default_rng(17)
    x = np.column_stack([np.ones(30), draw.normal(size=(30, 2))])
    y = draw.poisson(np.exp(x @ np.array([1.0, 0.5, -0.5]))).astype(float)
    mode, precision = _poisson_mode(x, y)
    start = mode + 20 * np.sqrt(np.diag(np.linalg.inv(precision)))

    def model(x: Any, y: Any, batch: int | None = None) -> None:
        beta = numpyro.sample("beta", dist.Normal(0, 10).expand([3]).to_event(1))
        with numpyro.plate("rows", 30):
            numpyro.sample("y", dist.Poisson(jnp.exp(x @ beta)), obs=y)

    init = init_to_value(values={"beta": jnp.array(start)})
    return StressCase("start 20 sd away: Poisson regression", model, (jnp.array(x), jnp.array(y)), start=init)


def _poisson_mode(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mode and precision by Newton's method from 0."""
    beta, prior = np.zeros(3), np.eye(3) / 100
    for _ in range(50):
        rate = np.exp(x @ beta)
        precision = prior + (x.T * rate) @ x
        beta = beta + np.linalg.solve(precision, x.T @ (y - rate) - prior @ beta)
    return beta, precision


def edge() -> StressCase:
    """N(0, 0.1²) in two dimensions, with log density −∞ beyond z₁ + z₂ = 1, seven posterior standard deviations away.

    The start is 0.7 of the guide's standard deviation from that edge: nearly every step has a draw beyond it.
    """

    def model(batch: int | None = None) -> None:
        z = numpyro.sample("z", dist.Normal(0, 0.1).expand([2]).to_event(1))
        numpyro.factor("edge", jnp.where(z.sum() > 1, -jnp.inf, 0.0))

    init = init_to_value(values={"z": jnp.array([0.45, 0.45])})
    optimum = _optimum(np.zeros(2), np.full(2, 0.1), 0.1 * np.eye(2))
    return StressCase("−∞ beyond an edge", model, (), start=init, optimum=optimum)


def tails(d: int = 10) -> StressCase:
    """Independent Student-t with 3 degrees of freedom and scales from 0.1 to 10."""
    sizes = np.logspace(-1, 1, d)
    scale = sizes * _tails_scale()

    def model(batch: int | None = None) -> None:
        numpyro.sample("z", dist.StudentT(3, jnp.array(2 * sizes), jnp.array(sizes)).to_event(1))

    return StressCase("tails: Student-t, 3 degrees", model, (), optimum=_optimum(2 * sizes, scale, np.diag(scale)))


def _tails_scale() -> float:
    """The s of least KL(N(0, s²) ‖ t₃), by Gauss–Hermite quadrature."""
    from scipy import optimize, stats

    nodes, weights = np.polynomial.hermite_e.hermegauss(150)
    weights = weights / weights.sum()
    kl = lambda s: -np.log(s) - float(weights @ stats.t.logpdf(s * nodes, 3))
    return float(optimize.minimize_scalar(kl, bounds=(0.3, 3), method="bounded").x)


CASES: dict[str, Callable[[], StressCase]] = {
    "funnel": centred_schools,
    "separation": separated,
    "one": lambda: noncentred_schools(1),
    "hundred": lambda: noncentred_schools(100),
    "far": far,
    "scales": scales,
    "edge": edge,
    "tails": tails,
    "subsampled": subsampled,
    "wide": wide,
}
