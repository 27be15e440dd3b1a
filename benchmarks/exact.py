# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Conjugate Gaussian regression: KL(guide ‖ posterior) after one step of size 1, and along a default run."""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_natgrad import NaturalGradient

from .cases import conjugate_posterior, conjugate_regression

SEEDS, PARTICLES = 5, 8


def divergences(optimizer: NaturalGradient, steps: int) -> np.ndarray:
    """KL(N(m, LLᵀ) ‖ posterior) in nats after each step, shape (seed, step); computed in double precision."""
    case = conjugate_regression()
    svi = SVI(case.model, AutoMultivariateNormal(case.model), optimizer, Trace_ELBO(PARTICLES))
    svi.init(jax.random.key(0), *case.data)

    def run(key: jax.Array) -> dict:
        def body(state: tuple, _: None) -> tuple:
            state, _ = svi.update(state, *case.data)
            return state, svi.get_params(state)

        return jax.lax.scan(body, svi.init(key, *case.data), None, length=steps)[1]

    fits = [jax.device_get(jax.jit(run)(jax.random.key(seed))) for seed in range(SEEDS)]
    mean, cov = conjugate_posterior(case)
    pairs = [zip(fit["auto_loc"], fit["auto_scale_tril"], strict=True) for fit in fits]
    return np.array([[kl(m, lower, mean, cov) for m, lower in pair] for pair in pairs])


def kl(m: np.ndarray, lower: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> float:
    """KL(N(m, LLᵀ) ‖ N(mean, cov)) in nats, from the whitened difference, to avoid cancellation near zero."""
    root = np.linalg.cholesky(cov)
    a = np.linalg.solve(root, lower.astype(np.float64))
    shift = np.linalg.solve(root, m.astype(np.float64) - mean)
    x = np.linalg.svd(a, compute_uv=False) ** 2 - 1
    return float(0.5 * np.sum(x - np.log1p(x)) + 0.5 * shift @ shift)


def report() -> str:
    """The table, in the dtype of the run."""
    dtype = jnp.zeros(()).dtype
    one = divergences(NaturalGradient(step_size=1, max_kl=None), 1)[:, 0]
    shipped = divergences(NaturalGradient(), 60)
    median = np.median(shipped, axis=0)
    return "\n".join(
        [
            f"## Conjugate Gaussian regression, {dtype}: KL(guide ‖ posterior), nats",
            "",
            "| run | median | worst seed |",
            "| --- | --- | --- |",
            f"| one step, `step_size=1, max_kl=None` | {np.median(one):.1e} | {one.max():.1e} |",
            *(
                f"| default options, step {t} | {median[t - 1]:.1e} | {shipped[:, t - 1].max():.1e} |"
                for t in (10, 20, 40, 60)
            ),
            "",
        ]
    )
