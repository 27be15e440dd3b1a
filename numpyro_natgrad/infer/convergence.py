# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""When a stop is proposed, and how many more steps a fit needs otherwise; computed in NumPy after a chunk of steps.

    Newton decrement < tolerance   over the last three steps

The Newton decrement (:mod:`.newton_decrement`) rests on a quadratic model of the loss, which can be wrong far from the
optimum. The steps must therefore have been neither skipped nor shortened, and their losses must not fall significantly.
All this only proposes a stop, and an independent check (:mod:`.judge`), which knows the noise, grants it.
"""

from typing import NamedTuple

import numpy as np

from numpyro_natgrad.infer.history import History


class StoppingConstants(NamedTuple):
    """Every number of the stopping rule; measurements are those of ``docs/benchmarks/stopping.md``."""

    #: Steps of the window: the slope of the losses needs three. Windows that grow to eight steps, and a standard error
    #: on top of the decrement, stop later, and no more rightly.
    window: int = 3
    #: Steps of the window, and standard errors on top, where no check is possible. Not tuned.
    unjudged_window: int = 8
    unjudged_errors: float = 1.0
    #: Standard errors by which the slope of the losses has to be negative to count as a fall. Without this criterion
    #: checks take half as much time again. Not tuned.
    slope_errors: float = 2.5
    #: Steps in a row without a finite loss after which a fit has diverged; no rule looks back further. Not tuned.
    patience: int = 20


STOPPING = StoppingConstants()


def converged(history: History, tolerance: float, *, is_judged: bool = True) -> bool:
    """Whether the expected remaining gain was below the tolerance over the window.

    :param is_judged: whether a check will judge it. Otherwise the rule is stricter.
    """
    rule = STOPPING
    window, errors = (rule.window, 0.0) if is_judged else (rule.unjudged_window, rule.unjudged_errors)
    if history.steps < window:
        return False
    last = History(*(x[-window:] for x in history))
    below = last.newton_decrement + errors * last.newton_decrement_error < tolerance
    # A trust region that shortens a step to less than the tolerance limits noise, not progress.
    shortened = last.limited & (last.kl >= tolerance)
    regular = np.isfinite(last.loss) & ~last.skipped & ~shortened
    return bool(np.all(below & regular)) and not _is_falling(last.loss)


def diverged(history: History) -> bool:
    """Whether none of the last ``STOPPING.patience`` steps had a finite loss."""
    return history.steps >= STOPPING.patience and not np.isfinite(history.loss[-STOPPING.patience :]).any()


def _is_falling(loss: np.ndarray) -> bool:
    """Whether the slope of the least-squares line through the losses is significantly negative."""
    loss = loss[np.isfinite(loss)]
    time = np.arange(len(loss)) - (len(loss) - 1) / 2
    slope = time @ loss / (time @ time)
    residual = loss - loss.mean() - slope * time
    error = np.sqrt(residual @ residual / (len(loss) - 2) / (time @ time))
    return bool(slope < -STOPPING.slope_errors * error - np.finfo(np.float32).eps * np.abs(loss).max())


def remaining_effort(history: History, tolerance: float, noise: float, memory: float) -> str:
    """How many more steps or particles the fit needs to reach the tolerance, as the end of a sentence.

    ``noise`` is the part of the Newton decrement that is noise, nats. It is inversely proportional to the number of
    stationary steps, which is twice the ``memory`` of the running means.
    """
    gain, error = history.newton_decrement[-1], history.newton_decrement_error[-1]
    ratio = (gain + error) / tolerance
    if np.isnan(ratio):  # no parameter has a Fisher matrix
        return ""
    if ratio < 1:
        return f", but not yet over {STOPPING.window} steps"
    if noise < gain / 2:
        return "; the parameters are still moving towards the optimum"
    more = int(np.ceil(max(2 * memory, STOPPING.unjudged_window) * (ratio - 1)))
    return f"; about {_two_digits(more)} further steps, or {ratio:.2g} times the particles"


def format_interval(value: float, error: float) -> str:
    """Format ``0.031 ± 0.004``: the error with one digit, and the value with as many decimals."""
    if not (np.isfinite(value) and np.isfinite(error)):
        return "an unknown number of"
    digits = max(0, -int(np.floor(np.log10(error)))) if error > 0 else 3
    return f"{value:.{digits}f} ± {error:.{digits}f}" if digits < 7 else f"{value:.1e} ± {error:.0e}"


def _two_digits(n: int) -> int:
    """Round up to two digits, because the number is an estimate."""
    unit = 10 ** max(0, len(str(n)) - 2)
    return -(-n // unit) * unit


class Judgement(NamedTuple):
    """What the judge found.

    :ivar float gain: expected remaining gain, nats; NaN if it could not be computed.
    :ivar float error: its standard error, nats.
    :ivar bool saddle: whether the loss falls along a direction of negative curvature.
    :ivar int draws: draws of the loss that were examined, and ``nonfinite``, how many of them were not finite.
    :ivar str cause: the site at which losses are not finite, or why the gain could not be computed; else ``""``.
    :ivar bool abstains: the loss has no Hessian, so that only finiteness was checked.
    :ivar int required: draws that would make the error smaller than the tolerance, where the fit has not paid for them.
    """

    gain: float
    error: float
    saddle: bool
    draws: int
    nonfinite: int
    cause: str
    abstains: bool = False
    required: int = 0

    def grants(self, tolerance: float) -> bool:
        """Whether a proposed stop is granted."""
        return self.abstains or (
            not self.nonfinite and not self.saddle and max(self.gain, 0.0) + self.error < tolerance
        )

    def is_known(self, tolerance: float, errors: float) -> bool:
        """Whether a stop is granted, or refused by a gain so many standard errors above the tolerance."""
        return self.grants(tolerance) or self.gain - errors * self.error > tolerance

    def __str__(self) -> str:
        if self.nonfinite:
            cause = f": {self.cause}" if self.cause else ""
            return f"{self.nonfinite} of {self.draws} draws have a non-finite loss{cause}"
        if self.abstains:
            return f"finite losses, and cannot estimate the gain: {self.cause}"
        if self.cause:
            return f"an unknown number of nats to gain: {self.cause}"
        where = " along a direction of no or negative curvature" if self.saddle else ""
        return f"{format_interval(max(self.gain, 0.0), self.error)} nats to gain{where}"
