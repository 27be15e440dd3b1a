# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``fit(svi, rng_key, *args)`` takes the steps of ``svi.run`` until the fit has converged (:mod:`.convergence`)."""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

import jax
import numpy as np
from numpyro.infer.svi import SVI, SVIState

from numpyro_natgrad.blocks.partition import Partition
from numpyro_natgrad.compilation.batches import BatchIterator, described
from numpyro_natgrad.compilation.data import Arguments, Data, split, traceable
from numpyro_natgrad.compilation.devices import check_processes, explained_loss, fetch
from numpyro_natgrad.compilation.disk_cache import disk_cache
from numpyro_natgrad.compilation.initial import check_start, initial_state, is_set_up
from numpyro_natgrad.compilation.threads import one_blas_thread
from numpyro_natgrad.infer.arguments import parameter_values
from numpyro_natgrad.infer.convergence import STOPPING, converged, diverged
from numpyro_natgrad.infer.fitting.checks import (
    check_batches,
    check_callback,
    check_init_params,
    check_keywords,
    check_limits,
    check_mutable_state,
    check_optimizer,
    check_parameters,
    check_start_given,
)
from numpyro_natgrad.infer.fitting.outcome import (
    CONVERGED,
    DIVERGED,
    EXHAUSTED,
    FAILED,
    INTERRUPTED,
    MAX_STEPS,
    RUNNING,
    STOPPED,
    FitResult,
    outcome,
)
from numpyro_natgrad.infer.fitting.progress import Callback, Reporter, message_of_stop, progress_of
from numpyro_natgrad.infer.fitting.starts import SeveralStarts, Starts, check_num_starts
from numpyro_natgrad.infer.history import History, HistoryRecorder, empty_history
from numpyro_natgrad.infer.loop import STEPS_PER_CHUNK, Chunk, Program, history_of, program_of
from numpyro_natgrad.infer.nonfinite import nonfinite_site
from numpyro_natgrad.infer.stop_check import StopCheck

#: Seconds between two updates of the progress bar while programs are compiled.
REFRESH = 0.5


@one_blas_thread()
def fit(
    svi: SVI,
    rng_key: jax.Array,
    *args: Any,
    max_steps: int = 10_000,
    tolerance: float = 0.01,
    batches: Iterable[Any] | None = None,
    epochs: int = 1,
    prefetch: bool = True,
    init_state: SVIState | None = None,
    init_params: dict[str, Any] | None = None,
    resume: FitResult | None = None,
    num_starts: int = 1,
    callback: Callback | None = None,
    cache: bool | str | os.PathLike[str] | None = None,
    progress_bar: bool = True,
    forward_mode_differentiation: bool = False,
    **kwargs: Any,
) -> FitResult:
    """Take the steps of ``svi.run`` until the expected remaining gain is below ``tolerance`` nats.

    The remaining gain is relative to the best guide of this family nearby. A running estimate proposes a stop, and an
    independent one, by fresh draws and over all parameters, grants it (:mod:`.judge`). How close that guide is to the
    posterior, :func:`.verdict` estimates. After a keyboard interrupt the result so far is returned.

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_natgrad import NaturalGradient, fit
        >>> def model(y):
        ...     z = numpyro.sample("z", dist.Normal(0, 10))
        ...     numpyro.sample("y", dist.Normal(z, 1), obs=y)
        >>> svi = SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO(num_particles=4))
        >>> result = fit(svi, random.key(0), jnp.array(2.0), progress_bar=False)
        >>> result.converged, len(result.losses) < 50
        (True, True)

    :param SVI svi: an ``SVI`` with :class:`.NaturalGradient` as its optimizer.
    :param jax.Array rng_key: as for ``svi.run``; not used if a state is given.
    :param args: positional arguments of model and guide, the same in every step. Arrays are inputs of the compiled
        program, so that other data of the same shapes and types need no compilation, unless the model needs their
        values while it is traced.
    :param int max_steps: the largest number of steps of this call.
    :param float tolerance: remaining gain, nats, below which the fit has converged; 0 takes all steps. A gain of 0.01
        nats is at most 0.14 posterior standard deviations in any direction.
    :param batches: an iterable of tuples or lists, each with the arguments of one step, instead of ``args``: arrays, or
        what NumPy can convert, such as the tensors of a data loader. The fit ends when it is exhausted. Each new shape
        compiles once. An error that it raises comes out of ``fit`` with the result so far as ``partial_result``.
    :param int epochs: how often ``batches`` is read, at most; an iterator, such as a generator, can be read once.
    :param bool prefetch: read ``batches`` in a thread, one chunk of steps ahead, and put them on the device while steps
        run. ``False`` for a source that only the calling thread may read.
    :param SVIState init_state: the state to start from, as for ``svi.run``.
    :param dict init_params: initial values of parameters, as for ``svi.run``.
    :param FitResult resume: a result to continue from its last state; its history is extended.
    :param int num_starts: random starts, run at once by ``jax.vmap``, of which the best is fitted (:mod:`.starts`).
        ``max_steps`` and the history count the steps of the best one.
    :param callback: a function that is called with a :class:`.Progress` after every five steps. To end the fit, it
        raises ``StopIteration("why")``. Another error comes out of ``fit`` with the result so far as
        ``partial_result``.
    :param cache: where compiled programs are kept for the next process: ``None`` for the user's cache folder, or that
        of the environment variable ``NUMPYRO_NATGRAD_CACHE``, which turns the cache off if it is ``off``; a folder; or
        ``False`` for nowhere. JAX's own persistent cache is used instead where it is set.
    :param bool progress_bar: show the remaining gain, and means of ELBO and KL over a chunk of steps. Of several
        processes only the first one shows it. The logger ``"numpyro_natgrad"`` has the same text (level ``INFO``).
    :param bool forward_mode_differentiation: as for ``svi.run``.
    :param kwargs: keyword arguments of model and guide, the same in every step.
    :return: parameters, state, history, and why the fit ended.
    :raises TypeError: if the optimizer is not a :class:`.NaturalGradient`, or an argument has the wrong type.
    :raises ValueError: if an argument has a value that cannot be used.
    :raises StructureError: if model or guide have mutable state that the loss would drop.
    """
    check_optimizer(svi)
    check_keywords(svi, kwargs, fit)
    check_limits(max_steps, tolerance)
    check_batches(args, batches, epochs, prefetch)
    check_num_starts(
        num_starts, {"batches": batches, "init_state": init_state, "init_params": init_params, "resume": resume}
    )
    check_callback(callback)
    check_start_given(svi, rng_key, init_state, init_params, resume)
    source = BatchIterator(batches, STEPS_PER_CHUNK, epochs, prefetch)
    reporter = Reporter(max_steps, progress_bar)
    with explained_loss(), source, disk_cache(cache), reporter:
        reporter.say("tracing")
        first = args if source.fixed else source.peek()
        if first is None:
            raise ValueError("`batches` is empty: expected at least one tuple of arguments for model and guide.")
        check_processes((first, kwargs, init_state))
        is_new = init_state is None and resume is None and not is_set_up(svi.guide)
        state = _start(svi, rng_key, first, kwargs, init_state, init_params, resume)
        check_mutable_state(svi, state)
        check_parameters(state)
        program = program_of(svi, forward_mode_differentiation)
        run = _Run(svi, program, state, (args, kwargs), source, tolerance, resume, reporter, callback)
        if is_new:
            run.check_start = lambda: check_start(svi, rng_key, first, kwargs, init_params)
        if num_starts > 1:
            run.choose(rng_key, num_starts, max_steps)
        try:
            end = run.until(max_steps - (run.starts.steps if run.starts else 0))
        except Exception as error:
            run.keep(error)
            raise
        result = run.result(end)
        reporter.end(result.reason)
    return result


