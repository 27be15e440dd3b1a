# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``fit_many``: many fits of one model at once, for other data, folds or starts, in one ``jax.vmap``.

Each fit takes the steps of :func:`.fit` for its key and data, and stops by the same rule and the same judge. One that
has stopped keeps its state while the others go on.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro.infer.svi import SVI, SVIState

from numpyro_natgrad.blocks.partition import Partition
from numpyro_natgrad.compilation.data import Arguments, Data, traceable
from numpyro_natgrad.compilation.devices import fetch
from numpyro_natgrad.compilation.disk_cache import disk_cache
from numpyro_natgrad.compilation.initial import initial_state
from numpyro_natgrad.compilation.threads import one_blas_thread
from numpyro_natgrad.infer.convergence import STOPPING, converged, diverged, format_interval
from numpyro_natgrad.infer.fitting.checks import check_keywords, check_limits, check_optimizer, check_parameters
from numpyro_natgrad.infer.fitting.fit import REFRESH
from numpyro_natgrad.infer.fitting.outcome import CONVERGED, DIVERGED, INTERRUPTED, MAX_STEPS, FitResult, outcome
from numpyro_natgrad.infer.fitting.progress import Reporter
from numpyro_natgrad.infer.fitting.starts import (
    CANNOT_BE_MAPPED,
    START_KEY,
    STARTS,
    cause_of,
    entry,
    stacked_losses,
    stacked_starts,
)
from numpyro_natgrad.infer.history import HistoryRecorder, empty_history
from numpyro_natgrad.infer.loop import STEPS_PER_CHUNK, StackedChunk, StepRecords, history_of, program_of
from numpyro_natgrad.infer.optimizer import table
from numpyro_natgrad.infer.stop_check import StopCheck
from numpyro_natgrad.options import StructureError

#: Columns of :meth:`FitManyResult.table`.
COLUMNS = ("fit", "steps", "ELBO", "nats to gain", "end")


@dataclass(frozen=True, repr=False)
class FitManyResult:
    """What :func:`fit_many` returns: ``result[i]`` is the :class:`.FitResult` of one fit, and printing shows a table.

    :ivar dict params: the fitted parameters, constrained, with a leading axis of the fits.
    :ivar SVIState state: the last states, stacked.
    :ivar tuple fits: the result of each fit.
    :ivar numpy.ndarray elbo: ELBO of each fit for its own data at fresh draws, the same in all fits, nats, ``(fits,)``.
    :ivar numpy.ndarray elbo_error: its standard error, nats.
    """

    params: dict[str, Any]
    state: SVIState
    fits: tuple[FitResult, ...]
    elbo: np.ndarray
    elbo_error: np.ndarray

    @property
    def converged(self) -> np.ndarray:
        """Whether each fit has converged, ``(fits,)``, bool."""
        return np.array([one.converged for one in self.fits])

    @property
    def steps(self) -> np.ndarray:
        """Steps of each fit, ``(fits,)``."""
        return np.array([one.history.steps for one in self.fits])

    def __len__(self) -> int:
        return len(self.fits)

    def __getitem__(self, index: int) -> FitResult:
        return self.fits[index]

    def __iter__(self) -> Iterator[FitResult]:
        return iter(self.fits)

    def __repr__(self) -> str:
        """The outcome without the arrays."""
        return f"FitManyResult(fits={len(self)}, converged={self.converged.sum()}, steps up to {self.steps.max()})"

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """A row for each fit: its steps, its ELBO, the nats to gain by the judge or the steps, and why it ended."""
        rows = []
        for i, one in enumerate(self.fits):
            judged = one.judgement is not None and np.isfinite(one.judgement.gain)
            gain = (max(one.judgement.gain, 0.0), one.judgement.error) if judged and one.judgement else _running(one)
            elbo = format_interval(float(self.elbo[i]), float(self.elbo_error[i]))
            end = one.reason.partition(":")[0]
            rows.append((str(i), str(one.history.steps), elbo, format_interval(*gain), end))
        return table(rows, COLUMNS)


