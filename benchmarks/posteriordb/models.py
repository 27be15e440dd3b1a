# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Twelve posteriors as NumPyro models: the densities of their Stan programs, flat (improper) priors included.

A model's sites and deterministics bear the names of Stan's parameters where the reference draws do. Its arguments are
made of Stan's data by ``data``. One density differs slightly from Stan's: if the precision cannot represent the jitter
of 1e-10 of the Gaussian process, the smallest jitter that it can represent replaces it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints

Data = dict[str, Any]


class Model(NamedTuple):
    """One posterior: ``function(**data(stan))`` is its model; ``nuts`` samples it where no draws are published."""

    function: Callable[..., None]
    data: Callable[[Data], Data]
    about: str
    nuts: Data = {}  # noqa: RUF012


def _same(*names: str) -> Callable[[Data], Data]:
    """Stan's data, unchanged, as arguments."""
    return lambda stan: {name: np.asarray(stan[name]) if np.ndim(stan[name]) else stan[name] for name in names}


def _flat(*shape: int) -> dist.Distribution:
    return dist.ImproperUniform(constraints.real, (), event_shape=shape)


def _flat_positive() -> dist.Distribution:
    return dist.ImproperUniform(constraints.positive, (), event_shape=())


def _iid(base: dist.Distribution, *shape: int) -> dist.Distribution:
    return base.expand(shape).to_event(len(shape))


def _columns(*terms: Any) -> jax.Array:
    """A design matrix; a number is a constant column."""
    rows = max(np.size(x) for x in terms)
    return jnp.stack([jnp.broadcast_to(jnp.asarray(x, float), (rows,)) for x in terms], -1)


def eight_schools_noncentered(y: Any, sigma: Any) -> None:
    z = numpyro.sample("theta_trans", _iid(dist.Normal(0.0, 1.0), len(y)))
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    theta = numpyro.deterministic("theta", mu + tau * z)
    numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def kidscore_interaction(kid_score: Any, mom_iq: Any, mom_hs: Any) -> None:
    beta = numpyro.sample("beta", _flat(4))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(_columns(1.0, mom_hs, mom_iq, mom_hs * mom_iq) @ beta, sigma), obs=kid_score)


def ar_k(y: Any, K: int) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", _iid(dist.Normal(0.0, 10.0), K))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = _columns(*(y[K - k : len(y) - k] for k in range(1, K + 1)))
    numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y[K:])


def garch11(y: Any, sigma1: float) -> None:
    """The bound beta1 < 1 − alpha1 is kept by a fraction; its Jacobian makes the prior flat in beta1 itself."""
    y = jnp.asarray(y)
    mu = numpyro.sample("mu", _flat())
    alpha0 = numpyro.sample("alpha0", _flat_positive())
    alpha1 = numpyro.sample("alpha1", dist.Uniform(0.0, 1.0))
    fraction = numpyro.sample("beta1_fraction", dist.Uniform(0.0, 1.0))
    numpyro.factor("beta1_jacobian", jnp.log1p(-alpha1))
    beta1 = numpyro.deterministic("beta1", fraction * (1.0 - alpha1))

    def step(variance: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
        variance = alpha0 + alpha1 * (before - mu) ** 2 + beta1 * variance
        return variance, variance

    first = jnp.asarray(sigma1, y.dtype) ** 2 + 0.0 * mu
    _, rest = jax.lax.scan(step, first, y[:-1])
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(jnp.concatenate([first[None], rest]))), obs=y)


def gp_pois_regr(x: Any, k: Any) -> None:
    x = jnp.asarray(x)
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    z = numpyro.sample("f_tilde", _iid(dist.Normal(0.0, 1.0), x.size))
    kernel = alpha**2 * jnp.exp(-0.5 * ((x[:, None] - x[None, :]) / rho) ** 2)
    held = x.size * jnp.finfo(kernel.dtype).eps * alpha**2  # rounding makes no eigenvalue smaller than minus this
    jitter = jnp.maximum(1e-10, held) if kernel.dtype == jnp.float32 else 1e-10
    f = numpyro.deterministic("f", jnp.linalg.cholesky(kernel + jitter * jnp.eye(x.size, dtype=kernel.dtype)) @ z)
    numpyro.sample("k", dist.Poisson(jnp.exp(f)), obs=k)


def low_dim_gauss_mix(y: Any) -> None:
    """Marginalised over the components, whose means are ordered."""
    sigma = numpyro.sample("sigma", _iid(dist.HalfNormal(2.0), 2))
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), event_shape=(2,)))
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = jnp.stack([jnp.log(theta), jnp.log1p(-theta)])
    each = weights + dist.Normal(mu, sigma).log_prob(jnp.asarray(y)[:, None])
    numpyro.factor("y", logsumexp(each, -1).sum())


def diamonds(Y: Any, X: Any) -> None:
    """The first column of X is constant, and the others are centred."""
    centred = X[:, 1:] - X[:, 1:].mean(0)
    b = numpyro.sample("b", _iid(dist.Normal(0.0, 1.0), centred.shape[1]))
    intercept = numpyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = numpyro.sample("sigma", dist.LeftTruncatedDistribution(dist.StudentT(3.0, 0.0, 10.0), low=0.0))
    numpyro.sample("Y", dist.Normal(intercept + jnp.asarray(centred) @ b, sigma), obs=Y)


