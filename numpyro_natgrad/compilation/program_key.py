# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The key under which a compiled program is kept: a hash of its jaxpr that does not depend on the order of its sums.

NumPyro's ELBOs sum over a ``set`` of names, whose order changes from process to process. The text of a program, which
is the key of JAX's own cache, is then never the same again. Here every value is hashed from the operation that makes it
and the hashes of its operands. Sums are hashed by the sum of these hashes, so that their order has no influence. Equal
keys therefore mean equal functions, up to the rounding of a sum in another order.
"""

import hashlib
import os
import platform
import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

#: Of the files. (What this package computes is in the jaxpr.)
FORMAT = 1
_MODULUS = 1 << 256
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
#: Operations whose result does not depend on the order of operands, and those that call into Python.
_SUMS = ("add", "add_any")
_CALLBACKS = ("callback", "outside_call")
#: Calls of one function, whose operands are the inputs of its jaxpr.
_CALLS = ("jit", "pjit", "closed_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")
#: Settings of JAX that do not change a program.
_WITHOUT_EFFECT = re.compile("cache|log|trace|debug|profil|dump|dir|leak")


class UnkeyedError(ValueError):
    """A program that cannot be kept, because it calls into Python."""


def program_key(traced: Any, options: Any) -> str:
    """A hash of a traced function, of how it is compiled, and of everything else that its program depends on.

    :param traced: what ``jax.jit(function).trace(...)`` returned.
    :raises UnkeyedError: if the program calls into Python.
    """
    inputs = [_hash("input", i, v.aval.str_short()) for i, v in enumerate(traced.jaxpr.jaxpr.invars)]
    outputs = _outputs(traced.jaxpr, inputs)
    # Inputs that nothing depends on are arguments of the program all the same.
    return f"{_hash(inputs, outputs, sorted((options or {}).items()), _environment(), _settings()):064x}"


def _outputs(closed: Any, inputs: Sequence[int]) -> list[int]:
    """The hashes of the results of a jaxpr, from those of its inputs."""
    jaxpr, constants = (closed.jaxpr, closed.consts) if hasattr(closed, "consts") else (closed, [])
    known = dict(zip(jaxpr.invars, inputs, strict=True)) | {
        v: _hash("constant", _value(x)) for v, x in zip(jaxpr.constvars, constants, strict=True)
    }
    read = lambda v: _hash("literal", _value(v.val), v.aval.str_short()) if hasattr(v, "val") else known[v]
    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _results(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _results(eqn: Any, operands: list[int]) -> list[int]:
    name, params = eqn.primitive.name, eqn.params
    if any(part in name for part in _CALLBACKS):
        raise UnkeyedError(f"`{name}` calls into Python.")
    shapes = [v.aval.str_short() for v in eqn.outvars]
    if name in _SUMS:
        return [(sum(operands) + _hash("sum", shapes)) % _MODULUS]
    if name == "while":
        return _hashed_loop(params, operands)
    if name == "cond":
        branches = [_outputs(branch, operands[1:]) for branch in params["branches"]]
        return [_hash("cond", operands[0], *hashes) for hashes in zip(*branches, strict=True)]
    if name in _CALLS:
        inner = next(x for x in params.values() if _is_jaxpr(x))
        others = [_value(x) for key, x in sorted(params.items()) if key != "name" and not _is_jaxpr(x)]
        return [_hash("call", others, result) for result in _outputs(inner, operands)]
    return [_hash(name, _value(params), operands, shape, i) for i, shape in enumerate(shapes)]


def _hashed_loop(params: dict[str, Any], operands: list[int]) -> list[int]:
    """A loop: its constants are known by their hashes, since their order changes too, what is carried by its place."""
    of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
    begin = operands[of_test + of_body :]
    carried = [_hash("carried", i) for i in range(len(begin))]
    test = _outputs(params["cond_jaxpr"], operands[:of_test] + carried)
    body = _outputs(params["body_jaxpr"], operands[of_test : of_test + of_body] + carried)
    return [_hash("while", test, body, begin, i) for i in range(len(begin))]


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or (hasattr(x, "jaxpr") and hasattr(x, "consts"))


def _invars(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr).invars


def _value(x: Any) -> Any:
    """A parameter of an operation or a constant, as something that ``repr`` writes in full."""
    if _is_jaxpr(x):
        return _outputs(x, [_hash("input", i) for i in range(len(_invars(x)))])
    if isinstance(x, dict):
        return [(name, _value(y)) for name, y in sorted(x.items(), key=lambda item: str(item[0]))]
    if isinstance(x, tuple | list):
        return [type(x).__name__, [_value(y) for y in x]]
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if isinstance(x, np.ndarray | np.generic | jax.Array):
        array = np.asarray(x)
        return array.shape, array.dtype.name, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    if isinstance(x, Callable):  # type: ignore[arg-type]  # rules of differentiation, which are not compiled
        return getattr(x, "__qualname__", type(x).__name__)
    return _ADDRESS.sub("", repr(x))


def _hash(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest(), "big")


@cache
def _environment() -> str:
    """The versions, the compiler's flags and the processor."""
    devices = jax.devices()
    client = devices[0].client
    return repr(
        (
            (FORMAT, jax.__version__, version("jaxlib")),
            (client.platform, client.platform_version, len(devices), devices[0].device_kind),
            (os.environ.get("XLA_FLAGS", ""), os.environ.get("LIBTPU_INIT_ARGS", "")),
            _processor(),
        )
    )


def _processor() -> str:
    """Name and features of the processor, for which machine code is made."""
    try:
        with open("/proc/cpuinfo") as info:
            lines = {line for line in info if line.startswith(("model name", "flags", "Features"))}
    except OSError:
        lines = set()
    return repr((platform.machine(), platform.processor(), sorted(lines)))


def _settings() -> str:
    values = {name: x for name, x in jax.config.values.items() if not _WITHOUT_EFFECT.search(name)}
    return _ADDRESS.sub("", repr(sorted(values.items())))