def _running(one: FitResult) -> tuple[float, float]:
    if not one.history.steps:
        return np.nan, np.nan
    return float(one.history.newton_decrement[-1]), float(one.history.newton_decrement_error[-1])


@one_blas_thread()
def fit_many(
    svi: SVI,
    rng_keys: jax.Array,
    *args: Any,
    in_axes: Any = 0,
    max_steps: int = 10_000,
    tolerance: float = 0.01,
    cache: bool | str | os.PathLike[str] | None = None,
    progress_bar: bool = True,
    forward_mode_differentiation: bool = False,
    **kwargs: Any,
) -> FitManyResult:
    """Fit one model many times at once: ``fit(svi, rng_keys[i], *args_i, **kwargs)`` for each i, in one ``jax.vmap``.

    All fits have data of the same shapes. Fits of data sets that differ in their numbers of rows are padded, with a
    mask (``numpyro.handlers.mask``, or ``obs_mask``) as one of the arguments. An autoguide is set up anew for each
    fit.

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_natgrad import NaturalGradient, fit_many
        >>> def model(y):
        ...     z = numpyro.sample("z", dist.Normal(0, 10))
        ...     numpyro.sample("y", dist.Normal(z, 1), obs=y)
        >>> svi = SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO(num_particles=4))
        >>> y = jnp.array([-2.0, 1.0, 5.0])
        >>> many = fit_many(svi, random.split(random.key(0), 3), y, progress_bar=False)
        >>> many.converged.tolist(), many.params["z_auto_loc"].round(1).tolist()
        ([True, True, True], [-2.0, 1.0, 5.0])

    :param SVI svi: an ``SVI`` with :class:`.NaturalGradient` as its optimizer.
    :param jax.Array rng_keys: a key for each fit, as ``jax.random.split`` makes them.
    :param args: positional arguments of model and guide.
    :param in_axes: as for ``jax.vmap``: which axis of each of ``args`` counts the fits; ``None`` for what all of them
        share. Several starts of one fit are ``in_axes=None``.
    :param int max_steps: the largest number of steps of each fit.
    :param float tolerance: as for :func:`.fit`.
    :param cache: as for :func:`.fit`.
    :param bool progress_bar: show the number of fits that have stopped.
    :param bool forward_mode_differentiation: as for ``svi.run``.
    :param kwargs: keyword arguments of model and guide, which all fits share.
    :return: states and parameters, stacked, and the result of each fit.
    :raises TypeError: if the optimizer is not a :class:`.NaturalGradient`, or an argument has the wrong type.
    :raises ValueError: if an argument has a value that cannot be used, or ``vmap`` cannot run the model or the guide.
    :raises StructureError: if the model has mutable state, or needs values of mapped arguments while it is traced.
    """
    check_optimizer(svi)
    check_keywords(svi, kwargs, fit_many)
    check_limits(max_steps, tolerance)
    count = _count(rng_keys)
    mapped = _Mapped.of(args, kwargs, in_axes, count)
    reporter = Reporter(max_steps, progress_bar)
    with disk_cache(cache), reporter:
        reporter.say("tracing")
        first = mapped.of_fit(0)
        state = initial_state(svi, rng_keys[0], first, kwargs)
        check_parameters(state)
        if state.mutable_state is not None:
            raise StructureError(
                "`fit_many`: expected a model without mutable state, but it has the mutable sites "
                f"{sorted(state.mutable_state)}. Call `fit` for each of the {count} fits."
            )
        try:
            run = _ManyRun(svi, rng_keys, mapped, first, kwargs, tolerance, forward_mode_differentiation, reporter)
        except StructureError:
            raise
        except CANNOT_BE_MAPPED as error:
            raise ValueError(
                "`fit_many`: expected a model and a guide that `jax.vmap` can run for all fits at once, but "
                f"{cause_of(error)}. Call `fit` for each of the {count} fits."
            ) from error
        run.until(max_steps)
        result = run.result(random.fold_in(rng_keys[0], START_KEY))
        reporter.end(f"{result.converged.sum()} of {count} fits converged")
    return result


