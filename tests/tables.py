# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The tables of cases that the tests share: forms of a Gaussian site, and guides."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import (
    AutoBatchedLowRankMultivariateNormal,
    AutoBatchedMultivariateNormal,
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from oracles import captured_loss, spd


def tiers(cases: Iterable[Any], *laws: Any) -> list[Any]:
    """Parameters of a test, of which only ``laws`` run in the first tier."""
    values = lambda case: case if isinstance(case, tuple) else (case,)
    return [case if case in laws else pytest.param(*values(case), marks=pytest.mark.slow) for case in cases]


class GaussianForm(NamedTuple):
    """One way to write a Gaussian guide in NumPyro.

    :ivar build: the distribution from its mean and its covariance argument.
    :ivar constraint: of the covariance argument.
    :ivar value: that argument, from a lower triangular K with Σ = KKᵀ.
    :ivar shape: of a draw.
    :ivar diagonal: whether the family has independent components.
    """

    build: Callable[[Any, Any], Any]
    constraint: Any
    value: Callable[[np.ndarray], np.ndarray]
    shape: tuple[int, ...] = (3,)
    diagonal: bool = False

    @property
    def factor(self) -> np.ndarray:
        """The K that every form starts from."""
        d = self.shape[-1]
        if self.diagonal:
            return np.linspace(0.4, 1.5, int(np.prod(self.shape))).reshape(self.shape)
        k = np.stack([np.linalg.cholesky(spd(seed, d)) for seed in range(int(np.prod(self.shape[:-1])))])
        return k.reshape(*self.shape, d)

    @property
    def loc(self) -> np.ndarray:
        return np.linspace(-1, 1.5, int(np.prod(self.shape))).reshape(self.shape)

    def at(self, loc: jax.Array, cov: jax.Array) -> Any:
        """The distribution at unconstrained parameters."""
        return self.build(loc, biject_to(self.constraint)(cov))

    def sample(self, name: str) -> jax.Array:
        """The guide's statements: parameters ``name_loc`` and ``name_cov``, and a draw."""
        loc = numpyro.param(f"{name}_loc", jnp.asarray(self.loc))
        cov = numpyro.param(f"{name}_cov", jnp.asarray(self.value(self.factor)), constraint=self.constraint)
        return numpyro.sample(name, self.build(loc, cov))


def gram(k: np.ndarray) -> np.ndarray:
    return k @ np.swapaxes(k, -1, -2)


def normal(loc: Any, scale: Any) -> Any:
    return dist.Normal(loc, scale).to_event(np.ndim(loc))


def tril(loc: Any, value: Any) -> Any:
    return dist.MultivariateNormal(loc, scale_tril=value).to_event(np.ndim(loc) - 1)


def covariance(loc: Any, value: Any) -> Any:
    return dist.MultivariateNormal(loc, covariance_matrix=value)


def precision(loc: Any, value: Any) -> Any:
    return dist.MultivariateNormal(loc, precision_matrix=value)


def same(k: np.ndarray) -> np.ndarray:
    return k


FORMS = {
    "scale, softplus": GaussianForm(normal, constraints.softplus_positive, same, (2, 2), diagonal=True),
    "scale, exp": GaussianForm(normal, constraints.positive, same, (2, 2), diagonal=True),
    "scale_tril, scaled unit": GaussianForm(tril, constraints.scaled_unit_lower_cholesky, same),
    "scale_tril, softplus": GaussianForm(tril, constraints.softplus_lower_cholesky, same),
    "scale_tril, batch": GaussianForm(tril, constraints.lower_cholesky, same, (2, 2)),
    "covariance_matrix": GaussianForm(covariance, constraints.positive_definite, gram),
    "precision_matrix": GaussianForm(precision, constraints.positive_definite, lambda k: np.linalg.inv(gram(k))),
}


class GuideCase(NamedTuple):
    """A guide, and the block that each of its parameters belongs to.

    :ivar model: the model; it takes ``DATA``.
    :ivar make: the guide, from the model.
    :ivar gaussian: site → (mean parameter, covariance parameter) of the sites whose natural gradient has a closed form.
    :ivar low_rank: site → (mean, factor, scale) of low-rank sites, which need Hessian-vector products.
    :ivar natural: parameters of an exponential family, stepped in natural parameters.
    :ivar kl_hessian: parameters stepped with the Hessian of KL.
    :ivar local: those of them that belong to local rows of a minibatch, which step first where products are allowed.
    :ivar point: parameters without a Fisher matrix.
    :ivar likely: parameters stepped with the Fisher matrix of the likelihood.
    """

    model: Callable[..., None]
    make: Callable[[Any], Any]
    gaussian: dict[str, tuple[str, str]] = {}
    low_rank: dict[str, tuple[str, str, str]] = {}
    natural: set[str] = set()
    kl_hessian: set[str] = set()
    local: set[str] = set()
    point: set[str] = set()
    likely: set[str] = set()


