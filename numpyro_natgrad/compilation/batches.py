# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The minibatches of the coming steps, read by a thread and put on the device while the last steps run.

    iterable ──▶ arrays of NumPy, checked ──▶ stacked for a chunk of steps ──▶ on the device

One chunk is read ahead, so that memory does not depend on the number of batches. A batch is copied as soon as it is
read, because a loader may write the next one into the same memory.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_natgrad.compilation.data import Arguments

#: Kinds of devices, by DLPack's numbers, whose memory NumPy can read: the CPU, and pinned memory of a GPU.
HOST_DEVICES = (1, 3)


class Chunk(NamedTuple):
    """Batches of equal shapes and types.

    :ivar batches: the arguments of each step, on the host unless they were given as arrays of JAX.
    :ivar stacked: the same, stacked, padded to the size of a chunk, and on the device.
    """

    batches: list[Arguments]
    stacked: Arguments


class BatchIterator:
    """The arguments of the next steps: none for fixed data, stacked minibatches otherwise.

    :param batches: the user's iterable, or ``None`` for fixed data.
    :param int size: steps in a chunk.
    :param int epochs: how often ``batches`` is read.
    :param bool prefetch: read in a thread of its own.
    :ivar float seconds: seconds that :meth:`take` waited.
    """

    def __init__(self, batches: Iterable[Any] | None, size: int, epochs: int = 1, prefetch: bool = True) -> None:
        self.fixed = batches is None
        self._reader = _Reader(() if batches is None else batches, epochs)
        self._size = size
        self._pool = ThreadPoolExecutor(1, "numpyro_natgrad_batches") if prefetch and not self.fixed else None
        self._ahead: Future[Chunk] | None = None
        self._waits, self._once = True, is_read_once(batches)
        self.seconds = 0.0

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._reader.closed = True
        if self._pool is not None:
            waits = self._waits and error is not KeyboardInterrupt
            self._pool.shutdown(wait=waits, cancel_futures=True)

    def abandon(self) -> None:
        """Do not wait at the end for a batch that is being read: the thread ends after it."""
        self._waits = False

    def peek(self) -> Arguments | None:
        """The arguments of the next step, without consuming them; ``None`` if there are none."""
        return next(iter(self._submit("read", 1).result()), None)

    def take(self, left: int) -> tuple[int, Arguments]:
        """The number of steps, at most ``left``, and their batches, stacked and padded; the next are read meanwhile."""
        if self.fixed:
            return min(self._size, left), ()
        begin, pending = time.perf_counter(), self._ahead
        self._ahead = None
        chunk = (pending or self._submit("chunk", min(self._size, left), self._size)).result()
        self.seconds += time.perf_counter() - begin
        rest = min(self._size, left - len(chunk.batches))
        if self._pool is not None and chunk.batches and rest:
            self._ahead = self._submit("chunk", rest, self._size)
        return len(chunk.batches), chunk.stacked

    def hold(self, most: int) -> Arguments:
        """Of at most ``most`` of the next batches those of the commonest shapes, stacked, without consuming them."""
        held = self._ahead.result().batches if self._ahead is not None else []
        held = (held + self._submit("read", most).result())[:most]
        return stacked(_commonest(held))

    def remarks(self, exhausted: bool) -> str:
        """What the user should know about the batches that were read, as the end of a sentence."""
        once = "; an iterator can be read once: give an iterable such as a list or a data loader, and `epochs`"
        more = (once if self._once else "; a larger `epochs` reads it again") if exhausted else ""
        return more + self._reader.lost()

    def _submit(self, task: str, *args: int) -> "Future[Any]":
        work = getattr(self._reader, task)
        if self._pool is not None:
            return self._pool.submit(work, *args)
        done: Future[Any] = Future()
        done.set_result(work(*args))
        return done


class _Reader:
    """Reads and checks batches; only one thread at a time may use it.

    :ivar closed: ends the reading after the current batch.
    """

    def __init__(self, batches: Iterable[Any], epochs: int) -> None:
        self._batches = _numbered(batches, epochs)
        self._pending: list[Arguments] = []
        self._first: Arguments | None = None
        self._count, self._lost, self._where = 0, Counter[str](), ""
        # Both are local to a thread in JAX.
        self._x64 = jnp.result_type(float) == jnp.float64
        self._device = jax.config.jax_default_device  # type: ignore[attr-defined]
        self.closed = False

    def read(self, most: int) -> list[Arguments]:
        """The next ``most`` batches, or as many as there are, without consuming them."""
        with jax.enable_x64(self._x64), jax.default_device(self._device):
            while len(self._pending) < most and not self.closed and (found := next(self._batches, None)) is not None:
                self._pending.append(self._checked(*found))
        return self._pending[:most]

    def chunk(self, most: int, size: int) -> Chunk:
        """Consume the next batches of equal shapes, at most ``most``."""
        batches = self.read(most)
        alike = next((k for k, b in enumerate(batches) if signature(b) != signature(batches[0])), len(batches))
        batches, self._pending = batches[:alike], self._pending[alike:]
        with jax.enable_x64(self._x64), jax.default_device(self._device):
            return Chunk(batches, jax.device_put(stacked(batches + batches[-1:] * (size - alike))))

    def lost(self) -> str:
        """How many numbers are not finite, as the end of a sentence."""
        lost, count = self._lost["numbers"], self._lost["batches"]
        if not lost:
            return ""
        return f"; {lost} numbers in {count} of the {self._count} batches read are not finite, first in `{self._where}`"

    def _checked(self, name: str, batch: Any) -> Arguments:
        """The arguments of one step: the entries of a tuple or list; anything else is a single argument."""
        several = isinstance(batch, tuple | list) and not hasattr(batch, "_fields")
        leaves, tree = jax.tree_util.tree_flatten_with_path(tuple(batch) if several else (batch,))
        names = [name + jax.tree_util.keystr(path if several else path[1:]) for path, _ in leaves]
        arrays = [_array(x, where) for (_, x), where in zip(leaves, names, strict=True)]
        arguments = jax.tree.unflatten(tree, arrays)
        if self._first is None:
            self._first = arguments
        elif _kind(arguments) != _kind(self._first):
            raise ValueError(
                f"`{name}` has the arguments {described(arguments)}, and the first batch had "
                f"{described(self._first)}: expected the same structure, types and numbers of axes in every batch. "
                "Only lengths of axes may differ. Convert the batches where they are made."
            )
        self._count += 1
        lost = [_nonfinite(x) for x in arrays]
        if any(lost):
            self._where = self._where or next(where for where, n in zip(names, lost, strict=True) if n)
            self._lost.update(numbers=sum(lost), batches=1)
        return arguments


