# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Logistic data in files that are larger than memory should be: written and read piece by piece, and their exact fit.

The files are made from a seed in a temporary folder: 20 covariates and the outcome, in single precision.
"""

import pathlib
from collections.abc import Iterator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np

COVARIATES = 20
#: Rows that are made, and read, at once; a row group of Parquet has as many.
PIECE = 50_000


class Exact(NamedTuple):
    """The mode of the posterior and the Hessian of −log p there, in double precision."""

    mode: np.ndarray
    hessian: np.ndarray

    def kl(self, mean: np.ndarray, factor: np.ndarray) -> float:
        """KL(N(mean, factor factorᵀ) ‖ N(mode, Hessian⁻¹)), nats: what the guide's ELBO is below that of the best."""
        root, off = np.linalg.cholesky(self.hessian).T, mean - self.mode
        spread = root @ factor
        logdet = 2 * np.sum(np.log(np.abs(np.diag(np.linalg.qr(spread)[1]))))
        return float(0.5 * (np.sum(spread**2) - len(mean) - logdet + np.sum((root @ off) ** 2)))


def coefficients() -> np.ndarray:
    """What the data are drawn with."""
    return 0.5 * np.random.default_rng(0).normal(size=COVARIATES)


def pieces(rows: int) -> Iterator[np.ndarray]:
    """The data in pieces, ``(PIECE, COVARIATES + 1)``; covariates have a correlation of ½."""
    rng, beta = np.random.default_rng(1), coefficients().astype(np.float32)
    for start in range(0, rows, PIECE):
        n = min(PIECE, rows - start)
        x = np.sqrt(0.5, dtype=np.float32) * (
            rng.standard_normal((n, COVARIATES), np.float32) + rng.standard_normal((n, 1), np.float32)
        )
        y = rng.random(n, np.float32) < 1 / (1 + np.exp(-x @ beta))
        yield np.concatenate([x, y[:, None].astype(np.float32)], axis=1)


class MemoryMap:
    """Batches of a memory-mapped file. It is mapped piece by piece, since pages that were read count as memory."""

    def __init__(self, folder: pathlib.Path, rows: int, batch: int) -> None:
        self._path, self._rows, self._batch = folder / "rows.bin", rows, batch
        with self._path.open("wb") as file:
            for piece in pieces(rows):
                file.write(piece.tobytes())

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        width, step = COVARIATES + 1, max(PIECE // self._batch, 1) * self._batch
        for start in range(0, self._rows, step):
            shape = min(step, self._rows - start), width
            piece: Any = np.memmap(self._path, np.float32, "r", 4 * start * width, shape)
            for i in range(0, len(piece), self._batch):
                yield piece[i : i + self._batch, :-1], piece[i : i + self._batch, -1]


class Parquet:
    """Batches of a file of Parquet, which ``pyarrow`` reads row group by row group."""

    def __init__(self, folder: pathlib.Path, rows: int, batch: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path, self._batch = folder / "rows.parquet", batch
        names = [f"x{k}" for k in range(COVARIATES)] + ["y"]
        schema = pa.schema([(name, pa.float32()) for name in names])
        with closing(pq.ParquetWriter(self._path, schema, compression="none", use_dictionary=False)) as writer:
            for piece in pieces(rows):
                writer.write_table(pa.table(list(piece.T.copy()), schema=schema))

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        import pyarrow.parquet as pq

        # By default pyarrow keeps all that it has read of the file.
        with pq.ParquetFile(self._path, pre_buffer=False) as file:
            for part in file.iter_batches(self._batch):
                columns = [column.to_numpy() for column in part.columns]
                yield np.stack(columns[:-1], axis=1), columns[-1]


FORMATS: dict[str, type[MemoryMap] | type[Parquet]] = {"memory map": MemoryMap, "Parquet": Parquet}


def exact(rows: int) -> Exact:
    """Newton's method over the pieces, from the coefficients of the data; the prior is a standard Normal."""
    mode = coefficients()
    for _ in range(3):  # the error is squared in each: 1e-3 at the start, where rows are few
        gradient, hessian = mode.copy(), np.eye(COVARIATES)
        for piece in pieces(rows):
            x = piece[:, :-1]
            mean = 1 / (1 + np.exp(-(x @ mode.astype(np.float32))))
            gradient += (x.T @ (mean - piece[:, -1])).astype(float)
            hessian += (x.T @ (x * (mean * (1 - mean))[:, None])).astype(float)
        mode = mode - np.linalg.solve(hessian, gradient)
    return Exact(mode, hessian)
