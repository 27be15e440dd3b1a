# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Many parameters: milliseconds and memory of a compiled step beside Adam's, by the number of latents.

The likelihood is the cheapest there is, one observation a latent, so that nothing hides the cost of the optimizer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from numpyro.optim import Adam

from numpyro_natgrad import NaturalGradient

from ..cases import cheap
from .timing import step_costs

GUIDES: dict[str, Any] = {
    "mean field": AutoNormal,
    "full": AutoMultivariateNormal,
    "low rank": partial(AutoLowRankMultivariateNormal, rank=10),
}
LATENTS = {
    "mean field": (100_000, 1_000_000, 10_000_000),
    "full": (50, 100, 128, 129, 200, 500, 1000, 2000),
    "low rank": (100_000,),
}
PARTICLES = {"mean field": (1, 8), "full": (8,), "low rank": (8,)}


def measure(guide: str, latents: int, particles: int) -> dict[str, Any]:
    """One row: Adam's step and ours on the same guide."""
    case = cheap(latents)
    svis = {
        name: SVI(case.model, GUIDES[guide](case.model), optimizer, Trace_ELBO(num_particles=particles))
        for name, optimizer in (("Adam", Adam(0.01)), ("ours", NaturalGradient()))
    }
    costs = step_costs(svis, case.data)
    return {"guide": guide, "latents": latents, "particles": particles, **costs}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    f"{guide} {latents} x{particles}": partial(measure, guide, latents, particles)
    for guide, sizes in LATENTS.items()
    for latents in sizes
    for particles in PARTICLES[guide]
}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown, and the exponents of the cost in the number of latents."""
    lines = ["| guide | latents | particles | Adam, ms | ours, ms | ratio | Adam, MB | ours, MB | ratio |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows.values():
        (a, a_mb), (b, b_mb) = (row[name].values() for name in ("Adam", "ours"))
        lines.append(
            f"| {row['guide']} | {row['latents']:,} | {row['particles']} | {a:.3g} | {b:.3g} | {b / a:.2f} "
            f"| {a_mb:.3g} | {b_mb:.3g} | {b_mb / a_mb:.2f} |"
        )
    return "\n".join([*lines, "", *_exponents(rows)])


def _exponents(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The slope of log milliseconds in log latents, over the upper half of the sizes of each guide."""
    lines = []
    for guide in GUIDES:
        for particles in PARTICLES[guide]:
            mine = [r for r in rows.values() if (r["guide"], r["particles"]) == (guide, particles)]
            mine = sorted(mine, key=lambda r: r["latents"])[len(mine) // 2 - 1 :] if len(mine) > 2 else []
            if mine:
                slopes = {
                    name: np.polyfit(
                        np.log([r["latents"] for r in mine]), np.log([r[name]["milliseconds"] for r in mine]), 1
                    )[0]
                    for name in ("Adam", "ours")
                }
                lines.append(
                    f"A step of {guide}, {particles} particles, grows as latents^{slopes['Adam']:.2f} with Adam and "
                    f"as latents^{slopes['ours']:.2f} with ours."
                )
    return lines
