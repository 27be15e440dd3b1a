# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""A table of the distributions that have a closed form, and expectations under them that use no formula of theirs.

Expectations are integrals by the trapezoidal rule on a stretched real line (the error is below 1e-8 where the density
is smooth), sums over counts, or means over draws, with a standard error.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.flatten_util import ravel_pytree
from numpyro import distributions as dist
from numpyro.distributions import biject_to, constraints, transforms

DRAWS = 10_000


class Case(NamedTuple):
    """A distribution at one point.

    :ivar make: the distribution, from its arguments.
    :ivar arguments: their values.
    :ivar over: ``"line"``, ``"counts"`` or ``"draws"``: how expectations are computed.
    :ivar constraints: of arguments that ``make`` does not take as NumPyro's class does.
    """

    make: Callable[..., Any]
    arguments: dict[str, Any]
    over: str = "line"
    constraints: dict[str, Any] = {}

    def start(self) -> tuple[jax.Array, Callable]:
        """Unconstrained arguments x, ``(P,)``, and the distribution as a function of them."""
        values = {name: jnp.asarray(x, jnp.result_type(float)) for name, x in self.arguments.items()}
        known = {**getattr(self.make, "arg_constraints", {}), **self.constraints}
        maps = {name: biject_to(known[name]) for name in values}
        x, unravel = ravel_pytree({name: maps[name].inv(value) for name, value in values.items()})
        return x, lambda y: self.make(**{name: maps[name](part) for name, part in unravel(y).items()})


TRIL = np.array([[1.2, 0.0], [0.5, 0.8]])
SPD = TRIL @ TRIL.T
LOC2 = np.array([0.3, -0.7])
place = {"loc": 0.4, "scale": 1.3}
real, positive = constraints.real, constraints.positive
located = {"loc": real, "scale": positive}

