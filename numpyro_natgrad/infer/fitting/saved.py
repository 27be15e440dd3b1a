# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``save`` and ``load``: a fit as one file of arrays (``.npz``) and text (JSON), which is read without pickle.

Each array of the state has the name of its place in the tree, so that a file of another model, guide or precision is
refused by the names and shapes that differ.
"""

import json
import os
import pathlib
import sys
import warnings
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import numpyro
from jax import random
from numpyro.infer.svi import SVI

from numpyro_natgrad.compilation.devices import fetch
from numpyro_natgrad.compilation.initial import initial_state
from numpyro_natgrad.infer.arguments import check_key
from numpyro_natgrad.infer.convergence import Judgement
from numpyro_natgrad.infer.fitting.checks import check_optimizer
from numpyro_natgrad.infer.fitting.outcome import FitResult
from numpyro_natgrad.infer.fitting.starts import Starts
from numpyro_natgrad.infer.history import empty_history

#: The version of the format, and the name of the array that holds the text.
FORMAT, HEADER = 1, "header"
#: Differences that an error shows.
SHOWN = 6
#: Fields of a result that are text or numbers.
PLAIN = ("converged", "reason", "report", "judge_seconds", "batch_seconds", "next_check")


def save(path: str | os.PathLike[str], result: FitResult) -> None:
    """Write a result to a file, from which :func:`load` reads it, bit for bit.

    The file is written beside its place and then renamed, so that a process that is killed meanwhile leaves the last
    one. Of several processes all have to call this function, and the first one writes.

    .. doctest::

        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_natgrad import NaturalGradient, fit, load, save
        >>> def model(y):
        ...     z = numpyro.sample("z", dist.Normal(0, 10))
        ...     numpyro.sample("y", dist.Normal(z, 1), obs=y)
        >>> svi = SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO(num_particles=4))
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "fit.npz"
        >>> result = fit(svi, random.key(0), jnp.array(2.0), max_steps=5, progress_bar=False)
        >>> save(file, result)
        >>> again = load(file, svi, random.key(0), jnp.array(2.0))
        >>> len(fit(svi, random.key(0), jnp.array(2.0), resume=again, progress_bar=False).losses) > 5
        True

    :param path: the file; an existing one is replaced.
    :param FitResult result: what :func:`.fit` returned, or ``progress.result()`` in a callback.
    :raises TypeError: if it is another result.
    :raises FileNotFoundError: if there is no such folder.
    """
    if not isinstance(result, FitResult):
        raise TypeError(
            f"`save(path, <{type(result).__name__}>)`: expected a `FitResult`, as `fit` returns it. Save the state of "
            "another loop by `orbax.checkpoint`."
        )
    arrays = {name: np.asarray(_plain(x)) for name, x in _named(result).items()}
    if jax.process_index() > 0:
        return
    fields = {name: getattr(result, name) for name in PLAIN}
    tuples = {name: x and x._asdict() for name, x in (("judgement", result.judgement), ("starts", result.starts))}
    types = _types(_named(result))
    header = {"format": FORMAT, "versions": _versions(), "types": types, **fields, **tuples}
    text = json.dumps(header, default=lambda x: np.asarray(x).tolist())
    content: dict[str, Any] = {HEADER: np.array(text)} | {name: _storable(x) for name, x in arrays.items()}
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`{path}`: expected a file in an existing folder, but there is no `{path.parent}`.")
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    with beside.open("wb") as file:
        np.savez(file, **content)
    os.replace(beside, path)


def load(path: str | os.PathLike[str], svi: SVI, rng_key: jax.Array, *args: Any, **kwargs: Any) -> FitResult:
    """Read a result that :func:`save` has written, for a new ``svi`` of the same model and guide.

    The ``svi`` is set up as by :func:`.fit`, so that ``fit(svi, rng_key, *args, resume=result)`` goes on and
    :func:`.verdict` judges. On the same machine, the next steps are those of a fit that was not interrupted, bit for
    bit, if ``fit`` keeps its programs on disk (``cache``) or all processes have the same ``PYTHONHASHSEED``: NumPyro
    sums over sets of names.

    :param path: the file.
    :param SVI svi: an ``SVI`` with :class:`.NaturalGradient`, the same model, guide and loss.
    :param jax.Array rng_key: as for :func:`.fit`; only its type matters.
    :param args: positional arguments of model and guide, of the shapes of the fit; with ``batches`` one of these.
    :param kwargs: keyword arguments of model and guide.
    :return: the result.
    :raises ValueError: if the file is none of :func:`save`, or its arrays are not those of ``svi``; differences are
        listed.
    """
    check_optimizer(svi)
    check_key(rng_key)
    header, arrays = _read(pathlib.Path(path))
    state = initial_state(svi, rng_key, args, kwargs)
    like = {"state": state, "params": jax.eval_shape(svi.get_params, state), "history": empty_history()}
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    expected = {_name(place): x for place, x in leaves}
    _compare(str(path), header, _types(expected))
    values = {name: _restored(arrays[name], x) for name, x in expected.items()}
    found = jax.tree.unflatten(tree, [values[_name(place)] for place, _ in leaves])
    judgement, starts = header["judgement"], header["starts"]
    if starts is not None:
        fields: dict[str, Any] = {k: np.array(x) if isinstance(x, list) else x for k, x in starts.items()}
        starts = Starts(**fields)
    return FitResult(
        **found,
        losses=found["history"].loss,
        judgement=None if judgement is None else Judgement(**judgement),
        starts=starts,
        **{name: header[name] for name in PLAIN},
    )


def _named(result: FitResult) -> dict[str, Any]:
    """The arrays of a result by the names of their places."""
    tree = {"state": result.state, "params": result.params, "history": result.history}
    return {_name(place): x for place, x in jax.tree_util.tree_leaves_with_path(tree)}


def _name(place: Any) -> str:
    return jax.tree_util.keystr(place[:1], simple=True) + jax.tree_util.keystr(place[1:])


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: Any) -> Any:
    """An array that NumPy has: the integers of a key, and all parts of what is spread over processes."""
    return fetch(random.key_data(x) if _is_key(x) else x)


def _storable(x: np.ndarray) -> np.ndarray:
    """The bytes of an array whose type NumPy's format does not know, such as bfloat16."""
    return x.view(np.dtype(f"u{x.dtype.itemsize}")) if x.dtype.kind == "V" else x


