# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The table of parameters that ``optimizer.report`` and ``FitResult.report`` show."""

from collections.abc import Sequence

HEADER = ("parameter", "site", "family", "Fisher", "size")


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows under :data:`HEADER`, aligned, as one string."""
    lines = [HEADER, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "─" * len(text[0]), *text[1:]])
