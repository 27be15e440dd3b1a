# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""When a fit has converged, and how many more steps it needs if it has not; computed in NumPy after a chunk of steps.

    Newton decrement + its standard error < tolerance,   over the last quarter of the steps, but 3 to 8 of them

The Newton decrement (:mod:`.newton_decrement`) rests on a quadratic model of the loss, which can be wrong far from the
optimum. The criterion therefore has to hold over a window of steps that were neither skipped nor shortened, and in
which the losses do not fall significantly. The window grows with the number of steps, because a long window would
double the length of short fits. All this only proposes a stop, and an independent check (:mod:`.judge`) grants it.
"""

from typing import NamedTuple

import numpy as np

from numpyro_natgrad.infer.history import History


class StoppingConstants(NamedTuple):
    """Every number of the stopping rule; measurements are those of ``docs/benchmarks/stopping.md``."""

    #: The window has the number of steps taken divided by this. Chosen on posteriordb: a fixed window of eight made
    #: short fits longer, and a third of the steps was no better than a quarter. A fixed window of three is no earlier
    #: in the median, and has 4 false stops in 300 starts of fifteen hard rows of the random starts, where this has 3.
    steps_per_window_step: int = 4
    #: Steps of the shortest window: the slope of the losses needs three. Not tuned.
    min_window: int = 3
    #: Steps of the longest window. Longer ones were not tried.
    max_window: int = 8
    #: Steps of the longest window that may violate the criterion, by a draw from a heavy tail. Not tuned.
    exceptions: int = 1
    #: Standard errors by which the decrement has to be below the tolerance. Without them checks are 1.6 times as many,
    #: and the check is fallible in the neck of a funnel.
    decrement_errors: float = 1.0
    #: Standard errors by which the slope of the losses has to be negative to count as a fall. Without this criterion
    #: checks take half as much time again. Not tuned.
    slope_errors: float = 2.5
    #: Steps in a row without a finite loss after which a fit has diverged. Not tuned.
    patience: int = 20

    @property
    def memory(self) -> int:
        """Steps that the rule looks back over: from this many steps on the window has its full length."""
        return max(self.patience, self.steps_per_window_step * self.max_window)


STOPPING = StoppingConstants()


def converged(history: History, tolerance: float, errors: float = STOPPING.decrement_errors) -> bool:
    """Whether the expected remaining gain and so many standard errors were below the tolerance over the window."""
    rule = STOPPING
    window = int(np.clip(history.steps // rule.steps_per_window_step, rule.min_window, rule.max_window))
    if history.steps < window:
        return False
    last = History(*(x[-window:] for x in history))
    below = last.newton_decrement + errors * last.newton_decrement_error < tolerance
    # A trust region that shortens a step to less than the tolerance limits noise, not progress.
    shortened = last.limited & (last.kl >= tolerance)
    regular = np.isfinite(last.loss) & ~last.skipped & ~shortened
    required = window - (rule.exceptions if window == rule.max_window else 0)
    return bool(below[-1] and np.sum(below & regular) >= required and not _is_falling(last.loss))


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
    ratio = (gain + STOPPING.decrement_errors * error) / tolerance
    if np.isnan(ratio):  # no parameter has a Fisher matrix
        return ""
    if ratio < 1:
        return ", but not yet over a whole window of steps"
    if noise < gain / 2:
        return "; the parameters are still moving towards the optimum"
    more = int(np.ceil(max(2 * memory, STOPPING.max_window) * (ratio - 1)))
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
