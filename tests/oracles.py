# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Oracles of the tests: dense algebra, NumPyro's own distributions, and the loss as ``SVI`` gives it to optimizers.

Nothing here uses the package under test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import random
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.optim import _NumPyroOptim
from scipy.special import expit, log_expit


def root_eps(dtype) -> float:
    """√ε: the relative error of a computation that loses half of its digits."""
    return float(np.sqrt(np.finfo(dtype).eps))


def assert_close(actual, expected, tolerance: float) -> None:
    """Two trees agree relative to the largest number of each leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(initial=0.0), 1e-300))


def kl(p, q) -> float:
    """KL(p ‖ q) of two Gaussians given as (mean, covariance), by NumPyro, in double precision."""
    with jax.enable_x64(True):
        p, q = ([jnp.asarray(np.asarray(x), jnp.float64) for x in pair] for pair in (p, q))
        return float(dist.kl_divergence(dist.MultivariateNormal(*p), dist.MultivariateNormal(*q)))


def form(length, x: jax.Array) -> jax.Array:
    """F, ``(P, P)``, of a function whose derivative along d at ``x`` is ½ dᵀFd."""
    return jax.hessian(lambda d: jax.jvp(length, (x,), (d,))[1])(jnp.zeros_like(x))


def spd(seed: int, d: int, *, low: float = 0.5, high: float = 5.0) -> np.ndarray:
    """A symmetric positive definite matrix with eigenvalues between ``low`` and ``high``."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return (basis * np.geomspace(low, high, d)) @ basis.T


_NODES, _SHARES = np.polynomial.hermite_e.hermegauss(40)
_SHARES = _SHARES / _SHARES.sum()


def logistic_bound(
    weights: np.ndarray, rest: np.ndarray | float, y: np.ndarray, mean: np.ndarray, cov: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """The ELBO of N(mean, cov) for v by quadrature, with E d/df and −E d²/df² of log p(y | f) at every datum.

    v ~ N(0, I), f given v ~ N(weights v, rest), y ~ Bernoulli(σ(f)).
    """
    sd = np.sqrt(rest + np.sum(weights @ cov * weights, 1))
    f = (weights @ mean)[:, None] + sd[:, None] * _NODES
    likelihood = (log_expit((2 * y - 1)[:, None] * f) @ _SHARES).sum()
    divergence = 0.5 * (np.trace(cov) + mean @ mean - len(mean) - np.linalg.slogdet(cov)[1])
    return likelihood - divergence, y - expit(f) @ _SHARES, (expit(f) * expit(-f)) @ _SHARES


def best_logistic_gaussian(
    weights: np.ndarray, rest: np.ndarray | float, y: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """The best Gaussian for v by the fixed point S⁻¹ = I + Wᵀ diag(h) W, m = Wᵀg, in steps of a fifth."""
    mean, precision = np.zeros(weights.shape[1]), 100.0 * np.eye(weights.shape[1])
    for _ in range(250):
        _, g, h = logistic_bound(weights, rest, y, mean, np.linalg.inv(precision))
        precision = 0.8 * precision + 0.2 * (np.eye(len(mean)) + (weights.T * h) @ weights)
        mean = mean + 0.2 * np.linalg.solve(precision, weights.T @ g - mean)
    cov = np.linalg.inv(precision)
    return logistic_bound(weights, rest, y, mean, cov)[0], mean, cov


class CapturingOptimizer(_NumPyroOptim):
    """An optimizer that takes no step and keeps the function that ``SVI`` gives to its optimizer."""

    def __init__(self) -> None:
        self.fn = None

    def init(self, params):
        return params

    def get_params(self, state):
        return state

    def eval_and_update(self, fn, state, forward_mode_differentiation=False):
        self.fn = fn
        return (jnp.zeros(()), None), state


def captured_loss(model, guide, loss, *args, seed: int = 0, **kwargs):
    """(at, params): ``at(key)`` is the loss at that key as an optimizer of ``SVI`` sees it, params are the start.

    ``at(key, other, given)`` is another loss of the same model and guide, at other arguments.
    """
    optimizer = CapturingOptimizer()
    svi = SVI(model, guide, optimizer, loss)
    init = lambda key: svi.init(key, *args, **kwargs)
    # An autoguide keeps what it traces; everything else is initialised by one program instead of a hundred.
    start = (init if isinstance(guide, AutoGuide) else jax.jit(init))(random.key(seed))

    def at(key, other=None, given=None):
        svi.loss = other or loss
        svi.update(start._replace(rng_key=key), *(args if given is None else given), **kwargs)
        return optimizer.fn

    return at, start.optim_state


def walk(svi: SVI, args: tuple, steps: int) -> tuple[list, list]:
    """Iterates of :class:`.NaturalGradient`, the start among them, and NumPyro's own gradients at those that it left."""
    state, update = svi.init(random.key(0), *args), jax.jit(svi.update)
    loss = lambda params, key: svi.loss.loss(key, svi.constrain_fn(params), svi.model, svi.guide, *args)
    slope, params, slopes = jax.jit(jax.grad(loss)), [state.optim_state[1].params], []
    for _ in range(steps):
        slopes.append(slope(params[-1], random.split(state.rng_key)[1]))
        state, _ = update(state, *args)
        assert not svi.optim.info(state).skipped
        params.append(state.optim_state[1].params)
    return params, slopes
