# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The variational autoencoder of ``examples/vae.py``: steps and seconds to what Adam reaches in 2000 steps.

    python -m benchmarks.vae

Three starts; Adam at five rates, each constant and with a cosine decay, and the best of these ten by its ELBO on the
fitted images after all of its steps, which is the mark. Batches of 128 of 1497 images, one particle, default options.
Checkpoints every 25 steps; seconds are of the steps alone, compiled.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import vae

SEEDS, STEPS, ADAM_STEPS = 3, 1000, 2000


def row(seed: int, data: vae.Digits) -> str:
    """One start."""
    ours = vae.natural(data, STEPS, seed=seed)
    best = max(vae.adams(data, ADAM_STEPS, seed=seed), key=lambda curve: curve.train[-1])
    mark = float(best.train[-1])
    theirs, steps = best.reached(mark), ours.reached(mark)
    cells = [
        *(str(seed), best.label, f"{mark:.2f}", f"{theirs:.0f}", f"{steps:.0f}"),
        *(f"{1e-3 * best.milliseconds * theirs:.2f}", f"{1e-3 * ours.milliseconds * steps:.2f}"),
        f"{ours.milliseconds / best.milliseconds:.1f}",
        *(f"{ours.train[np.searchsorted(ours.steps, at)]:.2f}" for at in (500, 1000)),
        *(f"{x:.2f}" for x in (best.test[-1], ours.test[np.searchsorted(ours.steps, steps)], max(ours.test))),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """The table."""
    titles = [
        *("start", "best Adam", "its ELBO", "its steps", "our steps", "its s", "our s", "a step costs"),
        *("our ELBO, 500", "1000", "held out: Adam", "ours at the mark", "our best"),
    ]
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}", flush=True)
    data = vae.digits()
    for seed in range(SEEDS):
        print(row(seed, data), flush=True)


if __name__ == "__main__":
    main()