def _count(rng_keys: Any) -> int:
    """The number of keys."""
    is_typed = isinstance(rng_keys, jax.Array) and jnp.issubdtype(rng_keys.dtype, jax.dtypes.prng_key)
    axes = 1 if is_typed else 2
    if not isinstance(rng_keys, jax.Array | np.ndarray) or rng_keys.ndim != axes or not len(rng_keys):
        given = f"{rng_keys.dtype}{rng_keys.shape}" if hasattr(rng_keys, "dtype") else f"<{type(rng_keys).__name__}>"
        raise ValueError(
            f"`rng_keys={given}`: expected one key for each fit, such as `jax.random.split(jax.random.key(0), 10)` for "
            "ten fits."
        )
    return len(rng_keys)


class _Mapped:
    """The positional arguments of all fits, with the axis of the fits first where an array has one.

    :ivar leaves: all leaves of ``(args, kwargs)``, and ``axes``: 0 or ``None`` for each.
    """

    def __init__(self, tree: Any, leaves: list[Any], axes: list[int | None]) -> None:
        self._tree, self.leaves, self.axes = tree, leaves, axes

    @classmethod
    def of(cls, args: Arguments, kwargs: dict[str, Any], in_axes: Any, count: int) -> "_Mapped":
        """Check the axes, and move each to the front."""
        in_axes = tuple(in_axes) if isinstance(in_axes, list) else in_axes
        try:
            axes = jax.tree.broadcast(in_axes, args, is_leaf=lambda x: x is None)
        except ValueError as error:
            raise ValueError(
                f"`in_axes={in_axes!r}`: expected an integer or `None`, or a tuple with one for each of the "
                f"{len(args)} positional arguments of model and guide, as for `jax.vmap`."
            ) from error
        places, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
        each = jax.tree.leaves(axes, is_leaf=lambda x: x is None)
        each += [None] * (len(places) - len(each))
        leaves = []
        for (place, x), axis in zip(places, each, strict=True):
            name = ("args" if place[0].idx == 0 else "kwargs") + jax.tree_util.keystr(place[1:])
            leaves.append(x if axis is None else _axis_first(x, axis, count, name))
        return cls(tree, leaves, [None if axis is None else 0 for axis in each])

    def of_fit(self, index: int) -> Arguments:
        """The positional arguments of one fit."""
        leaves = [x if axis is None else x[index] for x, axis in zip(self.leaves, self.axes, strict=True)]
        return jax.tree.unflatten(self._tree, leaves)[0]

    def stacked(self, first: Data) -> tuple[Data, Data]:
        """The arguments of all fits, with the inputs of those of the first fit, and the axes of these inputs."""
        chosen = first.chosen()
        lost = [i for i, axis in enumerate(self.axes) if axis is not None and not chosen[i]]
        if lost:
            raise StructureError(
                f"`fit_many`: the model or the guide needs the values of {len(lost)} of the mapped arguments while it "
                "is traced, as for a size: expected arrays whose values are not needed. Map over arrays of one size, "
                "with a mask, or call `fit` for each of the fits."
            )
        pick = lambda each: tuple(x for x, yes in zip(each, chosen, strict=True) if yes)
        return Data(pick(self.leaves), first.constants), Data(pick(self.axes), first.constants)


def _axis_first(x: Any, axis: Any, count: int, name: str) -> jax.Array:
    shape = x.shape if isinstance(x, jax.Array | np.ndarray) else ()
    if not isinstance(axis, int) or not -len(shape) <= axis < len(shape) or shape[axis] != count:
        given = f"has the shape {shape}" if isinstance(x, jax.Array | np.ndarray) else f"is a `{type(x).__name__}`"
        raise ValueError(
            f"`{name}` {given}: expected an array with {count} entries along axis {axis!r}, one for each key. Stack "
            "the data of all fits, or give `None` for it in `in_axes` if all fits share it."
        )
    return jnp.moveaxis(jnp.asarray(x), axis, 0)


