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

from ...storage.buffers import bytes_of
from ...storage.lazy import Columns, LazyTensor, MemoryTensor, Turned
from ...storage.safetensors_file import FileTensor
from ...storage.tensor_file import TensorFile

__all__ = ["unpadded_ranks"]

HEAD_BYTES = 64
"""Of A's last row, or of B's last column where that is a row of the file, read of every module: in
a trained one they are hardly ever all zeros."""

Pair = tuple[LazyTensor, LazyTensor]


def unpadded_ranks(pairs: Mapping[str, Pair]) -> dict[str, int]:
    """The ranks of those modules that have padding. pairs: stored A [R, ...] and B [m, R, ...]."""
    rows = [b.whole if isinstance(b, Turned) else a for a, b in pairs.values()]
    heads = _may_be_zero(rows)
    used: dict[LazyTensor, Tensor] = {}
    found = {name: _rank(*pair, used) for (name, pair), zero in zip(pairs.items(), heads) if zero}
    return {name: rank for name, rank in found.items() if rank < pairs[name][0].shape[0]}


def _may_be_zero(tensors: Sequence[LazyTensor]) -> list[bool]:
    """Whether the last row of each begins with zeros."""
    places: dict[TensorFile, dict[int, tuple[int, int]]] = {}
    rows: dict[torch.device, dict[int, Tensor]] = {}
    for k, x in enumerate(tensors):
        if isinstance(x, FileTensor):
            row = x.nbytes // x.shape[0]
            place = x.begin + x.nbytes - row, min(row, HEAD_BYTES)
            places.setdefault(x.file, {})[k] = place
        elif isinstance(x, MemoryTensor):
            head = x.read()[-1].flatten()[: HEAD_BYTES // x.dtype.itemsize]
            rows.setdefault(head.device, {})[k] = head
    zero = [isinstance(x, Turned) for x in tensors]  # its last row lies all over the file
    for file, wanted in places.items():
        for k, found in zip(wanted, file.peek(list(wanted.values()))):
            zero[k] = not found.strip(b"\0\x80")  # a zero may have a sign
    for heads in rows.values():
        flat = torch.cat(list(heads.values())).cpu()
        for k, head in zip(heads, flat.split([len(head) for head in heads.values()])):
            zero[k] = not head.any()
    return zero


def _rank(a: LazyTensor, b: LazyTensor, used: dict[LazyTensor, Tensor]) -> int:
    """How many rank rows are left without the padding. used: which columns of matrices that many
    modules have a part of are not zeros, each looked through once."""
    a = MemoryTensor(a.read()) if isinstance(a, Turned) else a
    rank, step = a.shape[0], 1
    while rank:
        start = max(0, rank - step)
        rows = a.rows(start, rank).flatten(1)
        if not _is_blank(rows) and (last := _last(rows.any(1))):
            rank = start + last
            break
        rank, step = start, 2 * step
    if rank < a.shape[0]:
        rank += _last(_columns(b, rank, used))
    return max(rank, 1)


def _columns(b: LazyTensor, first: int, used: dict[LazyTensor, Tensor]) -> Tensor:
    """Which columns of B, from the first on, are not zeros."""
    if not isinstance(b, Columns):
        columns = b.read().flatten(1)[:, first:]
        return columns.new_zeros(0) if _is_blank(columns) else columns.any(0)
    if b.whole not in used:
        used[b.whole] = b.whole.read().any(0)
    return used[b.whole][b.index :: b.count][first:]


def _is_blank(x: Tensor) -> bool:
    """Whether all bits are 0, which is seen many times as fast as that all numbers are."""
    data = bytes(bytes_of(x.detach().cpu().contiguous()))
    return data == bytes(len(data))


def _last(present: Tensor) -> int:
    """How many there are up to the last that is true."""
    found = present.nonzero()
    return int(found[-1]) + 1 if len(found) else 0
