# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``fit(svi, rng_key, *args)`` takes the steps of ``svi.run`` until the fit has converged (:mod:`.convergence`)."""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from typing import Any, NamedTuple

import jax
import numpy as np
from numpyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.svi import SVI, SVIState
from tqdm.auto import tqdm

from numpyro_natgrad.blocks.partition import Partition
from numpyro_natgrad.compilation.batches import BatchIterator, described, is_read_once
from numpyro_natgrad.compilation.data import Arguments, Data, split, traceable
from numpyro_natgrad.compilation.devices import check_processes, explained_loss, fetch
from numpyro_natgrad.compilation.disk_cache import disk_cache
from numpyro_natgrad.compilation.initial import check_start, initial_state, is_set_up
from numpyro_natgrad.infer.convergence import (
    STOPPING,
    History,
    HistoryRecorder,
    converged,
    diverged,
    empty_history,
    format_interval,
    remaining_effort,
)
from numpyro_natgrad.infer.judge import MIN_HELD, Judgement, StopCheck
from numpyro_natgrad.infer.loop import STEPS_PER_CHUNK, Chunk, Program, StepRecords, program_of
from numpyro_natgrad.infer.nonfinite import nonfinite_site
from numpyro_natgrad.infer.optimizer import NaturalGradient, table
from numpyro_natgrad.infer.starts import Starts, best_start, check_num_starts
from numpyro_natgrad.options import RuleConstants, StructureError
from numpyro_natgrad.step.newton_decrement import noise_part
from numpyro_natgrad.step.state import NaturalGradientState

#: Seconds between two updates of the progress bar while programs are compiled.
REFRESH = 0.5
#: Reasons for the end of a fit.
CONVERGED, MAX_STEPS, EXHAUSTED, INTERRUPTED = (
    "converged",
    "`max_steps` was reached",
    "`batches` is exhausted",
    "interrupted",
)
FAILED = "an error was raised"
DIVERGED = (
    f"diverged: the last {STOPPING.patience} losses were not finite; check data and model for NaN. If this happens at "
    "the start, start elsewhere by `init_params`, or the guide's `init_loc_fn=init_to_median` or a smaller `init_scale`"
)


