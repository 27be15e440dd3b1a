# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Several devices: what a step on 1, 2, 4 and 8 virtual devices exchanges, and how far it is from that on one.

Collectives are those of the compiled ``SVI.update``. Those of the search for a radius run once for each radius, or for
each halving of one, and are counted once.
"""

import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import lax, random
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpyro import distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from numpyro_natgrad import NaturalGradient

DEVICES = (1, 2, 4, 8)
STEPS = 20
COLLECTIVE = re.compile(r"= (.+?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
#: What is in parts: rows, latents with a row each, latents with features of every row, or particles.
KINDS: dict[str, dict[str, Any]] = {
    "rows, full": {"guide": AutoMultivariateNormal, "rows": 4096, "latents": 20, "particles": 8},
    "rows, mean field": {"guide": AutoNormal, "rows": 4096, "latents": 500, "particles": 1},
    "latents": {"guide": AutoNormal, "rows": 0, "latents": 65536, "particles": 1},
    "features": {"guide": AutoNormal, "rows": 64, "latents": 4096, "particles": 1},
    "particles": {"guide": AutoNormal, "rows": 64, "latents": 20, "particles": 16},
}


def regression(rows: int, latents: int) -> tuple[Callable, list[np.ndarray]]:
    """Logistic regression, and its data."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(rows, latents)) / np.sqrt(latents)
    y = draw.random(rows) < 1 / (1 + np.exp(-3 * x @ draw.normal(size=latents)))

    def model(x: jax.Array, y: jax.Array) -> None:
        w = numpyro.sample("w", dist.Normal(0, 1).expand([latents]).to_event(1))
        with numpyro.plate("rows", rows):
            numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    return model, [x.astype(np.float32), y.astype(np.float32)]


def counts(latents: int) -> tuple[Callable, list[np.ndarray]]:
    """A latent rate for each count, and the counts."""

    def model(y: jax.Array) -> None:
        with numpyro.plate("rows", latents):
            numpyro.sample("y", dist.Poisson(jnp.exp(numpyro.sample("z", dist.Normal(3, 0.3)))), obs=y)

    return model, [np.random.default_rng(0).poisson(20.0, latents).astype(np.float32)]


def exchanged(text: str) -> dict[str, int]:
    """Collectives and bytes of a compiled step, outside of loops and in one trip of each."""
    found = {"once": 0, "once, bytes": 0, "in loops": 0, "in loops, bytes": 0, "gathers": 0}
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            where = "in loops" if "while/body" in line else "once"
            shapes = re.findall(r"\w+?(\d+)\[([\d,]*)\]", match[1])
            found[where] += 1
            found[f"{where}, bytes"] += sum(
                int(bits) // 8 * int(np.prod([int(n) for n in shape.split(",") if n])) for bits, shape in shapes
            )
            found["gathers"] += match[2] != "all-reduce"
    return found


def steps(kind: str, count: int) -> tuple[dict[str, np.ndarray], str]:
    """Parameters after some steps on so many devices, and the text of the compiled step."""
    setting, mesh = KINDS[kind], Mesh(np.array(jax.devices()[:count]), ("part",))
    rows, latents, in_parts = setting["rows"], setting["latents"], kind in ("latents", "features")
    model, data = regression(rows, latents) if rows else counts(latents)

    def place(*axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    def spread(f: Callable, keys: jax.Array) -> Any:
        return jax.vmap(f)(lax.with_sharding_constraint(keys, place("part")))

    first, others = {"features": ((None, "part"), ()), "particles": ((), ())}.get(kind, (("part",), ("part",)))
    args = [jax.device_put(data[0], place(*first)), *(jax.device_put(x, place(*others)) for x in data[1:])]
    loss = Trace_ELBO(setting["particles"], vectorize_particles=spread if kind == "particles" else True)
    svi = SVI(model, setting["guide"](model), NaturalGradient(), loss)
    state = svi.init(random.key(2), *data)
    own = jax.tree.map(lambda x: place("part") if in_parts and x.shape == (latents,) else place(), state)
    state = jax.jit(lambda x: x, out_shardings=own)(state)
    step = jax.jit(svi.update, out_shardings=(own, None)).lower(state, *args).compile()
    for _ in range(STEPS):
        state, _ = step(state, *args)
    return {name: np.asarray(x) for name, x in svi.get_params(state).items()}, step.as_text() or ""


def measure(kind: str) -> dict[str, Any]:
    """One row: the exchange on each number of devices, and the largest difference to one device."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES[-1]}"
    found = {count: steps(kind, count) for count in DEVICES}
    one = found[1][0]
    largest = lambda params: max(float(np.abs(x - one[k]).max() / np.abs(one[k]).max()) for k, x in params.items())
    devices = {str(n): {**exchanged(text), "difference": largest(params)} for n, (params, text) in found.items()}
    return {**{name: KINDS[kind][name] for name in ("rows", "latents", "particles")}, "devices": devices}


CASES: dict[str, Callable[[], dict[str, Any]]] = {kind: partial(measure, kind) for kind in KINDS}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown: one line for each number of devices."""
    lines = [
        "| in parts | rows | latents | particles | devices | sums | bytes | in loops | bytes | gathers | difference |"
    ]
    lines.append("| " + " | ".join(["---"] * 11) + " |")
    columns = ("once", "once, bytes", "in loops", "in loops, bytes", "gathers")
    for kind, row in rows.items():
        sizes = [f"{row[name]:,}" for name in ("rows", "latents", "particles")]
        for count, found in row["devices"].items():
            cells = [kind, *sizes, count, *(f"{found[c]:,}" for c in columns), f"{found['difference']:.0e}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
