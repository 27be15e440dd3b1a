# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
Sparse Gaussian-process classification
======================================

Is a handwritten digit odd?

The inputs are the first two principal components of scikit-learn's digits, so that the result can be drawn. The bound
is that of Hensman, Matthews & Ghahramani (2015), with M inducing values u = f(Z)::

    u ~ N(0, K_zz),   f(x) | u ~ N(K_xz K_zz⁻¹ u, k_xx - K_xz K_zz⁻¹ K_zx),   y ~ Bernoulli(σ(f)),
    ELBO = E_q(u) E_p(f|u) log p(y | f) - KL(q(u) ‖ p(u))      (nats)

q(u) has a full covariance and takes natural-gradient steps. The variance and the lengthscales of the kernel are
``numpyro.param`` sites of the model, and share its steps. With ``fallback_optimizer=optax.adam(0.1)`` Adam fits them in
the same updates instead (Salimbeni, Eleftheriadis & Hensman 2018 alternate the two): such a step costs less, and is
further from the optimum at the end. Z are the centres of k-means, and are not fitted.

The model writes u = Lv with K_zz = LLᵀ and v ~ N(0, I). The natural gradient of q is the same in all linear
coordinates and does not depend on this choice. Adam and the hyper-parameters converge faster with it.

Run it with ``python examples/gp_classification.py``; ``--help`` lists what can be changed.
"""

# sphinx_gallery_thumbnail_path = 'figures/gp_classification.png'

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from _common import (
    DRAWS,
    Curve,
    Problem,
    draw_curves,
    follow,
    guide_beside_nuts,
    nuts,
    options,
    report,
    save,
    summary,
)
from jax import Array, nn, random
from jax.scipy.linalg import solve_triangular
from matplotlib.axes import Axes
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.infer.initialization import init_to_mean
from numpyro.optim import Adam
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

from numpyro_natgrad import NaturalGradient

# u is f(Z) plus noise with this fraction of the variance. The ELBO remains a bound, and single precision suffices.
JITTER = 1e-4

# Nodes and weights of the quadrature of Gauss and Hermite, for expectations over a normal distribution. The error for
# log σ(f) is below 1e-5 for standard deviations up to 2.
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(20)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


class Split(NamedTuple):
    """Data of two classes.

    :param x: inputs, shape `(n, d)`.
    :param y: 0 or 1, shape `(n,)`.
    """

    x: Array
    y: Array


def components() -> tuple[np.ndarray, np.ndarray]:
    """Two principal components of 1797 images, shape `(n, 2)`, and their digits."""
    data = load_digits()
    return PCA(2, svd_solver="full").fit_transform(data.data / 16), data.target


def digits(size: int) -> tuple[Split, Split]:
    """Two principal components of 1797 images, and whether the digit is odd, for training and for testing.

    :param size: how many are trained on.
    """
    x, digit = components()
    order = np.random.default_rng(0).permutation(len(x))
    parts = order[:size], order[size:]
    train, test = (Split(jnp.asarray(x[i], float), jnp.asarray(digit[i] % 2, float)) for i in parts)
    return train, test


# %%
# The model
# ---------


def kernel(a: Array, b: Array, variance: Array, lengthscale: Array) -> Array:
    """Squared exponential, `variance * exp(-|(a - b) / lengthscale|² / 2)`, shape `(n, m)`.

    :param a: points, shape `(n, d)`.
    :param b: points, shape `(m, d)`.
    :param variance: of the process.
    :param lengthscale: one for each dimension, shape `(d,)`.
    """
    difference = (a[:, None] - b) / lengthscale
    return variance * jnp.exp(-0.5 * jnp.sum(difference**2, axis=-1))


def conditional(x: Array, inducing: Array, variance: Array, lengthscale: Array) -> tuple[Array, Array]:
    """W and s with `f(x) | v ~ N(W v, s)`: W = K_xz L⁻ᵀ, shape `(n, m)`, and s, shape `(n,)`.

    :param x: inputs at which f is evaluated, shape `(n, d)`.
    :param inducing: Z, shape `(m, d)`.
    :param variance: of the kernel.
    :param lengthscale: of the kernel, shape `(d,)`.
    """
    prior = kernel(inducing, inducing, variance, lengthscale) + JITTER * variance * jnp.eye(len(inducing))
    weights = solve_triangular(jnp.linalg.cholesky(prior), kernel(inducing, x, variance, lengthscale), lower=True)
    return weights.T, variance - jnp.sum(weights**2, axis=0)


def model(x: Array, y: Array, inducing: Array, batch: int | None = None) -> None:
    """The classifier; f given v is drawn along with it, from the model itself, so that its KL is zero.

    :param x: inputs, shape `(n, d)`.
    :param y: 0 or 1, shape `(n,)`.
    :param inducing: Z, shape `(m, d)`.
    :param batch: how many rows are looked at, of all of them by default.
    """
    positive = dist.constraints.positive
    variance = numpyro.param("variance", 1.0, constraint=positive)
    lengthscale = numpyro.param("lengthscale", jnp.ones(x.shape[1]), constraint=positive)
    v = numpyro.sample("v", dist.Normal(0.0, 1.0).expand([len(inducing)]).to_event(1))
    with numpyro.plate("datum", len(y), subsample_size=batch) as row:
        weights, rest = conditional(x[row], inducing, variance, lengthscale)
        noise = random.normal(numpyro.prng_key(), rest.shape)
        f = weights @ v + jnp.sqrt(rest) * noise
        numpyro.sample("y", dist.Bernoulli(logits=f), obs=y[row])


def problem(train: Split, inducing: Array, batch: int | None = None) -> Problem:
    """The classifier with a full Gaussian for v, which starts as the prior.

    :param train: the data.
    :param inducing: Z.
    :param batch: rows of a minibatch; every particle draws its own.
    """
    classifier = partial(model, batch=batch)
    guide = AutoMultivariateNormal(classifier, init_loc_fn=init_to_mean, init_scale=1.0)
    return Problem(classifier, guide, (*train, inducing))


def probability(params: dict[str, Array], x: Array, inducing: Array) -> Array:
    """p(y = 1 | x): σ(f) averaged over the Gaussian q(f(x)), by quadrature.

    :param params: of a fit.
    :param x: inputs, shape `(n, d)`.
    :param inducing: Z.
    """
    weights, rest = conditional(x, inducing, params["variance"], params["lengthscale"])
    mean = weights @ params["auto_loc"]
    sd = jnp.sqrt(rest + jnp.sum((weights @ params["auto_scale_tril"]) ** 2, axis=1))
    return nn.sigmoid(mean[:, None] + sd[:, None] * NODES) @ WEIGHTS


def draws(params: dict[str, Array]) -> Array:
    """Draws of v by q, shape `(DRAWS, m)`.

    :param params: of a fit.
    """
    z = random.normal(random.key(2), (DRAWS, len(params["auto_loc"])))
    return params["auto_loc"] + z @ params["auto_scale_tril"].T


def log_odds(v: Array | np.ndarray, params: dict[str, Array], inducing: Array) -> Array:
    """Draws of f at the mean image of each digit, shape `(n, 10)`.

    :param v: its draws, shape `(n, m)`.
    :param params: of a fit.
    :param inducing: Z.
    """
    x, digit = components()
    centres = jnp.asarray(np.stack([x[digit == number].mean(0) for number in range(10)]), float)
    weights, rest = conditional(centres, inducing, params["variance"], params["lengthscale"])
    return jnp.asarray(v) @ weights.T + jnp.sqrt(rest) * random.normal(random.key(3), (len(v), 10))


# %%
# Comparison with NUTS
# --------------------
#
# The best q(v) of any shape maximises the bound. It is proportional to p(v) exp(E_p(f|v) log p(y | f)), from which NUTS
# draws, with the hyper-parameters of the fit.


def best_posterior(params: dict[str, Array], train: Split, inducing: Array) -> None:
    """The model whose posterior is the best q(v); the expectation over f is by quadrature.

    :param params: of a fit.
    :param train: the data.
    :param inducing: Z.
    """
    v = numpyro.sample("v", dist.Normal(0.0, 1.0).expand([len(inducing)]).to_event(1))
    weights, rest = conditional(train.x, inducing, params["variance"], params["lengthscale"])
    f = (weights @ v)[:, None] + jnp.sqrt(rest)[:, None] * NODES
    log_density = nn.log_sigmoid(jnp.where(train.y[:, None] == 1, f, -f)) @ WEIGHTS
    numpyro.factor("y", log_density.sum())


def log_odds_beside_nuts(params: dict[str, Array], train: Split, inducing: Array) -> str:
    """Means and standard deviations of f at the mean image of each digit, by q and by NUTS.

    :param params: of a fit.
    :param train: the data.
    :param inducing: Z.
    """
    v = nuts(best_posterior, params, train, inducing)["v"]
    name = "log odds"
    mine, reference = (log_odds(x, params, inducing) for x in (draws(params), v))
    return guide_beside_nuts({name: mine}, {name: np.asarray(reference)}, [name])


# %%
# Comparison with the Laplace approximation of scikit-learn
# ---------------------------------------------------------


def laplace(train: Split) -> GaussianProcessClassifier:
    """Scikit-learn's classifier: all data, the same kernel, Laplace's approximation, its own hyper-parameters.

    :param train: the data.
    """
    start = ConstantKernel(1.0, (1e-3, 1e3)) * RBF(np.ones(train.x.shape[1]), (1e-2, 1e2))
    return GaussianProcessClassifier(start).fit(np.asarray(train.x, float), np.asarray(train.y))


def scores(p: Any, test: Split) -> str:
    """Error and log predictive density on the test set, the latter with its standard error.

    :param p: probabilities of 1.
    :param test: the truth.
    """
    p, y = np.asarray(p, float), np.asarray(test.y)
    density = np.log(np.where(y == 1, p, 1 - p))
    return f"{np.mean((p > 0.5) != y):>9.1%}{density.mean():>11.3f} ± {density.std() / np.sqrt(len(y)):.3f}"


def line(label: str, cost: str, bound: str, kernel: str, score: str) -> str:
    """One row of the table.

    :param label: the fit.
    :param cost: its steps and seconds.
    :param bound: what it says of the log evidence.
    :param kernel: its hyper-parameters.
    :param score: on the test set.
    """
    return f"{label:<30}{cost:>15}{bound:>16}{kernel:>20}{score:>26}"


def fitted(curve: Curve, inducing: Array, test: Split) -> str:
    """The row of a fit.

    :param curve: the fit.
    :param inducing: Z.
    :param test: the test set.
    """
    params = curve.params
    error = curve.weights.std() / np.sqrt(DRAWS)
    scales = " ".join(f"{x:.2f}" for x in params["lengthscale"])
    return line(
        curve.label,
        f"{curve.steps[-1]:>6}{curve.seconds[-1]:>9.2f}",
        f"{curve.weights.mean():.2f} ± {error:.2f}",
        f"{params['variance']:.1f}; {scales}",
        scores(probability(params, test.x, inducing), test),
    )


def exact_kernel(classifier: GaussianProcessClassifier, test: Split) -> str:
    """The row of scikit-learn's fit.

    :param classifier: the fit.
    :param test: the test set.
    """
    variance, *scales = np.exp(classifier.kernel_.theta)
    return line(
        "scikit-learn, Laplace, all data",
        "",
        f"{classifier.log_marginal_likelihood_value_:.2f}",
        f"{variance:.1f}; {' '.join(f'{x:.2f}' for x in scales)}",
        scores(classifier.predict_proba(np.asarray(test.x, float))[:, 1], test),
    )


# %%
# The figure
# ----------


def draw_surface(axis: Axes, params: dict[str, Array], train: Split, inducing: Array) -> None:
    """The probability of an odd digit, the data and the inducing points.

    :param axis: where to draw.
    :param params: of a fit.
    :param train: the data.
    :param inducing: Z.
    """
    low, high = np.asarray(train.x).min(0) - 0.2, np.asarray(train.x).max(0) + 0.2
    grid = np.meshgrid(*(np.linspace(a, b, 80) for a, b in zip(low, high, strict=True)))
    p = probability(params, jnp.stack([g.ravel() for g in grid], axis=1), inducing).reshape(grid[0].shape)
    shade = axis.contourf(*grid, p, np.linspace(0, 1, 11), cmap="PuOr_r", alpha=0.55)
    axis.contour(*grid, p, [0.5], colors="black", linewidths=1.2)
    for digit, colour in ((0, "#542788"), (1, "#b35806")):
        axis.plot(*np.asarray(train.x)[np.asarray(train.y) == digit].T, ".", color=colour, ms=3)
    axis.plot(*np.asarray(inducing).T, "D", mfc="white", mec="black", ms=5)
    axis.figure.colorbar(shade, ax=axis, label="probability that the digit is odd", ticks=[0, 0.5, 1])
    axis.set(xlabel="first principal component", ylabel="second principal component")


# %%
# All together
# ------------


def main() -> None:
    """Fit by natural gradients, with and without Adam, and by Adam; compare with scikit-learn; draw the figure."""
    chosen = options(
        "Sparse Gaussian-process classification.",
        "gp_classification.png",
        steps=100,
        adam_steps=1000,
        size=(400, "digits to train on"),
        inducing=(25, "inducing points"),
        batch=(100, "rows of a minibatch, in the fit that takes them"),
    )
    train, test = digits(chosen.size)
    inducing = jnp.asarray(KMeans(chosen.inducing, n_init=1, random_state=0).fit(train.x).cluster_centers_)
    whole = problem(train, inducing)
    # The guide is that of all data, because NumPyro takes ten seconds to set one up.
    parts = problem(train, inducing, chosen.batch)._replace(guide=whole.guide)
    natural, both = NaturalGradient(), NaturalGradient(fallback_optimizer=optax.adam(0.1))
    curves = [follow("NaturalGradient()", whole, natural, chosen.steps)]
    curves += [follow(f"... in batches of {chosen.batch}", parts, natural, chosen.steps, whole)]
    curves += [follow("... adam(0.1) for the kernel", whole, both, 3 * chosen.steps)]
    curves += [follow("Adam(0.03) alone", whole, Adam(0.03), chosen.adam_steps)]
    params = curves[0].params
    print(f"\n{report(whole, natural)}\n")
    print(summary({"log odds": log_odds(draws(params), params, inducing)}, dims={"log odds": ["digit"]}))
    print(f"\n{log_odds_beside_nuts(params, train, inducing)}\n")
    print(line("", " steps  seconds", "ELBO (nats)", "variance; scales", "test error, log density"))
    for curve in curves:
        print(fitted(curve, inducing, test))
    print(exact_kernel(laplace(train), test))
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    axes[2].sharey(axes[1])
    draw_surface(axes[0], params, train, inducing)
    draw_curves(axes[1:], curves, depth=60.0)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Is the digit odd? {chosen.size} digits, {chosen.inducing} inducing points, 8 draws a step")
    save(figure, chosen.output)


if __name__ == "__main__":
    main()
