"""The model card beside a merge: what it is made of, and how to make it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..report import Interference, Report

CARD = "README.md"
_TAGS = "tags: [lora, merge, domerge_fast]"


@dataclass(frozen=True)
class Heading:
    """What a card says of the form it stands beside; `library` is the Hub's name of what loads
    it, `note` a sentence on what the files hold."""

    title: str
    library: str | None = None
    note: str = ""


def model_card(heading: Heading, report: Report, base_model: str | None) -> str:
    """README.md with the Hub's front matter, the recipe, versions and the interference table."""
    front = ["---", _TAGS, "---"]
    if heading.library:
        front.insert(1, f"library_name: {heading.library}")
    if base_model:
        front.insert(1, f"base_model: {json.dumps(base_model)}")
    made = f"Made by domerge_fast from {len(report.adapters)} adapters"
    made += f" of `{base_model}`." if base_model else "."
    parts = [
        "\n".join(front),
        f"# {heading.title}",
        " ".join([made, heading.note]).strip(),
        "## Recipe",
        "```json\n" + json.dumps(recipe(report), indent=2, ensure_ascii=False) + "\n```",
        "## Result",
        _table(("", ""), report.summary()),
    ]
    if report.interference:
        parts += ["## Interference before merging", *_interference(report.interference)]
    parts += ["## Versions", _table(("package", "version"), list(report.versions.items()))]
    return "\n\n".join(parts) + "\n"


def recipe(report: Report) -> dict[str, object]:
    """Everything needed to repeat the merge."""
    return {
        "method": report.method,
        "adapters": list(report.adapters),
        "weights": list(report.weights),
        "scale": report.scale,
        **report.options,
        "backend": report.backend,
        "device": report.device,
        "dtype": report.dtype,
    }


def _interference(found: Interference) -> list[str]:
    number = [f"{i}" for i in range(1, len(found.adapters) + 1)]
    adapters = [
        (k, f"`{name}`", *(f"{v:.3g}" for v in (norm, *spread)))
        for k, name, norm, spread in zip(number, found.adapters, found.norms, found.spread)
    ]
    head = ("#", "adapter", "norm of ΔW", "least of a module", "median", "largest")
    parts = [_table(head, adapters)]
    for title, table in (
        ("Overlap of row spaces (A): 0 orthogonal, 1 the same", found.rows),
        ("Overlap of column spaces (B): 0 orthogonal, 1 the same", found.columns),
        ("Cosine between the updates ΔW", found.cosine),
    ):
        rows = [(k, *(f"{v:.3f}" for v in row)) for k, row in zip(number, table)]
        parts += [f"{title}:", _table(("", *number), rows)]
    return parts


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
