# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The code in the documents, docstrings and examples runs, and prints what is printed there."""

import ast
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
    p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")] if "_build" not in p.parts
)
MODULES = [m.name for m in pkgutil.walk_packages(numpyro_natgrad.__path__, "numpyro_natgrad.")]


def _blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of that language in a document."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


#: Pages whose code is part of the first tier; that of all others belongs to the second.
FIRST_TIER = {"README.md", "docs/fisher.md", "docs/guides.md", "docs/natural_gradients/distance.md"}
#: A landing page shows three lines of a program; wrong calls have a test of their own.
EXCERPTS = {"docs/index.md", "docs/wrong_calls.md"}
PROGRAMS = [name for name in DOCUMENTS if _blocks(name, "python") and name not in EXCERPTS]


def test_most_pages_have_code():
    assert len(PROGRAMS) >= 14
    assert set(PROGRAMS) > FIRST_TIER


@pytest.mark.parametrize(
    "document", [pytest.param(p, marks=[] if p in FIRST_TIER else pytest.mark.slow) for p in PROGRAMS]
)
def test_code_blocks_of_a_document_run(document, capsys):
    """All ``python`` blocks of a page run, one after the other, and print what its ``text`` blocks show."""
    namespace: dict = {}
    for block in _blocks(document, "python"):
        exec(compile(block, document, "exec"), namespace)
    printed, shown = capsys.readouterr().out, _blocks(document, "text")
    assert shown or _blocks(document, "console")
    for block in shown:
        assert block.strip() in printed


def _messages() -> list[str]:
    """The strings of the package, with … for what is filled in."""
    found = []
    for path in (ROOT / "numpyro_natgrad").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.replace("{}", "…"))
    return found


def test_messages_in_troubleshooting_are_those_of_the_package():
    quoted = re.findall(r"^> (.*)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    messages = _messages()
    assert len(quoted) > 20
    for message in quoted:
        assert any(message in one for one in messages), message


@pytest.mark.slow
def test_wrong_calls_raise_the_errors_that_are_shown(capsys):
    """Every row of the page is run after its program, and raises exactly that error."""
    page = "docs/wrong_calls.md"
    namespace: dict = {}
    exec(compile(_blocks(page, "python")[0], page, "exec"), namespace)
    rows = re.findall(r"^\| `(.*?)` \| (.*) \|$", (ROOT / page).read_text(), re.MULTILINE)
    assert len(rows) >= 60
    for call, shown in rows:
        with pytest.raises(Exception, match=re.escape(shown.partition(": ")[2])) as caught:
            eval(call, namespace)
        assert f"{type(caught.value).__name__}: {caught.value}" == shown, call


def test_every_page_is_listed_where_the_folder_is_read():
    """``docs/README.md`` links every page that the site's index has."""
    listed = (ROOT / "docs" / "README.md").read_text()
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert (
            page.name in {"README.md", "index.md", "contributing.md", "changelog.md"} or f"]({page.name}" in listed
        ), page


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