class FitResult(NamedTuple):
    """What :func:`fit` returns: the three fields of the result of ``svi.run``, and how the fit went.

    :ivar dict params: the fitted parameters, constrained.
    :ivar SVIState state: the last state.
    :ivar numpy.ndarray losses: the loss of every step, ``(steps,)``, nats.
    :ivar History history: figures of every step.
    :ivar bool converged: whether the judge found the expected remaining gain below the tolerance, beyond noise.
    :ivar str reason: why the fit ended, the remaining gain, and how many more steps or particles it needs, if any.
    :ivar str report: the table of :meth:`.NaturalGradient.report` for the last arguments; empty without steps.
    :ivar Judgement judgement: what the judge found last; ``None`` if no stop was proposed.
    :ivar float judge_seconds: seconds that the judge took, with compilation.
    :ivar Starts starts: how the best of several starts was chosen; ``None`` with a single start.
    :ivar float batch_seconds: seconds that the steps waited for ``batches``.
    """

    params: dict[str, Any]
    state: SVIState
    losses: np.ndarray
    history: History
    converged: bool
    reason: str
    report: str
    judgement: Judgement | None = None
    judge_seconds: float = 0.0
    starts: Starts | None = None
    batch_seconds: float = 0.0

    def __repr__(self) -> str:
        """The outcome without the arrays."""
        return f"FitResult(converged={self.converged}, steps={len(self.losses)}, reason={self.reason!r})"


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
    :param cache: where compiled programs are kept for the next process: ``None`` for the user's cache folder, or that
        of the environment variable ``NUMPYRO_NATGRAD_CACHE``, which turns the cache off if it is ``off``; a folder; or
        ``False`` for nowhere. JAX's own persistent cache is used instead where it is set.
    :param bool progress_bar: show the remaining gain, and means of ELBO and KL over a chunk of steps. Of several
        processes only the first one shows it.
    :param bool forward_mode_differentiation: as for ``svi.run``.
    :param kwargs: keyword arguments of model and guide, the same in every step.
    :return: parameters, state, history, and why the fit ended.
    :raises TypeError: if the optimizer is not a :class:`.NaturalGradient`, or an argument has the wrong type.
    :raises ValueError: if an argument has a value that cannot be used.
    :raises StructureError: if model or guide have mutable state that the loss would drop.
    """
    _check_optimizer(svi)
    _check(max_steps, tolerance)
    _check_batches(args, batches, epochs, prefetch)
    check_num_starts(
        num_starts, {"batches": batches, "init_state": init_state, "init_params": init_params, "resume": resume}
    )
    source = BatchIterator(batches, STEPS_PER_CHUNK, epochs, prefetch)
    hidden = not progress_bar or jax.process_index() > 0
    bar = tqdm(total=max_steps, disable=hidden, mininterval=0.2)
    with explained_loss(), source, disk_cache(cache), bar:
        bar.set_postfix_str("tracing")
        first = args if source.fixed else source.peek()
        if first is None:
            raise ValueError("`batches` is empty: expected at least one tuple of arguments for model and guide.")
        check_processes((first, kwargs, init_state))
        is_new = init_state is None and resume is None and not is_set_up(svi.guide)
        state = _start(svi, rng_key, first, kwargs, init_state, init_params, resume)
        _check_mutable_state(svi, state)
        _check_parameters(state)
        past = empty_history() if resume is None else resume.history
        program = program_of(svi, forward_mode_differentiation)
        run = _Run(svi, program, state, (args, kwargs), HistoryRecorder(past), bar)
        if is_new:
            run.check_start = lambda: check_start(svi, rng_key, first, kwargs, init_params)
        starts = run.choose(rng_key, num_starts, max_steps) if num_starts > 1 else None
        try:
            end = run.until(source, max_steps - (starts.steps if starts else 0), tolerance)
        except Exception as error:
            if not source.fixed and run.recorder.steps > past.steps:
                _keep(error, run.result(FAILED, source, tolerance, starts))
            raise
        result = run.result(end, source, tolerance, starts)
        bar.set_postfix_str(result.reason)
    return result


def _keep(error: Exception, result: FitResult) -> None:
    """Give the steps before an error to the user, as its ``partial_result``."""
    error.partial_result = result  # type: ignore[attr-defined]
    error.add_note(
        f"`fit` had taken {result.history.steps} steps. The `partial_result` of this error is their result: go on by "
        "`fit(..., resume=error.partial_result)`."
    )


class _Run:
    """A fit in progress: its state, its history, its judge, and the partition of the last chunk.

    :ivar check_start: raises an error if the start is not valid; called if the first steps could not be taken.
    """

    def __init__(
        self,
        svi: SVI,
        program: Program,
        state: SVIState,
        arguments: tuple[Arguments, dict[str, Any]],
        recorder: HistoryRecorder,
        bar: tqdm,
    ) -> None:
        self._svi, self._program, self.state, self._arguments = svi, program, state, arguments
        self.recorder, self._bar = recorder, bar
        self.check = StopCheck(svi, recorder.steps)
        self.partition: Partition | None = None
        self.check_start: Callable[[], None] | None = None
        self._data: Data | None = None
        self._begin = time.perf_counter()

    def choose(self, key: jax.Array, num_starts: int, max_steps: int) -> Starts:
        """Go on from the best of several starts, at least one chunk before the last step."""
        show = lambda text: self._bar.set_postfix_str(text)
        most = max(max_steps - STEPS_PER_CHUNK, 0)
        data = split(self._svi, *self._arguments)
        self.state, records, starts = best_start(
            self._svi, key, self.state, self._program, num_starts, most, data, show
        )
        if records is not None:
            self.recorder.append(_history(records, starts.steps, 0.0, time.perf_counter() - self._begin))
            self._bar.update(starts.steps)
        return starts

    def result(self, end: str, source: BatchIterator, tolerance: float, starts: Starts | None) -> FitResult:
        """The outcome, after a reason to stop."""
        svi, history, optimizer_state = self._svi, self.recorder.history(), self.state.optim_state[1]
        unowned = tuple(self.partition.unowned) if self.partition else ()
        effort = _effort(end, history, tolerance, optimizer_state, svi.optim._options.constants)
        reason = _reason(end, history, tolerance, effort, unowned, self.check) + source.remarks(end == EXHAUSTED)
        reason += f"; {starts}" if starts else ""
        if end == DIVERGED and source.fixed and self.state.mutable_state is None:
            where = nonfinite_site(svi, svi.get_params(self.state), self.state.rng_key, *self._arguments)
            reason += f"; {where}" if where else ""
        return FitResult(
            params=self._program.constrained(self.state).result()(self.state),
            state=self.state,
            losses=history.loss,
            history=history,
            converged=end == CONVERGED,
            reason=reason,
            report=table(self.partition.rows()) if self.partition else "",
            judgement=self.check.last,
            judge_seconds=self.check.seconds,
            starts=starts,
            batch_seconds=source.seconds,
        )

    def until(self, source: BatchIterator, max_steps: int, tolerance: float) -> str:
        """Run chunks until there is a reason to stop, and return it."""
        try:
            left = max_steps
            while left:
                steps, batches = source.take(left)
                if not steps:
                    return EXHAUSTED
                self._advance(steps, batches, tolerance)
                left -= steps
                if diverged(self.recorder.recent):
                    return DIVERGED
                if converged(self.recorder.recent, tolerance) and self._is_granted(source, tolerance):
                    return CONVERGED
        except KeyboardInterrupt:
            source.abandon()
            return INTERRUPTED
        return MAX_STEPS

    def _is_granted(self, source: BatchIterator, tolerance: float) -> bool:
        assert self.partition is not None
        assert self._data is not None
        hold, steps = None if source.fixed else source.hold, self.recorder.steps
        return self.check.grants(self.state, self._data, steps, self.partition.particles, hold, tolerance)

    def _advance(self, steps: int, batches: Arguments, tolerance: float) -> None:
        begin = time.perf_counter() - self._begin
        chunk = self._compiled(batches, tolerance)
        assert self._data is not None
        state, records = chunk(self.state, steps, batches, self._data)
        part = _history(fetch(records), steps, begin, time.perf_counter() - self._begin)
        if self.check_start is not None and not (np.isfinite(part.loss) & ~part.skipped).any():
            self.check_start()
        self.state, self.check_start = state, None
        self.recorder.append(part)
        self._bar.set_postfix_str(_progress(part), refresh=False)
        self._bar.update(steps)

    def _compiled(self, batches: Arguments, tolerance: float) -> Chunk:
        """The program of a chunk; everything that the fit needs later is compiled beside it."""
        trace = lambda data: self._program.compiled(self.state, batches, data)
        if self._data is None:
            self._data, (self.partition, future) = traceable(self._svi, *self._arguments, trace)
            if tolerance:
                self.check.compile(self.state, self._data, batches)
            self._program.constrained(self.state)
        else:
            self.partition, future = _noted(trace, self._data, batches)
        while not future.done():
            self._bar.set_postfix_str("compiling (first fit of this shape; kept for the next)")
            wait([future], timeout=REFRESH)
        return future.result()


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
    starts = {"init_state": init_state, "init_params": init_params, "resume": resume}
    if len(several := [f"`{name}`" for name, x in starts.items() if x is not None]) > 1:
        raise ValueError(f"{' and '.join(several)} were given: expected one of them to start from.")
    given = init_state if resume is None else resume.state
    if given is not None and svi.constrain_fn is not None:
        return given
    # With a given state, ``svi.init`` only prepares ``svi.get_params``, as in a new process.
    fresh = initial_state(svi, rng_key, args, kwargs, init_params)
    return fresh if given is None else given


def _history(records: StepRecords, steps: int, begin: float, end: float) -> History:
    loss, info = records
    seconds = begin + (end - begin) * np.arange(1, steps + 1) / steps
    fields = info.kl, info.step_size, info.newton_decrement, info.newton_decrement_error, info.limited, info.skipped
    return History(*(np.asarray(x)[:steps] for x in (loss, *fields, seconds)))


def _progress(part: History) -> str:
    """The text beside the progress bar, for a chunk."""
    gain = format_interval(part.newton_decrement[-1], part.newton_decrement_error[-1])
    text = f"ELBO {-part.loss.mean():.2f}, KL/step {part.kl.mean():.2g}, {gain} nats to gain"
    skipped = int(part.skipped.sum())
    return text + (f", {skipped} of {part.steps} skipped" if skipped else "")


def _effort(end: str, history: History, tolerance: float, state: NaturalGradientState, constants: RuleConstants) -> str:
    """How many more steps are needed, as the end of a sentence, if that is unknown to the reader."""
    known = end in (CONVERGED, DIVERGED) or not tolerance or not history.steps
    return "" if known else remaining_effort(history, tolerance, *noise_part(state, constants))


def _reason(
    end: str, history: History, tolerance: float, effort: str, unowned: tuple[str, ...], check: StopCheck
) -> str:
    """Why the fit ended, the remaining gain and who estimated it, and how many more steps are needed."""
    if end == DIVERGED or not history.steps:
        return end
    gain = format_interval(history.newton_decrement[-1], history.newton_decrement_error[-1])
    rest = f" (without {', '.join(map(repr, unowned))}, moved by the fallback optimizer)" if unowned else ""
    running = f"{gain} nats to gain{rest}, `tolerance={tolerance:g}`"
    if check.last is not None and check.last.abstains:
        return f"{end}: {running}, by the running estimate alone, since {check.last.cause}{effort}"
    if end == CONVERGED and check.last is not None:
        return f"{end}: {check.last}, by {check.last.draws} fresh draws, `tolerance={tolerance:g}`"
    if check.last is not None:
        when = "" if check.at == history.steps else f" after {check.at} steps"
        return f"{end}: an independent check{when} found {check.last}, `tolerance={tolerance:g}`"
    few = f"; fewer than {MIN_HELD} batches are left for an independent check" if check.few else ""
    return f"{end}: {running}{few or effort}"


def _check(max_steps: Any, tolerance: Any) -> None:
    _check_count("max_steps", max_steps, "10_000")
    if not _is_number(tolerance):
        raise TypeError(f"`tolerance={tolerance!r}`: expected a number of nats, such as 0.01; 0 takes all steps.")
    if not 0 <= tolerance < np.inf:
        raise ValueError(f"`tolerance={tolerance!r}`: expected a number of nats, such as 0.01; 0 takes all steps.")


def _check_count(name: str, value: Any, example: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"`{name}={value!r}`: expected a positive integer, such as {example}.")
    if value < 1:
        raise ValueError(f"`{name}={value!r}`: expected a positive integer, such as {example}.")


def _check_batches(args: tuple[Any, ...], batches: Any, epochs: Any, prefetch: Any) -> None:
    _check_count("epochs", epochs, "3")
    if not isinstance(prefetch, bool):
        raise TypeError(f"`prefetch={prefetch!r}`: expected `True` or `False`.")
    if batches is None:
        if epochs != 1:
            raise ValueError(
                f"`epochs={epochs}` was given without `batches`: expected `batches=` beside it. A step on `args` takes "
                "all of the data; `max_steps` limits the steps."
            )
        return
    if args:
        raise ValueError(
            f"{len(args)} positional arguments for model and guide were given beside `batches`: expected one of "
            "the two. Give what is the same in every step by keyword."
        )
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes | dict | np.ndarray | jax.Array):
        given = repr(batches) if isinstance(batches, int | float | str) else f"<{type(batches).__name__}>"
        raise TypeError(
            f"`batches={given}`: expected an iterable of tuples, the arguments of one step after the other."
        )
    if epochs > 1 and is_read_once(batches):
        raise ValueError(
            f"`epochs={epochs}`, but `batches` is a `{type(batches).__name__}`, which can be read once: expected an "
            "iterable whose `__iter__` returns a new iterator each time, such as a list or a data loader."
        )


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | np.number) and not isinstance(x, bool)


def _check_optimizer(svi: SVI) -> None:
    if not isinstance(svi, SVI):
        raise TypeError(
            f"`fit({type(svi).__name__}, ...)`: expected a `numpyro.infer.SVI`, such as "
            "`SVI(model, guide, NaturalGradient(), Trace_ELBO(num_particles=8))`."
        )
    if not isinstance(svi.optim, NaturalGradient):
        raise TypeError(
            f"the optimizer of this `SVI` is `{type(svi.optim).__name__}`: expected `NaturalGradient`, which estimates "
            "the remaining gain. Use `SVI(model, guide, NaturalGradient(), loss)`, or call `svi.run`."
        )


def _check_parameters(state: SVIState) -> None:
    if not jax.tree.leaves(state.optim_state[1].params):
        raise ValueError(
            "the guide and the model have no parameters, so there is nothing to fit; expected at least one "
            "`numpyro.param` site. Use an autoguide such as `AutoMultivariateNormal(model)`, or add a `param`."
        )


def _check_mutable_state(svi: SVI, state: SVIState) -> None:
    """Refuse a loss that drops the values of ``numpyro.primitives.mutable`` sites.

    With several particles NumPyro's ELBOs return ``None`` in their place, which changes the structure of the state
    inside of a compiled loop. Other losses have no ``loss_with_mutable_state``.
    """
    if state.mutable_state is None:
        return
    name, sites = type(svi.loss).__name__, sorted(state.mutable_state)
    update = getattr(type(svi.loss), "loss_with_mutable_state", ELBO.loss_with_mutable_state)
    if update is ELBO.loss_with_mutable_state:
        raise StructureError(
            f"the mutable sites {sites} cannot be updated: `{name}` does not support mutable state; expected "
            "`Trace_ELBO(num_particles=1)` or `TraceMeanField_ELBO(num_particles=1)`. Choose one of these losses."
        )
    drops = update in (Trace_ELBO.loss_with_mutable_state, TraceMeanField_ELBO.loss_with_mutable_state)
    if drops and svi.loss.num_particles > 1:
        raise StructureError(
            f"the mutable sites {sites} cannot be updated: `{name}(num_particles={svi.loss.num_particles})` drops "
            f"mutable state; expected one particle. Use `{name}(num_particles=1)`."
        )
