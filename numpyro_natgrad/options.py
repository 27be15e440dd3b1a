# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The options of :class:`.NaturalGradient`, checked before anything runs."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

Estimator = Literal["first_order", "second_order"]
Fisher = Literal["closed_form", "kl_hessian", "monte_carlo", "empirical"]

#: Where a step would leave the cone of precisions, the share of the old one at which it starts to bend back: see
#: :func:`.positive`. A natural parameter that is bounded keeps more of its room: draws of a Gamma that has
#: lost all of its shape are zeros in float32, and a loss that is no number shows no way back.
MARGIN, NATURAL_MARGIN, LIFTED_MARGIN = 0.05, 0.25, 1e-6


class Options(NamedTuple):
    """See :class:`.NaturalGradient`, whose arguments they are.

    ``ordinary``: an ordinary optimizer was asked for.
    """

    step_size: float | Callable[[Any], Any] | None
    max_kl: float | Literal["adaptive"] | None
    estimator: Estimator | None
    path_gradient: bool
    fisher: Fisher | None = None
    ordinary: bool = False

    @property
    def margin(self) -> float:
        return LIFTED_MARGIN if self.max_kl is None else MARGIN

    @property
    def strict(self) -> bool:
        """Whether the limit is a number of nats, which the guide's own KL has to keep."""
        return self.max_kl is not None and not self.adaptive

    @property
    def adaptive(self) -> bool:
        return self.max_kl == "adaptive"


def checked(
    step_size: Any, max_kl: Any, estimator: Any, path_gradient: Any, fisher: Any = None, *, ordinary: bool = False
) -> Options:
    """The options, or an error that names the one that cannot be used."""
    if step_size is not None and not callable(step_size) and not _positive(step_size):
        raise ValueError(
            f"`step_size={step_size!r}`: expected a positive number (1 is the whole way to the minimum of the local "
            "model), a schedule `step -> number`, or None for the rule that needs no choice."
        )
    if max_kl is not None and max_kl != "adaptive" and not _positive(max_kl):
        raise ValueError(
            f"`max_kl={max_kl!r}`: expected a positive number of nats a step, 'adaptive' (the default), or None for "
            "no limit."
        )
    if estimator not in (None, "first_order", "second_order"):
        raise ValueError(
            f"`estimator={estimator!r}`: expected 'first_order' (gradients only), 'second_order' (Hessian products of "
            "the loss), or None to choose by the number of latents."
        )
    if not isinstance(path_gradient, bool):
        raise TypeError(f"`path_gradient={path_gradient!r}`: expected True or False.")
    if fisher is not None and fisher not in get_args(Fisher):
        raise ValueError(
            f"`fisher={fisher!r}`: expected one of {', '.join(map(repr, get_args(Fisher)))}, or None for the best way "
            "at every site."
        )
    return Options(step_size, max_kl, estimator, path_gradient, fisher, ordinary)


def _positive(x: Any) -> bool:
    try:
        return bool(not isinstance(x, bool) and np.ndim(x) == 0 and float(x) > 0 and np.isfinite(float(x)))
    except (TypeError, ValueError):
        return False
