"""Writes MLX adapters, as mlx-lm loads them.

mlx-lm 0.32 wraps the modules called `lora_parameters.keys` in the last `num_layers` layers (all for
-1), and in the whole model, with `lora_parameters.rank`, and refuses tensors that are of no wrapped
module or have another shape; wrapped modules without tensors have an update of zero
(`tuner/utils.py:load_adapters`). So the keys that are written are the names of all modules within
their layers, for all layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...adapters.stems import split
from ...errors import DomergeError
from ...results.card import CARD, Heading
from ...results.report import Report
from ...storage.stream import SafetensorsWriter
from ..format import ONE, Format, Holds
from ..merge_folder import MergeFolder
from ..target import Layout, Target
from .experts import place_of
from .read import CONFIG, SIDES, WEIGHTS, load, recognises

__all__ = ["MLX"]


@dataclass
class _Stack:
    """A module of MLX with `count` experts, each of the shape of `layout`. missing: how many have
    still to come; kept: their A [E, r, n] and B [E, m, r], once one has."""

    layout: Layout
    count: int = 0
    missing: int = 0
    kept: tuple[Tensor, Tensor] | None = None

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.count, rank, *self.layout.inputs), (self.count, self.layout.m, rank)

    def add(self, expert: int, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
        if self.kept is None:
            of_a, of_b = self.shapes(len(a))
            self.kept = a.new_zeros(of_a, dtype=dtype), b.new_zeros(of_b, dtype=dtype)
        self.kept[0][expert], self.kept[1][expert] = a, b
        self.missing -= 1


class MlxFolder(MergeFolder):
    """Writes a merged adapter module by module, with one scale and one rank for all. The experts of
    a layer are kept until all of them are there."""

    heading = Heading("Merged LoRA adapter", "mlx")

    def __init__(self, path: Path, target: Target, overwrite: bool, force: bool = False) -> None:
        if target.config["layer_replication"]:
            problem = "the adapters replicate layers (layer_replication), which MLX cannot"
            raise DomergeError(f"{problem}; write another format")
        self._stacks = _stacks(target)
        super().__init__(path, target, overwrite, force, (CONFIG, WEIGHTS, CARD))

    def _open(self, folder: Path, files: contextlib.ExitStack) -> None:
        largest = {
            f"{name}.{side}": (self._target.dtype, shape)
            for name, shapes in _shapes(self._target, self._stacks)
            for side, shape in zip(SIDES, shapes)
        }
        self._writer = files.enter_context(SafetensorsWriter(folder / WEIGHTS, largest))

    def add(self, name: str, a: Tensor, b: Tensor) -> None:
        """A [k, n] and B [m, k] of a module, with ΔW = B A."""
        a, b = self._target.padded(a, b)
        place = place_of(name)
        if place is None:
            self._write(name, a.T, b.T)
            return
        stack = self._stacks[place[0]]
        stack.add(place[1], a, b, self._target.dtype)
        if not stack.missing and stack.kept:
            self._write(place[0], *stack.kept)
            stack.kept = None

    def _write(self, name: str, a: Tensor, b: Tensor) -> None:
        for side, x in zip(SIDES, (a, b)):
            self._writer.add(f"{name}.{side}", x.to(self._target.dtype))

    def finish(self, report: Report) -> None:
        """Config and card."""
        names = [name for name, _ in _shapes(self._target, self._stacks)]
        self._write_json(CONFIG, _config(self._target, names))
        self._write_card(report)


def _stacks(target: Target) -> dict[str, _Stack]:
    """The modules of MLX that hold experts, by name. All have as many: up to the last one that is
    adapted in any. DomergeError where those of a module differ."""
    found: dict[str, _Stack] = {}
    count = 0
    for name, layout in target.layouts.items():
        if place := place_of(name):
            stack = found.setdefault(place[0], _Stack(layout))
            if (layout.m, layout.inputs) != (stack.layout.m, stack.layout.inputs):
                problem = f"{name!r} and {stack.layout.name!r} have different shapes, and MLX has"
                raise DomergeError(f"{problem} one module of both; write another format")
            stack.missing += 1
            count = max(count, place[1] + 1)
    for stack in found.values():
        stack.count = count
    return found


def _shapes(
    target: Target, stacks: Mapping[str, _Stack]
) -> Iterator[tuple[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """The modules of MLX, with the shapes of lora_a and lora_b."""
    rank = target.rank
    assert rank is not None
    for name, x in target.layouts.items():
        if place_of(name) is None:
            yield name, ((*x.inputs, rank), (rank, x.m))
    for name, stack in stacks.items():
        yield name, stack.shapes(rank)


def _config(target: Target, modules: Iterable[str]) -> dict[str, object]:
    keys = sorted({_in_layer(name) for name in modules})
    scale = next(iter(target.scales.values()), 1.0)
    parameters = {"rank": target.rank, "scale": scale, "dropout": 0.0, "keys": keys}
    base = target.config["base_model_name_or_path"]
    return {
        "fine_tune_type": "lora",
        "lora_parameters": parameters,
        **({"model": base} if base else {}),
        "num_layers": -1,
    }


def _in_layer(name: str) -> str:
    """A module's name within its layer; in whole where it is in none."""
    return split(name)[1].partition(".")[2] or name


def notes(target: Target, ranks: Collection[int]) -> tuple[str, ...]:
    """What whoever uses the adapter has to know."""
    found = next((x.name for x in target.layouts.values() if x.kind == "embedding"), None)
    if found is None:
        return ()
    told = "where a model ties it to its output head, mlx-lm applies its update there as well"
    return (f"{found}: {told}, PEFT does not",)


MLX = Format(
    "mlx",
    "an MLX folder, as mlx-lm has it: A and B transposed, one scale",
    recognises,
    load,
    MlxFolder,
    holds=Holds(embeddings=True, scales=ONE),
    notes=notes,
    files=(CONFIG, WEIGHTS),
)
