# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What a judge concludes from gradients, products with the Hessian and reductions of the loss: its numbers and rules.

All of it is NumPy on the host. :mod:`.judge` draws, and evaluates the loss.
"""

import math
from typing import NamedTuple

import numpy as np

from numpyro_natgrad.infer.convergence import Judgement
from numpyro_natgrad.infer.krylov import Product, conjugate_gradients


class JudgeConstants(NamedTuple):
    """Every number of the judge."""

    #: Pairs of draws m ± Kε in a group; the scatter of the groups gives the standard error.
    group: int = 8
    #: Groups in a call of the compiled program.
    chunk: int = 4
    #: Chunks of pairs for the gradients, and for the Hessian, at least: 256 draws. While noise hides whether the gain
    #: is below the tolerance, the number for the gradients is multiplied by ``more``, or by more.
    min_chunks: int = 4
    more: int = 4
    #: Chunks whose groups are kept apart, 4096 draws. With more, groups are averaged, so that memory does not grow, and
    #: no more of them are taken than the noise requires, whose standard error is inversely proportional to them.
    kept_chunks: int = 64
    #: Pairs of draws that see each row of a subsampled plate with latents of its own, in the mean.
    row_pairs: int = 8
    #: Pairs of draws of the Hessian for each latent of a full covariance, and at least those of ``min_chunks``: with n
    #: times as many pairs as latents its inverse is n/(n − 1) times too large in the mean (as of a Wishart matrix).
    #: Chosen among 2, 3, 4 and 8 on three posteriors and on guides of 130 latents (``docs/benchmarks/stopping.md``).
    latent_pairs: int = 4
    #: Products with the Hessian, at most, and the relative residual at which conjugate gradients stop.
    products: int = 64
    residual: float = 1e-2
    #: Curvature, in units of these scales, that counts as none: the error of differenced gradients.
    flat: float = 1e-3
    #: Products from a random vector that look for the direction of least curvature.
    flat_products: int = 8
    #: Random vectors from which the scale of every parameter is estimated, for preconditioning.
    probes: int = 4
    #: Gradients are differenced over a distance, in the metric of these scales, of the precision to this power.
    difference: float = 0.2
    #: Draws for the gradients, at most, as a multiple of the fit's, whose steps also take Hessian-vector products.
    draws: float = 8.0
    #: After a refusal, the factor by which the number of steps has to grow before the next judgement; and, at most, if
    #: noise was the reason and the fit has not paid for the draws that would help.
    growth: float = 1.25
    noisy_growth: float = 2.0
    #: Steps of the fit for each minibatch that a judgement holds, and the most minibatches.
    steps_per_batch: int = 5
    max_held: int = 64
    #: Standard errors by which a measured reduction of the loss has to exceed the quadratic model's.
    errors: float = 2.0

    @property
    def chunk_pairs(self) -> int:
        """Pairs of draws in a call of the compiled program."""
        return self.group * self.chunk


JUDGE = JudgeConstants()
#: Draws of a judgement for which no fit has paid.
USUAL_DRAWS = 2 * JUDGE.chunk_pairs * JUDGE.kept_chunks
#: Lengths, in units of the Newton step and of √nats along the flattest direction, at which the real reduction of the
#: loss is measured; both signs.
LENGTHS = (0.1, 0.3, 1.0, 3.0)
#: The most chunks of a judgement for one purpose: beyond, their keys would be those of another.
MOST_CHUNKS = 2**16


class Hessian(NamedTuple):
    """The Hessian of the loss at common draws.

    :ivar product: ``v -> Hv``.
    :ivar scale: the scale of its rows.
    :ivar flattest: the direction of least curvature that was found, of length 1 in the metric of ``scale``.
    :ivar least: the curvature there; NaN if a product with H is not finite.
    """

    product: Product
    scale: np.ndarray
    flattest: np.ndarray
    least: float


class NewtonStep(NamedTuple):
    """What the quadratic model of the loss says: the cross-validated Newton decrement.

    :ivar longest: the Newton step; or, where the loss is flat or falls, a direction of length 1 along which it does.
    :ivar gain: nats; NaN if there is no Newton step, ``is_flat``. ``noise`` is its standard error.
    """

    longest: np.ndarray
    is_flat: bool
    gain: float
    noise: float

    def judgement(self, draws: int) -> Judgement:
        """The judgement by the quadratic model alone."""
        return Judgement(gain=self.gain, error=self.noise, saddle=False, draws=draws, nonfinite=0, cause="")


class Plan(NamedTuple):
    """Whether a judgement ends; else by what its draws are multiplied.

    :ivar required: draws that would make the error smaller than the tolerance; 0 if it is.
    """

    more: int
    required: int
    is_last: bool


def newton_step(slopes: np.ndarray, hessian: Hessian) -> NewtonStep:
    """The Newton step by every second group of gradients, and the decrement by the others."""
    x, direction, curvature = conjugate_gradients(
        hessian.product, slopes[::2].mean(0), hessian.scale, JUDGE.products, JUDGE.residual, JUDGE.flat
    )
    gain, error = _mean(0.5 * slopes[1::2] @ x)
    is_flat = curvature <= JUDGE.flat
    return NewtonStep(direction if is_flat else x, is_flat, math.nan if is_flat else gain, math.sqrt(2) * error)


def plan_after(count: int, noise: float, tolerance: float, draws: float, held: bool) -> Plan:
    """What follows an undecided judgement, after so many chunks with this standard error, nats.

    :param draws: the most draws. What they cannot decide is not begun; noise may fall faster than draws grow, by
        ``more``.
    """
    required, taken = _required(noise, tolerance), 2 * count * JUDGE.chunk_pairs
    more = 1 if held else required
    if JUDGE.more * count <= JUDGE.kept_chunks:
        more = min(max(required, JUDGE.more), JUDGE.kept_chunks // count, int(draws // taken))
    beyond = more * taken > draws or more * count > MOST_CHUNKS
    hopeless = not held and required * taken > JUDGE.more * draws
    return Plan(more, required * taken if required > 1 else 0, more <= 1 or beyond or hopeless)


def _required(noise: float, tolerance: float) -> int:
    """By how much draws are multiplied so that noise, nats, falls below the tolerance; 1 if it is below, or NaN."""
    return 2 ** math.ceil(math.log2(noise / tolerance)) if 0 < tolerance < noise < math.inf else 1


def combined(found: Judgement, reductions: np.ndarray, falls: np.ndarray) -> Judgement:
    """Correct the quadratic model by the reductions ``(groups, moves)`` that were measured on other draws.

    At least the largest reduction remains, whatever the quadratic model says.

    :param falls: of each move, whether its curvature is negative; then a reduction shows a saddle.
    """
    reached = _reached(reductions)
    real, noise = reductions[:, reached].mean(0), reductions[:, reached].std(0, ddof=1) / math.sqrt(len(reductions))
    beyond, saddle = real - JUDGE.errors * noise, False
    gain, error = found.gain, found.error
    if reached.any():
        best = int(np.argmax(beyond))
        saddle = bool((beyond[falls[reached]] > 0).any())
        if not beyond[best] <= gain:  # also if it is not known
            gain, error = float(real[best]), max(error, float(noise[best]))
    return found._replace(gain=gain, error=error, saddle=saddle)


def _reached(reductions: np.ndarray) -> np.ndarray:
    """Which moves are reached without a rise of the loss: beyond one lies another basin, or an overflow."""
    with np.errstate(all="ignore"):
        falls = reductions.mean(0) >= -JUDGE.errors * reductions.std(0, ddof=1) / math.sqrt(len(reductions))
    before = np.roll(falls.reshape(-1, len(LENGTHS), 2), 1, axis=1)
    before[:, 0] = True
    return np.logical_and.accumulate(before, axis=1).ravel() & np.isfinite(reductions).all(0)


def _mean(x: np.ndarray) -> tuple[float, float]:
    """With its standard error."""
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))
