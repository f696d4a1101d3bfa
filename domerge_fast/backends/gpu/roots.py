"""Roots of the adapters' own Grams that are too large for a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _C
from ...algebra.roots import root
from ...algebra.side import Side
from .kernels import Kernels

__all__ = ["MAX_RANK", "find_large"]

MAX_RANK = 256
"""r up to which a block finds the root of an adapter's Gram; beyond, batched library calls do."""


def find_large(
    kernels: Kernels,
    packed: Sequence[Tensor],
    problems: Sequence[Side],
    made: _C.LaunchTables,
    places: int,
    roots: Tensor,
    norms: Tensor,
) -> None:
    """What Kernels.roots makes, of adapters of r above MAX_RANK: those of a rank in one batch.
    places: the number of the table that says where each begins."""
    alike: dict[int, list[tuple[Tensor, list[int]]]] = {}
    first = 0
    for p, k in zip(problems, packed):
        last = first + p.modules * len(p.ranks)
        if max(p.ranks) <= MAX_RANK:
            first = last
            continue
        pieces = k.view(p.modules, -1).split([r * r for r in p.ranks], 1)
        for i, (r, piece) in enumerate(zip(p.ranks, pieces)):
            if r > MAX_RANK:
                blocks = list(range(first + i, last, len(p.ranks)))
                alike.setdefault(r, []).append((piece.reshape(-1, r, r), blocks))
        first = last
    begin, *_ = made.places[places]
    offsets = memoryview(made)[begin:]
    for found in alike.values():
        grams = torch.cat([k for k, _ in found])
        sizes = grams.diagonal(dim1=1, dim2=2).sum(1).clamp_min(0).sqrt()[:, None, None]
        units = kernels.as_roots(torch.where(sizes > 0, root(grams) / sizes, 0.0))
        for own, size, i in zip(units, sizes, (i for _, blocks in found for i in blocks)):
            at = offsets[i]
            roots[at : at + len(own)] = own
            norms[i] = size.squeeze()
