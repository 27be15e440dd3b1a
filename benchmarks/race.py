# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Steps and seconds to the best ELBO: ``NaturalGradient()`` with default options against Adam at ten settings.

Every fit of a case is scored on one common set of draws, in double precision. *Steps* count up to the first step at
which the parameters that ``get_params`` returns are within the case's gap of the best ELBO that any fit of the run
found, including a long run with 64 particles. *Seconds* are those of the compiled loop; *with compilation* adds tracing
and compiling. Adam's settings are five rates, each constant and with a cosine decay over its steps. *Best Adam* is the
setting that reaches the gap in the fewest steps (median over seeds), or ends lowest if none does; it is chosen with
hindsight.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.optim import optax_to_numpyro
from tqdm import tqdm

from numpyro_natgrad import NaturalGradient

from .cases import Case

RATES = (0.3, 0.1, 0.03, 0.01, 0.003)
SEEDS, PARTICLES, DRAWS = 5, 8, 4096


class Fit(NamedTuple):
    """One method's fits over the seeds: marks (steps), losses (seed, mark) in nats, seconds a step and to compile."""

    name: str
    marks: np.ndarray
    losses: np.ndarray
    seconds: float
    compiling: float

    def reached(self, target: float) -> np.ndarray:
        """First step within the target, per seed; infinity if there is none."""
        hit = self.losses <= target
        return np.where(hit.any(1), self.marks[hit.argmax(1)], np.inf)


def marks(steps: int) -> np.ndarray:
    """Steps at which a fit is scored: every step up to 60, then steps 3 % apart."""
    return np.unique(np.r_[1:61, np.geomspace(60, steps, 80).astype(int)])


def race(case: Case, steps: int = 100, adam_steps: int = 1000) -> tuple[list[Fit], float]:
    """All fits of a case, and the best loss of any."""
    svi = SVI(case.model, AutoMultivariateNormal(case.model), NaturalGradient(), Trace_ELBO(PARTICLES))
    svi.init(jax.random.key(0), *case.data)
    fits = [_fit("NaturalGradient()", case, svi, lambda _: NaturalGradient(), [0.0], steps)[0]]
    for kind, schedule in (("constant", lambda r: r), ("cosine", lambda r: optax.cosine_decay_schedule(r, adam_steps))):
        name = f"Adam {kind}"
        fits += _fit(name, case, svi, lambda r, s=schedule: optax_to_numpyro(optax.adam(s(r))), RATES, adam_steps)
    reference = _fit("reference", case, svi, lambda _: NaturalGradient(), [0.0], 400, particles=64, seeds=1)[0]
    return fits, min(fit.losses[np.isfinite(fit.losses)].min() for fit in [*fits, reference])


def _fit(
    name: str, case: Case, svi: SVI, optimizer: Callable, rates: Any, steps: int, particles: int = PARTICLES,
    seeds: int = SEEDS,
) -> list[Fit]:  # fmt: skip
    at = marks(steps)

    def run(rate: jax.Array, key: jax.Array) -> Any:
        fit = SVI(case.model, svi.guide, optimizer(rate), Trace_ELBO(particles))

        def body(state: Any, _: Any) -> Any:
            state, _ = fit.update(state, *case.data)
            return state, fit.optim.get_params(state.optim_state)

        path = jax.lax.scan(body, fit.init(key, *case.data), None, length=steps)[1]
        return jax.tree.map(lambda x: x[at - 1], path)

    start = time.perf_counter()
    compiled = jax.jit(run).lower(jnp.array(0.1), jax.random.key(0)).compile()
    compiling = time.perf_counter() - start
    score = scorer(case, svi)
    fits = []
    for rate in rates:
        seconds, losses = [], []
        for seed in tqdm(range(seeds), desc=f"{case.title}: {name} {rate or ''}", leave=False):
            start = time.perf_counter()
            path = jax.block_until_ready(compiled(jnp.array(rate), jax.random.key(seed)))
            seconds.append((time.perf_counter() - start) / steps)
            losses.append(np.asarray(score(path), float))
        fits.append(Fit(f"{name} {rate or ''}".strip(), at, np.array(losses), float(np.median(seconds)), compiling))
    return fits


def scorer(case: Case, svi: SVI) -> Callable[[Any], jax.Array]:
    """−ELBO of a path of parameters on one common set of draws, in double precision.

    In single precision log q of a nearly singular covariance, which Adam's first steps can make, is meaningless: it was
    −10²² nats in one run.
    """
    elbo = Trace_ELBO(DRAWS)

    def one(params: Any) -> jax.Array:
        return elbo.loss(jax.random.key(2026), svi.constrain_fn(params), case.model, svi.guide, *case.data)

    score = jax.jit(lambda path: jax.lax.map(one, path))

    def double(path: Any) -> jax.Array:
        with jax.enable_x64(True):
            return score(jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), path))

    return double


def best_adam(fits: list[Fit], best: float, case: Case) -> Fit:
    """Adam's best setting: first within the gap, else first within the loose gap, else lowest at the end."""
    adam = [f for f in fits if f.name.startswith("Adam")]

    def rank(fit: Fit) -> tuple[float, ...]:
        done, half = (float(np.median(fit.reached(best + gap))) for gap in (case.gap, case.loose))
        return done, half, float(np.median(np.nan_to_num(fit.losses[:, -1], nan=np.inf)))

    return min(adam, key=rank)


def row(fit: Fit, best: float, case: Case) -> str:
    """One line of the table."""
    reached = fit.reached(best + case.gap)
    seconds, half = (float(np.median(fit.reached(best + gap))) * fit.seconds for gap in (case.gap, case.loose))
    cells = [
        fit.name,
        _number(float(np.median(reached)), ".0f"),
        _number(float(reached.max()), ".0f"),
        _number(seconds, ".3f"),
        _number(seconds + fit.compiling, ".1f"),
        _number(half, ".3f"),
        f"{1e3 * fit.seconds:.2f}",
        f"{np.median(fit.losses[:, -1]) - best:.3f} (at {fit.marks[-1]})",
    ]
    return f"| {' | '.join(cells)} |"


def _number(x: float, form: str) -> str:
    return format(x, form) if np.isfinite(x) else "never"


def report(case: Case) -> str:
    """The table of one case."""
    fits, best = race(case)
    oracle = best_adam(fits, best, case)
    shown = [
        fits[0]._replace(name="**NaturalGradient()**"),
        oracle._replace(name=f"**best Adam: {oracle.name}**"),
        *fits[1:],
    ]
    dtype = jnp.zeros(()).dtype
    return "\n".join(
        [
            f"## {case.title}, {dtype}: within {case.gap} nats of the best −ELBO ({best:.3f})",
            "",
            "| method | steps, median | steps, worst seed | seconds | with compilation "
            f"| seconds to within {case.loose:g} nats | ms per step | final gap, nats |",
            "| --- " * 8 + "|",
            *(row(fit, best, case) for fit in shown),
            "",
        ]
    )
