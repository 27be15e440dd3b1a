# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Refusals of arguments of ``fit`` before the first step, by name and with the remedy."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from numpyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.svi import SVI, SVIState

from numpyro_natgrad.compilation.batches import is_read_once
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.infer.arguments import (
    check_count,
    check_key,
    check_parameters_of,
    check_state,
    expected_parameters,
    shown,
)
from numpyro_natgrad.infer.fitting.outcome import FitResult
from numpyro_natgrad.infer.optimizer import NaturalGradient
from numpyro_natgrad.options import StructureError


def check_limits(max_steps: Any, tolerance: Any) -> None:
    """Refuse a number of steps or a tolerance that cannot be used."""
    check_count("max_steps", max_steps, "10_000")
    if not _is_number(tolerance):
        raise TypeError(f"`tolerance={tolerance!r}`: expected a number of nats, such as 0.01; 0 takes all steps.")
    if not 0 <= tolerance < np.inf:
        raise ValueError(f"`tolerance={tolerance!r}`: expected a number of nats, such as 0.01; 0 takes all steps.")


def check_batches(args: tuple[Any, ...], batches: Any, epochs: Any, prefetch: Any) -> None:
    """Refuse minibatches that cannot be read as often as they have to be, or that come beside fixed data."""
    check_count("epochs", epochs, "3")
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
        raise TypeError(
            f"`batches={shown(batches)}`: expected an iterable of tuples, the arguments of one step after the other."
        )
    if epochs > 1 and is_read_once(batches):
        raise ValueError(
            f"`epochs={epochs}`, but `batches` is a `{type(batches).__name__}`, which can be read once: expected an "
            "iterable whose `__iter__` returns a new iterator each time, such as a list or a data loader."
        )


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | np.number) and not isinstance(x, bool)


def check_callback(callback: Any) -> None:
    """Refuse what is not a function."""
    if callback is not None and not callable(callback):
        raise TypeError(
            f"`callback={callback!r}`: expected a function of one argument, a `Progress`. To call several of them, "
            "write one function that does."
        )


def check_start_given(svi: SVI, rng_key: Any, init_state: Any, init_params: Any, resume: Any) -> None:
    """Refuse several starts, a start of the wrong type, and what is not a key where there is none."""
    starts = {"init_state": init_state, "init_params": init_params, "resume": resume}
    if len(several := [f"`{name}`" for name, x in starts.items() if x is not None]) > 1:
        raise ValueError(f"{' and '.join(several)} were given: expected one of them to start from.")
    if init_state is not None:
        check_state(svi, init_state, "init_state")
    elif resume is None:
        check_key(rng_key)
    elif isinstance(resume, FitResult):
        check_state(svi, resume.state, "resume.state")
    else:
        raise TypeError(
            f"`resume={shown(resume)}`: expected a `FitResult`, as `fit` or `load` returns it. To go on from a state "
            "of `svi.update`, use `init_state`."
        )


def check_init_params(svi: SVI, given: Params, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse initial values of parameters that do not exist, and values of the wrong shape; the guide is set up."""
    expected = expected_parameters(svi, args, kwargs)
    if unknown := sorted(given.keys() - expected.keys()):
        raise ValueError(
            f"`init_params` has {unknown}: expected names of parameters of guide and model, {list(expected)}. Leave "
            "the others out."
        )
    check_parameters_of({**expected, **given}, expected, "init_params")


def check_keywords(svi: SVI, kwargs: dict[str, Any], function: Callable[..., Any]) -> None:
    """Refuse a keyword that is like an argument of this function, and that the model does not take."""
    own = [name for name, x in inspect.signature(function).parameters.items() if x.kind is x.KEYWORD_ONLY]
    try:
        taken = inspect.signature(svi.model).parameters.values()
    except (TypeError, ValueError):  # some callables have no signature
        return
    if any(x.kind is x.VAR_KEYWORD for x in taken):
        return
    for name in kwargs.keys() - {x.name for x in taken}:
        if near := difflib.get_close_matches(name, own, n=2, cutoff=0.7):
            like = " or ".join(f"`{x}`" for x in near)
            raise TypeError(
                f"`{name}={shown(kwargs[name])}` goes to model and guide, and the model does not take it: expected one "
                f"of its arguments, or of those of `{function.__name__}`, such as {like}."
            )


def check_optimizer(svi: SVI) -> None:
    """Refuse optimizers that do not estimate the remaining gain, and classes in the place of a guide or a loss."""
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
    for name, given, example in (("guide", svi.guide, "AutoNormal(model)"), ("loss", svi.loss, "Trace_ELBO()")):
        if isinstance(given, type):
            raise TypeError(
                f"the {name} of this `SVI` is the class `{given.__name__}`: expected an object, such as `{example}`."
            )


def check_parameters(state: SVIState) -> None:
    """Refuse a loss without parameters."""
    if not jax.tree.leaves(state.optim_state[1].params):
        raise ValueError(
            "the guide and the model have no parameters, so there is nothing to fit; expected at least one "
            "`numpyro.param` site. Use an autoguide such as `AutoMultivariateNormal(model)`, or add a `param`."
        )


def check_mutable_state(svi: SVI, state: SVIState) -> None:
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
