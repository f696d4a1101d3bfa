"""The page of a merge, or of what `inspect` found: one HTML file that needs nothing else."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence

from ..errors import DomergeError, printable
from ..results.card import published, short_names
from ..results.report import Interference, Report
from ..storage import side_file
from . import interference_figures, merge_figures, spectra_figures
from .figure import Figure, Page, Section

__all__ = ["check_html", "html", "page_of", "write_html"]

LONGEST_TEXT = 20_000
"""Characters of a recipe on a page."""

MOST_LISTED = 64
"""Adapters that are listed."""


def write_html(found: Report | Interference, path: str | os.PathLike[str]) -> None:
    """Write what a merge reports, or `inspect` found, as one HTML file, which needs no network.

    It shows what there is: with `report="details"` also modules, spectra and shares. An older page
    is replaced, another file is not. OutputError where it cannot be written; DomergeError without
    jinja2 (the extra `report`).
    """
    place = check_html(path)
    side_file.replace(place, html(page_of(found)).encode())


def check_html(path: str | os.PathLike[str]) -> str:
    """The path, where a page can be written there: otherwise raises as `write_html`."""
    place = os.fspath(path)
    side_file.check(place)
    side_file.check_replaced(place)
    _renderer()
    return place


def html(page: Page) -> str:
    """The page as a text."""
    return _renderer()("report.html", page=page)


def _renderer() -> Callable[..., str]:
    try:
        render = importlib.import_module(".render", __package__)
    except ImportError as error:
        problem = f"a page needs jinja2 ({error}); pip install 'domerge-fast[report]'"
        raise DomergeError(problem) from error
    return render.rendered


def page_of(found: Report | Interference) -> Page:
    """What the page says."""
    return _of_merge(found) if isinstance(found, Report) else _of_adapters(found)


def _of_adapters(found: Interference) -> Page:
    names = _names(found.adapters)
    summary = [("adapters", str(len(names)))]
    if found.details:
        summary.append(("modules that several have", str(len(found.details.modules))))
    sections = [Section("Before a merge", list(_before(found, names, None)))]
    title = "How much adapters interfere"
    return Page(title, summary, *_listed(names), sections, found.notes)


def _of_merge(report: Report) -> Page:
    names = _names(report.adapters)
    summary = [row for row in report.summary() if row[0] != "note"]
    kept = [*merge_figures.shares(report, names), *merge_figures.descent(report)]
    found = report.interference
    before = list(_before(found, names, report.energies)) if found else []
    sections = [Section("What the merge kept", kept), Section("Before the merge", before)]
    used = [section for section in sections if section.figures]
    weights = report.recipe.weights or ()
    listed = _listed([f"{name}, weight {w:g}" for name, w in zip(names, weights)] or names)
    return Page("What a merge did", summary, *listed, used, report.notes, _texts(report))


def _listed(names: Sequence[str]) -> tuple[Sequence[str], int]:
    """Those that are listed, and how many are not."""
    return names[:MOST_LISTED], max(0, len(names) - MOST_LISTED)


def _texts(report: Report) -> list[tuple[str, str]]:
    """The recipe as in a card, and the versions."""
    plain = json.dumps(published(report.recipe).plain(), indent=2, ensure_ascii=False)
    if len(plain) > LONGEST_TEXT:
        plain = f"{plain[:LONGEST_TEXT]}\n… {len(plain) - LONGEST_TEXT} more characters"
    versions = "\n".join(f"{name} {version}" for name, version in report.versions.items())
    return [("Recipe", plain), ("Versions", versions)]


def _before(
    found: Interference, names: Sequence[str], merged: Sequence[float] | None
) -> Iterator[Figure]:
    yield from interference_figures.overlaps(found)
    yield interference_figures.sizes(found, names)
    if found.details:
        yield from spectra_figures.spectra(found.details, names, merged)
    if found.details and found.details.modules:
        yield interference_figures.by_depth(found.details)
        yield interference_figures.conflicts(found.details)
    if found.direction:
        yield interference_figures.along(found.direction, names)
    if found.on_inputs:
        yield interference_figures.moved(found.on_inputs, names)


def _names(adapters: Sequence[str]) -> list[str]:
    return interference_figures.numbered([printable(name) for name in short_names(adapters)])
