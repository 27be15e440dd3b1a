# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``svi.init`` as one program: the same start as NumPyro's for the same key, in a third of the time.

NumPyro runs the set-up of an autoguide operation by operation, and compiles each of some two hundred. Here it is
traced once. What it keeps in the guide (values of sites, keys of handlers) are then tracers, which the program returns
as well, and which are replaced by their values afterwards.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.infer.autoguide import AutoGuide, AutoGuideList
from numpyro.infer.svi import SVI, SVIState
from numpyro.primitives import Messenger

from numpyro_natgrad.compilation.data import Arguments, Data, NotWorthTracingError, traceable, types
from numpyro_natgrad.compilation.programs import in_background

#: Latent sites and equations up to which NumPyro's set-up is one program. Each site costs the compiler a tenth of a
#: second or more: ten take half of the time that NumPyro takes, thirty one and a half times that.
MOST_SITES = 16
MOST_EQUATIONS = 3000


class _Start(NamedTuple):
    """A traced ``svi.init``: ``(key, data, init_params) -> (state, values of the tracers that svi keeps)``."""

    program: "Future[Callable[..., tuple[SVIState, list[jax.Array]]]]"
    kept: list[jax.core.Tracer]


#: The start of every ``SVI`` whose guide is set up, with what it was traced for.
_STARTS: "weakref.WeakKeyDictionary[SVI, tuple[Any, _Start]]" = weakref.WeakKeyDictionary()


def initial_state(
    svi: SVI, rng_key: jax.Array, args: Arguments, kwargs: dict[str, Any], init_params: dict[str, Any] | None = None
) -> SVIState:
    """``svi.init(rng_key, *args, init_params=init_params, **kwargs)``, by NumPyro itself if that cannot be traced.

    :raises Exception: what model or guide raise; what may be wrong with the arguments is added as a note.
    """
    try:
        return traceable(svi, args, kwargs, lambda data: _by_one_program(svi, rng_key, data, init_params))[1]
    except Exception:  # as above, or an equally good reason to let NumPyro say what is wrong
        return _by_numpyro(svi, rng_key, args, kwargs, init_params)


def check_start(
    svi: SVI, rng_key: jax.Array, args: Arguments, kwargs: dict[str, Any], init_params: dict[str, Any] | None = None
) -> None:
    """Let NumPyro set up a new guide, and refuse a start without finite density or gradient.

    One program cannot refuse: it knows no values while it is traced.

    :raises RuntimeError: if there is no valid start.
    """
    other = copy.copy(svi)
    other.guide = new_guide(svi.guide)
    _by_numpyro(other, rng_key, args, kwargs, init_params)


def new_guide(guide: Any) -> Any:
    """A copy of an autoguide that has not been set up, or another guide as it is."""
    if not isinstance(guide, AutoGuide):
        return guide
    new = copy.copy(guide)
    new.prototype_trace = None
    if isinstance(guide, AutoGuideList):
        new._guides = [new_guide(part) for part in guide._guides]
    return new


def without_validation(guide: Any) -> Any:
    """An autoguide whose distributions do not check their arguments, as a function.

    A check of a traced Cholesky factor compiles twenty small programs, and tells nothing. Guides by hand are checked.
    """

    def draw(*args: Any, **kwargs: Any) -> Any:
        with numpyro.validation_enabled(False):
            return guide(*args, **kwargs)

    return draw if isinstance(guide, AutoGuide) else guide


def _by_numpyro(
    svi: SVI, rng_key: jax.Array, args: Arguments, kwargs: dict[str, Any], init_params: dict[str, Any] | None
) -> SVIState:
    try:
        return svi.init(rng_key, *args, init_params=init_params, **kwargs)
    except (RuntimeError, ValueError, AssertionError) as error:
        for note in _unusable(args, kwargs):
            error.add_note(note)
        raise


def _unusable(args: Arguments, kwargs: dict[str, Any]) -> Iterable[str]:
    """What may have made NumPyro fail to set up model and guide: arrays with NaN, or without entries."""
    for path, x in jax.tree_util.tree_leaves_with_path({"args": args, "kwargs": kwargs}):
        if isinstance(x, np.ndarray | jax.Array) and jnp.issubdtype(x.dtype, jnp.number):
            name = "".join(str(key) for key in path).removeprefix("['args']").replace("['kwargs']", "kwargs")
            name = f"args{name}" if name.startswith("[") else name
            lost = int(jnp.sum(~jnp.isfinite(x)))
            if not x.size:
                yield f"`{name}` has the shape {x.shape}, and so no entries."
            elif lost:
                yield f"`{name}` has {lost} of {x.size} entries that are not finite: leave out or mask these data."


def _by_one_program(svi: SVI, key: jax.Array, data: Data, init_params: dict[str, Any] | None) -> SVIState:
    signature = data.signature(), types(init_params)
    known = _STARTS.get(svi)
    if known is not None and known[0] == signature and is_set_up(svi.guide) == isinstance(svi.guide, AutoGuide):
        return known[1].program.result()(key, data, init_params)[0]
    with _unchanged_if_it_fails(svi):
        start = _traced(svi, key, data, init_params)
        state = _run(svi, start, key, data, init_params)
    # The next start of an autoguide is another program, since the guide keeps its set-up.
    again = _traced(svi, key, data, init_params) if start.kept else start
    if again.kept:
        _run(svi, again, key, data, init_params)
    else:
        _STARTS[svi] = signature, again
    return state