class _Run:
    """A fit in progress: its state, its history, its judge, and the partition of the last chunk.

    :ivar check_start: raises an error if the start is not valid; called if the first steps could not be taken.
    :ivar starts: how the best of several starts was chosen.
    """

    def __init__(
        self,
        svi: SVI,
        program: Program,
        state: SVIState,
        arguments: tuple[Arguments, dict[str, Any]],
        source: BatchIterator,
        tolerance: float,
        past: FitResult | None,
        reporter: Reporter,
        callback: Callback | None,
    ) -> None:
        self._svi, self._program, self._state, self._arguments = svi, program, state, arguments
        self._source, self._tolerance, self._reporter, self._callback = source, tolerance, reporter, callback
        history = past.history if past else empty_history()
        self._recorder, self._first = HistoryRecorder(history, STOPPING.patience), history.steps
        self._check = StopCheck(svi, past.next_check if past else 0)
        self.starts: Starts | None = None
        self.check_start: Callable[[], None] | None = None
        self._partition: Partition | None = None
        self._data: Data | None = None
        self._begin = time.perf_counter()

    def choose(self, key: jax.Array, num_starts: int, max_steps: int) -> None:
        """Go on from the best of several starts, at least one chunk before the last step."""
        most = max(max_steps - STEPS_PER_CHUNK, 0)
        data = split(self._svi, *self._arguments)
        several = SeveralStarts(self._svi, key, self._state, self._program, num_starts, data)
        self._traced(())  # to be compiled beside them
        self._state, records, starts = several.best(most, self._reporter.say)
        if records is not None:
            part = history_of(records, starts.steps, 0.0, time.perf_counter() - self._begin)
            self._record(part)
        self.starts = starts

    def keep(self, error: Exception) -> None:
        """Give the steps before an error of ``batches`` or ``callback`` to the user, as its ``partial_result``."""
        steps = self._recorder.steps
        if hasattr(error, "partial_result") or steps == self._first or (self._source.fixed and not self._callback):
            return
        error.partial_result = self.result(FAILED)  # type: ignore[attr-defined]
        error.add_note(
            f"`fit` had taken {steps} steps. The `partial_result` of this error is their result: go on by "
            "`fit(..., resume=error.partial_result)`."
        )

    def result(self, end: str) -> FitResult:
        """The outcome, after a reason to stop."""
        svi, source, state, history = self._svi, self._source, self._state, self._recorder.history()
        params = self._program.constrained(state).result()(state)
        found = outcome(svi, state, params, history, self._check, self._partition, end, self._tolerance)
        reason = found.reason + source.remarks(end == EXHAUSTED) + (f"; {self.starts}" if self.starts else "")
        if end == DIVERGED and source.fixed and state.mutable_state is None:
            where = nonfinite_site(svi, svi.get_params(state), state.rng_key, *self._arguments)
            reason += f"; {where}" if where else ""
        return found._replace(reason=reason, starts=self.starts, batch_seconds=source.seconds)

    def until(self, max_steps: int) -> str:
        """Run chunks until there is a reason to stop, and return it."""
        try:
            left = max_steps
            while left:
                steps, batches = self._source.take(left)
                if not steps:
                    return EXHAUSTED
                part = self._advance(steps, batches)
                left -= steps
                end = self._end()
                message = self._told(part, end or RUNNING)
                if end:
                    return end
                if message is not None:
                    return f"{STOPPED} ({message})" if message else STOPPED
        except KeyboardInterrupt:
            self._source.abandon()
            return INTERRUPTED
        return MAX_STEPS

    def _end(self) -> str | None:
        """The reason to stop now, if the losses or the judge are one."""
        if diverged(self._recorder.recent):
            return DIVERGED
        return CONVERGED if self._stops() else None

    def _told(self, part: History, end: str) -> str | None:
        """Call the user's function, if there is one, and return the message with which it stops the fit."""
        if self._callback is None:
            return None
        seconds = float(self._recorder.recent.seconds[-1])
        result = partial(self.result, end)
        return message_of_stop(self._callback, progress_of(part, self._recorder.steps, seconds, self._state, result))

    def _stops(self) -> bool:
        """Whether a stop is proposed and granted."""
        history, steps = self._recorder.recent, self._recorder.steps
        if not converged(history, self._tolerance):
            return False
        assert self._partition is not None
        assert self._data is not None
        hold, particles = None if self._source.fixed else self._source.hold, self._partition.particles
        return self._check.grants(history, self._state, self._data, steps, particles, hold, self._tolerance)

    def _advance(self, steps: int, batches: Arguments) -> History:
        begin = time.perf_counter() - self._begin
        chunk = self._compiled(batches)
        assert self._data is not None
        state, records = chunk(self._state, steps, batches, self._data)
        part = history_of(fetch(records), steps, begin, time.perf_counter() - self._begin)
        if self.check_start is not None and not (np.isfinite(part.loss) & ~part.skipped).any():
            self.check_start()
        self._state, self.check_start = state, None
        self._record(part)
        return part

    def _record(self, part: History) -> None:
        self._recorder.append(part)
        self._reporter.steps(part, self._recorder.steps)

    def _compiled(self, batches: Arguments) -> Chunk:
        """The program of a chunk, when it is compiled."""
        future = self._traced(batches)
        while not future.done():
            self._reporter.say("compiling (first fit of this shape; kept for the next)")
            wait([future], timeout=REFRESH)
        return future.result()

    def _traced(self, batches: Arguments) -> "Future[Chunk]":
        """The program of a chunk; everything that the fit needs later is compiled beside it."""
        trace = lambda data: self._program.compiled(self._state, batches, data)
        if self._data is None:
            self._data, (self._partition, future) = traceable(self._svi, *self._arguments, trace)
            if self._tolerance:
                self._check.compile(self._state, self._data, batches)
            self._program.constrained(self._state)
        else:
            self._partition, future = _noted(trace, self._data, batches)
        return future


