"""Adapters of cases, and the updates that merges of them make."""

from __future__ import annotations

import torch
from torch import Tensor

import domerge_fast as dm
from domerge_fast.adapters import Adapter, from_tensors

from .shapes import Case


def adapters(cases: dict[str, Case], dtype: torch.dtype | None = None) -> list[Adapter]:
    """One adapter for each block of the cases, which are its modules; rounded to a dtype."""
    return [
        from_tensors(
            {name: (c.a[i].to(dtype), c.b[i].to(dtype)) for name, c in cases.items()},
            {name: c.scalings[i] for name, c in cases.items()},
            name=f"adapter-{i}",
        )
        for i in range(len(next(iter(cases.values())).ranks))
    ]


def dense(merged: dm.Merged, name: str) -> Tensor:
    """ΔW [m, n] in float64, from the factors."""
    a, b = merged.factors(name)
    return b.double() @ a.double()
