# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Many sites: seconds of tracing, lowering and XLA for a step beside Adam's, by the number of scalar sites.

Every latent is a site of its own, so that NumPyro visits each of them, and the likelihood is one vectorized site.
Where XLA needs minutes for Adam (``COMPILED``), only tracing and lowering are measured.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import random
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.optim import Adam

from numpyro_natgrad import NaturalGradient

from .timing import in_turns

SITES = (10, 100, 300, 1000)
#: Sites up to which programs are compiled: Adam's of 100 mixed sites takes XLA minutes, for its 50 rejection samplers.
COMPILED = {"AutoNormal": 300, "mixed families": 10}
OPTIMIZERS = {"Adam": lambda: Adam(0.01), "ours": NaturalGradient}
PRIORS = (dist.Normal(0.0, 1.0), dist.LogNormal(0.0, 1.0), dist.Gamma(2.0, 1.0), dist.Beta(2.0, 2.0))


def model(sites: int, families: int) -> None:
    """Scalar sites, of ``families`` families in turn, with an observation each."""
    z = [numpyro.sample(f"z{i}", PRIORS[i % families]) for i in range(sites)]
    numpyro.sample("y", dist.Normal(jnp.stack(z), 1.0), obs=jnp.linspace(0.5, 2.0, sites))


def mixed_guide(sites: int, families: int) -> None:
    """The family of each prior, written by hand."""
    for i in range(sites):
        family = type(PRIORS[i % families])
        positive = partial(numpyro.param, constraint=constraints.positive)
        first = (numpyro.param if i % families < 2 else positive)(f"a{i}", 1.0)
        numpyro.sample(f"z{i}", family(first, positive(f"b{i}", 2.0)))


def problem(kind: str, sites: int, optimizer: Any) -> SVI:
    """The inference of one row."""
    if kind == "AutoNormal":
        mine = partial(model, sites, 1)
        return SVI(mine, AutoNormal(mine), optimizer, Trace_ELBO())
    return SVI(partial(model, sites, 4), partial(mixed_guide, sites, 4), optimizer, Trace_ELBO())


def equations(jaxpr: Any) -> int:
    """The number of equations of a jaxpr and of all jaxprs in it."""
    inner = (x for eqn in jaxpr.eqns for value in eqn.params.values() for x in _jaxprs(value))
    return len(jaxpr.eqns) + sum(map(equations, inner))


def _jaxprs(value: Any) -> Iterator[Any]:
    for x in value if isinstance(value, tuple | list) else (value,):
        x = getattr(x, "jaxpr", x)
        if hasattr(x, "eqns"):
            yield x


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of an action, and its result."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def traced(svi: SVI, state: Any) -> Any:
    """The traced program of one step; a new function, so that nothing is remembered."""
    return jax.jit(lambda s: svi.update(s)).trace(state)


def measure(kind: str, sites: int) -> dict[str, Any]:
    """One row: both optimizers in one process, tracing and steps interleaved."""
    for optimizer in OPTIMIZERS.values():  # what JAX and NumPyro import and compile once is no part of it
        small = problem(kind, 8, optimizer())
        traced(small, small.init(random.key(0))).lower()
    svis = {name: problem(kind, sites, optimizer()) for name, optimizer in OPTIMIZERS.items()}
    states = {name: svi.init(random.key(0)) for name, svi in svis.items()}
    times: dict[str, list[float]] = {name: [] for name in svis}
    programs = {}
    for _ in range(3 if sites < 300 else 1):
        for name, svi in svis.items():
            taken, programs[name] = seconds(partial(traced, svi, states[name]))
            times[name].append(taken)
    row: dict[str, Any] = {"kind": kind, "sites": sites}
    steps: dict[str, Callable[[], Any]] = {}
    for name, program in programs.items():
        lowering, lowered = seconds(program.lower)
        row[name] = {
            "equations": equations(program.jaxpr.jaxpr),
            "trace": statistics.median(times[name]),
            "lowering": lowering,
        }
        if sites <= COMPILED[kind]:
            row[name]["XLA"], compiled = seconds(lowered.compile)
            steps[name] = partial(compiled, states[name])
    for name, milliseconds in (in_turns(steps, seconds=2.0) if steps else {}).items():
        row[name]["step"] = 1e-3 * milliseconds
    return row


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    f"{kind} {sites}": partial(measure, kind, sites) for kind in COMPILED for sites in SITES
}

COLUMNS = {"equations": "equations", "trace": "trace, s", "lowering": "lowering, s", "XLA": "XLA, s"}
COLUMNS["step"] = "step, ms"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown, and the exponents in the number of sites."""
    heads = ["guide", "sites", *(f"{title}: Adam | ours | ratio" for title in COLUMNS.values())]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * (2 + 3 * len(COLUMNS)) + "|"]
    for row in rows.values():
        cells = [row["kind"], f"{row['sites']:,}"]
        for key in COLUMNS:
            cells += _cells(key, row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_exponents(rows)])


def _cells(key: str, row: dict[str, Any]) -> list[str]:
    if key not in row["Adam"]:
        return ["–", "–", "–"]
    a, b = (row[name][key] * (1e3 if key == "step" else 1) for name in OPTIMIZERS)
    return [f"{a:,}", f"{b:,}", f"{b / a:.2f}"] if key == "equations" else [f"{a:.2g}", f"{b:.2g}", f"{b / a:.2f}"]


def _exponents(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The slopes of log equations and log seconds in log sites, from 100 sites."""
    for kind in COMPILED:
        mine = [r for r in rows.values() if r["kind"] == kind and r["sites"] >= 100]
        if len(mine) < 2:
            continue
        logs = np.log([r["sites"] for r in mine])
        slopes = [
            f"{key}: Adam {np.polyfit(logs, np.log([r['Adam'][key] for r in mine]), 1)[0]:.2f}, "
            f"ours {np.polyfit(logs, np.log([r['ours'][key] for r in mine]), 1)[0]:.2f}"
            for key in ("equations", "trace", "lowering")
        ]
        yield f"Exponents in the number of sites, {kind}: " + "; ".join(slopes) + "."
