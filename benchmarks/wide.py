# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Guides with more latents than one joint step covers: random starts that diverge, and ELBOs beside Adam's best rate.

    python -m benchmarks.wide [--guide full] [--latents 130] [--particles 8] [--kind hierarchy] [--document]

``full`` is ``AutoMultivariateNormal``, ``mean`` is ``AutoNormal``. All starts of a method are one ``vmap``, each from
its own random start and key; options are the defaults, in float32. Ours run 300 steps. Adam runs at four constant
rates, as many steps for mean fields and 3000 for full Gaussians. A fit *diverges* if a parameter or its ELBO is not
finite, or if it ends worse than it began; beyond 1e9 nats nothing but rounding errors of single precision is left,
which counts as not finite. ELBOs (nats) are means over 256 draws common to all fits; *best* is the best of any mark of
the fits of the row that are finite at all marks. Gaps are nats below it at the end: median, and worst. Adam's *best
rate* has the best median at the end. Each fit is a file in ``--results``, so that a run can be interrupted.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from tqdm import tqdm

from numpyro_natgrad import NaturalGradient

RATES = (0.1, 0.03, 0.01, 0.003)
GUIDES = {"full": AutoMultivariateNormal, "mean": AutoNormal}
#: Latents and numbers of particles of the whole table.
SIZES = {"full": (100, 130, 400, 1000), "mean": (100, 130, 1000, 5000)}
PARTICLES = {"full": (8,), "mean": (1, 2, 8)}
DRAWS = 256
#: Steps of ours and of Adam; starts, fewer where a step takes a tenth of a second.
STEPS, ADAM_STEPS = 300, {"full": 3000, "mean": 300}
MARKS = (10, 30, 50, 100, 200, 300, 500, 1000, 2000, 3000)
SEEDS, SEEDS_OF_LARGE, LARGE = 20, 5, {"full": 1000, "mean": 5000}
#: Nats beyond which an ELBO in single precision is a rounding error.
MEANINGLESS = 1e9
RESULTS, PAGE = pathlib.Path("benchmarks/results/wide"), pathlib.Path("docs/benchmarks/wide.md")
HEADS = (
    *("guide", "problem", "latents", "particles", "starts", "diverge", "best ELBO", "gap after 50 steps, median"),
    *("worst", "gap after 300, median", "worst", "Adam's best rate", "after steps", "Adam's gap, median", "worst"),
    *("ms a step", "Adam's ms"),
)


def regression(d: int) -> Callable[[], None]:
    """Logistic regression on ``d`` correlated covariates, with a row for every second coefficient or more."""
    rng = np.random.default_rng(d)
    rows = max(200, d // 2)
    x = rng.normal(size=(rows, d)) + rng.normal(size=(rows, 1))
    logits = x @ rng.normal(size=d) / np.sqrt(d)
    y = jnp.asarray(rng.random(rows) < 1 / (1 + np.exp(-2 * logits)))
    scaled = jnp.asarray(x / np.sqrt(d), jnp.float32)

    def model() -> None:
        b = numpyro.sample("b", dist.Normal(0, 3).expand([d]).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=scaled @ b).to_event(1), obs=y)

    return model


