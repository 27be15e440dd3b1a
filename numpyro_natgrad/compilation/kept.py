# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Programs that are kept in memory as long as their ``SVI``, for other arrays of the same shapes and types.

Each is compiled as those of a fit (:mod:`.programs`), and so is kept on disk too.
"""

import copy
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import SVI

from numpyro_natgrad.compilation.data import Constants, Data, traceable, types
from numpyro_natgrad.compilation.programs import in_background


class KeptPrograms:
    """Programs by name and by the types of their arguments."""

    def __init__(self) -> None:
        self._programs: dict[Any, Future[Any]] = {}

    def __call__(self, name: Any, function: Callable[..., Any], *arguments: Any) -> "Future[Callable[..., Any]]":
        """A function, compiled in the background once for arguments of these types.

        :param name: tells it from the other functions.
        """
        key = name, types(arguments)
        if key not in self._programs:
            self._programs[key] = in_background(jax.jit(function).trace(*arguments))
        return self._programs[key]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Static:
    """What a program finds out while it is traced, among its results: names, for example."""

    value: Any


#: The programs of :func:`jit_for` of every ``SVI``, with its parts, which it may replace, and a copy of it, which
#: programs may keep: the ``SVI`` itself would then never be freed.
_KEPT: "weakref.WeakKeyDictionary[SVI, tuple[Constants, SVI, KeptPrograms]]" = weakref.WeakKeyDictionary()


def jit_for(svi: SVI, function: Callable[..., Any], *inputs: Any) -> Callable[[], Any]:
    """Start to compile ``function(*inputs)``, unless that was done before for inputs of these types.

    :param function: a function of a module, by which its programs are known.
    :param inputs: trees. Arrays are inputs of the program, and all else is constant: this ``SVI``, numbers, strings.
        Arrays in a :class:`.Data`, the arguments of model and guide, are inputs as far as these can be traced.
    :return: waits for the program and runs it. Only what is not an array may be in a :class:`Static` of the result.
    """
    own, kept = _programs_of(svi)
    leaves, tree = jax.tree.flatten(inputs, is_leaf=_is_data)
    args, kwargs = next((x.arguments() for x in leaves if _is_data(x)), ((), {}))

    def begun(data: Data) -> Callable[[], Any]:
        chosen = [own if x is svi else data if _is_data(x) else x for x in leaves]
        given = Data.split(jax.tree.unflatten(tree, chosen), {}, _is_input)
        program = kept(function, lambda given: function(*given.arguments()[0]), given)
        return lambda: program.result()(given)

    return traceable(svi, args, kwargs, begun)[1]


def _programs_of(svi: SVI) -> tuple[SVI, KeptPrograms]:
    parts = Constants(None, (svi.model, svi.guide, svi.loss))
    known = _KEPT.get(svi)
    if known is None or known[0] != parts:
        known = _KEPT[svi] = parts, copy.copy(svi), KeptPrograms()
    own, kept = known[1:]
    own.constrain_fn = svi.constrain_fn  # ``svi.init`` makes a new one, which does the same
    return own, kept


def _is_data(x: Any) -> bool:
    return isinstance(x, Data)


def _is_input(x: Any) -> bool:
    """Any array of numbers or keys, and numbers of NumPy."""
    if not isinstance(x, np.ndarray | np.generic | jax.Array):
        return False
    return x.dtype == bool or jnp.issubdtype(x.dtype, jnp.number) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
