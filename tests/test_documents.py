# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What the documents show runs as it stands."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import numpyro_natgrad

ROOT = pathlib.Path(__file__).parent.parent


def test_the_readme_runs_from_top_to_bottom():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_examples_in_docstrings_give_what_they_say():
    names = [m.name for m in pkgutil.walk_packages(numpyro_natgrad.__path__, "numpyro_natgrad.")]
    results = [doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS) for name in names]
    assert sum(r.attempted for r in results) > 0
    assert sum(r.failed for r in results) == 0
