# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The arguments of model and guide: arrays are inputs of compiled programs, everything else is constant.

New arrays of the same shapes and types then need no compilation. A model may need an array's values while it is traced,
as in ``if x.max() > 1`` or ``numpyro.plate("n", int(x.sum()))``. Nobody is asked which: :data:`TRACED` lists what is
tried, one after the other, until model and guide can be traced.
"""

import weakref
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.svi import SVI

from numpyro_natgrad.options import StructureError

Arguments = tuple[Any, ...]
Result = TypeVar("Result")

#: The largest rounding error of an input, as a fraction of its standard deviation over rows. NumPy computes with
#: constants in double precision, so that ``x - x.mean()`` is exact for seconds since 1970. Such arrays stay constants.
ROUNDING = 1e-4


def _is_array(x: Any) -> bool:
    """All arrays but integers without an axis, which are nearly always sizes."""
    if not isinstance(x, np.ndarray | jax.Array) or not (x.dtype == bool or jnp.issubdtype(x.dtype, jnp.number)):
        return False
    return (x.ndim > 0 or jnp.issubdtype(x.dtype, jnp.inexact)) and _survives_rounding(x)


def _is_inexact_array(x: Any) -> bool:
    return _is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)


#: Which leaves are inputs of a program: all arrays, floating-point arrays (a model may need its indices), or none.
TRACED: tuple[Callable[[Any], bool], ...] = (_is_array, _is_inexact_array, lambda x: False)


def _survives_rounding(x: Any) -> bool:
    """Whether JAX's precision represents an array of NumPy: all that a program sees of an input."""
    rounded = jax.dtypes.canonicalize_dtype(x.dtype)
    if isinstance(x, jax.Array) or x.dtype == rounded or not x.size:
        return True
    with np.errstate(all="ignore"):
        error = np.abs(x - x.astype(rounded))
        spread = ROUNDING * np.std(x, axis=0) if x.ndim and np.issubdtype(x.dtype, np.floating) else 0.0
    return bool(np.all((error <= spread) | ~np.isfinite(x)))


class Constants:
    """The leaves of a tree that are not inputs; equal if a program that was compiled for one holds for the other."""

    def __init__(self, tree: Any, leaves: Iterable[Any]) -> None:
        # Arrays may be written to later.
        self.tree = tree
        self.leaves = tuple(x.copy() if isinstance(x, np.ndarray) else x for x in leaves)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Constants) or self.tree != other.tree:
            return False
        return all(is_same_leaf(*pair) for pair in zip(self.leaves, other.leaves, strict=True))

    def __hash__(self) -> int:
        return hash(self.tree)


def is_same_leaf(old: Any, new: Any) -> bool:
    """Whether two constants of a program are interchangeable."""
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        return old.dtype == new.dtype and np.array_equal(old, new)
    if isinstance(old, bool | int | float | complex | str | bytes | np.generic):
        return type(old) is type(new) and old == new
    return old is new


class SameArrays:
    """Recognises the arrays of a tree without keeping them; those of NumPy may have been written to."""

    def __init__(self, tree: Any) -> None:
        self._marks = [(weakref.ref(x), _checksum(x)) for x in jax.tree.leaves(tree)]

    def are(self, tree: Any) -> bool:
        """Whether the tree has these arrays, with the same values."""
        pairs = zip(self._marks, jax.tree.leaves(tree), strict=True)
        return all(known() is x and checksum == _checksum(x) for (known, checksum), x in pairs)


def _checksum(x: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(x).data) if isinstance(x, np.ndarray) else 0


def place(x: Any) -> Any:
    """How an array is spread over several devices; ``None`` if it is on one."""
    sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    return sharding if sharding is not None and len(sharding.device_set) > 1 else None


def types(tree: Any) -> tuple[Any, ...]:
    """The structure of a tree, and shapes, types and places of its leaves."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((jnp.shape(x), jnp.result_type(x), place(x)) for x in leaves)


class _Input:
    """Stands for an input among the constants; there is one, also after pickling."""

    def __reduce__(self) -> str:
        return "_INPUT"


_INPUT = _Input()


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Data:
    """``(args, kwargs)`` of model and guide as one argument of a compiled program.

    :ivar inputs: the arrays that are inputs of the program.
    :ivar constants: everything else, in its place.
    """

    inputs: tuple[Any, ...]
    constants: Constants

    @classmethod
    def split(cls, args: Arguments, kwargs: dict[str, Any], is_input: Callable[[Any], bool]) -> "Data":
        """Take the arguments apart."""
        leaves, tree = jax.tree.flatten((args, kwargs))
        chosen = [is_input(x) for x in leaves]
        inputs = tuple(x for x, yes in zip(leaves, chosen, strict=True) if yes)
        constants = (_INPUT if yes else x for x, yes in zip(leaves, chosen, strict=True))
        return cls(inputs, Constants(tree, constants))

    def arguments(self) -> tuple[Arguments, dict[str, Any]]:
        """``(args, kwargs)``, with inputs as they are here: arrays, or tracers inside of a program."""
        inputs = iter(self.inputs)
        leaves = [next(inputs) if x is _INPUT else x for x in self.constants.leaves]
        return jax.tree.unflatten(self.constants.tree, leaves)

    def chosen(self) -> list[bool]:
        """Which leaves of ``(args, kwargs)`` are inputs."""
        return [x is _INPUT for x in self.constants.leaves]

    def signature(self) -> tuple[Any, ...]:
        """What a compiled program depends on: shapes, types and places of the inputs, and the constants."""
        return types(self.inputs), self.constants

    def tree_flatten(self) -> tuple[tuple[Any, ...], Constants]:
        """The children and the static part of this node of a tree."""
        return self.inputs, self.constants

    @classmethod
    def tree_unflatten(cls, constants: Constants, inputs: tuple[Any, ...]) -> "Data":
        """The node from its parts."""
        return cls(tuple(inputs), constants)


#: Index in :data:`TRACED` of what could be traced for every ``SVI``.
_FOUND: "weakref.WeakKeyDictionary[SVI, int]" = weakref.WeakKeyDictionary()


class NotWorthTracingError(Exception):
    """Raised while something is traced, to end the attempt."""


def split(svi: SVI, args: Arguments, kwargs: dict[str, Any]) -> Data:
    """The arguments with the inputs that could be traced for this ``SVI`` before, or else with all arrays as inputs."""
    return Data.split(args, kwargs, TRACED[_FOUND.get(svi, 0)])


def traceable(
    svi: SVI, args: Arguments, kwargs: dict[str, Any], trace: Callable[[Data], Result]
) -> tuple[Data, Result]:
    """Call ``trace`` with ever fewer inputs until it raises nothing, and remember for ``svi`` which these were.

    :return: the arguments, taken apart, and what ``trace`` returned for them.
    :raises Exception: what ``trace`` raised without any inputs.
    """
    error, count = None, -1
    for index in range(_FOUND.get(svi, 0), len(TRACED)):
        data = Data.split(args, kwargs, TRACED[index])
        if len(data.inputs) == count:
            continue
        count = len(data.inputs)
        try:
            result = trace(data)
        except (StructureError, NotWorthTracingError):
            raise
        except Exception as failure:  # NumPyro, JAX and the user's model raise what they like
            error = failure
        else:
            _FOUND[svi] = index
            return data, result
    assert error is not None
    raise error
