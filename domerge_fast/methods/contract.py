"""What a method that lives in R x R is: a function on Grams of a batch of modules.

    coefficients(grams, state, weights, options) -> C_A [P, k, R] and C_B [P, k, R]
    ΔW = λ (C_B B^T)^T (C_A A)

in plain torch and float64, of P modules that are alike: it reads nothing, calls no op and knows no
device. It is called for several batches at once, in threads of their own, and keeps nothing between
calls. A module of a lower rank than others has rows of zeros, which are left out. Who runs it
(running.py) has the Grams once, takes the Grams of what it makes from these, cuts there, and
applies the coefficients once a batch (applying.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..adapters.plan import Stack
from ..algebra.side import each_row
from ..backends.layout import side_by_side

__all__ = [
    "BATCH_BYTES",
    "Batch",
    "Coefficients",
    "Contract",
    "Found",
    "Needs",
    "Reducible",
    "State",
    "batched",
    "batches",
    "checked",
    "joined",
]

BATCH_BYTES = 64 << 20
"""What the R x R matrices of one kind may take in a batch of modules."""

PART_CUBES = 1 << 23
"""What R^3 of a batch may add up to on a CPU: a batch is one thread's work."""


@dataclass(frozen=True)
class Needs:
    """What a method has to be given.

    gram: the dtype of its Grams, None for none. bare: those of B^T are without the scalings s_i,
    and so is the B^T that C_B is applied to. host: they are in the host's memory, where scalings
    and weights always are. calibrates: whether it can do what `State.calibrated` asks for.
    """

    gram: torch.dtype | None = None
    bare: bool = False
    host: bool = False
    calibrates: bool = False

    @property
    def passes(self) -> int:
        """How often the factors are read for a merge at a given λ."""
        return 1 if self.gram is None else 2


@dataclass(frozen=True)
class State:
    """What a method is told besides: what `Method.reduce` made of the whole model; the Schatten
    norm of the merge that is wanted with it; and whether it is to be calibrated (svc.py)."""

    whole: Any = None
    order: int | None = None
    calibrated: bool = False


@dataclass(frozen=True, eq=False)
class Batch:
    """P modules that the same adapters have, with the same ranks: A A^T, B^T B [P, R, R], None
    where nobody needs them; the s_i [P, T] in float64; the ranks; the sides n and m as far as they
    limit the rank; the modules' names; the positions of the adapters; and the powers of two that
    were taken out of A and B."""

    grams: tuple[Tensor, Tensor] | None
    scales: Tensor
    ranks: tuple[int, ...]
    sides: tuple[int, int]
    names: Sequence[str]
    adapters: tuple[int, ...]
    powers: tuple[int, int] = (0, 0)

    @property
    def a(self) -> Tensor:
        """A A^T."""
        return self._both[0]

    @property
    def b(self) -> Tensor:
        """B^T B."""
        return self._both[1]

    @property
    def _both(self) -> tuple[Tensor, Tensor]:
        if self.grams is None:
            raise TypeError("a method that reads Grams has a row that `takes` them (Needs)")
        return self.grams

    @property
    def parts(self) -> list[slice]:
        """What is one thread's work each; all at once where there are no Grams."""
        count = len(self.names)
        if self.grams is None:
            return [slice(0, count)]
        return batches(count, sum(self.ranks), self.a.device)

    def part(self, at: slice) -> Batch:
        """Some of the modules."""
        grams = self.grams and (self.a[at], self.b[at])
        return replace(self, grams=grams, scales=self.scales[at], names=self.names[at])

    def of_rows(self, x: Tensor) -> Tensor:
        """What is said of every adapter [.., T] of every row of it, [.., R]."""
        return each_row(x, self.ranks)


Reducible = tuple[Batch, Tensor]
"""A batch of modules, and the weights w_i of their adapters [P, T] in float64."""


@dataclass(frozen=True, eq=False)
class Found:
    """What was found of a stack before anything is made. sizes: the Schatten norms of its modules'
    merges at λ = 1, where they were wanted. overlaps: <ΔW, τ_i> and ||τ_i||^2 of every adapter,
    [P, 2, T], where it was calibrated."""

    sizes: Sequence[float] | None = None
    overlaps: Tensor | None = None

    def kept(self) -> Found:
        """What is worth keeping until the whole model is known."""
        return self

    def least(self) -> Found:
        """What is kept where there is no room for more: what is R x R."""
        return self


