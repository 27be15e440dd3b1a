# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Many rows: a logistic regression on 20 covariates, streamed from files, and a hierarchy with many local rows.

*Memory* is the largest resident set of the process. *Nats* are KL(guide ‖ exact posterior) for each thousand rows after
1, 2 and 3 epochs: what the ELBO is below that of the fit to all data at once. *Seconds* are those to the first epoch's
end with at most 0.1 such nats, from ``SVI(...)``, with compilation. Adam is run by the same loop, on chunks that the
same thread reads ahead; its rate falls to zero by a cosine over three epochs. PyMC's lines are its full-rank ADVI on
batches of ``pymc_extras``' ``DataLoader``, and need an environment with both packages.
"""

import pathlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax, random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.optim import Adam, optax_to_numpyro

from numpyro_natgrad import FitResult, NaturalGradient, fit
from numpyro_natgrad.compilation.batches import BatchIterator

from .row_files import COVARIATES, FORMATS, exact
from .timing import step_costs

EPOCHS, CHUNK, TARGET = 3, 5, 0.1
RATES = (0.1, 0.03, 0.01)
#: Rows, and rows of a batch.
STREAMS = [(100_000, 1000), (1_000_000, 1000), (100_000, 10_000), (1_000_000, 10_000), (10_000_000, 10_000)]
LOCAL_ROWS, LOCAL_BATCH = (1000, 10_000, 100_000, 1_000_000), 500

Marks = Iterator[tuple[np.ndarray, np.ndarray]]


def regression(rows: int) -> Callable[..., None]:
    """The model of batches of so many rows."""

    def model(x: Any, y: Any) -> None:
        b = numpyro.sample("b", dist.Normal(0, 1).expand([COVARIATES]).to_event(1))
        with numpyro.plate("rows", rows, subsample_size=len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ b), obs=y)

    return model


def _ours(rows: int, batches: Iterable[Any], particles: int) -> Marks:
    """Mean and factor of the guide after each epoch."""
    model = regression(rows)
    svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(particles))
    result: FitResult | None = None
    for _ in range(EPOCHS):
        options: dict[str, Any] = {"tolerance": 0, "max_steps": 10**6, "progress_bar": False, "cache": False}
        result = fit(svi, random.key(0), batches=batches, resume=result, **options)
        yield result.params["auto_loc"], result.params["auto_scale_tril"]


def _adam(rows: int, batches: Iterable[Any], particles: int, rate: float, count: int) -> Marks:
    model, schedule = regression(rows), optax.cosine_decay_schedule(rate, count * EPOCHS)
    svi = SVI(model, AutoMultivariateNormal(model), optax_to_numpyro(optax.adam(schedule)), Trace_ELBO(particles))

    @jax.jit
    def chunk(state: Any, steps: int, batches: Any) -> Any:
        return lax.fori_loop(0, steps, lambda i, s: svi.update(s, *(x[i] for x in batches))[0], state)

    state = None
    for _ in range(EPOCHS):
        with BatchIterator(batches, CHUNK) as source:
            state = svi.init(random.key(0), *(source.peek() or ())) if state is None else state
            while True:
                steps, stacked = source.take(10**9)
                if not steps:
                    break
                state = jax.block_until_ready(chunk(state, steps, stacked))
        params: Any = svi.get_params(state)
        yield params["auto_loc"], params["auto_scale_tril"]


def _pymc(rows: int, batches: Iterable[Any], batch: int, rate: float) -> Marks:
    import pymc as pm
    from pymc_extras.variational import DataLoader

    loader = DataLoader(lambda: (np.c_[x, y] for x, y in batches), batch_size=batch, total_size=rows)
    with pm.Model() as model:
        b = pm.Normal("b", 0.0, 1.0, shape=COVARIATES)
        data = pm.Data("data", np.zeros((batch, COVARIATES + 1), np.float32))
        logits = pm.math.dot(data[:, :-1], b)
        pm.Bernoulli("y", logit_p=logits, observed=data[:, -1], total_size=loader.total_size)
        advi = pm.FullRankADVI(random_seed=0)
        # As `pm.fit` does: without the score, PyMC 6.3 hardly moves the parameters.
        step = advi.objective.step_function(obj_optimizer=pm.adam(learning_rate=rate), score=True)
        for _ in range(EPOCHS):
            for part in loader:
                model.set_data("data", part)
                step()
            yield advi.approx.mean.eval(), np.linalg.cholesky(advi.approx.cov.eval())


def stream(who: str, form: str, rows: int, batch: int, particles: int = 8, rate: float = 0.0) -> dict[str, Any]:
    """Three epochs over a file."""
    with tempfile.TemporaryDirectory() as folder:
        batches = FORMATS[form](pathlib.Path(folder), rows, batch)
        begin, found, seconds = time.perf_counter(), [], []
        marks = {
            "ours": lambda: _ours(rows, batches, particles),
            "Adam": lambda: _adam(rows, batches, particles, rate, rows // batch),
            "PyMC": lambda: _pymc(rows, batches, batch, rate),
        }
        for mean, factor in marks[who]():
            found.append((np.asarray(mean, float), np.asarray(factor, float)))
            seconds.append(time.perf_counter() - begin)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    best = exact(rows)
    row = {"who": who, "format": form, "rows": rows, "batch": batch, "particles": particles, "rate": rate}
    nats = [best.kl(*each) / (rows / 1000) for each in found]
    return {**row, "megabytes": memory, "seconds": seconds, "nats": nats}


def overlap(work: float) -> dict[str, Any]:
    """Seconds of 200 steps whose loader takes ``work`` times as long as a step, with and without a thread."""
    rows, batch, steps = 100_000, 10_000, 200
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, COVARIATES)).astype(np.float32)
    y = (rng.random(batch) < 0.5).astype(np.float32)
    model = regression(rows)
    svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(8))

    def once(pause: float, prefetch: bool, steps: int) -> float:
        def loader() -> Iterator[Any]:
            for _ in range(steps):
                time.sleep(pause)
                yield x, y

        begin = time.perf_counter()
        fit(svi, random.key(0), batches=loader(), tolerance=0, prefetch=prefetch, progress_bar=False, cache=False)
        return time.perf_counter() - begin

    def seconds(pause: float, prefetch: bool) -> float:
        """What the steps after the first chunk take, without the start of a fit."""
        whole = [once(pause, prefetch, steps + CHUNK) - once(pause, prefetch, CHUNK) for _ in range(3)]
        return float(np.median(whole))

    once(0.0, False, CHUNK)
    alone = seconds(0.0, False)
    pause = work * alone / steps
    apart, together = seconds(pause, False), seconds(pause, True)
    return {
        "who": "overlap",
        "work": work,
        "alone": alone,
        "loader": pause * steps,
        "apart": apart,
        "together": together,
    }


def local(rows: int) -> dict[str, Any]:
    """A step of a hierarchy with so many local rows, of which a batch has 500."""

    def model(y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 10))
        tau = numpyro.sample("tau", dist.LogNormal(0, 1))
        with numpyro.plate("rows", rows, subsample_size=LOCAL_BATCH) as index:
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, 0.5), obs=y[index])

    plates = lambda y: numpyro.plate("rows", rows, subsample_size=LOCAL_BATCH)
    svis = {
        name: SVI(model, AutoNormal(model, create_plates=plates), optimizer, Trace_ELBO(1))
        for name, optimizer in (("Adam", Adam(0.01)), ("ours", NaturalGradient()))
    }
    y = jnp.asarray(np.random.default_rng(0).normal(1, 1.2, rows), jnp.float32)
    return {"who": "local", "rows": rows, **step_costs(svis, (y,), seconds=8.0)}


def _cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for form in FORMATS:
        for rows, batch in STREAMS:
            yield f"ours {form} {rows} x{batch}", partial(stream, "ours", form, rows, batch)
    for rows, batch in STREAMS:
        if rows // batch < 100:  # for the memory alone
            continue
        yield f"ours one particle {rows} x{batch}", partial(stream, "ours", "memory map", rows, batch, 1)
        for who, particles in (("Adam", 1), ("Adam", 8), ("PyMC", 1)):
            for rate in RATES:
                name = f"{who} {rate} {particles} particles {rows} x{batch}"
                yield name, partial(stream, who, "memory map", rows, batch, particles, rate)
    for work in (0.5, 1.0, 2.0):
        yield f"overlap {work}", partial(overlap, work)
    for rows in LOCAL_ROWS:
        yield f"local {rows}", partial(local, rows)


CASES: dict[str, Callable[[], dict[str, Any]]] = dict(_cases())


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Three tables in Markdown: streams, the overlap of reading and steps, and local rows."""
    parts = {
        name: [r for r in rows.values() if (r["who"] in name)] for name in ("ours, Adam, PyMC", "overlap", "local")
    }
    made = [make(found) for make, found in zip((_streams, _overlaps, _locals), parts.values(), strict=True) if found]
    return "\n\n".join("\n".join(lines) for lines in made)