class _ManyRun:
    """Many fits in progress: stacked states, and for each fit its history, its judge, and why it has ended."""

    def __init__(
        self,
        svi: SVI,
        keys: jax.Array,
        mapped: _Mapped,
        first: Arguments,
        kwargs: dict[str, Any],
        tolerance: float,
        forward: bool,
        reporter: Reporter,
    ) -> None:
        self._svi, self._tolerance, self._reporter = svi, tolerance, reporter
        self._begin = time.perf_counter()
        program = self._program = program_of(svi, forward)

        def trace(one: Data) -> tuple[SVIState, Data, Data, tuple[Partition, Future[StackedChunk]]]:
            data, axes = mapped.stacked(one)
            begin = program.kept(("starts", axes.inputs), stacked_starts(svi, axes), keys, data)
            states = begin.result()(keys, data)
            return states, data, axes, program.together(states, data, axes)

        self._one, found = traceable(svi, first, kwargs, trace)
        self._states, self._data, self._axes, (self._partition, self._chunk) = found
        self._checks = [StopCheck(svi) for _ in range(len(keys))]
        self._recorders = [HistoryRecorder(empty_history(), STOPPING.patience) for _ in self._checks]
        self._ends: list[str | None] = [None] * len(keys)
        if tolerance:
            self._checks[0].compile(self._state_of(0), self._data_of(0))

    def until(self, max_steps: int) -> None:
        """Run chunks until every fit has a reason to stop."""
        end, left = MAX_STEPS, max_steps
        try:
            while not self._chunk.done():
                self._reporter.say("compiling (first fits of this shape; kept for the next)")
                wait([self._chunk], timeout=REFRESH)
            while left and None in self._ends:
                steps = min(left, STEPS_PER_CHUNK)
                self._advance(steps)
                left -= steps
        except KeyboardInterrupt:
            end = INTERRUPTED
        self._ends = [one or end for one in self._ends]

    def _advance(self, steps: int) -> None:
        begin = time.perf_counter() - self._begin
        active = np.array([end is None for end in self._ends])
        going_on = [int(i) for i in np.flatnonzero(active)]
        self._states, records = self._chunk.result()(self._states, steps, active, self._data)
        records, now = fetch(records), time.perf_counter() - self._begin
        for i in going_on:
            self._recorders[i].append(history_of(_entry(records, i), steps, begin, now))
        for i in going_on:
            self._ends[i] = self._end(i)
        stopped = sum(end is not None for end in self._ends)
        self._reporter.count(steps, max(x.steps for x in self._recorders), f"{stopped} of {len(active)} fits stopped")

    def _end(self, i: int) -> str | None:
        recorder, particles = self._recorders[i], self._partition.particles
        if diverged(recorder.recent):
            return DIVERGED
        check, history, steps = self._checks[i], recorder.recent, recorder.steps
        if not converged(history, self._tolerance):
            return None
        at = self._state_of(i), self._data_of(i), steps
        return CONVERGED if check.grants(history, *at, particles, None, self._tolerance) else None

    def _state_of(self, i: int) -> SVIState:
        return entry(self._program, self._states, i)

    def _data_of(self, i: int) -> Data:
        inputs = zip(self._data.inputs, self._axes.inputs, strict=True)
        return Data(tuple(x if axis is None else x[i] for x, axis in inputs), self._one.constants)

    def result(self, key: jax.Array) -> FitManyResult:
        """All outcomes; ELBOs are estimated at common fresh draws."""
        svi = self._svi
        states, data, keys = self._states, self._data, random.split(key, STARTS.losses)
        params = self._program.kept("params", jax.vmap(svi.get_params), states).result()(states)
        evaluate = self._program.kept(
            ("losses", self._axes.inputs), stacked_losses(svi, self._axes), states, keys, data
        )
        losses = fetch(evaluate.result()(states, keys, data)).astype(np.float64)
        fits = []
        for i, end in enumerate(self._ends):
            own, state = entry(self._program, (params, states), i)
            history = self._recorders[i].history()
            assert end is not None
            fits.append(outcome(svi, state, own, history, self._checks[i], self._partition, end, self._tolerance))
        error = losses.std(1, ddof=1) / np.sqrt(losses.shape[1])
        return FitManyResult(params, self._states, tuple(fits), -losses.mean(1), error)


def _entry(records: StepRecords, i: int) -> StepRecords:
    return jax.tree.map(lambda x: x[i], records)