@dataclass(frozen=True, eq=False)
class Coefficients(Found):
    """Merges of P modules at λ = 1 as A' = C_A A and B'^T = C_B B^T.

    a, b: C_A and C_B [P, k, R]; or None, for A as it is, and [P, T], what the rows of every adapter
    are multiplied by in B. strengths: where it is calibrated, s_i^r of every adapter and row,
    [P, T, k]. Who runs the method adds: ranks, how many rows every module has before rows of zeros;
    grams, A' A'^T and B'^T B' [P, k, k], where they will be cut.
    """

    a: Tensor | None = field(kw_only=True)
    b: Tensor = field(kw_only=True)
    strengths: Tensor | None = field(default=None, kw_only=True)
    ranks: Sequence[int] = field(default=(), kw_only=True)
    grams: tuple[Tensor, Tensor] | None = field(default=None, kw_only=True)

    def of_modules(self, at: slice) -> Coefficients:
        """Those of some of the modules, without rows that none of them has."""
        ranks = self.ranks[at]
        k = slice(max(ranks, default=None))
        return Coefficients(
            self.sizes and self.sizes[at],
            None if self.overlaps is None else self.overlaps[at],
            a=None if self.a is None else self.a[at, k],
            b=self.b[at] if self.a is None else self.b[at, k],
            strengths=None if self.strengths is None else self.strengths[at, :, k],
            ranks=ranks,
            grams=self.grams and (self.grams[0][at, k, k], self.grams[1][at, k, k]),
        )

    def padded(self, rows: int) -> Coefficients:
        """With so many rows, the last ones zeros."""
        more = rows - self.b.shape[1]
        if self.a is None or not more:
            return self
        a, b = (pad(x, (0, 0, 0, more)) for x in (self.a, self.b))
        strengths, grams = self.strengths, self.grams
        if strengths is not None:
            strengths = pad(strengths, (0, more))
        if grams:
            grams = pad(grams[0], (0, more, 0, more)), pad(grams[1], (0, more, 0, more))
        return replace(self, a=a, b=b, strengths=strengths, grams=grams)

    def settled(self) -> Coefficients:
        """With its `ranks`, and every module's rows of zeros behind the others: one of these stays
        where there is no other."""
        if self.a is None:
            return self
        live = (self.a != 0).any(2) & (self.b != 0).any(2)
        ranks = live.sum(1).clamp_min(1).tolist()
        if min(ranks) == live.shape[1]:
            return replace(self, ranks=ranks)
        order = live.logical_not().sort(dim=1, stable=True).indices[:, : max(ranks)]
        a, b = (_in_order(x * live[..., None], order) for x in (self.a, self.b))
        strengths = self.strengths
        if strengths is not None:
            strengths = _in_order(strengths.mT, order).mT
        return replace(self, a=a, b=b, strengths=strengths, ranks=ranks)


Contract = Callable[[Batch, State, Tensor, Any], Coefficients]
"""(grams, state, weights w_i [P, T], options) -> the coefficients of all modules.

options is the method's frozen dataclass. OptionError or FlatCut for what has no merge.
"""


def checked(made: object, name: str, ranks: Sequence[int], weights: Tensor) -> Coefficients:
    """What a method returned, by its name; TypeError where it is not what a `Contract` returns."""
    (count, adapters), rank = weights.shape, sum(ranks)
    told = type(made).__name__
    if isinstance(made, Coefficients):
        a, b = None if made.a is None else [*made.a.shape], [*made.b.shape]
        fits = b == [count, adapters] if a is None else a == b == [count, *b[1:2], rank]
        if fits:
            return made
        told = f"a {a}, b {b}"
    raise TypeError(
        f"method {name!r} has to return Coefficients, a and b [{count}, k, {rank}], "
        f"or a None and b [{count}, {adapters}]; it returned {told}"
    )


def batched(
    stacks: Sequence[Stack], grams_a: Sequence[Tensor] = (), grams_b: Sequence[Tensor] = ()
) -> Iterator[tuple[Sequence[int], Batch, Tensor]]:
    """All modules that are alike as one batch, with their weights [P, T], and the positions of the
    stacks that it is of. grams: of every stack, or none."""
    found: dict[tuple, list[int]] = {}
    for k, s in enumerate(stacks):
        sides = min(s.rank, s.a.d), min(s.rank, s.b.d)
        found.setdefault((s.a.ranks, sides, s.adapters, s.powers), []).append(k)
    for (ranks, sides, adapters, powers), members in found.items():
        given = [stacks[k] for k in members]
        names = [name for s in given for name in s.names]
        grams = (_of(grams_a, members), _of(grams_b, members)) if grams_a else None
        scales = _by_module(given, [s.b.scales for s in given])
        weights = _by_module(given, [s.weights for s in given])
        yield members, Batch(grams, scales, ranks, sides, names, adapters, powers), weights


def _of(grams: Sequence[Tensor], members: Sequence[int]) -> Tensor:
    """Those of the members [P, R, R]."""
    return side_by_side([x if x.dim() == 3 else x[None] for x in (grams[k] for k in members)])


def _by_module(stacks: Sequence[Stack], rows: Sequence[Sequence[float]]) -> Tensor:
    """What is said of every stack, of every module, [P, T]."""
    found = torch.tensor(rows, dtype=torch.float64)
    return torch.cat([row.expand(len(s.names), -1) for s, row in zip(stacks, found)])


def batches(count: int, rank: int, device: torch.device) -> list[slice]:
    """So many modules of stacked rank R in batches, each of them one thread's work."""
    most = BATCH_BYTES // (8 * rank**2)
    if device.type == "cpu":
        most = min(most, PART_CUBES // rank**3)
    step = max(1, most)
    return [slice(at, min(at + step, count)) for at in range(0, count, step)]


def joined(parts: Sequence[Coefficients]) -> Coefficients:
    """Those of one batch, part after part, which are `settled`."""
    rows = max(x.b.shape[1] for x in parts)
    parts = [x.padded(rows) for x in parts]
    sizes = [x.sizes for x in parts if x.sizes is not None]
    grams = [*zip(*(x.grams for x in parts if x.grams))]
    return Coefficients(
        [size for own in sizes for size in own] if sizes else None,
        _cat([x.overlaps for x in parts]),
        a=_cat([x.a for x in parts]),
        b=torch.cat([x.b for x in parts]),
        strengths=_cat([x.strengths for x in parts]),
        ranks=[rank for x in parts for rank in x.ranks],
        grams=(torch.cat(grams[0]), torch.cat(grams[1])) if grams else None,
    )


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [x for x in tensors if x is not None]
    return torch.cat(present) if present else None


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x [P, k, R] in the order [P, k'] of each module."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
