# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Results in a folder: one JSON file for each measurement, and the prepared caches of other posteriors' fits."""

import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpyro_natgrad

from .jobs import Cell, Job

FOLDER = pathlib.Path("benchmarks/results/cold")


class Store(NamedTuple):
    """The results of one environment.

    :ivar pathlib.Path folder: of all environments.
    :ivar str environment: its name, such as ``3.11``.
    """

    folder: pathlib.Path
    environment: str

    def path(self, job: Job) -> pathlib.Path:
        """Where a measurement is stored."""
        return self.folder / self.environment / job.posterior / f"{job.guide}-{job.line}-{job.round}.json"

    def read(self, job: Job) -> dict[str, Any] | None:
        """A measurement, or nothing."""
        path = self.path(job)
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, job: Job, result: dict[str, Any]) -> None:
        """Store a measurement."""
        path = self.path(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result))
        part.replace(path)

    def all_rounds(self, cell: Cell, line: str) -> list[dict[str, Any]]:
        """The measurements of a line, by rounds."""
        folder = self.path(cell.job(line, 0)).parent
        found = sorted(folder.glob(f"{cell.guide}-{line}-*.json"))
        return [json.loads(path.read_text()) for path in found]

    def prepared(self, cell: Cell) -> pathlib.Path:
        """The cache that this version of the package filled with fits of all other posteriors."""
        return self.folder / self.environment / "caches" / fingerprint() / cell.guide / cell.posterior


def environments(folder: pathlib.Path) -> Iterable[str]:
    """The names of all environments that have results."""
    return sorted(path.name for path in folder.glob("*") if path.is_dir())


def fingerprint() -> str:
    """Of the package's source, whose programs a cache holds."""
    source = pathlib.Path(numpyro_natgrad.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
