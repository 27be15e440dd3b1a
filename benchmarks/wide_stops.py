# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""When `fit(tolerance=0.05)` stops with guides of more than 128 latents, and what its check costs.

    python -m benchmarks.wide_stops [--kind regression] [--guide full] [--latents 130] [--document]

One fit each, with 8 particles in float32 from one random start, on the problems of `benchmarks.wide`. *Gain* is what
the last check found, nats, by so many draws. Seconds include compilation.
"""

import argparse
import itertools
import pathlib
import time

from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from numpyro_natgrad import NaturalGradient, fit
from numpyro_natgrad.infer.convergence import format_interval

from .wide import KINDS

OUTPUT = pathlib.Path("docs/benchmarks/wide_stops.md")
HEADING = "## The table\n"
KINDS_MEASURED, SIZES = ("regression", "hierarchy", "non-centred", "walk"), (130,)
GUIDES = {"full": AutoMultivariateNormal, "mean-field": AutoNormal}
TOLERANCE, MAX_STEPS = 0.05, 5000
HEADS = (
    *("problem", "guide", "latents", "converged", "steps", "gain", "draws of the last check"),
    *("seconds", "of these, checks"),
)


def line(kind: str, guide: str, latents: int) -> str:
    """One fit.

    :param kind: of the problem.
    :param guide: name of the guide.
    :param latents: how many it has.
    """
    model = KINDS[kind](latents)
    svi = SVI(model, GUIDES[guide](model), NaturalGradient(), Trace_ELBO(num_particles=8))
    began = time.perf_counter()
    result = fit(svi, random.key(0), tolerance=TOLERANCE, max_steps=MAX_STEPS, cache=False, progress_bar=False)
    seconds, last = time.perf_counter() - began, result.judgement
    found = ("–", "–") if last is None else (format_interval(max(last.gain, 0.0), last.error), f"{last.draws:,}")
    cells = (kind, guide, latents, "yes" if result.converged else "no", len(result.losses), *found)
    return f"| {' | '.join(map(str, cells))} | {seconds:.0f} | {result.judge_seconds:.0f} |"


def main() -> None:
    """Fit all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="*", choices=KINDS, default=list(KINDS_MEASURED))
    parser.add_argument("--guide", nargs="*", choices=GUIDES, default=list(GUIDES))
    parser.add_argument("--latents", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--document", action="store_true", help=f"write the table to {OUTPUT}")
    options = parser.parse_args()
    lines = [f"| {' | '.join(HEADS)} |", "| --- " * len(HEADS) + "|"]
    print("\n".join(lines))
    for latents, guide, kind in itertools.product(options.latents, options.guide, options.kind):
        lines.append(line(kind, guide, latents))
        print(lines[-1], flush=True)
    if options.document:
        before = OUTPUT.read_text().partition(HEADING)[0]
        OUTPUT.write_text(before + HEADING + "\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