DATA = np.array([0.3, -1.2, 0.7, 2.0])


def school(x: Any) -> None:
    """A small hierarchy: a location, a positive scale, and a plate."""
    a = numpyro.sample("a", dist.Normal(0, 1))
    s = numpyro.sample("s", dist.HalfNormal(1))
    with numpyro.plate("n", len(x)):
        b = numpyro.sample("b", dist.Normal(a, s))
        numpyro.sample("x", dist.Normal(b, 1), obs=x)


def plated(x: Any) -> None:
    """Two latents for each datum."""
    with numpyro.plate("n", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z.sum(-1), 1), obs=x)


def pair(x: Any) -> None:
    z1 = numpyro.sample("z1", dist.Normal(0, 1))
    z2 = numpyro.sample("z2", dist.Normal(z1, 1))
    numpyro.sample("x", dist.Normal(z2, 1).expand(x.shape).to_event(1), obs=x)


def rate(x: Any) -> None:
    z = numpyro.sample("z", dist.Gamma(2, 1))
    numpyro.sample("x", dist.Normal(z, 1).expand(x.shape).to_event(1), obs=x)


def positive(name: str, value: Any = 0.5) -> Any:
    return numpyro.param(name, value, constraint=constraints.positive)


def lists(model: Any) -> Any:
    guide = AutoGuideList(model)
    guide.append(AutoNormal(handlers.block(handlers.seed(model, 0), hide=["b"])))
    guide.append(AutoMultivariateNormal(handlers.block(handlers.seed(model, 0), hide=["a", "s"])))
    return guide


def by_hand(x: Any) -> None:
    with numpyro.plate("n", len(x)):
        loc = numpyro.param("loc", jnp.zeros((len(x), 2)))
        cov = numpyro.param("tril", jnp.tile(jnp.eye(2), (len(x), 1, 1)), constraint=constraints.lower_cholesky)
        numpyro.sample("z", dist.MultivariateNormal(loc, scale_tril=cov))


def low_rank_by_hand(x: Any) -> None:
    """The arguments are parameters; the factor does not start at zero."""
    loc, diag = numpyro.param("loc", jnp.zeros((len(x), 2))), positive("diag", jnp.ones((len(x), 2)))
    factor = numpyro.param("factor", jnp.full((len(x), 2, 1), 0.3))
    with numpyro.plate("n", len(x)):
        numpyro.sample("z", dist.LowRankMultivariateNormal(loc, factor, diag))


def low_rank_computed(x: Any) -> None:
    """The diagonal is no product of parameters."""
    loc, log_scale = numpyro.param("loc", jnp.zeros((len(x), 2))), numpyro.param("log_scale", jnp.zeros((len(x), 2)))
    factor = numpyro.param("factor", jnp.full((len(x), 2, 1), 0.3))
    with numpyro.plate("n", len(x)):
        numpyro.sample("z", dist.LowRankMultivariateNormal(loc, factor, jnp.exp(2 * log_scale)))


def mean_field_by_hand(x: Any) -> None:
    loc, scale = numpyro.param("loc", jnp.zeros((len(x), 2))), positive("scale", jnp.ones((len(x), 2)))
    with numpyro.plate("n", len(x)):
        numpyro.sample("z", dist.Normal(loc, scale).to_event(1))


def amortised(x: Any) -> None:
    """The means are computed from data: the scale is a parameter, the mean is not."""
    weight = numpyro.param("weight", jnp.full(2, 0.1))
    scale = positive("scale", jnp.ones((len(x), 2)))
    with numpyro.plate("n", len(x)):
        numpyro.sample("z", dist.Normal(x[:, None] * weight, scale).to_event(1))


def subsampled(x: Any) -> None:
    """A local parameter gathered by a plate, and a site that is scaled."""
    loc, scale = numpyro.param("loc", jnp.zeros((len(x), 2))), positive("scale", jnp.ones((len(x), 2)))
    with numpyro.plate("n", len(x), subsample_size=2) as i:
        numpyro.sample("z", dist.Normal(loc[i], scale[i]).to_event(1))


def batch_of_two(x: Any) -> None:
    with numpyro.plate("n", len(x), subsample_size=2) as i:
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z.sum(-1), 1), obs=x[i])


def structured(x: Any) -> None:
    z1 = numpyro.sample("z1", dist.Normal(numpyro.param("m1", 0.1), positive("s1")))
    slope, shift = numpyro.param("slope", 0.3), numpyro.param("shift", -0.2)
    numpyro.sample("z2", dist.Normal(shift + slope * z1, positive("s2")))


