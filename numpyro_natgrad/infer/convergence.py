# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""When a fit is done, and what to say where it is not; plain NumPy, between two chunks of steps.

The certificate (:mod:`.newton_decrement`) is a statement about the quadratic model of one step. Far from the optimum
that model can be wrong either way, so that it has to hold over a window of steps that were taken as proposed, while the
losses themselves fall no more than their noise would let them. A quarter of all steps is window enough: a fit that is
near from its fifth step on would else be twice as long for the sake of a proof.
"""

from typing import NamedTuple

import numpy as np

#: The certificate has to hold over one in so many steps, at least and at most these.
SHARE, LEAST, WINDOW = 4, 3, 8
#: How many of a whole window may miss it: one draw from a heavy tail.
MISSES = 1
#: Standard errors below the tolerance that the estimate has to be, and of a fall of the losses that counts as one.
BEYOND, FALLS = 1.0, 2.5
#: Steps in a row without a finite loss after which there is no point in going on.
HOPE = 20
#: Steps that both of these look back over at most; of more than so many the window is whole.
RECENT = max(HOPE, SHARE * WINDOW)


class History(NamedTuple):
    """One entry for each step, NumPy arrays of shape ``(steps,)``.

    :ivar loss: the loss at the iterate before the step, nats.
    :ivar kl_moved: KL(q ‖ q₊), nats; 0 if it was skipped.
    :ivar step_length: ρ, the share of the way to the minimum of the local model.
    :ivar decrement: nats still to gain after the step, from what ``get_params`` returns.
    :ivar decrement_error: its Monte-Carlo standard error, nats.
    :ivar limited: whether the KL limit shortened the step.
    :ivar skipped: whether the step was not taken.
    :ivar seconds: wall clock since the fit began, compilation included; steps of one chunk share its time evenly.
    """

    loss: np.ndarray
    kl: np.ndarray
    step_size: np.ndarray
    newton_decrement: np.ndarray
    newton_decrement_error: np.ndarray
    limited: np.ndarray
    skipped: np.ndarray
    seconds: np.ndarray

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.loss)


def empty() -> History:
    """Of no steps."""
    none = np.zeros(0)
    flags = none.astype(bool)
    return History(none, none, none, none, none, flags, flags, none)


def joined(parts: list[History]) -> History:
    """One history after the other."""
    return History(*(np.concatenate(x) for x in zip(empty(), *parts, strict=True)))


class Log:
    """A history that grows by parts, of which only the ``recent`` end is put together while it grows."""

    def __init__(self, past: History) -> None:
        self._parts = [past]
        self._start = past.seconds[-1] if past.steps else 0.0
        self.recent = past

    def append(self, part: History) -> None:
        """Write down a part; its seconds are since this log was begun."""
        part = part._replace(seconds=part.seconds + self._start)
        self._parts.append(part)
        self.recent = History(*(x[-RECENT:] for x in joined([self.recent, part])))

    def history(self) -> History:
        """All of it."""
        return joined(self._parts)


def converged(history: History, tolerance: float) -> bool:
    """Whether the remaining gain is below the tolerance beyond noise, over a quarter of the steps."""
    window = int(np.clip(history.steps // SHARE, LEAST, WINDOW))
    if history.steps < window:
        return False
    last = History(*(x[-window:] for x in history))
    below = last.newton_decrement + BEYOND * last.newton_decrement_error < tolerance
    # Where the model is wrong the limit is nats; one below the tolerance is that of steps which noise sends too far.
    shortened = last.limited & (last.kl >= tolerance)
    calm = np.isfinite(last.loss) & ~last.skipped & ~shortened
    least = window - (MISSES if window == WINDOW else 0)
    return bool(below[-1] and np.sum(below & calm) >= least and not _falling(last.loss))


def is_lost(history: History) -> bool:
    """Whether no step of the last :data:`HOPE` had a finite loss."""
    return history.steps >= HOPE and not np.isfinite(history.loss[-HOPE:]).any()


def _falling(loss: np.ndarray) -> bool:
    """Whether the line through the losses falls significantly, by its slope's standard error."""
    loss = loss[np.isfinite(loss)]
    time = np.arange(len(loss)) - (len(loss) - 1) / 2
    slope = time @ loss / (time @ time)
    rest = loss - loss.mean() - slope * time
    error = np.sqrt(rest @ rest / (len(loss) - 2) / (time @ time))
    return bool(slope < -FALLS * error - np.finfo(np.float32).eps * np.abs(loss).max())


def outlook(history: History, tolerance: float, noise: float, memory: float) -> str:
    """What it would take to reach the tolerance.

    :param noise: the part of the decrement that is noise, nats; it falls as one over the steps that noise rules.
    :param memory: half of the number of those steps, which is what the running means look back over.
    """
    gain, error = history.newton_decrement[-1], history.newton_decrement_error[-1]
    times = (gain + BEYOND * error) / tolerance
    if np.isnan(times):  # no parameter has a Fisher: nothing is known
        return ""
    if times < 1:
        return ", not yet for long enough"
    if noise < gain / 2:
        return "; it is still on its way"
    more = int(np.ceil(max(2 * memory, WINDOW) * (times - 1)))
    return f"; about {_two_digits(more)} further steps, or {times:.2g} times the particles"


def interval(value: float, error: float) -> str:
    """``0.031 ± 0.004``: the error to one digit, the value to the same decimal; ``0.031`` where there is no error."""
    if not (np.isfinite(value) and np.isfinite(error)):
        return "an unknown number of"
    digits = max(0, -int(np.floor(np.log10(error)))) if error > 0 else 3
    return f"{value:.{digits}f} ± {error:.{digits}f}" if digits < 7 else f"{value:.1e} ± {error:.0e}"


def _two_digits(n: int) -> int:
    """Rounded up, so that an estimate does not look like a count."""
    unit = 10 ** max(0, len(str(n)) - 2)
    return -(-n // unit) * unit
