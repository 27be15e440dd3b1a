# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The figures of every step of a fit, and their picture."""

from typing import Any, NamedTuple

import numpy as np


class History(NamedTuple):
    """One entry for each step; all fields are arrays of shape ``(steps,)``.

    :ivar numpy.ndarray loss: the loss at the iterate before the step, nats.
    :ivar numpy.ndarray kl: forward KL(q ‖ q₊) of the step, nats; 0 if it was skipped.
    :ivar numpy.ndarray step_size: ρ, where 1 is a step to the minimum of the local model.
    :ivar numpy.ndarray newton_decrement: expected remaining gain of ``get_params`` after the step, nats.
    :ivar numpy.ndarray newton_decrement_error: its Monte-Carlo standard error, nats.
    :ivar numpy.ndarray limited: whether the trust region shortened the step, bool.
    :ivar numpy.ndarray skipped: whether the step was not taken, bool.
    :ivar numpy.ndarray seconds: seconds since the fit began, with compilation; steps of a chunk share its time evenly.

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_natgrad import History
        >>> zero = np.zeros(3)
        >>> history = History(zero, zero, zero, zero, zero, zero > 0, zero > 0, zero)
        >>> history.steps
        3
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

    def plot(self, axes: Any = None, *, tolerance: float | None = None) -> Any:
        """Draw ELBO, KL of each step, and nats to gain, against steps; it needs matplotlib.

        Circles are steps that the trust region shortened, crosses are skipped steps, and the vertical line is the end
        of the fit. The panel of the ELBO leaves out the lowest tenth of the steps where these would hide the others.

        .. doctest::

            >>> import numpy as np
            >>> from numpyro_natgrad import History
            >>> gain, false = 1 / np.arange(1.0, 21.0), np.zeros(20, bool)
            >>> history = History(10 + gain, gain, 0 * gain + 1, gain, gain / 9, false, false, gain)
            >>> axes = history.plot(tolerance=0.1)
            >>> [axis.get_ylabel() for axis in axes]
            ['ELBO (nats)', 'KL of a step (nats)', 'nats to gain']

        :param axes: three axes of matplotlib to draw on, for instance of ``plt.subplots(3, 1, sharex=True)``; new ones
            by default.
        :param float tolerance: the tolerance of the fit, nats, as a horizontal line.
        :return: the three axes, ``numpy.ndarray``; their figure is ``axes[0].figure``.
        :raises ImportError: if matplotlib is not installed.
        :raises ValueError: if there are no steps, or not three axes.
        """
        if not self.steps:
            raise ValueError("`History.plot()`: expected at least one step, but the history is empty.")
        axes = _three_axes() if axes is None else np.ravel(axes)
        if len(axes) != 3:
            raise ValueError(
                f"`History.plot(axes=...)`: {len(axes)} axes were given; expected three. Make them by "
                "`plt.subplots(3, 1, sharex=True)`."
            )
        _draw(self, axes, tolerance)
        return axes


#: Okabe and Ito's palette: of lines, of shortened steps, of skipped steps, and of the tolerance.
LINE, LIMITED, SKIPPED, TOLERANCE = "#0072b2", "#e69f00", "#d55e00", "#009e73"


def _three_axes() -> np.ndarray:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "`History.plot` needs matplotlib, which is not installed. Install it by `pip install matplotlib`, or with "
            "all that the examples need by `pip install numpyro-natgrad[examples]`."
        ) from error
    return plt.subplots(3, 1, sharex=True, figsize=(7, 7), layout="constrained")[1]


def _draw(history: History, axes: np.ndarray, tolerance: float | None) -> None:
    """The three panels; logarithmic axes leave out what is not positive."""
    step, elbo = np.arange(1, history.steps + 1), -history.loss
    kl, gain = _positive(history.kl), _positive(history.newton_decrement)
    axes[0].plot(step, elbo, color=LINE, lw=1.2)
    finite = elbo[np.isfinite(elbo)]
    if finite.size:
        axes[0].set_ylim(*_limits(finite))
    axes[1].plot(step, kl, color=LINE, lw=1.2)
    axes[1].plot(step[history.limited], kl[history.limited], "o", mfc="none", color=LIMITED, ms=5, label="shortened")
    low, high = (_positive(history.newton_decrement + s * history.newton_decrement_error) for s in (-1, 1))
    axes[2].plot(step, gain, color=LINE, lw=1.2)
    # Where the error reaches the estimate, the band has no lower end on a logarithmic axis.
    floor = np.nanmin(np.r_[gain, tolerance or np.inf]) / 3
    axes[2].fill_between(step, np.fmax(low, floor), high, color=LINE, alpha=0.2, lw=0)
    if tolerance:
        axes[2].axhline(tolerance, color=TOLERANCE, ls="--", lw=1.2, label=f"tolerance {tolerance:g}")
    for axis, label in zip(axes, ("ELBO (nats)", "KL of a step (nats)", "nats to gain"), strict=True):
        skipped = step[history.skipped]
        across = axis.get_xaxis_transform()  # steps, and the height of the panel
        axis.plot(skipped, np.full(len(skipped), 0.03), "x", color=SKIPPED, ms=5, transform=across, label="skipped")
        axis.axvline(history.steps, color="0.4", ls=":", lw=1.2, label=f"end, after {history.steps} steps")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    for axis, x in zip(axes[1:], (kl, gain), strict=True):
        if np.isfinite(x).any():
            axis.set_yscale("log")
    if np.isfinite(gain).any():
        axes[2].set_ylim(bottom=floor)
    axes[2].set_xlabel("step")
    _legend(history, axes)


def _legend(history: History, axes: np.ndarray) -> None:
    """One entry for each kind of mark that occurs."""
    absent = {"shortened": history.limited, "skipped": history.skipped}
    each = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    shown = {label: line for label, line in each.items() if label not in absent or absent[label].any()}
    above = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 4}
    axes[0].legend(shown.values(), shown.keys(), frameon=False, fontsize="small", **above)


def _positive(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x) & (x > 0), x, np.nan)


def _limits(elbo: np.ndarray) -> tuple[float, float]:
    """Limits that show all values, or all but the lowest tenth where these are far below the others."""
    low, most, high = elbo.min(), np.quantile(elbo, 0.1), elbo.max()
    low = most if most - low > high - most else low
    margin = 0.08 * (high - low) or 1.0
    return float(low - margin), float(high + margin)


def empty_history() -> History:
    """A history of no steps."""
    zero = np.zeros(0)
    fields = dict.fromkeys(History._fields, zero) | {"limited": zero > 0, "skipped": zero > 0}
    return History(**fields)


def concatenate(parts: list[History]) -> History:
    """The histories of ``parts``, one after the other."""
    return History(*(np.concatenate(x) for x in zip(empty_history(), *parts, strict=True)))


class HistoryRecorder:
    """A history that grows by parts; only its last ``memory`` steps, ``recent``, are concatenated while it grows."""

    def __init__(self, past: History, memory: int) -> None:
        self._parts, self._memory = [past], memory
        self._start = past.seconds[-1] if past.steps else 0.0
        self.recent, self.steps = past, past.steps

    def append(self, part: History) -> None:
        """Append a part, whose ``seconds`` count from the creation of this recorder."""
        part = part._replace(seconds=part.seconds + self._start)
        self._parts.append(part)
        self.steps += part.steps
        self.recent = History(*(x[-self._memory :] for x in concatenate([self.recent, part])))

    def history(self) -> History:
        """The history of all steps."""
        return concatenate(self._parts)