def shared(x: Any) -> None:
    both = positive("both")
    numpyro.sample("z1", dist.Normal(numpyro.param("m1", 0.1), both))
    numpyro.sample("z2", dist.Normal(numpyro.param("m2", 0.1), both))


def log_normal(x: Any) -> None:
    numpyro.sample("z", dist.LogNormal(numpyro.param("m", 0.1), positive("s")))


def gamma(x: Any) -> None:
    numpyro.sample("z", dist.Gamma(positive("alpha", 2.0), positive("beta", 1.5)))


def pinned(x: Any) -> None:
    """A mean that enters the loss outside of its site too."""
    loc = numpyro.param("m1", 0.1)
    numpyro.sample("z1", dist.Normal(loc, positive("s1")))
    numpyro.sample("z2", dist.Delta(loc))


def with_model_param(x: Any) -> None:
    noise = positive("noise", 1.0)
    z = numpyro.sample("z", dist.Normal(0, 1))
    numpyro.sample("x", dist.Normal(z, noise).expand(x.shape).to_event(1), obs=x)


def auto(*names: str) -> dict[str, tuple[str, str]]:
    return {name: (f"{name}_auto_loc", f"{name}_auto_scale") for name in names}


LATENT = {"_auto_latent": ("auto_loc", "auto_scale")}
TRIL = {"_auto_latent": ("auto_loc", "auto_scale_tril")}

GUIDES = {
    "AutoNormal": GuideCase(school, AutoNormal, auto("a", "s", "b")),
    "AutoDiagonalNormal": GuideCase(school, AutoDiagonalNormal, LATENT),
    "AutoMultivariateNormal": GuideCase(school, AutoMultivariateNormal, TRIL),
    "AutoBatchedMultivariateNormal": GuideCase(plated, lambda m: AutoBatchedMultivariateNormal(m, batch_ndim=1), TRIL),
    "AutoGuideList": GuideCase(school, lists, {**auto("a", "s"), **TRIL}),
    "AutoLowRankMultivariateNormal": GuideCase(
        school,
        lambda m: AutoLowRankMultivariateNormal(m, rank=1),
        low_rank={"_auto_latent": ("auto_loc", "auto_cov_factor", "auto_scale")},
    ),
    "AutoBatchedLowRankMultivariateNormal": GuideCase(
        plated,
        lambda m: AutoBatchedLowRankMultivariateNormal(m, batch_ndim=1, rank=1),
        low_rank={"_auto_latent": ("auto_loc", "auto_cov_factor", "auto_scale")},
    ),
    "LowRankMultivariateNormal": GuideCase(
        plated, lambda m: low_rank_by_hand, low_rank={"z": ("loc", "factor", "diag")}
    ),
    "LowRankMultivariateNormal, computed": GuideCase(
        plated, lambda m: low_rank_computed, kl_hessian={"loc", "factor", "log_scale"}
    ),
    "AutoDelta": GuideCase(school, AutoDelta, likely={"a_auto_loc", "s_auto_loc", "b_auto_loc"}),
    "MultivariateNormal in a plate": GuideCase(plated, lambda m: by_hand, {"z": ("loc", "tril")}),
    "Normal in a plate": GuideCase(plated, lambda m: mean_field_by_hand, {"z": ("loc", "scale")}),
    "amortised": GuideCase(plated, lambda m: amortised, kl_hessian={"weight", "scale"}),
    "subsampled": GuideCase(batch_of_two, lambda m: subsampled, kl_hessian={"loc", "scale"}, local={"loc", "scale"}),
    "structured": GuideCase(pair, lambda m: structured, {"z1": ("m1", "s1")}, kl_hessian={"slope", "shift", "s2"}),
    "shared": GuideCase(pair, lambda m: shared, kl_hessian={"both", "m1", "m2"}),
    "pinned": GuideCase(pair, lambda m: pinned, kl_hessian={"m1", "s1"}),
    "LogNormal": GuideCase(rate, lambda m: log_normal, {"z": ("m", "s")}),
    "Gamma": GuideCase(rate, lambda m: gamma, natural={"alpha", "beta"}),
    "model param": GuideCase(with_model_param, AutoNormal, auto("z"), likely={"noise"}),
}


@cache
def started(name: str, precision: str) -> tuple[Any, Any]:
    """(at, params) of a guide, as :func:`.oracles.captured_loss` gives them; call it in that precision."""
    case = GUIDES[name]
    return captured_loss(case.model, case.make(case.model), Trace_ELBO(), jnp.asarray(DATA, float))
