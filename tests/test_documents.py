# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The code in the documents, docstrings and examples runs, and prints what is printed there."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import runpy
import sys

import pytest

import numpyro_natgrad

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = sorted(
    p.relative_to(ROOT).as_posix()
    for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/benchmarks/**/*.md")]
)
MODULES = [m.name for m in pkgutil.walk_packages(numpyro_natgrad.__path__, "numpyro_natgrad.")]


@pytest.mark.parametrize(
    ("document", "least"),
    [
        ("README.md", 2),
        ("docs/your_own_distribution.md", 4),
        ("docs/guides.md", 1),
        ("docs/fisher.md", 3),
        ("docs/diagnostics.md", 3),
        ("docs/compilation.md", 2),
        ("docs/minibatches.md", 1),
    ],
)
def test_code_blocks_of_a_document_run(document, least, capsys):
    text = (ROOT / document).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= least
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, document, "exec"), namespace)
    printed = capsys.readouterr().out
    shown = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    assert len(shown) >= 1
    for block in shown:
        assert block.strip() in printed


def test_doctests_of_all_modules_pass():
    results = [doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS) for name in MODULES]
    assert sum(r.attempted for r in results) > 0
    assert sum(r.failed for r in results) == 0


@pytest.mark.parametrize("name", MODULES)
def test_every_module_opens_with_a_sentence(name):
    """The first paragraph of the docstring starts with a capital, a name in backquotes or a formula, and ends."""
    opening = inspect.cleandoc(importlib.import_module(name).__doc__).split("\n\n")[0]
    assert re.fullmatch(r"(?s)[A-Z`:].*\w.*[.:?]", opening)
    assert len(opening.split()) > 3


def test_distribution_space_example_writes_its_figure(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    picture = tmp_path / "pictures" / "space.png"
    monkeypatch.setattr(sys, "argv", ["distribution_space.py", "--steps", "3", "--output", str(picture)])
    runpy.run_path(str(ROOT / "examples" / "distribution_space.py"), run_name="__main__")
    assert picture.stat().st_size > 10_000


def _anchors(document: pathlib.Path) -> set[str]:
    """GitHub's anchors of the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_to_files_and_headings(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text()):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            path = (ROOT / document).parent / name if name else ROOT / document
            assert path.exists(), target
            assert not anchor or anchor in _anchors(path), target


def test_names_in_the_architecture_page_exist():
    """A name in backquotes is a path of the repository, or a word of the package."""
    source = "\n".join(p.read_text() for p in ROOT.glob("numpyro_natgrad/**/*.py"))
    words = set(re.findall(r"\w+", source))
    quoted = re.findall(r"`([\w./*]+)(?:\([^`]*\))?`", (ROOT / "docs" / "architecture.md").read_text())
    assert len(quoted) > 50
    for name in quoted:
        is_path = any(any(folder.glob(name)) for folder in (ROOT, ROOT / "numpyro_natgrad"))
        assert is_path or name.split(".")[-1] in words, name


def test_every_public_name_exists():
    assert all(hasattr(numpyro_natgrad, name) for name in numpyro_natgrad.__all__)