def _restored(x: np.ndarray, like: Any) -> Any:
    if isinstance(like, np.ndarray):  # of the history
        return x
    if _is_key(like):
        return random.wrap_key_data(jnp.asarray(x), impl=random.key_impl(like))
    dtype = np.dtype(jnp.result_type(like))
    return jnp.asarray(x.view(dtype) if x.dtype != dtype and dtype.kind == "V" else x)


def _types(named: dict[str, Any]) -> dict[str, str]:
    """Type and shape of each array, as ``float32(3, 2)``, without those of the history, which has the length it has."""
    known = {name: x for name, x in named.items() if not name.startswith("history")}
    return {name: f"{jnp.result_type(x)}{tuple(jnp.shape(x))}" for name, x in known.items()}


def _versions() -> dict[str, str]:
    """Those of the modules and not of the installed distributions: a checkout on the path need not be installed."""
    package = sys.modules["numpyro_natgrad"]  # it imports this module, which hence cannot import it
    modules = {"numpyro-natgrad": package, "jax": jax, "jaxlib": jaxlib, "numpyro": numpyro}
    return {name: module.__version__ for name, module in modules.items()}


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        header = json.loads(str(arrays.pop(HEADER)))
    except (zipfile.BadZipFile, KeyError, ValueError, AttributeError, EOFError) as error:
        raise ValueError(
            f"`{path}` is not a complete file of `save`: expected a result of `fit`. Save it again by "
            "`save(path, result)`."
        ) from error
    if header["format"] != FORMAT:
        raise ValueError(
            f"`{path}` has the format {header['format']}: expected {FORMAT}. Read it with numpyro-natgrad "
            f"{header['versions']['numpyro-natgrad']}, which wrote it."
        )
    return header, arrays


def _compare(path: str, header: dict[str, Any], expected: dict[str, str]) -> None:
    """Refuse a file with other arrays, and warn of other versions."""
    saved, here = header["types"], _versions()
    other = {k: v for k, v in header["versions"].items() if here[k] != v}
    versions = ", ".join(f"{name} {was}, here {here[name]}" for name, was in other.items())
    different = [name for name in {**expected, **saved} if saved.get(name) != expected.get(name)]
    if different:
        each = [f"`{k}` is {saved.get(k, 'absent')}, expected {expected.get(k, 'none')}" for k in different[:SHOWN]]
        rest = f"; and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        raise ValueError(
            f"`{path}` does not fit this `svi`: {'; '.join(each)}{rest}. Use the model, guide, optimizer, precision "
            "and shapes of data of the fit that was saved." + (f" It was saved with {versions}." if versions else "")
        )
    if other:
        warnings.warn(
            f"`{path}` was saved with {versions}: its arrays are read as they are, and further steps are those of the "
            "fit that was saved up to rounding, not bit for bit.",
            stacklevel=3,
        )