def network(d: int) -> Callable[[], None]:
    """One hidden layer of tanh units that classify noisy rings into three classes; ``d`` weights in all, or nearly."""
    rng = np.random.default_rng(d)
    features = 10 if d < 2000 else 40
    hidden = max(d // (features + 3), 2)
    x = rng.normal(size=(400, features))
    y = jnp.asarray(np.digitize(np.linalg.norm(x[:, :3], axis=1) + 0.1 * rng.normal(size=400), (1.2, 1.9)))
    scaled = jnp.asarray(x / np.sqrt(features), jnp.float32)

    def model() -> None:
        w = numpyro.sample("w", dist.Normal(0, 1).expand([features, hidden]).to_event(2))
        v = numpyro.sample("v", dist.Normal(0, 1).expand([hidden, 3]).to_event(2))
        logits = jnp.tanh(scaled @ w) @ v
        numpyro.sample("y", dist.Categorical(logits=logits).to_event(1), obs=y)

    return model


def _groups(d: int) -> tuple[np.ndarray, jax.Array, int]:
    """Group of every row, counts, and number of groups, for a hierarchy of ``d`` latents."""
    rng = np.random.default_rng(d)
    groups = d - 3
    group = np.repeat(np.arange(groups), rng.integers(1, 12, groups))
    effects = 1 + 0.7 * rng.normal(size=groups)
    return group, jnp.asarray(effects[group] + 0.8 * rng.normal(size=len(group)), jnp.float32), groups


def hierarchy(d: int) -> Callable[[], None]:
    """Normal data in groups of 1 to 11 rows with effects around a mean, centred: ``d`` latents."""
    group, y, groups = _groups(d)

    def model() -> None:
        mean, sd = numpyro.sample("mean", dist.Normal(0, 5)), numpyro.sample("sd", dist.HalfNormal(2))
        noise = numpyro.sample("noise", dist.HalfNormal(2))
        effect = numpyro.sample("effect", dist.Normal(mean, sd).expand([groups]).to_event(1))
        numpyro.sample("y", dist.Normal(effect[group], noise).to_event(1), obs=y)

    return model


def noncentred(d: int) -> Callable[[], None]:
    """The same hierarchy, with effects in units of their spread."""
    group, y, groups = _groups(d)

    def model() -> None:
        mean, sd = numpyro.sample("mean", dist.Normal(0, 5)), numpyro.sample("sd", dist.HalfNormal(2))
        noise = numpyro.sample("noise", dist.HalfNormal(2))
        effect = numpyro.sample("effect", dist.Normal(0, 1).expand([groups]).to_event(1))
        numpyro.sample("y", dist.Normal((mean + sd * effect)[group], noise).to_event(1), obs=y)

    return model


def walk(d: int) -> Callable[[], None]:
    """Series with a level that walks at random, in steps of a standard deviation that is learned: ``d`` latents."""
    rng = np.random.default_rng(d)
    steps = d - 3
    y = jnp.asarray(0.1 * np.cumsum(rng.normal(size=steps)) + 0.3 * rng.normal(size=steps), jnp.float32)

    def model() -> None:
        start, noise = numpyro.sample("start", dist.Normal(0, 5)), numpyro.sample("noise", dist.LogNormal(-1, 1))
        drift = numpyro.sample("drift", dist.LogNormal(-3, 1))
        step = numpyro.sample("step", dist.Normal(0, 1).expand([steps]).to_event(1))
        numpyro.sample("y", dist.Normal(start + drift * jnp.cumsum(step), noise).to_event(1), obs=y)

    return model


KINDS = {"walk": walk, "regression": regression, "network": network, "hierarchy": hierarchy, "non-centred": noncentred}
GUIDE_KINDS = {
    "full": ("regression", "hierarchy", "non-centred"),
    "mean": ("regression", "network", "hierarchy", "walk"),
}


class Fits(NamedTuple):
    """Fits from all starts: ELBO in nats after each of ``marks`` steps, ``(starts, marks)``, and seconds a step."""

    marks: tuple[int, ...]
    elbo: np.ndarray
    seconds: float

    @property
    def diverged(self) -> np.ndarray:
        """Whether each start diverged."""
        return ~np.isfinite(self.elbo).all(1) | (self.elbo[:, -1] < self.elbo[:, 0])

    @property
    def best(self) -> float:
        """The best ELBO of the starts that are finite at all marks, nats."""
        return float(np.max(self.elbo[np.isfinite(self.elbo).all(1)], initial=-np.inf))

    @property
    def median(self) -> float:
        """Median ELBO at the end, nats; that of a fit that is not finite counts as -inf."""
        return float(np.median(np.nan_to_num(self.elbo[:, -1], nan=-np.inf)))

    def gaps(self, best: float, steps: int) -> list[str]:
        """Median and worst gap in nats after so many steps, as two cells."""
        gap = best - np.nan_to_num(self.elbo[:, self.marks.index(steps)], nan=-np.inf)
        return [f"{np.median(gap):.2f}", f"{gap.max():.2f}"]


class Problem(NamedTuple):
    """A model with its guide, and the random starts of all fits: unconstrained parameters with a leading axis."""

    model: Callable[[], None]
    guide: Any
    starts: dict[str, jax.Array]
    constrain: Callable[[Any], Any]

    @property
    def seeds(self) -> int:
        """Number of starts."""
        return len(jax.tree.leaves(self.starts)[0])


def problem(model: Callable[[], None], make_guide: Callable[..., Any], seeds: int) -> Problem:
    """Draw the starts; an autoguide keeps the start of its first set-up, so that each needs a new one."""
    each = []
    for seed in range(seeds):
        svi = SVI(model, make_guide(model), numpyro.optim.Adam(0.1), Trace_ELBO())
        state = svi.init(random.key(seed))
        each.append(svi.optim.get_params(state.optim_state))
    return Problem(model, svi.guide, jax.tree.map(lambda *x: jnp.stack(x), *each), svi.constrain_fn)


def fits(p: Problem, optimizer: Callable[[], Any], particles: int, marks: tuple[int, ...], title: str) -> Fits:
    """Run an optimizer from all starts."""
    svi = SVI(p.model, p.guide, optimizer(), Trace_ELBO(num_particles=particles))
    svi.constrain_fn = p.constrain
    fresh = svi.init(random.key(0))
    begin = jax.vmap(lambda x, key: fresh._replace(optim_state=svi.optim.init(x), rng_key=key))
    state = begin(p.starts, random.split(random.key(1), p.seeds))
    many = jax.jit(lambda s, n: lax.fori_loop(0, n, lambda _, s: jax.vmap(lambda x: svi.update(x)[0])(s), s))
    compiled = many.lower(state, 1).compile()
    score = scorer(p)
    elbo, seconds, taken = [score(p.starts)], 0.0, 0
    for mark in tqdm(marks, desc=title, leave=False):
        start = time.perf_counter()
        state = jax.block_until_ready(compiled(state, mark - taken))
        seconds, taken = seconds + time.perf_counter() - start, mark
        elbo.append(score(jax.vmap(svi.optim.get_params)(state.optim_state)))
    return Fits((0, *marks), np.stack(elbo, 1), seconds / taken / p.seeds)


def scorer(p: Problem) -> Callable[[Any], np.ndarray]:
    """The ELBO of every start, nats, on common draws."""
    elbo = Trace_ELBO(DRAWS)

    def one(params: Any) -> jax.Array:
        return -elbo.loss(random.key(2026), p.constrain(params), p.model, p.guide)

    compiled = jax.jit(lambda each: lax.map(one, each))
    return lambda each: np.asarray(compiled(each), np.float64)


class Row(NamedTuple):
    """A row of the table, and the folder of its fits."""

    guide: str
    kind: str
    latents: int
    particles: int
    folder: pathlib.Path

    @property
    def seeds(self) -> int:
        """Number of starts."""
        return SEEDS_OF_LARGE if self.latents >= LARGE[self.guide] else SEEDS

    def path(self, method: str) -> pathlib.Path:
        """File of a method's fits."""
        return self.folder / f"{self.guide}-{self.kind}-{self.latents}-{self.particles}-{method}.json"

    def read(self, method: str) -> Fits | None:
        """The fits of a method, if they are there."""
        if not self.path(method).exists():
            return None
        stored = json.loads(self.path(method).read_text())
        elbo = np.asarray(stored["elbo"], float)
        return Fits(tuple(stored["marks"]), np.where(np.abs(elbo) < MEANINGLESS, elbo, np.nan), stored["seconds"])

    def run(self) -> None:
        """Run and store the fits that are missing."""
        p, title = None, f"{self.guide} {self.kind} {self.latents}, {self.particles} particles"
        self.folder.mkdir(parents=True, exist_ok=True)
        methods: dict[str, Callable[[], Any]] = {"ours": NaturalGradient}
        methods |= {str(r): partial(numpyro.optim.Adam, r) for r in RATES}
        for method, optimizer in methods.items():
            if self.path(method).exists():
                continue
            p = p or problem(KINDS[self.kind](self.latents), GUIDES[self.guide], self.seeds)
            steps = STEPS if method == "ours" else ADAM_STEPS[self.guide]
            found = fits(p, optimizer, self.particles, tuple(m for m in MARKS if m <= steps), f"{title}, {method}")
            stored = {"marks": found.marks, "elbo": found.elbo.tolist(), "seconds": found.seconds}
            self.path(method).write_text(json.dumps(stored))

    def line(self) -> str | None:
        """The line of the table, if all fits are there."""
        ours, adam = self.read("ours"), {r: self.read(str(r)) for r in RATES}
        if ours is None or None in adam.values():
            return None
        done = {r: f for r, f in adam.items() if f is not None}
        rate = max(done, key=lambda r: done[r].median)
        best = max(f.best for f in (ours, *done.values()))
        cells = [
            *(self.guide, self.kind, f"{self.latents:,}", str(self.particles), str(len(ours.elbo))),
            *(str(ours.diverged.sum()), f"{best:.1f}", *ours.gaps(best, 50), *ours.gaps(best, STEPS)),
            *(str(rate), f"{done[rate].marks[-1]:,}", *done[rate].gaps(best, done[rate].marks[-1])),
            *(f"{1e3 * f.seconds:.1f}" for f in (ours, done[rate])),
        ]
        return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what the arguments choose, by default all, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wide", description=__doc__)
    parser.add_argument("--guide", nargs="*", choices=GUIDES, default=list(GUIDES))
    parser.add_argument("--kind", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--latents", nargs="*", type=int)
    parser.add_argument("--particles", nargs="*", type=int)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--document", action="store_true", help=f"write the table to {PAGE}")
    chosen = parser.parse_args()
    rows = [
        Row(guide, kind, latents, particles, chosen.results)
        for guide in chosen.guide
        for latents in chosen.latents or SIZES[guide]
        for particles in chosen.particles or PARTICLES[guide]
        for kind in GUIDE_KINDS[guide]
        if kind in chosen.kind
    ]
    table = [f"| {' | '.join(HEADS)} |", "| --- " * len(HEADS) + "|"]
    print("\n".join(table), flush=True)
    for each in rows:
        if not chosen.table:
            each.run()
        line = each.line()
        if line is not None:
            print(line, flush=True)
            table.append(line)
    if chosen.document:
        head, rest = PAGE.read_text().split("\n| guide", 1)
        PAGE.write_text("\n".join([head, *table, "", rest.split("\n\n", 1)[1]]))


if __name__ == "__main__":
    main()