def logmesquite(
    weight: Any, diam1: Any, diam2: Any, canopy_height: Any, total_height: Any, density: Any, group: Any
) -> None:
    logs = (jnp.log(x) for x in (diam1, diam2, canopy_height, total_height, density))
    beta = numpyro.sample("beta", _flat(7))
    sigma = numpyro.sample("sigma", _flat_positive())
    numpyro.sample("y", dist.Normal(_columns(1.0, *logs, group) @ beta, sigma), obs=jnp.log(weight))


def dogs(avoided: Any, shocked: Any, y: Any) -> None:
    beta = numpyro.sample("beta", _iid(dist.Normal(0.0, 100.0), 3))
    numpyro.sample("y", dist.Bernoulli(logits=beta[0] + beta[1] * avoided + beta[2] * shocked), obs=y)


def radon_hierarchical_intercept_noncentered(
    log_radon: Any, log_uppm: Any, floor_measure: Any, county: Any, J: int
) -> None:
    z = numpyro.sample("alpha_raw", _iid(dist.Normal(0.0, 1.0), J))
    beta = numpyro.sample("beta", _iid(dist.Normal(0.0, 10.0), 2))
    mu_alpha = numpyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    sigma_alpha = numpyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma_y = numpyro.sample("sigma_y", dist.HalfNormal(1.0))
    alpha = numpyro.deterministic("alpha", mu_alpha + sigma_alpha * z)
    mean = alpha[county] + beta[0] * log_uppm + beta[1] * floor_measure
    numpyro.sample("y", dist.Normal(mean, sigma_y), obs=log_radon)


def glmm_poisson(C: Any, year: Any) -> None:
    alpha = numpyro.sample("alpha", dist.Uniform(-20.0, 20.0))
    slopes = [numpyro.sample(f"beta{k}", dist.Uniform(-10.0, 10.0)) for k in (1, 2, 3)]
    sigma = numpyro.sample("sigma", dist.Uniform(0.0, 5.0))
    eps = numpyro.sample("eps", _iid(dist.Normal(0.0, sigma), len(year)))
    trend = sum(slope * year**k for k, slope in enumerate(slopes, 1))
    numpyro.sample("C", dist.Poisson(jnp.exp(alpha + trend + eps)), obs=C)


def wells_interaction(switched: Any, distance: Any, arsenic: Any) -> None:
    """The distance is in units of 100 metres."""
    alpha = numpyro.sample("alpha", _flat())
    beta = numpyro.sample("beta", _flat(3))
    design = _columns(distance, arsenic, distance * arsenic)
    numpyro.sample("y", dist.Bernoulli(logits=alpha + design @ beta), obs=switched)


def _history(stan: Data) -> Data:
    """How often a dog has avoided, and suffered, the shock in the trials before."""
    y = np.asarray(stan["y"])

    def before(x: np.ndarray) -> np.ndarray:
        return np.cumsum(x, 1) - x

    return {"avoided": before(1.0 - y), "shocked": before(1.0 * y), "y": y}


def _counties(stan: Data) -> Data:
    return {**_same("log_radon", "log_uppm", "floor_measure", "J")(stan), "county": np.asarray(stan["county_idx"]) - 1}


def _wells(stan: Data) -> Data:
    return {**_same("switched", "arsenic")(stan), "distance": np.asarray(stan["dist"]) / 100.0}


_BUSHES = _same("weight", "diam1", "diam2", "canopy_height", "total_height", "density", "group")

#: By the posterior's name in `posteriordb`.
MODELS = {
    "eight_schools-eight_schools_noncentered": Model(
        eight_schools_noncentered, _same("y", "sigma"), "hierarchical means, non-centred, heavy-tailed scale"
    ),
    "kidiq-kidscore_interaction": Model(
        kidscore_interaction, _same("kid_score", "mom_iq", "mom_hs"), "linear regression, unscaled and correlated"
    ),
    "arK-arK": Model(ar_k, _same("y", "K"), "AR(5) time series"),
    "garch-garch11": Model(garch11, _same("y", "sigma1"), "GARCH(1, 1), parameters bounded by one another"),
    "gp_pois_regr-gp_pois_regr": Model(gp_pois_regr, _same("x", "k"), "latent Gaussian process, Poisson counts"),
    "low_dim_gauss_mix-low_dim_gauss_mix": Model(low_dim_gauss_mix, _same("y"), "mixture of two Gaussians"),
    "diamonds-diamonds": Model(diamonds, _same("Y", "X"), "linear regression, 24 nearly collinear predictors"),
    "mesquite-logmesquite": Model(logmesquite, _BUSHES, "linear regression of 46 bushes"),
    "dogs-dogs": Model(dogs, _history, "logistic regression on a dog's own history"),
    "radon_mn-radon_hierarchical_intercept_noncentered": Model(
        radon_hierarchical_intercept_noncentered, _counties, "hierarchical regression, 85 counties, non-centred",
        {"dense_mass": False, "num_warmup": 1500},
    ),
    "GLMM_Poisson_data-GLMM_Poisson_model": Model(
        glmm_poisson, _same("C", "year"), "Poisson regression, 40 centred year effects",
        {"target_accept_prob": 0.98, "num_warmup": 2000, "num_samples": 7500},
    ),
    "wells_data-wells_interaction_model": Model(wells_interaction, _wells, "logistic regression, flat prior"),
}  # fmt: skip


def named(name: str) -> str:
    """The posterior that ``name`` stands for: its name in `posteriordb`, or a part that no other's name has."""
    hits = [key for key in MODELS if name in key]
    if name not in MODELS and len(hits) != 1:
        raise KeyError(f"`{name}`: expected a part of one of {', '.join(MODELS)}; it is in {hits or 'none'}.")
    return name if name in MODELS else hits[0]