def is_read_once(batches: Any) -> bool:
    """Whether an iterable is an iterator, like a generator, which is used up when it has been read."""
    return isinstance(batches, Iterator)


def _numbered(batches: Iterable[Any], epochs: int) -> Iterator[tuple[str, Any]]:
    """The batches of all epochs, each with its name for messages."""
    for epoch in range(epochs):
        count, when = 0, f"epoch {epoch + 1}: " if epoch else ""
        for batch in batches:
            yield f"{when}batches[{count}]", batch
            count += 1
        if epoch and not count:
            raise ValueError(
                f"`batches` is empty in epoch {epoch + 1}, and was not in the first: expected an iterable that can be "
                "read again. Let its `__iter__` return a new iterator each time."
            )


def _array(x: Any, name: str) -> Any:
    """A copy of NumPy's in the precision of JAX, or an array of JAX as it is."""
    if isinstance(x, jax.Array):
        return x
    if hasattr(x, "__dlpack_device__") and int(x.__dlpack_device__()[0]) not in HOST_DEVICES:
        return jax.dlpack.from_dlpack(x)
    try:
        given = np.asarray(x)
    except Exception as error:  # PyTorch says what is wrong with a tensor that requires gradients
        error.add_note(f"raised while `{name}`, a `{type(x).__name__}`, was converted to an array of NumPy.")
        raise
    if not (given.dtype == bool or jnp.issubdtype(given.dtype, jnp.number)):
        raise TypeError(
            f"`{name}` has the type `{given.dtype}`: expected numbers. Convert it where the batch is made, as by "
            "`np.asarray(x, np.float32)`; categories become integers."
        )
    if given.ndim and not len(given):
        raise ValueError(
            f"`{name}` has the shape {given.shape}, and so no rows: expected at least one. Leave out such a batch."
        )
    copied = np.array(given, jax.dtypes.canonicalize_dtype(given.dtype), order="C")
    if given.dtype.kind in "iu" and copied.dtype != given.dtype and not np.array_equal(copied, given):
        raise ValueError(
            f"`{name}` has integers that do not fit into `{copied.dtype}`: expected numbers below "
            f"{np.iinfo(copied.dtype).max}. Number them anew, or set `jax_enable_x64`."
        )
    return copied


def _nonfinite(x: Any) -> int:
    """How many numbers are not finite; arrays of JAX are not read."""
    known = isinstance(x, np.ndarray) and jnp.issubdtype(x.dtype, jnp.inexact)
    return int(x.size - np.count_nonzero(np.isfinite(x))) if known else 0


def stacked(batches: list[Arguments]) -> Arguments:
    """One tree of arrays with a leading axis for the batches; ``()`` if there are none."""
    stack = lambda *x: (jnp if isinstance(x[0], jax.Array) else np).stack(x)
    return jax.tree.map(stack, *batches) if batches else ()


def _commonest(batches: list[Arguments]) -> list[Arguments]:
    each = [signature(batch) for batch in batches]
    best = max(each, key=each.count, default=None)
    return [batch for batch, found in zip(batches, each, strict=True) if found == best]


def signature(batch: Arguments) -> Any:
    """What a program is compiled for."""
    leaves, tree = jax.tree.flatten(batch)
    return tree, [(x.shape, x.dtype) for x in leaves]


def _kind(batch: Arguments) -> Any:
    leaves, tree = jax.tree.flatten(batch)
    return tree, [(x.ndim, x.dtype) for x in leaves]


def described(batch: Arguments, skip: int = 0) -> str:
    """Types and shapes, without the first ``skip`` axes, as ``[0]: float32(100, 3), [1]: int32(100,)``."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    each = [f"{jax.tree_util.keystr(path)}: {x.dtype}{x.shape[skip:]}" for path, x in leaves]
    return "`" + ", ".join(each) + "`"
