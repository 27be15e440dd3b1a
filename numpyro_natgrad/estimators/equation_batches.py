# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Equal equations of a jaxpr as one batched equation, so that a model of a thousand scalar sites is a small program.

Two equations are equal if primitive, parameters and operand types agree. Equations whose operands are ready and that
are equal run as one, by ``jax.vmap`` of their primitive: "on-the-fly operation batching" (Neubig, Goldberg & Dyer
2017). Of the kinds that are ready the one runs first whose remaining equations have the lowest mean depth, so that all
draws are ready before the first density is computed. Each result is the same up to rounding.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

Atom = core.Var | core.Literal
Batch = list[core.JaxprEqn]

#: Fewer equal equations run one by one, so that a guide of few sites is compiled as it is written: the state of one
#: block alone has a dozen scalars, and stacking eight of them costs more kernels than it saves.
LEAST_BATCH = 16
#: Operands of more numbers are not copied to be stacked with others.
LARGEST_OPERAND = 4096
#: Primitives that are not batched: callbacks may not allow it, and jaxlib 0.10 miscompiles ``cond`` of nine predicates.
SINGLE = ("cond", "pure_callback", "io_callback", "debug_callback", "ffi_call")


class Row(NamedTuple):
    """One value of a batch: ``array[place]``, which is computed where it is needed on its own."""

    array: Any
    place: int


class Values:
    """The values of variables, of which those of batches are kept as rows of one array."""

    def __init__(self, known: dict[core.Var, Any]) -> None:
        self._known = dict(known)
        self._rows: dict[int, tuple[Any, tuple[Any, ...]]] = {}

    def __contains__(self, var: core.Var) -> bool:
        return var in self._known

    def copy(self) -> "Values":
        return Values(self._known)

    def update(self, items: Iterable[tuple[core.Var, Any]]) -> None:
        self._known.update(items)

    def read(self, atom: Atom) -> Any:
        """The value of one variable."""
        if isinstance(atom, core.Literal):
            return atom.val
        value = self._known[atom]
        if not isinstance(value, Row):
            return value
        if id(value.array) not in self._rows:  # with the array, so that its id remains its own
            self._rows[id(value.array)] = value.array, jnp.unstack(value.array)
        return self._rows[id(value.array)][1][value.place]

    def run(self, batch: Batch) -> None:
        """Run equal equations, all of whose operands are known."""
        first = batch[0]
        bind = lambda *operands: first.primitive.bind(*operands, **first.primitive.get_bind_params(first.params))
        with first.ctx.manager:
            operands = [self._stacked(atoms) for atoms in zip(*(eqn.invars for eqn in batch), strict=True)]
            arrays, axes = zip(*operands, strict=True) if operands else ((), ())
            shared = all(axis is None for axis in axes)
            out = bind(*arrays) if shared else jax.vmap(bind, in_axes=axes)(*arrays)
        for k, x in enumerate(out if first.primitive.multiple_results else [out]):
            self.update((eqn.outvars[k], x if shared else Row(x, i)) for i, eqn in enumerate(batch))

    def _stacked(self, atoms: Sequence[Atom]) -> tuple[Any, int | None]:
        """One operand of a batch with its axis in ``vmap``, ``None`` where all equations share it."""
        first = atoms[0]
        if isinstance(first, core.Literal) or all(atom is first for atom in atoms):
            return self.read(first), None
        values = [atom.val if isinstance(atom, core.Literal) else self._known[atom] for atom in atoms]
        alone = {id(x): x for x in values if not isinstance(x, Row)}
        singles = jnp.stack(list(alone.values())) if alone else None
        position = {key: n for n, key in enumerate(alone)}
        arrays, offsets, places, size = [], dict[int, int](), [], 0
        for value in values:
            row = value if isinstance(value, Row) else Row(singles, position[id(value)])
            if id(row.array) not in offsets:
                arrays.append(row.array)
                offsets[id(row.array)] = size
                size += len(row.array)
            places.append(offsets[id(row.array)] + row.place)
        return _rows(arrays[0] if len(arrays) == 1 else lax.concatenate(arrays, 0), places), 0


def _rows(array: Any, places: list[int]) -> Any:
    """Some rows of an array, as a slice if they are evenly spaced."""
    steps = set(np.diff(places).tolist())
    if len(steps) > 1 or min(steps) < 1:
        return array.at[np.array(places)].get(mode="promise_in_bounds")
    start, end = places[0], places[-1] + 1
    return array if end - start == len(places) == len(array) else lax.slice_in_dim(array, start, end, min(steps))


def map_stacked(fn: Callable[..., Any], *trees: Any) -> Any:
    """``jax.tree.map`` of an elementwise function, by one call for small arrays of the same shapes and types."""
    leaves, structure = zip(*(jax.tree.flatten(tree) for tree in trees), strict=True)
    columns = list(zip(*leaves, strict=True))
    kinds = defaultdict[Hashable, list[int]](list)
    for n, column in enumerate(columns):
        shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in column)
        kinds[shapes if all(jnp.size(x) <= LARGEST_OPERAND for x in column) else n].append(n)
    out: dict[int, Any] = {}
    for mine in kinds.values():
        if len(mine) < LEAST_BATCH:
            out.update((n, fn(*columns[n])) for n in mine)
        else:
            stacks = (jnp.stack(x) for x in zip(*(columns[n] for n in mine), strict=True))
            out.update(zip(mine, jnp.unstack(fn(*stacks)), strict=True))
    return jax.tree.unflatten(structure[0], [out[n] for n in range(len(columns))])


