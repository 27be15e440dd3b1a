# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.sensitivity``: every number of the step rule halved and doubled, one at a time.

Each cell is the seeds' median of the first step within 0.1 nats of the best ELBO of any row, or the gap that is left
after all steps. ELBOs are means over common draws. It writes ``docs/benchmarks/sensitivity.md``, and goes on where an
earlier run was stopped.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from tqdm import tqdm

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.options import CONSTANTS

from . import cases, trajectories

OUTPUT, RAW = pathlib.Path("docs/benchmarks/sensitivity.md"), pathlib.Path("sensitivity.json")
STEPS, SEEDS, DRAWS, NEAR = 150, 3, 1000, 0.1
#: Of blocks that no case below has: docs/benchmarks/networks.md, low_rank.md and flows.md are about them.
ELSEWHERE = (
    *("network_", "score_", "low_rank_", "diagonal_", "full_p", "fisher_", "sampled_", "dense_", "kept_", "element_"),
    *("natural_margin", "unlimited_margin", "noise_threshold_scores"),
)
#: Numbers that decide about shapes or blocks while the loss is traced, each with the cases in which it can matter: a
#: row of theirs is a program of its own. All others are inputs of one program.
STATIC = {
    "noise_threshold": ("minibatches", "random effects"),
    "floor_noise": ("40 Poisson", "minibatches"),
    "recent_steps": ("40 Poisson", "minibatches"),
    "joint_limit": ("40 Poisson",),
    "regression_steps": ("eight schools",),
}