def _noted(trace: Callable[[Data], Any], data: Data, batches: Arguments) -> Any:
    """Trace the steps for other batches; an error of the model is given the shapes of the batch."""
    try:
        return trace(data)
    except Exception as error:
        if batches:
            error.add_note(
                f"raised for a batch with the arguments {described(batches, 1)}, after others had passed. If it has "
                "fewer rows, as at the end of an epoch, let the plate follow: `subsample_size=len(x)`."
            )
        raise


def _start(
    svi: SVI,
    rng_key: jax.Array,
    args: Arguments,
    kwargs: dict[str, Any],
    init_state: SVIState | None,
    init_params: dict[str, Any] | None,
    resume: FitResult | None,
) -> SVIState:
    """The state to start from."""
    given = init_state if resume is None else resume.state
    if given is not None and svi.constrain_fn is not None:
        return given
    # With a given state, ``svi.init`` only prepares ``svi.get_params``, as in a new process.
    values = None if init_params is None else parameter_values(init_params, "init_params")
    try:
        fresh = initial_state(svi, rng_key, args, kwargs, values)
    except Exception:
        if values is not None:  # the guide may not be set up yet
            initial_state(svi, rng_key, args, kwargs)
            check_init_params(svi, values, args, kwargs)
        raise
    if values is not None:
        check_init_params(svi, values, args, kwargs)
    return fresh if given is None else given
