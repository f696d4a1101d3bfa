"""Models that are deeper, or shallower, than their base: any order of its layers, each with a merge
of its own (depth-wise integration, arXiv 2502.04030).

PEFT calls it `layer_replication`: ranges [start, end) of the base's layers, one after the other,
which share the base's weights; an adapter has weights for each layer of the result. What the layers
put out cannot be scaled there.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ... import options
from ...adapters.stems import joined, split
from ...api import merge
from ...errors import OptionError
from ...formats import from_tensors
from ...merged import Merged
from ..prepared import Prepared

__all__ = ["stack_layers"]


def stack_layers(
    prepared: Prepared,
    layers: Sequence[tuple[int, Sequence[float]]],
    output: str | os.PathLike[str],
    **asked: Any,
) -> Merged:
    """Write an adapter of a model that has these layers of the base, in this order.

    layers: of each its number in the base, and one coefficient for each adapter. asked: overwrite,
    force, rank, energy and dtype, as of `merge`. It can be loaded by PEFT, not by servers.

    Raises as `merge` does; OptionError for adapters of modules outside of one list of layers.
    """
    numbers = [_checked(k, layer, len(prepared.adapters)) for k, layer in enumerate(layers)]
    if not numbers:
        raise OptionError("layers", "there are none", "give (number, coefficients) of each")
    places = {name: split(name) for name in prepared.modules}
    stems = {stem for stem, _ in places.values()}
    if len(stems) > 1 or not all(rest for _, rest in places.values()):
        problem = f"adapters have modules outside of one list of layers ({sorted(stems)})"
        raise OptionError("layers", problem, "leave them out before (rules, leave_out)")
    (stem,) = stems
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    merges = {row: prepared.merge(row, "task") for row in {tuple(row) for _, row in layers}}
    for place, (number, row) in enumerate(layers):
        for name, (_, rest) in places.items():
            layer, _, part = rest.partition(".")
            if int(layer) == number:
                factors[joined(stem, f"{place}.{part}")] = merges[tuple(row)][name]
    if not factors:
        raise OptionError("layers", "no adapter changes any of them", "give some that they do")
    first = prepared.sources()[0].config
    if first.layer_replication:
        problem = "the adapters' own model has replicated layers"
        raise OptionError("layers", problem, "give adapters of the base as it is")
    made = from_tensors(factors, name="stacked layers")
    config = dataclasses.replace(
        made.config,
        base_model_name_or_path=first.base_model_name_or_path,
        task_type=first.task_type,
        layer_replication=_ranges(numbers),
    )
    told = ", ".join(prepared.adapters)
    note = (
        f"{len(layers)} layers of the base in another order, of {prepared.recipe.method} of {told}"
    )
    stacked = dataclasses.replace(made, config=config, notes=(note,))
    return merge([stacked], "linear", scale=1.0, output=output, **asked)


def _checked(place: int, layer: Any, adapters: int) -> int:
    if not isinstance(layer, Sequence) or len(layer) < 2:
        problem = f"{layer!r} is no layer with its coefficients"
        raise OptionError(f"layers[{place}]", problem, "give (number, coefficients)")
    if len(layer) > 2:
        problem = "has a third part: what a layer puts out cannot be scaled by an adapter"
        raise OptionError(f"layers[{place}]", problem, "give (number, coefficients)")
    number, row = layer
    if len(row) != adapters:
        problem = f"has {len(row)} coefficients"
        raise OptionError(f"layers[{place}]", problem, f"give one for each of {adapters} adapters")
    return int(options.check(f"layers[{place}]", number, int, low=0))


def _ranges(numbers: Sequence[int]) -> list[list[int]]:
    """[0, 1, 1, 2] as [[0, 2], [1, 3]]."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1][1] += 1
        else:
            found.append([number, number + 1])
    return found
