"""Modules by kind and depth, told by their names: `model.layers.3.self_attn.q_proj` is of the kind
`self_attn.q_proj`, in layer `model.layers.3`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

__all__ = ["MOST_DEPTHS", "MOST_KINDS", "Curve", "by_kind", "place_of"]

MOST_KINDS = 12
"""Kinds that are drawn."""

MOST_DEPTHS = 100
"""Points of a line; of more layers, neighbours are drawn as their mean."""

Curve = list[tuple[float, tuple[float, ...]]]
"""Depths, and the means of some numbers over the modules there."""

_NUMBER = re.compile(r"(?<![0-9A-Za-z])\d+(?![0-9A-Za-z])")


def place_of(name: str) -> tuple[str, tuple[str, int] | None]:
    """The kind of a module, and its layer: what stands before the first number of its name, and
    that. Other numbers in the name, as those of experts, are `*` in the kind."""
    number = _NUMBER.search(name)
    if not number:
        return name, None
    kind = _NUMBER.sub("*", name[number.end() :].lstrip("._"))
    stem = name[: number.start()].rstrip("._")
    return kind or stem, (stem, int(number[0][:18]))


def by_kind(modules: Mapping[str, Sequence[float]]) -> dict[str, Curve]:
    """By kind of module the means of numbers over depth, from the first layer, which is 1."""
    places = {name: place_of(name) for name in modules}
    stems = dict.fromkeys(layer[0] for _, layer in places.values() if layer)
    order = {stem: k for k, stem in enumerate(stems)}
    layers = sorted(
        {layer for _, layer in places.values() if layer}, key=lambda x: (order[x[0]], x[1])
    )
    width = max(1, -(-len(layers) // MOST_DEPTHS))
    depth = {layer: 1 + k // width * width + (width - 1) / 2 for k, layer in enumerate(layers)}
    found: dict[str, dict[float, list[Sequence[float]]]] = {}
    for name, (kind, layer) in places.items():
        at = depth[layer] if layer else 1.0
        found.setdefault(kind, {}).setdefault(at, []).append(modules[name])
    return {
        kind: [(at, _means(rows)) for at, rows in sorted(points.items())]
        for kind, points in found.items()
    }


def _means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(column) for column in zip(*rows))
