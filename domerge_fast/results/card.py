"""The model card beside a merge: what it is made of, and how to make it again.

A card is uploaded: names that come from elsewhere are text in it, never Markdown, HTML or YAML, and
no absolute path stands there.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath, PurePosixPath, PureWindowsPath

from ..recipe import CARD as CARD
from ..recipe import Recipe
from .report import Interference, Report

__all__ = ["CARD", "Heading", "model_card", "published", "recipe_text", "short_names"]


@dataclass(frozen=True)
class Heading:
    """What a card says of the form it stands beside; `library` is the Hub's name of what loads
    it, `note` a sentence on what the files hold."""

    title: str
    library: str | None = None
    note: str = ""


def model_card(heading: Heading, report: Report, base_model: str | None) -> str:
    """README.md with the Hub's front matter, the recipe, versions and the interference table."""
    base = short_names([base_model])[0] if base_model else ""
    if report.converted:
        return _conversion_card(heading, report, base)
    made = f"Made by domerge_fast from {len(report.adapters)} adapters"
    made += f" of {_code(base)}." if base else "."
    parts = [
        _front(heading, base, "[lora, merge, domerge_fast]"),
        f"# {heading.title}",
        " ".join([made, heading.note]).strip(),
        "## Recipe",
        _fenced("json", json.dumps(published(report.recipe).plain(), indent=2, ensure_ascii=False)),
        "## Result",
        _table(("", ""), [(label, _text(text)) for label, text in report.summary()]),
    ]
    if report.interference:
        title = "Interference before merging" if report.interference.tables else "Adapters"
        parts += [f"## {title}", *_interference(report.interference)]
    parts += ["## Versions", _table(("package", "version"), list(report.versions.items()))]
    return "\n\n".join(parts) + "\n"


def _conversion_card(heading: Heading, report: Report, base: str) -> str:
    """Of what is written in another format: from which files."""
    [source] = published(report.recipe).adapters
    files = [(_code(name), _code(digest)) for name, digest in source.files.items()]
    parts = [
        _front(heading, base, "[lora, domerge_fast]"),
        "# Converted LoRA adapter",
        f"Converted by domerge_fast from {_code(source.name)}.",
        _table(("file", "SHA-256"), files),
        *(f"- {_text(note)}" for note in report.notes),
    ]
    return "\n\n".join(parts) + "\n"


def _front(heading: Heading, base: str, tags: str) -> str:
    """The Hub's front matter."""
    lines = ["---", f"tags: {tags}", "---"]
    if heading.library:
        lines.insert(1, f"library_name: {heading.library}")
    if base:
        lines.insert(1, f"base_model: {json.dumps(base, ensure_ascii=False)}")
    return "\n".join(lines)


def recipe_text(recipe: Recipe) -> str:
    """The recipe as a card has it, on one line."""
    return json.dumps(published(recipe).plain(), ensure_ascii=False)


def published(recipe: Recipe) -> Recipe:
    """The recipe with names in place of paths: what has these files is found by their sums."""
    names = short_names([x.name for x in recipe.adapters])
    adapters = tuple(dataclasses.replace(x, name=n) for x, n in zip(recipe.adapters, names))
    model = recipe.base_model and short_names([recipe.base_model])[0]
    base, features = (
        x and dataclasses.replace(x, name=short_names([x.name])[0])
        for x in (recipe.base, recipe.features)
    )
    return dataclasses.replace(
        recipe, adapters=adapters, base=base, features=features, base_model=model
    )


def _interference(found: Interference) -> list[str]:
    number = [f"{i}" for i in range(1, len(found.adapters) + 1)]
    names = short_names(found.adapters)
    adapters = [
        (k, _code(name), *(f"{v:.3g}" for v in (norm, *spread)))
        for k, name, norm, spread in zip(number, names, found.norms, found.spread)
    ]
    head = ("#", "adapter", "norm of ΔW", "least of a module", "median", "largest")
    parts = [_table(head, adapters)]
    titles = (
        "Overlap of row spaces (A): 0 orthogonal, 1 the same",
        "Overlap of column spaces (B): 0 orthogonal, 1 the same",
        "Cosine between the updates ΔW",
    )
    for title, table in zip(titles, found.tables or ()):
        rows = [(k, *(f"{v:.3f}" for v in row)) for k, row in zip(number, table)]
        parts += [f"{title}:", _table(("", *number), rows)]
    return parts


def short_names(paths: Sequence[str]) -> list[str]:
    """How models and adapters are called: as they are, but of paths on this machine so many of
    their last parts as tell them apart."""
    parts = [_parts(path) for path in paths]
    names: list[str] = []
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(set(paths)):
            break
    return [_plain(name) for name in names]


def _parts(path: str) -> list[str]:
    for kind in (PurePosixPath, PureWindowsPath):
        found: PurePath = kind(path.removeprefix("file://"))
        if found.anchor or found.parts[:1] in [("~",), ("..",)] or str(path)[:1] == "~":
            return [p for p in found.parts if p not in (found.anchor, "..")] or ["?"]
    return [path]


def _plain(text: str) -> str:
    """On one line, without what controls how text is shown, and what is no Unicode."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _longest_fence(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _code(text: str) -> str:
    """A name as a code span."""
    fence = "`" * (_longest_fence(text) + 1)
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{_plain(text)}{pad}{fence}"


def _fenced(language: str, text: str) -> str:
    fence = "`" * max(3, _longest_fence(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _text(text: str) -> str:
    """A sentence that may quote a name: no links, no HTML, no code spans."""
    return re.sub(r"([\\`\[\]<])", r"\\\1", _plain(text))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are Markdown; a bar in them is escaped, in a code span too."""
    lines = [head, ["---"] * len(head), *rows]
    # Not all readers of tables see that a backslash before one is itself escaped.
    cells = [[re.sub(r"\\*\|", r"\\|", cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
