# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The variational autoencoder of ``examples/vae.py``: steps and seconds to the ELBO of 2000 steps of Adam.

    python -m benchmarks.vae

Three starts. Adam is the best of ten settings (five rates, each constant and with a cosine decay), and the target is
its final ELBO on the training images. Batches of 128 of 1497 images, one particle, default options. Checkpoints every
25 steps; seconds are those of the compiled steps.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import vae

SEEDS, STEPS, ADAM_STEPS = 3, 1000, 2000
HEADS = (
    *("start", "best Adam", "Adam's ELBO", "Adam's steps", "natural-gradient steps", "Adam's seconds"),
    *("natural-gradient seconds", "cost of a step / Adam's", "natural-gradient ELBO after 500 steps", "after 1000"),
    *("held out: Adam", "held out: natural gradient at the target", "held out: natural gradient, best"),
)


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
    """Print the table."""
    argparse.ArgumentParser(prog="python -m benchmarks.vae", description=__doc__).parse_args()
    print(f"| {' | '.join(HEADS)} |\n|{' --- |' * len(HEADS)}", flush=True)
    data = vae.digits()
    for seed in range(SEEDS):
        print(row(seed, data), flush=True)


if __name__ == "__main__":
    main()
