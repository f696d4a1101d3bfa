"""Modules of a merge with their factors: those that are alike as one stack."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..algebra.side import Side
from ..storage.buffers import Matrix, as_tensor, places
from .adapter import Alike

__all__ = ["Kind", "Stack", "near_one", "stack_of_one", "stacks_of"]

SQUARES = 2 * 4 * 12
"""Bytes for every entry of an R x R matrix: both sides have their Gram, C and the descent's own,
and later the parts of C in place of those."""


@dataclass(frozen=True, eq=False)
class Stack:
    """Modules that are alike, with their factors from every adapter that has them, as the two
    sides; or one module, whose sides, Grams and results have no dimension for modules (`count`).

    adapters: positions in the plan's list, one a block. a: blocks A_i [r_i, n]. b: blocks B_i^T
    [r_i, m] with the scaling s_i as their scale. weights: w_i.

    powers: the true A is 2^powers[0] times this one, and the true B^T (with its weights)
    2^powers[1] times. far: whether some adapters are so much smaller than others that they vanish
    beside them in float32 sums of squares. Both are what engine/precision.py leaves behind.
    """

    names: tuple[str, ...]
    adapters: tuple[int, ...]
    a: Side
    b: Side
    weights: tuple[float, ...]
    powers: tuple[int, int] = (0, 0)
    far: bool = False

    @property
    def name(self) -> str:
        """Of the first."""
        return self.names[0]

    @property
    def count(self) -> int | None:
        """Of modules, None for one whose sides have no dimension for them."""
        return self.a.count

    @property
    def rank(self) -> int:
        return self.a.rank

    def of_modules(self, begin: int, end: int) -> Stack:
        """The modules from one position to another."""
        a, b = (side.of_modules(begin, end) for side in (self.a, self.b))
        return replace(self, names=self.names[begin:end], a=a, b=b)

    def each(self) -> list[Stack]:
        """The modules, one by one."""
        if self.count is None:
            return [self]
        rows = zip(self.names, self.a.each(), self.b.each())
        return [replace(self, names=(name,), a=a, b=b) for name, a, b in rows]

    @property
    def omegas(self) -> tuple[float, ...]:
        """ω_i = w_i / sum |w| over the adapters that have the module."""
        return _shares(self.weights)


@functools.lru_cache(maxsize=1 << 10)
def _shares(weights: tuple[float, ...]) -> tuple[float, ...]:
    sizes = near_one(weights)
    total = sum(map(abs, sizes))
    return tuple([w / total for w in sizes])


def near_one(weights: Sequence[float]) -> list[float]:
    """The weights over a power of two, with the largest near 1: their sums are finite, and no
    digit is lost."""
    power = math.frexp(max(map(abs, weights)))[1]
    return [math.ldexp(w, -power) for w in weights]


@dataclass(frozen=True, eq=False, slots=True)
class Kind:
    """What modules that are alike have in common: the positions of their adapters, the weights, r_i
    and s_i of these, m, n, and the dtypes of the adapters' factors."""

    owners: tuple[int, ...]
    weights: tuple[float, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    m: int
    n: int
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(
        cls, owners: tuple[int, ...], alike: Sequence[Alike], weights: tuple[float, ...]
    ) -> Kind:
        """alike: of every adapter."""
        return cls(
            owners,
            weights,
            tuple([x.rank for x in alike]),
            tuple([x.scaling for x in alike]),
            alike[0].m,
            alike[0].n,
            tuple([x.dtype for x in alike]),
        )

    @property
    def rank(self) -> int:
        """R, the stacked rank."""
        return sum(self.ranks)

    @property
    def factor_bytes(self) -> int:
        """Bytes of a module's factors, of all adapters."""
        return self.rank * (self.m + self.n) * self.dtypes[0].itemsize

    @property
    def dense_bytes(self) -> int:
        """Bytes of a module's ΔW in float32."""
        return 4 * self.m * self.n

    def device_bytes(self, dtype: torch.dtype) -> int:
        """Device memory that merging a module to factors of this dtype takes: the factors and the
        results, each twice (one group computes while another is copied), and R x R matrices.
        Kernels' scratch memory comes on top: up to 256 MiB, whatever the group."""
        merged = self.rank * (self.m + self.n) * dtype.itemsize
        return 2 * self.factor_bytes + 2 * merged + SQUARES * self.rank**2


def stacks_of(
    kind: Kind, names: Sequence[str], a: Sequence[Matrix], b: Sequence[Matrix]
) -> list[Stack]:
    """Of modules alike: one, but where not all factors are stored alike. a, b: A [r_i, n] and B
    [m, r_i] of every adapter, of one module after the other."""
    width, ranks, count = len(kind.owners), kind.ranks, len(names)
    at_a, at_b = places(a, width), places(b, width)
    first_a, first_b = a[:width], b[:width]
    if (
        at_a is None
        or at_b is None
        or [x.shape[0] for x in first_a] != [*ranks]
        or first_a[0].device != first_b[0].device
    ):
        own = [slice(at, at + width) for at in range(0, len(a), width)]
        return [stack_of_one(kind, name, a[at], b[at]) for name, at in zip(names, own)]
    side_a = Side.of(a, (1.0,) * width, ranks, kind.n, count=count, places=at_a)
    side_b = Side.of(b, kind.scalings, ranks, kind.m, True, count, at_b)
    return [Stack(tuple(names), kind.owners, side_a, side_b, kind.weights)]


def stack_of_one(kind: Kind, name: str, a: Sequence[Matrix], b: Sequence[Matrix]) -> Stack:
    """Of one module: A and B of every adapter."""
    ranks, ones = kind.ranks, (1.0,) * len(kind.ranks)
    if [x.shape[0] for x in a] != [*ranks]:
        a, b = _unpadded(ranks, a, b)
    return Stack(
        (name,),
        kind.owners,
        _side(a, ones, ranks, kind.n),
        _side(b, kind.scalings, ranks, kind.m, transposed=True),
        kind.weights,
    )


def _unpadded(
    ranks: Sequence[int], a: Sequence[Matrix], b: Sequence[Matrix]
) -> tuple[Sequence[Matrix], Sequence[Matrix]]:
    """Without the rank rows that are padding (formats/peft/padding.py)."""
    padded = [rank != x.shape[0] for rank, x in zip(ranks, a)]
    rows = [as_tensor(x)[:r].contiguous() if p else x for x, r, p in zip(a, ranks, padded)]
    columns = [as_tensor(x)[:, :r].contiguous() if p else x for x, r, p in zip(b, ranks, padded)]
    return rows, columns


def _side(
    matrices: Sequence[Matrix],
    scales: tuple[float, ...],
    ranks: tuple[int, ...],
    d: int,
    transposed: bool = False,
) -> Side:
    """`Side.of` matrices that are row-major, or transposes of such: none is copied where all are
    alike."""
    if all(x.is_contiguous() for x in matrices):
        return Side.of(matrices, scales, ranks, d, transposed)
    tensors = [as_tensor(x) for x in matrices]
    turned = [x.T for x in tensors]
    if all(x.is_contiguous() for x in turned):
        return Side.of(turned, scales, ranks, d, not transposed)
    return Side.of([x.contiguous() for x in tensors], scales, ranks, d, transposed)
