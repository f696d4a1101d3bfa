"""Adapters of cases, and the updates that merges of them make."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import domerge_fast as dm
from domerge_fast.adapters import Adapter
from domerge_fast.formats import from_tensors
from domerge_fast.formats.model.checkpoint import open_checkpoint
from domerge_fast.formats.target import Target

from .shapes import Case

LEVELLING = ("iso_c", "iso_cts", "subspace_boost")
"""Methods that change the spectrum of one adapter too, and make singular values equal or nearly."""


def adapters(cases: dict[str, Case], dtype: torch.dtype | None = None) -> list[Adapter]:
    """One adapter for each block of the cases, which are its modules; rounded to a dtype.

    Adapter i lacks the modules of the cases that have no block i.
    """
    loaded = []
    for i in range(max(len(case.ranks) for case in cases.values())):
        own = {name: case for name, case in cases.items() if i < len(case.ranks)}
        factors = {name: (c.a[i].to(dtype), c.b[i].to(dtype)) for name, c in own.items()}
        scalings = {name: c.scalings[i] for name, c in own.items()}
        loaded.append(from_tensors(factors, scalings, name=f"adapter-{i}"))
    return loaded


def merge_all(cases: dict[str, Case], method: str, **options: Any) -> dm.Merged:
    """All cases as the modules of one model, with the weights of each."""
    weights = max((case.weights for case in cases.values()), key=len)
    return at_one(adapters(cases), method, weights=weights, **options)


def dense(merged: dm.Merged, name: str) -> Tensor:
    """ΔW [m, n] in float64, from the factors."""
    a, b = merged.factors(name)
    return b.double() @ a.double()


def at_one(sources: Sequence[Any], method: str = "do", **given: Any) -> dm.Merged:
    """The merge as methods are defined: λ is 1 unless another is given."""
    return dm.merge(sources, method, **{"scale": 1.0, **given})


def of_base(target: Target, base: Path) -> Target:
    """The target with the base model in a folder."""
    return dataclasses.replace(target, base=open_checkpoint(base))
