"""What the page shows: figures of a merge, and tables of losses, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import printable
from ..pages.figure import Figure, Row, Table
from ..pages.interference_figures import numbered, of_kinds, overlaps
from ..pages.merge_figures import shares_of
from ..pages.render import rendered
from ..results.card import short_names
from ..sessions.measures import Measured
from .explorer import Explorer, Ready
from .trial import Losses

__all__ = ["adapters_of", "figures_of", "interference_of", "losses_of"]


def adapters_of(explorer: Explorer) -> list[str]:
    """The adapters' names with their numbers, as people read them."""
    return numbered([printable(name) for name in short_names(explorer.adapters)])


def interference_of(explorer: Explorer) -> list[Figure]:
    """How the adapters interfere, whatever the weights."""
    return list(overlaps(explorer.interference)) if explorer.interference else []


def figures_of(explorer: Explorer, ready: Ready, found: Measured) -> str:
    """A merge's numbers, and how much of every adapter is in it, over modules and depth."""
    names = adapters_of(explorer)
    measured, total = len(ready.measures.modules), ready.measures.total
    note = f"Measured in {measured} of {total} modules, evenly spread." if measured < total else ""
    by_adapter: dict[str, list[float]] = {name: [] for name in names}
    for shares in found.modules.values():
        for k, share in shares.items():
            by_adapter[names[k]].append(share)
    rows: list[Row] = [
        (name, share, cosine, own)
        for name, share, cosine, own in zip(
            names, found.shares, found.cosines, ready.measures.norms
        )
    ]
    head = ("adapter", "share kept", "cosine with the merge", "‖ΔWᵢ‖")
    depth = of_kinds(
        "depth",
        "Share kept, by module",
        "mean over adapters, by projection",
        "Means over the adapters, by kind of module from the first layer to the last.",
        ("share kept",),
        {name: [_mean(x)] for name, x in found.modules.items() if x},
    )
    return rendered(
        "explored.html",
        norm=found.norm,
        own=(sum(x * x for x in ready.measures.norms) / len(names)) ** 0.5,
        method=ready.prepared.method.method.name,
        note=note,
        table=Table(head, rows),
        figures=[shares_of(by_adapter), depth],
    )


def _mean(shares: Mapping[int, float]) -> float:
    return sum(shares.values()) / len(shares)


def losses_of(explorer: Explorer, merged: Mapping[str, float], alone: Losses) -> str:
    """By text: the merge's loss, the base model's, and every adapter's own."""
    head = ("text", "merge", "base model", *adapters_of(explorer))
    rows: Sequence[Row] = [
        (printable(text), loss, alone.base[text], *(x[text] for x in alone.adapters))
        for text, loss in merged.items()
    ]
    return rendered("losses.html", table=Table(head, rows))