def _head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]


def _streams(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each method; of several rates the one that is first at the target, or else nearest to it."""
    lines = _head(
        "rows", "batch", "file", "method", "particles", "memory, MB", "rows/s, 1000", "nats after 1", "2", "3 epochs",
        f"seconds to {TARGET}",
    )  # fmt: skip
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in ("rows", "batch", "who", "format", "particles")), []).append(row)
    for key in sorted(groups, key=lambda k: (k[0], k[1])):
        row = min(groups[key], key=lambda r: (_arrival(r), np.nan_to_num(r["nats"][-1], nan=np.inf)))
        # The first epoch has the compilation.
        speed = 2 * row["rows"] / (row["seconds"][2] - row["seconds"][0]) / 1000
        who = row["who"] + (f", rate {row['rate']}" if row["rate"] else "")
        nats, arrival = " | ".join(f"{x:.2g}" for x in row["nats"]), _arrival(row)
        lines.append(
            f"| {row['rows']:,} | {row['batch']:,} | {row['format']} | {who} | {row['particles']} "
            f"| {row['megabytes']:.0f} | {speed:.0f} | {nats} | {'–' if arrival == np.inf else f'{arrival:.1f}'} |"
        )
    return lines


def _arrival(row: dict[str, Any]) -> float:
    return next((s for s, nats in zip(row["seconds"], row["nats"], strict=True) if nats <= TARGET), np.inf)


def _overlaps(rows: list[dict[str, Any]]) -> list[str]:
    lines = _head("loader / steps", "steps alone, s", "loader alone, s", "one after the other, s", "with a thread, s")
    for r in rows:
        cells = [r["work"], *(f"{r[k]:.2f}" for k in ("alone", "loader", "apart", "together"))]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _locals(rows: list[dict[str, Any]]) -> list[str]:
    lines = _head("local rows", "Adam, ms", "ours, ms", "ratio", "Adam, MB", "ours, MB")
    for row in rows:
        (a, a_mb), (b, b_mb) = (row[name].values() for name in ("Adam", "ours"))
        lines.append(f"| {row['rows']:,} | {a:.3g} | {b:.3g} | {b / a:.2f} | {a_mb:.3g} | {b_mb:.3g} |")
    if len(rows) > 2:
        size = np.log([r["rows"] for r in rows[-3:]])
        slope = {k: np.polyfit(size, np.log([r[k]["milliseconds"] for r in rows[-3:]]), 1)[0] for k in ("Adam", "ours")}
        lines += ["", f"A step grows as rows^{slope['Adam']:.2f} with Adam and as rows^{slope['ours']:.2f} with ours."]
    return lines
