# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Settings of the documentation site: ``python -m sphinx -W --keep-going docs docs/_build/html``.

Nothing is loaded from the network, neither by the build nor by a reader's browser: formulas become MathML, and links to
other projects are resolved only where their inventories can be fetched. ``NATGRAD_DOCS_EXECUTE=1`` runs the examples of
the gallery, which takes minutes; ``NATGRAD_DOCS_LINKS=1`` fetches the inventories.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))
sys.path.insert(0, str(DOCS.parent / "examples"))
os.environ.setdefault("MPLBACKEND", "Agg")

EXECUTE = os.environ.get("NATGRAD_DOCS_EXECUTE", "") not in ("", "0")
LINKS = os.environ.get("NATGRAD_DOCS_LINKS", "") not in ("", "0")

# ---- the project -----------------------------------------------------------------------------------------------------

project = "numpyro-natgrad"
author = "Contributors to the numpyro_natgrad project"
project_copyright = author
version = release = re.findall(r'__version__ = "(.*)"', (DOCS.parent / "numpyro_natgrad" / "__init__.py").read_text())[
    0
]

# ---- pages -----------------------------------------------------------------------------------------------------------

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
root_doc = "index"
# The README of a folder lists its pages for those who read them in the repository.
exclude_patterns = ["README.md", "**/README.md", "_build"]
highlight_language = "none"  # indented blocks are formulas

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4  # those of GitHub

intersphinx_mapping = (
    {
        "arviz": ("https://python.arviz.org/en/stable/", None),
        "jax": ("https://docs.jax.dev/en/latest/", None),
        "numpyro": ("https://num.pyro.ai/en/stable/", None),
        "optax": ("https://optax.readthedocs.io/en/latest/", None),
        "python": ("https://docs.python.org/3/", None),
    }
    if LINKS
    else {}
)

# ---- reference -------------------------------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings have the types
autodoc_preserve_defaults = True


def write_modules() -> None:
    """Write a page with the docstring of every module, where the derivations are, under a heading for each room."""
    package = DOCS.parent / "numpyro_natgrad"
    text = (
        "Modules and derivations\n=======================\n\nThe derivations are in the docstrings of the modules.\n\n"
    )
    for folder in sorted({path.parent for path in package.rglob("*.py")} - {package}):
        names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
        room = ".".join(folder.relative_to(package.parent).parts)
        text += "\n".join(["", room, "-" * len(room), "", f".. automodule:: {room}", ""])
        for name in names:
            title = f"{name}.py"
            text += "\n".join(["", title, "~" * len(title), "", f".. automodule:: {room}.{name}", ""])
    text += "\n".join(["", "options.py", "-" * len("options.py"), "", ".. automodule:: numpyro_natgrad.options", ""])
    page = DOCS / "modules.rst"
    if not page.exists() or page.read_text() != text:
        page.write_text(text)


write_modules()

# ---- gallery ---------------------------------------------------------------------------------------------------------

if EXECUTE:  # keep the figures of the repository as they are, and progress bars out of the pages
    os.environ["TQDM_DISABLE"] = "1"
    import _common

    _common.FIGURES = pathlib.Path(tempfile.mkdtemp(prefix="natgrad_gallery_"))

# This example needs a package for Python 3.12, and is only shown where that is not installed.
SHOWN_ONLY = "" if importlib.util.find_spec("numpyro_forecast") else "(?!forecast_quickstart)"

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "plot_gallery": "True" if EXECUTE else "False",
    "filename_pattern": rf"/{SHOWN_ONLY}[a-z]\w*\.py$",
    "ignore_pattern": r"(^|/)_",
    "remove_config_comments": True,
    "show_memory": False,
    "write_computation_times": False,
    "show_signature": False,
    "download_all_examples": False,
    "abort_on_example_error": True,
    "first_notebook_cell": (
        "# `pip install numpyro-natgrad[examples]`; the file `_common.py` of the examples has to lie beside this one.\n"
        'import sys\n\nsys.argv = ["example"]  # instead of options on a command line\n%matplotlib inline'
    ),
}

# ---- look ------------------------------------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = "numpyro-natgrad"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_domain_indices = False
html_theme_options: dict[str, Any] = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": False,
    "show_navbar_depth": 1,
}

# ---- links that a command checks on request --------------------------------------------------------------------------

linkcheck_timeout = 20
linkcheck_anchors = False


def _mathml(self: Any, node: nodes.math | nodes.math_block, *, block: bool) -> None:
    """Write a formula as MathML, which browsers draw without a script."""
    try:
        formula = str(tex2mathml(node.astext(), as_block=block))
        # A function without parentheses stands apart from its argument.
        self.body.append(formula.replace("<mi>log</mi>", '<mo lspace="0.17em" rspace="0.17em">log</mo>'))
    except MathError as error:
        logging.getLogger(__name__).warning("formula not understood: %s", error, location=node)
    raise nodes.SkipNode


def _formulas_are_literal(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """An indented paragraph of a docstring is a formula, unless it belongs to a directive, a field or a list."""
    above = ""
    for i, line in enumerate(lines):
        opens = line.startswith("    ") and i > 0 and not lines[i - 1].strip()
        if opens and above and not re.match(r"(\s|:|\.\. |[*-] )", above) and not above.endswith("::"):
            lines[i - 1] = "\n::\n"
        above = line if line.strip() else above
    lines[:] = "\n".join(lines).split("\n")


def _pages_of_the_site(app: Any, docname: str, source: list[str]) -> None:
    """Links of the repository to scripts and to lists of pages become links to pages of the site."""
    text = re.sub(r"\]\((?:\.\./)+examples/(\w+)\.py\)", r"](/gallery/\1.rst)", source[0])
    text = re.sub(r"\]\((?:\.\./)+examples\)", "](/gallery/index.rst)", text)
    source[0] = text.replace("](benchmarks/README.md)", "](/benchmarks/index.md)")


def _figure_of_an_example(app: Any, docname: str, source: list[str]) -> None:
    """Show the figure that the repository keeps where an example was not run."""
    name = docname.removeprefix("gallery/")
    if EXECUTE or name == docname or not (DOCS / "figures" / f"{name}.png").exists():
        return
    figure = f".. image:: /figures/{name}.png\n   :alt: what the example draws\n   :width: 100%\n\n"
    place = source[0].find(".. GENERATED FROM PYTHON SOURCE LINES")  # after the text at the head
    source[0] = source[0][:place] + figure + source[0][place:]


def setup(app: Any) -> dict[str, bool]:
    """Register the renderer of formulas, and the hooks."""
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda self, node: _mathml(self, node, block=False), None),
        block_renderers=(lambda self, node: _mathml(self, node, block=True), None),
    )
    app.connect("autodoc-process-docstring", _formulas_are_literal)
    app.connect("source-read", _pages_of_the_site)
    app.connect("source-read", _figure_of_an_example)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
