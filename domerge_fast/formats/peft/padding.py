"""Rank rows that are zero on both sides: they add nothing to an update.

Adapters are padded with them so that all modules have one rank, which servers want. A method that
looks at ranks, or at factors, must not: a padded adapter is read as if it were not. Row k is left
out where row k of A and column k of B are zeros, from the last one up; before others such rows are
kept, because nobody pads there and to find them every factor would have to be read. One row always
stays. Rows of zeros in A alone are factors like others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...storage.lazy import LazyTensor, MemoryTensor
from ...storage.safetensors_file import FileTensor, SafetensorsFile

__all__ = ["unpadded_ranks"]

HEAD_BYTES = 64
"""Of A's last row, read of every module: in a trained one they are hardly ever all zeros."""

Pair = tuple[LazyTensor, LazyTensor]


def unpadded_ranks(pairs: Mapping[str, Pair]) -> dict[str, int]:
    """The ranks of those modules that have padding. pairs: stored A [R, ...] and B [m, R, ...]."""
    heads = _may_be_zero([a for a, _ in pairs.values()])
    found = {name: _rank(*pair) for (name, pair), zero in zip(pairs.items(), heads) if zero}
    return {name: rank for name, rank in found.items() if rank < pairs[name][0].shape[0]}


def _may_be_zero(tensors: Sequence[LazyTensor]) -> list[bool]:
    """Whether the last row of each begins with zeros."""
    places: dict[SafetensorsFile, dict[int, tuple[int, int]]] = {}
    rows: dict[torch.device, dict[int, Tensor]] = {}
    for k, x in enumerate(tensors):
        if isinstance(x, FileTensor):
            row = x.nbytes // x.shape[0]
            place = x.begin + x.nbytes - row, min(row, HEAD_BYTES)
            places.setdefault(x.file, {})[k] = place
        elif isinstance(x, MemoryTensor):
            head = x.read()[-1].flatten()[: HEAD_BYTES // x.dtype.itemsize]
            rows.setdefault(head.device, {})[k] = head
    zero = [False] * len(tensors)
    for file, wanted in places.items():
        for k, found in zip(wanted, file.peek(list(wanted.values()))):
            zero[k] = not found.strip(b"\0\x80")  # a zero may have a sign
    for heads in rows.values():
        flat = torch.cat(list(heads.values())).cpu()
        for k, head in zip(heads, flat.split([len(head) for head in heads.values()])):
            zero[k] = not head.any()
    return zero


def _rank(a: LazyTensor, b: LazyTensor) -> int:
    """How many rank rows are left without the padding."""
    rank, step = a.shape[0], 1
    while rank:
        start = max(0, rank - step)
        if last := _last(a.rows(start, rank).flatten(1).any(1)):
            rank = start + last
            break
        rank, step = start, 2 * step
    if rank < a.shape[0]:
        rank = max(rank, _last(b.read().flatten(1).any(0)))
    return max(rank, 1)


def _last(present: Tensor) -> int:
    """How many there are up to the last that is true."""
    found = present.nonzero()
    return int(found[-1]) + 1 if len(found) else 0
