# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What a fit returns, and the sentence that says why it ended."""

from typing import Any, NamedTuple

import numpy as np
from numpyro.infer.svi import SVI, SVIState

from numpyro_natgrad.blocks.partition import Partition
from numpyro_natgrad.infer.convergence import STOPPING, Judgement, format_interval, remaining_effort
from numpyro_natgrad.infer.fitting.starts import Starts
from numpyro_natgrad.infer.history import History
from numpyro_natgrad.infer.judge import MIN_HELD
from numpyro_natgrad.infer.optimizer import table
from numpyro_natgrad.infer.stop_check import StopCheck
from numpyro_natgrad.options import RuleConstants
from numpyro_natgrad.step.newton_decrement import noise_part
from numpyro_natgrad.step.state import NaturalGradientState

#: Reasons for the end of a fit.
CONVERGED, MAX_STEPS, EXHAUSTED, INTERRUPTED, STOPPED, FAILED = (
    "converged",
    "`max_steps` was reached",
    "`batches` is exhausted",
    "interrupted",
    "stopped by `callback`",
    "an error was raised",
)
#: In the place of a reason while the fit goes on.
RUNNING = "not finished"
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
    :ivar int next_check: steps before which no further stop is granted, after a refusal; ``resume`` heeds it.
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
    next_check: int = 0

    def __repr__(self) -> str:
        """The outcome without the arrays."""
        return f"FitResult(converged={self.converged}, steps={len(self.losses)}, reason={self.reason!r})"


def outcome(
    svi: SVI,
    state: SVIState,
    params: dict[str, Any],
    history: History,
    check: StopCheck,
    partition: Partition | None,
    end: str,
    tolerance: float,
) -> FitResult:
    """The result of a fit with this reason to end, without what only its caller knows."""
    unowned = tuple(partition.unowned) if partition else ()
    effort = _effort(end, history, tolerance, state.optim_state[1], svi.optim._options.constants)
    return FitResult(
        params=params,
        state=state,
        losses=history.loss,
        history=history,
        converged=end == CONVERGED,
        reason=_reason(end, history, tolerance, effort, unowned, check),
        report=table(partition.rows()) if partition else "",
        judgement=check.last,
        judge_seconds=check.seconds,
        next_check=history.steps if end == CONVERGED else check.next,
    )


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
