# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Writes docs/benchmarks/cold.md: a section for each environment, one for verdicts, and one for the other packages.

A section is replaced if its results are stored here, and kept as it is if they are not.
"""

import pathlib
import re

from .results import Store, environments
from .rivals_table import HEADING as RIVALS_HEADING
from .rivals_table import SHARED, rivals
from .table import each, rows, summary
from .verdicts_table import HEADING as VERDICTS_HEADING
from .verdicts_table import verdicts

OUTPUT = pathlib.Path("docs/benchmarks/cold.md")
#: The end of the name of an environment in which an earlier version of this package was measured.
BEFORE = "-before"


def write(results: pathlib.Path, clock: str) -> str:
    """Write all sections that have results."""
    text = OUTPUT.read_text()
    stores = {name: Store(results, name) for name in environments(results)}
    for name, store in stores.items():
        if found := environment(store, clock):
            text = _with_section(text, f"## Python {name}", found)
    pairs = [(store, stores.get(name + BEFORE)) for name, store in stores.items() if not name.endswith(BEFORE)]
    if found := verdicts(pairs):
        text = _with_section(text, VERDICTS_HEADING, found)
    if found := rivals(list(stores.values())):
        text = _with_section(text, RIVALS_HEADING, found)
    OUTPUT.write_text(text)
    return f"wrote {OUTPUT}"


def environment(store: Store, clock: str) -> str:
    """The tables of one environment; empty without measurements, and for an earlier version of the package."""
    found = rows(store, clock)
    if not found or store.environment.endswith(BEFORE):
        return ""
    before = rows(Store(store.folder, store.environment + BEFORE), clock)
    fewest, most = (end(row.rounds for row in found) for end in (min, max))
    about = f"Rounds: {most}." if fewest == most else f"Rounds: {fewest} to {most}."
    about += "" if clock == "seconds" else f" {SHARED}"
    return "\n".join([f"{found[0].versions}. {about}", "", *summary(found, before), "", *each(found)])


def _with_section(text: str, heading: str, body: str) -> str:
    """The text with this section in it, in the place of the one with the same heading, or at the end."""
    section = f"{heading}\n\n{body.strip()}\n"
    pattern = rf"^{re.escape(heading)}\n.*?(?=^## |\Z)"
    if re.search(pattern, text, re.M | re.S):
        return re.sub(pattern, lambda _: section + "\n", text, count=1, flags=re.M | re.S).rstrip() + "\n"
    return f"{text.rstrip()}\n\n{section}"
