# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What a fit tells while it runs: a progress bar, lines of :mod:`logging`, and calls of the user's ``callback``."""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
from numpyro.infer.svi import SVIState
from tqdm.auto import tqdm

from numpyro_natgrad.infer.convergence import format_interval
from numpyro_natgrad.infer.fitting.outcome import FitResult
from numpyro_natgrad.infer.history import History

#: The logger of the package. Chunks of steps have the level ``INFO``, or ``DEBUG`` within :data:`LOG_INTERVAL`.
LOGGER = logging.getLogger("numpyro_natgrad")
#: Seconds between two lines of the level ``INFO``.
LOG_INTERVAL = 1.0


class Progress(NamedTuple):
    """What :func:`.fit` passes to its ``callback`` after each chunk of steps.

    .. doctest::

        >>> from numpyro_natgrad import Progress
        >>> def callback(progress: Progress):
        ...     if progress.seconds > 60:
        ...         raise StopIteration("a minute is over")

    :ivar int step: steps taken, with those of a result that was resumed.
    :ivar SVIState state: the state after them.
    :ivar float elbo: mean ELBO of the chunk, nats.
    :ivar float kl: mean forward KL of a step of the chunk, nats.
    :ivar float newton_decrement: expected remaining gain, nats.
    :ivar float newton_decrement_error: its standard error, nats.
    :ivar float seconds: seconds since the fit began, with compilation, and those of a result that was resumed.
    :ivar result: ``result()`` makes a :class:`.FitResult` of the steps so far, from which ``fit(resume=...)`` goes on.
    """

    step: int
    state: SVIState
    elbo: float
    kl: float
    newton_decrement: float
    newton_decrement_error: float
    seconds: float
    result: Callable[[], FitResult]


Callback = Callable[[Progress], object]


def progress_of(
    part: History, steps: int, seconds: float, state: SVIState, result: Callable[[], FitResult]
) -> Progress:
    """The figures of the last chunk, after ``steps`` and ``seconds`` in all."""
    gain, error = float(part.newton_decrement[-1]), float(part.newton_decrement_error[-1])
    return Progress(steps, state, float(-part.loss.mean()), float(part.kl.mean()), gain, error, seconds, result)


def message_of_stop(callback: Callback, progress: Progress) -> str | None:
    """Call the user's function, and return what it raises :class:`StopIteration` with, or ``None`` to go on.

    :raises TypeError: if it returns ``True``, as functions that stop other loops do.
    """
    try:
        answer = callback(progress)
    except StopIteration as stop:
        return str(stop)
    if answer is True:
        raise TypeError(
            "`callback` returned `True`: expected `None`, since its answer is not used. To end the fit, "
            '`raise StopIteration("why")`.'
        )
    return None


class Reporter:
    """The progress bar and the logger, both in the first of several processes only."""

    def __init__(self, max_steps: int, progress_bar: bool) -> None:
        self._is_first = jax.process_index() == 0
        self._bar = tqdm(total=max_steps, disable=not (progress_bar and self._is_first), mininterval=0.2)
        self._next = 0.0

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        """Show a few words beside the bar."""
        self._bar.set_postfix_str(text)

    def steps(self, part: History, total: int) -> None:
        """Report the steps of a chunk, after which there are ``total``."""
        self.count(part.steps, total, _text(part))

    def count(self, steps: int, total: int, text: str) -> None:
        """Report so many steps, after which there are ``total``, in these words."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(steps)
        if self._is_first:
            now = time.monotonic()
            due = now >= self._next
            LOGGER.log(logging.INFO if due else logging.DEBUG, "step %d: %s", total, text)
            self._next = now + LOG_INTERVAL if due else self._next

    def end(self, reason: str) -> None:
        """Report why the fit ended."""
        self.say(reason)
        if self._is_first:
            LOGGER.info("%s", reason)


def _text(part: History) -> str:
    """The text beside the progress bar, for a chunk."""
    gain = format_interval(part.newton_decrement[-1], part.newton_decrement_error[-1])
    text = f"ELBO {-part.loss.mean():.2f}, KL/step {part.kl.mean():.2g}, {gain} nats to gain"
    skipped = int(part.skipped.sum())
    return text + (f", {skipped} of {part.steps} skipped" if skipped else "")
