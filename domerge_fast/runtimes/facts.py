"""What files hold, or will hold, that a runtime may not take."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..adapters import Adapter, Module
from ..adapters.names import PREFIX
from ..adapters.parts import Parts
from ..formats.peft.write import rank_fields
from ..formats.target import Layout, Target
from .runtime import Stated

__all__ = ["Facts", "of_adapter", "of_target"]

TOKENS = "added_tokens.json"


@dataclass(frozen=True)
class Facts:
    """format: its name. modules: what says their kinds and places; parts: theirs. ranks: the least
    and the largest of the stored factors. scales: every module's rank and what it is scaled by,
    where that may not be 1; stated: what PEFT's config says of all, in a PEFT folder. fields: what
    a config that is there has; None for one that is written with all. targets: its target_modules.
    carried: names of the tensors saved whole. changed: parameters with changes that are no product
    of factors. replicates: whether layers are replicated. adds_tokens: whether its tokenizer lists
    added ones. others: what it is besides LoRA, as `Runtime.others`."""

    format: str
    modules: Mapping[str, Layout | Module]
    parts: Parts
    ranks: tuple[int, int]
    scales: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    stated: Stated | None = None
    fields: frozenset[str] | None = None
    targets: object = None
    carried: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    replicates: bool = False
    adds_tokens: bool = False
    others: tuple[str, ...] = ()


def of_target(format: str, target: Target, ranks: Collection[int] = ()) -> Facts:
    """Of what is to be written; the scale of a merge is in its factors. ranks: of the modules,
    where they are known; else they are what they are at most."""
    if target.rank is not None:
        ranks = [target.rank]
    ranks = ranks or [layout.largest_rank for layout in target.layouts.values()]
    scales, stated = _scales(target)
    return Facts(
        format,
        target.modules,
        target.parts,
        (min(ranks), max(ranks)),
        scales,
        stated if format == "peft" else None,
        targets=target.config["target_modules"],
        carried=_names(target.carried),
        changed=tuple(target.changes.names),
        replicates=bool(target.config["layer_replication"]),
        adds_tokens=any(file.path.name == TOKENS for file in target.copied),
    )


def _scales(target: Target) -> tuple[dict[str, tuple[int, float]], Stated | None]:
    """Every module's rank and scale, and what PEFT's config says of them, of what is converted."""
    if not target.scales:
        return {}, None
    ranks = {n: target.rank or layout.largest_rank for n, layout in target.layouts.items()}
    fields: dict[str, Any] = rank_fields(ranks, target.scales)
    found = {name: (rank, target.scale(name)) for name, rank in ranks.items()}
    return found, Stated(fields["r"], fields["lora_alpha"], False)


def of_adapter(adapter: Adapter) -> Facts:
    """Of an adapter that was read, as its files have it."""
    layouts, scales = {}, {}
    for name, module in adapter.modules.items():
        rank = adapter.stored[name][0].shape[0]
        shape = module.a_shape[1:]
        layouts[name] = Layout(name, module.kind, module.m, shape, rank, module.slice)
        scales[name] = rank, module.scaling
    ranks = [rank for rank, _ in scales.values()]
    format = adapter.style.format if adapter.style else "tensors"
    raw, folder = adapter.config.raw, adapter.folder
    stated = None
    if format == "peft":
        alpha, rslora = float(raw.get("lora_alpha", 8)), bool(raw.get("use_rslora"))
        stated = Stated(raw.get("r", 8), alpha, rslora)
    return Facts(
        format,
        layouts,
        adapter.parts,
        (min(ranks), max(ranks)),
        scales,
        stated,
        frozenset(raw) if format == "peft" else None,
        adapter.config.target_modules,
        _names(adapter.carried),
        tuple(adapter.changed),
        bool(adapter.config.layer_replication),
        folder is not None and os.path.isfile(folder / TOKENS),
        _others(adapter),
    )


def _others(adapter: Adapter) -> tuple[str, ...]:
    kinds = sorted(adapter.style.kinds) if adapter.style else []
    return (*kinds, "DoRA") if adapter.magnitudes else tuple(kinds)


def _names(carried: Collection[str]) -> tuple[str, ...]:
    return tuple(key.removeprefix(PREFIX) for key in carried)