class Case(NamedTuple):
    """A fit, and the data that the ELBO is judged on where steps see minibatches."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    full: dict[str, Any] = {}  # noqa: RUF012
    particles: int = 8


def _centred(y: Any, sigma: Any) -> None:
    mu, tau = numpyro.sample("mu", dist.Normal(0, 5)), numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(y)):
        numpyro.sample("y", dist.Normal(numpyro.sample("theta", dist.Normal(mu, tau)), sigma), obs=y)


def _batches(x: Any, y: Any, size: int | None = 40) -> None:
    beta = numpyro.sample("beta", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("rows", len(y), subsample_size=size) as i:
        numpyro.sample("y", dist.Bernoulli(logits=x[i] @ beta), obs=y[i])


def _effects(y: Any) -> None:
    scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("groups", len(y)):
        z = numpyro.sample("z", dist.Normal(0, scale))
    numpyro.sample("y", dist.Normal(z[:, None], 1).to_event(2), obs=y)


def _cases() -> dict[str, Case]:
    schools, draw = cases.eight_schools(), np.random.default_rng(0)
    sigma = jnp.array([15.0, 10, 16, 11, 9, 11, 10, 18])
    poisson, counts = trajectories.poisson_regression(40, 80)
    x = draw.normal(size=(800, 8))
    y = draw.random(800) < 1 / (1 + np.exp(-x @ draw.normal(size=8)))
    groups = 3 * draw.normal(size=(20, 1)) + draw.normal(size=(20, 4))
    return {
        "eight schools, full": Case(schools.model, AutoMultivariateNormal, schools.data),
        "centred eight schools, mean field": Case(_centred, AutoNormal, (*schools.data, sigma)),
        "40 Poisson coefficients, full": Case(poisson, AutoMultivariateNormal, counts),
        "minibatches of 40 rows of 800": Case(
            _batches, AutoMultivariateNormal, (jnp.array(x), jnp.array(y, float)), {"size": None}
        ),
        "random effects beside a parameter": Case(_effects, AutoNormal, (jnp.array(groups),)),
    }


def variations() -> dict[str, dict[str, float]]:
    """The constants as shipped, and with one of them halved or doubled: what is changed, by the name of the row."""
    found: dict[str, dict[str, float]] = {"as shipped": {}}
    for name, value in CONSTANTS._asdict().items():
        if not name.startswith(ELSEWHERE):
            half, double = (max(1, value // 2), 2 * value) if isinstance(value, int) else (0.5 * value, 2.0 * value)
            found |= {f"`{name}` = {half:g}": {name: half}, f"`{name}` = {double:g}": {name: double}}
    return found


def batches(rows: dict[str, dict[str, float]]) -> list[list[str]]:
    """Rows that one program computes together."""
    alone = [[r] for r, changed in rows.items() if any(name.startswith(tuple(STATIC)) for name in changed)]
    return [[r for r in rows if [r] not in alone], *alone]


def applies(case: str, changed: dict[str, float]) -> bool:
    """Whether a row is run in a case."""
    return all(
        case.startswith(cases) for prefix, cases in STATIC.items() for name in changed if name.startswith(prefix)
    )


def elbos(case: Case, rows: list[dict[str, float]]) -> np.ndarray:
    """ELBO after every step of each row and seed, ``(rows, SEEDS, STEPS)``; −∞ where it is NaN."""
    guide, judge, optimizer = case.guide(case.model), Trace_ELBO(DRAWS), NaturalGradient()
    svi = SVI(case.model, guide, optimizer, Trace_ELBO(case.particles))
    options = optimizer._options
    svi.init(random.key(0), *case.args)

    def one(key: jax.Array, changed: dict[str, Any]) -> jax.Array:
        optimizer._options = options._replace(constants=CONSTANTS._replace(**changed))

        def body(state: Any, _: None) -> tuple[Any, jax.Array]:
            state, _ = svi.update(state, *case.args)
            params = svi.get_params(state)
            return state, -judge.loss(random.key(7), params, case.model, guide, *case.args, **case.full)

        return jax.lax.scan(body, svi.init(key, *case.args), None, STEPS)[1]

    keys = random.split(random.key(1), SEEDS)
    if len(rows) == 1:
        found = jax.jit(lambda keys: jax.lax.map(lambda key: one(key, rows[0]), keys)[None])(keys)
    else:
        names = {name for changed in rows for name in changed}
        values = {n: jnp.array([changed.get(n, getattr(CONSTANTS, n)) for changed in rows]) for n in names}
        each = lambda changed: jax.lax.map(lambda key: one(key, changed), keys)
        found = jax.jit(lambda values: jax.lax.map(each, values))(values)
    return np.nan_to_num(np.asarray(found), nan=-np.inf, posinf=-np.inf)


def cell(found: np.ndarray, best: float) -> str:
    """Steps to within :data:`NEAR` nats of the best ELBO, or the gap at the end; medians over the seeds."""
    near = found >= best - NEAR
    steps = np.median(np.where(near.any(1), near.argmax(1) + 1, np.inf))
    return f"{steps:.0f}" if np.isfinite(steps) else f"{best - np.median(found[:, -1]):.2g} nats"


def main() -> None:
    """Run what has not been run yet, and write the table."""
    jax.config.update("jax_enable_x64", True)
    fits, rows = _cases(), variations()
    done = json.loads(RAW.read_text()) if RAW.exists() else {}
    groups = [(c, group) for group in batches(rows) for c in fits if applies(c, rows[group[0]])]
    todo = [(c, group) for c, group in groups if any(f"{c}|{r}" not in done for r in group)]
    for c, group in tqdm(todo):
        found = elbos(fits[c], [rows[r] for r in group])
        done |= {f"{c}|{r}": x.tolist() for r, x in zip(group, found, strict=True)}
        RAW.write_text(json.dumps(done))
    best = {c: max(np.max(done[f"{c}|{r}"]) for r in rows if applies(c, rows[r])) for c in fits}
    shown = lambda c, r: cell(np.array(done[f"{c}|{r}"]), best[c]) if applies(c, rows[r]) else "–"
    lines = [f"| {r} | " + " | ".join(shown(c, r) for c in fits) + " |" for r in rows]
    head = "# Every number of the step rule, halved and doubled\n\nWritten by `python -m benchmarks.sensitivity`. "
    how = (
        f"Steps to {NEAR} nats, or what is left after {STEPS}; medians over {SEEDS} seeds, float64, eight particles. "
        "Best ELBO of any row.\n\n"
    )
    titles = "| constant | " + " | ".join(fits) + " |\n" + "| --- " * (len(fits) + 1) + "|\n"
    OUTPUT.write_text(head + how + titles + "\n".join(lines) + "\n")
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    main()
