# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Refusals of what most public functions take, before any work: the ``SVI``, a key, a state, values of parameters."""

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_natgrad.guide.gaussian_sites import Params


def initialised(svi: SVI) -> SVI:
    """The same ``SVI``, if ``svi.init`` has been called."""
    if svi.constrain_fn is None:
        raise ValueError(
            "`svi.constrain_fn` is None: expected an initialised SVI; call `svi.init(rng_key, ...)` first."
        )
    return svi


def check_key(rng_key: Any) -> None:
    """Refuse what is not one key, typed or of integers."""
    shape, dtype = getattr(rng_key, "shape", None), getattr(rng_key, "dtype", np.dtype(object))
    typed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if shape is None or not (shape == () if typed else dtype == np.uint32 and len(shape) == 1):
        raise TypeError(f"`rng_key={shown(rng_key)}`: expected one key, such as `jax.random.key(0)`.")


def check_state(svi: SVI, state: Any, name: str = "state") -> None:
    """Refuse what is not a state of this ``SVI``; of one that is not initialised the parameters are not known."""
    if not isinstance(state, SVIState):
        raise TypeError(
            f"`{name}={shown(state)}`: expected an `SVIState`, as `svi.init` or `svi.update` returns it, or "
            "`result.state`."
        )
    if not isinstance(svi.constrain_fn, partial):
        return
    given, expected = (sorted(x) for x in (svi.optim.get_params(state.optim_state), svi.constrain_fn.args[0]))
    if given != expected:
        raise ValueError(
            f"`{name}` has the parameters {given}: expected those of this `svi`, {expected}. It is a state of another "
            "model or guide."
        )


def check_count(name: str, value: Any, example: str) -> None:
    """Refuse what is not a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"`{name}={value!r}`: expected a positive integer, such as {example}.")
    if value < 1:
        raise ValueError(f"`{name}={value!r}`: expected a positive integer, such as {example}.")


def parameter_values(given: Any, name: str) -> Params:
    """Values of parameters as a dict of arrays (or trees of arrays); Python numbers and lists of them become floats."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"`{name}={shown(given)}`: expected a dict from names of parameters to arrays, such as that of "
            "`svi.get_params(state)`."
        )

    def array(path: Any, x: Any) -> Any:
        if isinstance(x, Real):
            return jnp.asarray(float(x))
        if not hasattr(x, "dtype"):
            entry = f"{name}{keystr(path)}"
            raise TypeError(f"`{entry}={shown(x)}`: expected a number or an array of numbers, such as 0.5.")
        return x

    lists = {key: _array_of_list(x) for key, x in given.items()}
    return tree_map_with_path(array, lists, is_leaf=lambda x: x is None)


def expected_parameters(svi: SVI, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Params:
    """Shapes of the parameters that ``svi.get_params`` returns for these data; the guide is set up."""
    other = copy.copy(svi)
    with warnings.catch_warnings(action="ignore"):  # NumPyro's, which the first ``svi.init`` has shown
        return jax.eval_shape(lambda key: other.get_params(other.init(key, *args, **kwargs)), random.key(0))


def check_parameters_of(values: Params, expected: Params, name: str) -> None:
    """Refuse a dict that lacks a parameter, or has one of another shape.

    :param expected: their shapes, by :func:`expected_parameters`.
    """
    shapes = lambda tree: {keystr(path): jnp.shape(x) for path, x in tree_leaves_with_path(tree)}
    have, want = shapes(values), shapes(expected)
    for entry, shape in want.items():
        if entry not in have:
            raise ValueError(
                f"`{name}{entry}` is missing: expected a value of every parameter, {list(expected)}. Give the dict of "
                "`svi.get_params(state)`."
            )
        if have[entry] != shape:
            raise ValueError(
                f"`{name}{entry}` has the shape {have[entry]}: expected {shape}, for these data. Give the dict of "
                "`svi.get_params(state)`."
            )


def shown(x: Any) -> str:
    """What was given, in a message: a short value as it is typed, else its type."""
    plain = isinstance(x, int | float | str | None)
    return repr(x) if plain else f"<{type(x).__name__}>"


def _array_of_list(x: Any) -> Any:
    """A list of numbers, of any depth, as an array; all else as it is."""
    numbers = isinstance(x, list | tuple) and all(isinstance(leaf, Real) for leaf in jax.tree.leaves(x))
    return jnp.asarray(np.asarray(x, float)) if numbers and jax.tree.leaves(x) else x
