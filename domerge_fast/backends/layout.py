"""How the memory of tensors is laid out for kernels that read addresses."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

from ..algebra.side import Side, starts
from ..storage.buffers import Pieces, Run, spread

__all__ = [
    "addresses",
    "dense",
    "matrices",
    "placed",
    "recycled",
    "repeated",
    "row_major",
    "side_by_side",
]

Maybe = TypeVar("Maybe", Tensor, Tensor | None)

GAP = 64
"""Results that share an allocation begin at multiples of this many elements."""

LARGE = 32 << 20
"""Bytes from which on an allocation is had from the system every time, page by page: the most up to
which that of glibc may keep what was freed. In small pages it takes as long as an op takes to fill
them."""
LEAST = 1 << 20
"""Bytes from which on memory of an allocation is used again where results are let go."""
PIECE = 4 << 20
"""Bytes of results that are kept and share an allocation. What was freed serves the next merge
then, of which the sizes may differ, and a tensor that somebody holds keeps no more than that, or
than the modules that it was made with as one tensor."""

_pieces: ContextVar[Pieces | None] = ContextVar("domerge_results", default=None)


@contextlib.contextmanager
def recycled() -> Iterator[None]:
    """While the block runs, memory of results of ops in this thread, on the CPU, is used again for
    others once nobody holds any of them. For results that are let go one after the other."""
    token = _pieces.set(Pieces())
    try:
        yield
    finally:
        _pieces.reset(token)


def addresses(
    tensors: Sequence[Tensor | None], sides: Sequence[Side] | None = None, dims: int = 2
) -> memoryview:
    """Where matrices begin, those of a tensor [P, ...] one after the other. sides: whose they are;
    where there is none, 0 for every module of its side. dims: of what are no matrices."""
    runs = [
        (0, 0, sides[k].modules if sides else 1) if x is None else starts(x, dims)
        for k, x in enumerate(tensors)
    ]
    return memoryview(spread(runs)).cast("Q")


def repeated(rows: Iterable[tuple[bytes, int]]) -> bytes:
    """Numbers as `packed`, each as often as is said."""
    return b"".join([numbers * count for numbers, count in rows])


def side_by_side(batches: Sequence[Tensor]) -> Tensor:
    """Batches [P, ...] of one shape but for P as one: without a copy where they follow each other
    in one allocation, as results of an op do."""
    first = batches[0]
    if len(batches) == 1:
        return first
    strides, at, memory = first.stride(), first.data_ptr(), first.untyped_storage()
    step, count = strides[0] * first.itemsize, 0
    for x in batches:
        if x.data_ptr() != at + step * count or x.stride() != strides:
            return torch.cat(list(batches))
        count += x.shape[0]
    if at + step * count > memory.data_ptr() + memory.nbytes():
        return torch.cat(list(batches))
    return first.as_strided((count, *first.shape[1:]), strides)


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it where it is no dense piece of memory; a transposed matrix is."""
    if x.is_contiguous() or (x.ndim == 2 and x.stride() == (1, x.shape[0])):
        return x
    return x.contiguous()


def matrices(coefficients: Sequence[Maybe]) -> list[Maybe]:
    """Float32, every matrix row-major."""
    return [
        c if c is None or (c.dtype == torch.float32 and c.is_contiguous()) else row_major(c.float())
        for c in coefficients
    ]


def row_major(x: Tensor) -> Tensor:
    """x with every matrix row-major, which may have any distance from each other."""
    count, step = x.stride()[-2:]
    return x if step == 1 and count == x.shape[-1] else x.contiguous()


def placed(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device | None = None,
    counts: Sequence[int | None] | None = None,
    turned: Sequence[bool] | None = None,
    kept: bool = False,
) -> tuple[list[Tensor], memoryview]:
    """Row-major results of an op in one allocation, and their `addresses`: small ones cost more to
    allocate than to compute. One of them keeps the memory of all. counts: where there is one, so
    many of that shape, as a tensor [count, ...]. turned: of which the transposes are wanted. kept:
    whether they may outlive the work on a group; then they are in several, of PIECE bytes but where
    a result is larger, unless they are let go (`recycled`)."""
    leads = [None] * len(shapes) if counts is None else counts
    alike = [_dense(shape) for shape in shapes]
    sizes = [step * (1 if lead is None else lead) for (_, step), lead in zip(alike, leads)]
    several = kept and _pieces.get() is None
    most = PIECE // dtype.itemsize if several else sum(sizes)
    results: list[Tensor] = []
    runs: list[Run] = []
    for chosen in _runs(sizes, most):
        memory = _memory(sum([sizes[k] for k in chosen]), dtype, device)
        at, first = memory.data_ptr(), 0
        for k in chosen:
            shape, lead, (strides, step) = shapes[k], leads[k], alike[k]
            if lead is not None:
                shape, strides = (lead, *shape), (step, *strides)
            x = memory.as_strided(shape, strides, first)
            results.append(x.mT if turned and turned[k] else x)
            runs.append(
                (at + first * dtype.itemsize, step * dtype.itemsize, 1 if lead is None else lead)
            )
            first += sizes[k]
    return results, memoryview(spread(runs)).cast("Q")


def _runs(sizes: Sequence[int], most: int) -> Iterator[range]:
    """Positions of neighbours of which the sizes add up to `most`, or of one that is larger."""
    begin, total = 0, 0
    for k, size in enumerate(sizes):
        if k > begin and total + size > most:
            yield range(begin, k)
            begin, total = k, 0
        total += size
    if sizes:
        yield range(begin, len(sizes))


@functools.lru_cache(maxsize=1 << 14)
def _dense(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The strides of a row-major result of that shape, and what it takes up, in elements."""
    strides = tuple([math.prod(shape[n + 1 :]) for n in range(len(shape))])
    return strides, -(-math.prod(shape) // GAP) * GAP


def _memory(count: int, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Room for so many numbers."""
    nbytes = count * dtype.itemsize
    pieces = _pieces.get()
    if nbytes < (LARGE if pieces is None else LEAST) or (device and device.type != "cpu"):
        return torch.empty(count, dtype=dtype, device=device)
    return (pieces or Pieces()).take(nbytes)[0][:nbytes].view(dtype)
