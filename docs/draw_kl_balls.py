# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Draws ``docs/figures/kl_balls.png``: Gaussians at the same KL from a center, and the ellipses of its Fisher matrix.

    KL(N(m, σ²) ‖ N(m', σ'²)) = log(σ'/σ) + (σ² + (m − m')²) / (2σ'²) − ½,      F = diag(1/σ², 2)  in (m, log σ)

Run it with ``python docs/draw_kl_balls.py``.
"""

import pathlib

import matplotlib.pyplot as plt
import numpy as np

OUTPUT = pathlib.Path(__file__).parent / "figures" / "kl_balls.png"
CENTERS = [(-2.3, -1.2), (-0.9, -0.6), (1.2, 0.0)]
COLOURS = {0.3: "#d55e00", 0.03: "#0072b2"}  # nats; Okabe and Ito's palette


def kl(m: float, s: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """KL from the Gaussian (m, log s) to those at (x, y), nats."""
    return y - s + (np.exp(2 * s) + (m - x) ** 2) / (2 * np.exp(2 * y)) - 0.5


def main() -> None:
    """Draw contours of KL around three Gaussians."""
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    x, y = np.meshgrid(np.linspace(-3.2, 3.2, 800), np.linspace(-2.2, 1.4, 600))
    angle = np.linspace(0, 2 * np.pi, 200)
    for m, s in CENTERS:
        for nats, colour in COLOURS.items():
            axis.contour(x, y, kl(m, s, x, y), levels=[nats], colors=colour, linewidths=1.6)
            radius = np.sqrt(2 * nats)  # ½ dᵀF d = nats
            ellipse = m + radius * np.exp(s) * np.cos(angle), s + radius / np.sqrt(2) * np.sin(angle)
            axis.plot(*ellipse, "--", color=colour, lw=0.9)
        axis.plot(m, s, "k.", ms=4)
    lines = [plt.Line2D([], [], color=c, label=f"KL = {nats} nats") for nats, c in COLOURS.items()]
    lines.append(plt.Line2D([], [], color="0.3", ls="--", lw=0.9, label="½ dᵀF d of the same size"))
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False)
    axis.set(xlabel="mean", ylabel="log standard deviation", xlim=(-3.2, 3.2), ylim=(-1.9, 0.9))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUTPUT, dpi=150)


if __name__ == "__main__":
    main()