CASES = {
    "Gamma": Case(dist.Gamma, {"concentration": 2.5, "rate": 0.7}),
    "InverseGamma": Case(dist.InverseGamma, {"concentration": 2.5, "rate": 0.7}),
    "Exponential": Case(dist.Exponential, {"rate": 0.7}),
    "Chi2": Case(dist.Chi2, {"df": 3.5}),
    "Beta": Case(dist.Beta, {"concentration1": 2.5, "concentration0": 0.8}),
    "Dirichlet": Case(dist.Dirichlet, {"concentration": [2.5, 0.8, 1.5]}, "draws"),
    "Bernoulli (probs)": Case(dist.BernoulliProbs, {"probs": 0.3}, "two"),
    "Bernoulli (logits)": Case(dist.BernoulliLogits, {"logits": -0.7}, "two"),
    "Categorical (probs)": Case(dist.CategoricalProbs, {"probs": [0.2, 0.5, 0.3]}, "three"),
    "Categorical (logits)": Case(dist.CategoricalLogits, {"logits": [0.2, -0.5, 1.3]}, "three"),
    "Binomial (probs)": Case(
        lambda probs: dist.BinomialProbs(probs, 7), {"probs": 0.3}, "eight", {"probs": constraints.unit_interval}
    ),
    "Binomial (logits)": Case(
        lambda logits: dist.BinomialLogits(logits, 7), {"logits": 0.3}, "eight", {"logits": real}
    ),
    "Multinomial (probs)": Case(
        lambda probs: dist.MultinomialProbs(probs, 5, total_count_max=5),
        {"probs": [0.2, 0.5, 0.3]},
        "draws",
        {"probs": constraints.simplex},
    ),
    "Multinomial (logits)": Case(
        lambda logits: dist.MultinomialLogits(logits, 5, total_count_max=5),
        {"logits": [0.2, -0.5, 1.3]},
        "draws",
        {"logits": constraints.real_vector},
    ),
    "Poisson": Case(dist.Poisson, {"rate": 3.0}, "counts"),
    "Geometric (probs)": Case(dist.GeometricProbs, {"probs": 0.3}, "counts"),
    "Geometric (logits)": Case(dist.GeometricLogits, {"logits": -0.4}, "counts"),
    "NegativeBinomial (probs)": Case(
        lambda probs: dist.NegativeBinomialProbs(2.5, probs),
        {"probs": 0.3},
        "counts",
        {"probs": constraints.unit_interval},
    ),
    "NegativeBinomial (logits)": Case(
        lambda logits: dist.NegativeBinomialLogits(2.5, logits), {"logits": -0.4}, "counts", {"logits": real}
    ),
    "NegativeBinomial2": Case(
        lambda mean: dist.NegativeBinomial2(mean, 2.5), {"mean": 3.0}, "counts", {"mean": positive}
    ),
    "ZeroInflatedPoisson": Case(dist.ZeroInflatedPoisson, {"gate": 0.3, "rate": 2.0}, "counts"),
    "Normal": Case(dist.Normal, place),
    "HalfNormal": Case(dist.HalfNormal, {"scale": 1.3}),
    "LogNormal": Case(dist.LogNormal, place),
    "LogitNormal": Case(
        lambda loc, scale: dist.TransformedDistribution(dist.Normal(loc, scale), transforms.SigmoidTransform()),
        place,
        "line",
        located,
    ),
    "MultivariateNormal (scale_tril)": Case(
        lambda loc, scale_tril: dist.MultivariateNormal(loc, scale_tril=scale_tril),
        {"loc": LOC2, "scale_tril": TRIL},
        "draws",
        {"loc": constraints.real_vector, "scale_tril": constraints.lower_cholesky},
    ),
    "MultivariateNormal (covariance)": Case(
        lambda loc, covariance: dist.MultivariateNormal(loc, covariance),
        {"loc": LOC2, "covariance": SPD},
        "draws",
        {"loc": constraints.real_vector, "covariance": constraints.positive_definite},
    ),
    "MultivariateNormal (precision)": Case(
        lambda loc, precision: dist.MultivariateNormal(loc, precision_matrix=precision),
        {"loc": LOC2, "precision": SPD},
        "draws",
        {"loc": constraints.real_vector, "precision": constraints.positive_definite},
    ),
    "LowRankMultivariateNormal": Case(
        lambda loc, factor, diag: dist.LowRankMultivariateNormal(loc, factor, diag),
        {"loc": [0.3, -0.7, 0.2], "factor": [[0.9], [-0.4], [0.3]], "diag": [0.6, 1.2, 0.4]},
        "draws",
        {"loc": constraints.real_vector, "factor": real, "diag": positive},
    ),
    "MatrixNormal": Case(
        dist.MatrixNormal,
        {"loc": np.ones((2, 2)), "scale_tril_row": TRIL, "scale_tril_column": TRIL + np.eye(2)},
        "draws",
    ),
    "Wishart": Case(
        lambda concentration, rate: dist.Wishart(concentration, rate_matrix=rate),
        {"concentration": 4.5, "rate": SPD},
        "draws",
        {"concentration": constraints.greater_than(1.0), "rate": constraints.positive_definite},
    ),
    "WishartCholesky (scale)": Case(
        lambda concentration, scale: dist.WishartCholesky(concentration, scale_matrix=scale),
        {"concentration": 4.5, "scale": SPD},
        "draws",
        {"concentration": constraints.greater_than(1.0), "scale": constraints.positive_definite},
    ),
    "InverseWishart": Case(
        lambda concentration, scale: dist.InverseWishart(concentration, scale_matrix=scale),
        {"concentration": 4.5, "scale": SPD},
        "draws",
        {"concentration": constraints.greater_than(1.0), "scale": constraints.positive_definite},
    ),
    "InverseWishartCholesky": Case(
        lambda concentration, tril: dist.InverseWishartCholesky(concentration, scale_tril=tril),
        {"concentration": 4.5, "tril": TRIL},
        "draws",
        {"concentration": constraints.greater_than(1.0), "tril": constraints.lower_cholesky},
    ),
    "VonMises": Case(dist.VonMises, {"loc": 0.4, "concentration": 1.7}),
    "Kumaraswamy": Case(lambda b: dist.Kumaraswamy(1.5, b), {"b": 2.5}, "line", {"b": positive}),
    "Weibull": Case(dist.Weibull, {"scale": 1.3, "concentration": 1.8}),
    "Pareto": Case(lambda alpha: dist.Pareto(0.5, alpha), {"alpha": 2.5}, "line", {"alpha": positive}),
    "Gumbel": Case(dist.Gumbel, place),
    "Laplace": Case(dist.Laplace, place),
    "Logistic": Case(dist.Logistic, place),
    "SoftLaplace": Case(dist.SoftLaplace, place),
    "StudentT": Case(dist.StudentT, {"df": 3.5, **place}),
    "Cauchy": Case(dist.Cauchy, place),
    "HalfCauchy": Case(dist.HalfCauchy, {"scale": 1.3}),
    "MultivariateStudentT": Case(
        lambda loc, scale_tril: dist.MultivariateStudentT(4.5, loc, scale_tril),
        {"loc": LOC2, "scale_tril": TRIL},
        "draws",
        {"loc": constraints.real_vector, "scale_tril": constraints.lower_cholesky},
    ),
}


def support(case: Case, fn: Any) -> tuple[jax.Array, jax.Array]:
    """Points of the support and their weights, Σ w f(z) = E f(z)."""
    if case.over == "draws":
        return fn.sample(random.key(1), (DRAWS,)), jnp.full(DRAWS, 1 / DRAWS)
    if case.over != "line":
        z = jnp.arange({"two": 2, "three": 3, "eight": 8, "counts": 200}[case.over])
        return z, jnp.exp(fn.log_prob(z))
    v = jnp.linspace(-10.0, 10.0, 8001)
    to_support = biject_to(fn.support)
    z, slope = jax.vmap(jax.value_and_grad(lambda t: to_support(jnp.sinh(2 * t) / 2 + t)))(v)
    weights = jnp.exp(fn.log_prob(z)) * slope * (v[1] - v[0])
    return z, jnp.where(jnp.isfinite(weights), weights, 0.0)
