# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are kept on disk, in the user's cache folder, for the next process.

A file is one program, named by its key (:mod:`.program_key`): a checksum, and what JAX makes of an executable. It is
written beside its place and then renamed, so that two processes do not disturb each other. A file that is damaged, or
that JAX cannot load, is removed and its program compiled anew. The folder has to belong to the user, and nobody else
may write to it, because programs are machine code and JAX unpickles what surrounds them.

A cache folder that the user has given to JAX is used instead, as it is. With several devices nothing is kept.
"""

import hashlib
import os
import pathlib
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from platformdirs import user_cache_path

#: The environment variable that turns the cache off, or names its folder, and the values that turn it off.
VARIABLE = "NUMPYRO_NATGRAD_CACHE"
OFF = ("off", "0", "false", "no")
#: Bytes that the folder holds, at most: the programs of some forty models, with their verdicts. Those not used for
#: longest go first.
MAX_BYTES = 256 * 2**20
_CHECKSUM = hashlib.sha256().digest_size
_SUFFIX = ".program"


#: Folders about which a line was said: a fit and its verdict say the same of one.
_WARNED: set[pathlib.Path] = set()


class ProgramFolder:
    """The programs in one folder."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def has(self, key: str) -> bool:
        """Whether there is a file for this key."""
        return (self.path / (key + _SUFFIX)).exists()

    def load(self, key: str, in_tree: Any, out_tree: Any) -> Any | None:
        """The program of this key, or ``None``."""
        file = self.path / (key + _SUFFIX)
        try:
            content = file.read_bytes()
        except OSError:
            return None
        checksum, payload = content[:_CHECKSUM], content[_CHECKSUM:]
        try:
            if hashlib.sha256(payload).digest() != checksum:
                raise ValueError("its checksum differs")
            program = deserialize_and_load(payload, in_tree, out_tree)
        except Exception as error:  # whatever JAX, XLA or pickle raise
            self._warn(f"a compiled program in `{self.path}` cannot be used ({error}): it is compiled anew.")
            _removed(file)
            return None
        with suppress(OSError):
            os.utime(file)
        return program

    def keep(self, key: str, program: Any) -> None:
        """Write a program, and make room for it."""
        try:
            payload = serialize(program)[0]
        except Exception:  # JAX cannot serialise every program
            return
        try:
            with tempfile.NamedTemporaryFile(dir=self.path, delete=False) as part:
                part.write(hashlib.sha256(payload).digest() + payload)
            os.replace(part.name, self.path / (key + _SUFFIX))
            self._make_room()
        except OSError as error:
            self._warn(f"compiled programs cannot be kept in `{self.path}`: {error}.")

    def _make_room(self) -> None:
        files = sorted(((f.stat().st_mtime, f.stat().st_size, f) for f in self.path.iterdir()), reverse=True)
        total = 0
        for _, size, file in files:
            total += size
            if total > MAX_BYTES:
                _removed(file)

    def _warn(self, text: str) -> None:
        if self.path not in _WARNED:
            _WARNED.add(self.path)
            warnings.warn(text, stacklevel=2)


#: The folder of the fit, or the verdict, that runs.
_FOLDER: ContextVar[ProgramFolder | None] = ContextVar("numpyro_natgrad_programs", default=None)


@contextmanager
def disk_cache(setting: Any) -> Iterator[None]:
    """Keep the programs that are compiled meanwhile, and use those that were kept.

    :param setting: ``None`` for :data:`VARIABLE` or else the user's cache folder, ``False`` for no cache, or a folder.
    """
    token = _FOLDER.set(_folder(setting))
    try:
        yield
    finally:
        _FOLDER.reset(token)


def program_folder() -> ProgramFolder | None:
    """Where programs are kept now, if anywhere."""
    return _FOLDER.get()


def _folder(setting: Any) -> ProgramFolder | None:
    path = cache_path(setting)
    # The key of a program does not know on which of several devices its inputs lie.
    if path is None or jax.config.values["jax_compilation_cache_dir"] or jax.device_count() > 1:
        return None
    if unusable := _made_private(path):
        warnings.warn(f"`{path}` cannot keep compiled programs: {unusable}.", stacklevel=5)
        return None
    return ProgramFolder(path)


def cache_path(setting: Any) -> pathlib.Path | None:
    """The folder for a setting, as of :func:`disk_cache`; ``None`` for no cache.

    :raises TypeError: if it is neither of those.
    """
    if setting is False:
        return None
    if setting is None or setting is True:
        setting = os.environ.get(VARIABLE) or user_cache_path("numpyro_natgrad") / "programs"
        if str(setting).lower() in OFF:
            return None
    if not isinstance(setting, str | os.PathLike):
        raise TypeError(f"`cache={setting!r}`: expected a folder, `None` for the user's cache folder, or `False`.")
    return pathlib.Path(setting).expanduser()


def _made_private(path: pathlib.Path) -> str:
    """Make the folder, for this user alone; if it cannot be used, why."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError as error:
        return str(error)
    if hasattr(os, "getuid"):
        if found.st_uid != os.getuid():
            return "it belongs to another user"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"other users can write to it; use `chmod go-w`, or name another folder in `{VARIABLE}`"
    return "" if os.access(path, os.R_OK | os.W_OK | os.X_OK) else "it cannot be written to"


def _removed(file: pathlib.Path) -> None:
    with suppress(OSError):  # another process was faster, or the folder is read-only
        file.unlink()
