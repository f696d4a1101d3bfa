"""How a merge takes the form that a runtime demands, where it can by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ..adapters.stems import split
from ..errors import some
from ..formats.format import Format
from ..formats.model.checkpoint import Checkpoint
from ..formats.peft.write import WHERE
from ..formats.target import Layout, Target
from .demands import missing
from .runtime import Runtime, Together

__all__ = ["fitted"]


def fitted(runtime: Runtime, row: Format, target: Target) -> tuple[Target, tuple[str, ...]]:
    """The target with what a runtime wants written otherwise, and what is to be said of it."""
    if row.name != "peft":
        return target, ()
    added = dict(_added(runtime, target))
    if not added and not (runtime.listed and isinstance(target.config["target_modules"], str)):
        return target, ()
    layouts = {**target.layouts, **added}
    names = sorted(name for name, layout in layouts.items() if not layout.slice)
    config = {**target.config, **dict.fromkeys(WHERE), "target_modules": names}
    config["target_parameters"] = target.config["target_parameters"]
    zeros = dict.fromkeys(added, next(iter(target.scales.values()), 1.0))
    scales = {**target.scales, **zeros} if target.scales else {}
    made = dataclasses.replace(
        target, config=config, layouts=layouts, empty=tuple(added), scales=scales
    )
    return made, (f"{some([*added], 1)}: factors of zero, for {runtime.title}",) if added else ()


def _added(runtime: Runtime, target: Target) -> Iterator[tuple[str, Layout]]:
    """The modules that are written with factors of zero, where their shape is known."""
    for rule in runtime.together:
        if rule.filled:
            for name in missing(rule, target.parts):
                if shape := _shape(name, rule, target):
                    m, inputs = shape
                    yield name, Layout(name, "linear", m, (inputs,), 1)


def _shape(name: str, rule: Together, target: Target) -> tuple[int, int] | None:
    """Of a module that is not adapted: what the base has, or the only one that modules called so
    have here (keys and values have one)."""
    if target.base:
        return _in_base(name, target.base)
    last = name.rpartition(".")[2]
    alike = ("k_proj", "v_proj") if last in ("k_proj", "v_proj") else (last,)
    shapes = {
        (layout.m, *layout.inputs)
        for layout in target.layouts.values()
        if layout.key.rpartition(".")[2] in alike and layout.kind == "linear"
    }
    if len(shapes) != 1:
        return None
    [(m, n)] = shapes
    return m, n


def _in_base(name: str, base: Checkpoint) -> tuple[int, int] | None:
    rest = f"{split(name)[1]}.weight"
    shapes = {x.shape for key, x in base.tensors.items() if split(key)[1] == rest}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2:
        return None
    return shape[0], shape[1]