def _run(svi: SVI, start: _Start, key: jax.Array, data: Data, init_params: dict[str, Any] | None) -> SVIState:
    """The state, after the tracers that the trace has left in ``svi`` were replaced by their values."""
    state, values = start.program.result()(key, data, init_params)
    replacements = {id(tracer): value for tracer, value in zip(start.kept, values, strict=True)}
    visit_tracers(svi, lambda tracer: replacements.get(id(tracer), tracer))
    return state


def is_set_up(guide: Any) -> bool:
    """Whether a guide keeps the start of an earlier ``svi.init``."""
    return isinstance(guide, AutoGuide) and guide.prototype_trace is not None


def _traced(svi: SVI, key: jax.Array, data: Data, init_params: dict[str, Any] | None) -> _Start:
    kept: list[jax.core.Tracer] = []

    def begin(key: jax.Array, data: Data, init_params: dict[str, Any] | None) -> tuple[SVIState, list[jax.core.Tracer]]:
        args, kwargs = data.arguments()
        # Arguments are validated where steps are traced. Here each check of a constant would be a program of its own.
        with _FewSites(), _order_of_the_model(svi.guide), numpyro.validation_enabled(False):
            state = svi.init(key, *args, init_params=init_params, **kwargs)
        kept.extend(tracers_of(svi))
        return state, kept

    traced = jax.jit(begin).trace(key, data, init_params)
    if _equations(traced.jaxpr.jaxpr) > MOST_EQUATIONS:
        raise NotWorthTracingError
    return _Start(in_background(traced), kept)


class _FewSites(Messenger):
    """Ends the attempt as soon as there are more latent sites than :data:`MOST_SITES`."""

    def __init__(self) -> None:
        super().__init__()
        self._names: set[str] = set()

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            self._names.add(msg["name"])
            if len(self._names) > MOST_SITES:
                raise NotWorthTracingError


@contextmanager
def _order_of_the_model(guide: Any) -> Iterator[None]:
    """Let autoguides keep the latents in the order of the model.

    Dicts that come out of a loop of JAX are in the order of the alphabet; those of NumPyro's own set-up are not.
    """

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if name == "_init_locs":
            value = {site: value[site] for site in self.prototype_trace if site in value} | value
        object.__setattr__(self, name, value)

    classes = [(part, type(part)) for part in _parts(guide)]
    for part, cls in classes:
        part.__class__ = type(cls.__name__, (cls,), {"__setattr__": set_attribute})
    try:
        yield
    finally:
        for part, cls in classes:
            part.__class__ = cls


def _equations(jaxpr: Any) -> int:
    inner = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values())) if hasattr(x, "eqns")]
    return len(jaxpr.eqns) + sum(map(_equations, inner))


@contextmanager
def _unchanged_if_it_fails(svi: SVI) -> Iterator[None]:
    objects = [svi, *_parts(svi.guide)]
    before = [dict(vars(x)) for x in objects]
    try:
        yield
    except BaseException:
        for x, attributes in zip(objects, before, strict=True):
            vars(x).clear()
            vars(x).update(attributes)
        raise


def _parts(guide: Any) -> list[Any]:
    if not isinstance(guide, AutoGuide):
        return []
    return [guide, *(part for one in getattr(guide, "_guides", []) for part in _parts(one))]


def tracers_of(root: Any) -> list[jax.core.Tracer]:
    """All tracers that are reachable from an object, once each."""
    found: dict[int, jax.core.Tracer] = {}

    def note(tracer: jax.core.Tracer) -> jax.core.Tracer:
        found[id(tracer)] = tracer
        return tracer

    visit_tracers(root, note)
    return list(found.values())


def visit_tracers(root: Any, replace: Callable[[jax.core.Tracer], Any]) -> None:
    """Replace every tracer that is reachable from an object by ``replace(tracer)``.

    Attributes, containers, closures and partial functions are followed. Tuples are made anew, all else is changed in
    place.
    """
    _visited(root, replace, {})


def _visited(x: Any, replace: Callable[[jax.core.Tracer], Any], seen: dict[int, Any]) -> Any:
    if isinstance(x, jax.core.Tracer):
        return replace(x)
    if id(x) in seen or isinstance(x, _LEAVES):
        return x
    seen[id(x)] = x  # which also keeps it alive, and its id its own
    visit = partial(_visited, replace=replace, seen=seen)
    if isinstance(x, tuple):
        new = [visit(y) for y in x]
        same = all(a is b for a, b in zip(x, new, strict=True))
        return x if same else x._make(new) if hasattr(x, "_make") else tuple(new)
    if isinstance(x, dict | list):
        # NumPyro writes the attributes of copies of distributions in an order that changes from process to process.
        places = sorted(x.items(), key=lambda item: str(item[0])) if isinstance(x, dict) else enumerate(list(x))
        for place, y in places:
            if (z := visit(y)) is not y:
                x[place] = z
    elif isinstance(x, partial):
        before = x.func, x.args, x.keywords
        if (after := visit(before)) is not before:
            x.__setstate__((*after, vars(x)))  # type: ignore[attr-defined]
    elif isinstance(x, MethodType):
        visit(x.__self__)
    elif isinstance(x, FunctionType):
        for cell in filter(_is_filled, x.__closure__ or ()):
            if (z := visit(cell.cell_contents)) is not cell.cell_contents:
                cell.cell_contents = z
    if hasattr(x, "__dict__") and not isinstance(x, dict):
        visit(vars(x))
    return x


#: What keeps no tracers of a trace: classes, modules and plain values.
_LEAVES = (type, ModuleType, BuiltinFunctionType, str, bytes, int, float, complex, jax.Array, type(None))


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