def needed(eqns: Sequence[core.JaxprEqn], outputs: Iterable[Atom]) -> list[core.JaxprEqn]:
    """The equations that outputs depend on, or that have effects; validation, above all, leaves others."""
    wanted = {v for v in outputs if isinstance(v, core.Var)}
    kept = []
    for eqn in reversed(eqns):
        if eqn.effects or not wanted.isdisjoint(eqn.outvars):
            kept.append(eqn)
            wanted.update(variables(eqn))
    return kept[::-1]


def variables(eqn: core.JaxprEqn) -> list[core.Var]:
    """The operands of an equation that are no literals."""
    return [v for v in eqn.invars if isinstance(v, core.Var)]


def batches(eqns: Sequence[core.JaxprEqn], inputs: Sequence[core.Var] = ()) -> list[Batch]:
    """The equations in an order in which they can run, with those that run as one in the order of their operands."""
    kinds = _Kinds()
    kind = [kinds.of(eqn) for eqn in eqns]
    parents, children = _graph(eqns)
    height = [0] * len(eqns)
    for i in reversed(range(len(eqns))):
        height[i] = 1 + max((height[child] for child in children[i]), default=0)
    ready = defaultdict[int, list[int]](list)
    urgency: dict[int, int] = {}

    def add(i: int) -> None:
        ready[kind[i]].append(i)
        urgency[kind[i]] = max(urgency.get(kind[i], 0), height[i])

    waiting = list(map(len, parents))
    for i in (i for i, n in enumerate(waiting) if not n):
        add(i)
    order: list[Batch] = []
    place = {v: (-1, n) for n, v in enumerate(inputs)}  # of each variable its batch and its row there
    while ready:
        k = max(urgency, key=lambda k: urgency[k])
        del urgency[k]
        chosen = sorted(ready.pop(k), key=lambda i: [place.get(v, (-1, 0)) for v in variables(eqns[i])])
        mine = [eqns[i] for i in chosen]
        place.update((v, (len(order), n)) for n, eqn in enumerate(mine) for v in eqn.outvars)
        order += [mine] if len(mine) >= LEAST_BATCH else [[eqn] for eqn in mine]
        for child in (child for i in chosen for child in children[i]):
            waiting[child] -= 1
            if not waiting[child]:
                add(child)
    return order


def _graph(eqns: Sequence[core.JaxprEqn]) -> tuple[list[set[int]], list[list[int]]]:
    """Of each equation those it depends on, and those that depend on it; effects keep their order."""
    source: dict[core.Var, int] = {}
    parents: list[set[int]] = []
    children: list[list[int]] = [[] for _ in eqns]
    last_effect: set[int] = set()
    for i, eqn in enumerate(eqns):
        mine = {source[v] for v in variables(eqn) if v in source}
        if eqn.effects:
            mine, last_effect = mine | last_effect, {i}
        for parent in mine:
            children[parent].append(i)
        parents.append(mine)
        source.update(dict.fromkeys(eqn.outvars, i))
    return parents, children


class _Kinds:
    """A number for each kind of equal equations."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._single = 0
        self._has_single: dict[int, tuple[Any, bool]] = {}

    def of(self, eqn: core.JaxprEqn) -> int:
        operands = [v.aval for v in eqn.invars]
        if eqn.effects or not eqn.invars or any(_size(x) > LARGEST_OPERAND for x in (*operands, *_avals(eqn.outvars))):
            return self._new()
        if self._runs_alone(eqn):
            return self._new()
        key = eqn.primitive, tuple(map(_operand, eqn.invars)), _hashable(eqn.params)
        try:
            return self._numbers.setdefault(key, len(self._numbers))
        except TypeError:  # a parameter of the primitive that cannot be compared
            return self._new()

    def _runs_alone(self, eqn: core.JaxprEqn) -> bool:
        """Whether the equation, or one of a jaxpr in it, is not to be batched."""
        inner = (x for value in eqn.params.values() for x in (value if isinstance(value, tuple | list) else (value,)))
        return eqn.primitive.name in SINGLE or any(map(self._holds_single, inner))

    def _holds_single(self, x: Any) -> bool:
        jaxpr = getattr(x, "jaxpr", x)
        if not hasattr(jaxpr, "eqns"):
            return False
        if id(jaxpr) not in self._has_single:  # with the jaxpr, so that its id remains its own
            self._has_single[id(jaxpr)] = jaxpr, any(map(self._runs_alone, jaxpr.eqns))
        return self._has_single[id(jaxpr)][1]

    def _new(self) -> int:
        self._single -= 1
        return self._single


def _avals(variables: Iterable[Any]) -> list[Any]:
    return [v.aval for v in variables]


def _size(aval: Any) -> float:
    shape = getattr(aval, "shape", None)
    return math.inf if shape is None else math.prod(shape)


def _operand(atom: Atom) -> Hashable:
    kind = getattr(atom.aval, "shape", None), getattr(atom.aval, "dtype", None)
    # Arrays as literals are scalars.
    return (*kind, np.asarray(atom.val).tobytes()) if isinstance(atom, core.Literal) else kind


def _hashable(x: Any) -> Hashable:
    if isinstance(x, dict):
        return tuple((k, _hashable(v)) for k, v in x.items())
    if isinstance(x, tuple | list):
        return tuple(map(_hashable, x))
    return x
