"""How Sphinx makes the site (`make docs`), from the pages as they lie in the repository."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from docstrings import restructured  # noqa: E402

from domerge_fast import __version__  # noqa: E402

project = "domerge_fast"
copyright = "the maintainers of domerge_fast, Apache-2.0"
version = release = __version__

# Pages refer to each other by their places in the repository, which is the source folder.
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "benchmarks/*.md", "benchmarks/**/*.md"]
exclude_patterns = [".*", "build", "dist", "demo", "tests", "benchmarks/data", "docs/_build"]

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
smartquotes = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = project
html_copy_source = html_show_sourcelink = False

PICTURES = [f"benchmarks/results/quality/kept-{theme}.svg" for theme in ("light", "dark")]
FRONT = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">\n'


def docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """A listener of autodoc's: docstrings are no reStructuredText before."""
    lines[:] = restructured(lines)


def finish(app: Any, error: Exception | None) -> None:
    """The site's own address leads to its index. What README.md shows by HTML, Sphinx does not
    copy."""
    out = Path(app.outdir)
    (out / "index.html").write_text(FRONT, encoding="utf-8")
    for picture in PICTURES:
        (out / picture).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE.parent / picture, out / picture)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", docstring)
    app.connect("build-finished", finish)
