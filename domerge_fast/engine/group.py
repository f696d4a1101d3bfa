"""A group of modules as a method takes it: near 1, finite, and with its Grams; what the report says
of its adapters is counted from these."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Plan, Stack
from ..algebra.host import gather, within
from ..algebra.powers import USUAL
from ..algebra.side import each_row
from ..backends.layout import side_by_side
from ..errors import AdapterError
from ..methods.base import Grams, grams, wide_grams
from ..recipe import NONE
from . import precision
from .interference import InterferenceSums
from .precision import Diagonals

__all__ = ["Group", "measured", "not_finite"]

Pair = tuple[Tensor, Tensor]
_Batch = tuple[list[int], Pair, Diagonals]


@dataclass(frozen=True, eq=False)
class Group:
    """Stacks near 1 with their Grams as the method takes them, and ||ΔW_i||_F of every module of
    each, () where these were not asked for. moved: the diagonals of the Grams of stacks that were
    brought near 1."""

    stacks: list[Stack]
    grams: Grams
    norms: Sequence[Sequence[Sequence[float]]]
    moved: Sequence[Diagonals | None]

    def apart(self) -> Group:
        """With a stack for every module."""
        if all(s.count is None for s in self.stacks):
            return self
        counts = [1 if s.count is None else s.count for s in self.stacks]
        return Group(
            [one for s in self.stacks for one in s.each()],
            (_apart(self.grams[0], self.stacks), _apart(self.grams[1], self.stacks)),
            [[row] for rows in self.norms for row in rows],
            [x for x, count in zip(self.moved, counts) for _ in range(count)],
        )


def _apart(tensors: Sequence[Tensor | None], stacks: Sequence[Stack]) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for x, s in zip(tensors, stacks):
        if s.count is None:
            found.append(x)
        else:
            found += [None] * s.count if x is None else x.unbind()
    return found


def measured(
    plan: Plan,
    stacks: Sequence[Stack],
    wanted: Sequence[bool],
    sums: InterferenceSums,
    backend: str,
    wide: bool = False,
    bare: bool = False,
) -> Group:
    """The group, of stacks that are brought near 1 where they are not, counted into the sums.

    wanted: of which the method takes Grams. wide: it takes `wide_grams`, of all, of which what is
    counted is made too; bare: without scalings. A module that has to be looked at by itself becomes
    a stack by itself. AdapterError for a factor that is not finite.
    """
    found = _with_grams(stacks, wanted, backend, wide, bare)
    parts = [x for x in found if x.grams]
    without = [x for x in found if not x.grams]
    batches = _batches(parts)
    odd = _unusual(parts, batches)
    if without or any(odd):
        parts = [x for part, own in zip(parts, odd) for x in part.split(own)]
        parts += _looked_at(without, backend) if without else ()
        parts = [_moved(plan, x) for x in parts]
        if any(x.moved for x in parts):
            parts = _again(parts, wide, bare, backend)
        _check_finite(plan, parts)
        if any(odd):  # those that are counted by Grams come first
            batches = _batches([x for x in parts if x.counted])
    return Group(
        [x.stack for x in parts],
        ([x.taken and x.taken[0] for x in parts], [x.taken and x.taken[1] for x in parts]),
        _counted(parts, batches, sums, backend),
        [x.moved for x in parts],
    )


@dataclass(frozen=True, eq=False)
class _Part:
    """A stack, its Grams as the method takes them, and those with scalings, on the device of both.
    tops: of a stack without, the largest magnitude of every block, [P, 2T], A's before B's.
    diagonals: of a module's Grams, in the host's memory, if it is looked at by itself. moved: those
    that it had before it was brought near 1, if it was. counted: whether norms are counted from
    these Grams, in float64 where it was moved."""

    stack: Stack
    taken: Pair | None
    grams: Pair | None
    counted: bool = True
    tops: Tensor | None = None
    diagonals: Diagonals | None = None
    moved: Diagonals | None = None

    def split(self, chosen: Mapping[int, Diagonals | None]) -> Iterator[_Part]:
        """The modules chosen one by one, with the diagonals given, and what is between them."""
        if not chosen:
            yield self
            return
        if self.stack.count is None:
            yield replace(self, diagonals=chosen[0])
            return
        begin = 0
        for k, own in chosen.items():
            if k > begin:
                yield self._of_modules(begin, k)
            (stack,) = self.stack.of_modules(k, k + 1).each()
            yield replace(self._at(stack, k), diagonals=own)
            begin = k + 1
        if begin < self.stack.count:
            yield self._of_modules(begin, self.stack.count)

    def _of_modules(self, begin: int, end: int) -> _Part:
        return self._at(self.stack.of_modules(begin, end), slice(begin, end))

    def _at(self, stack: Stack, at: int | slice) -> _Part:
        taken = self.taken and (self.taken[0][at], self.taken[1][at])
        grams = self.grams and (self.grams[0][at], self.grams[1][at])
        tops = None if self.tops is None else self.tops[at]
        return replace(self, stack=stack, taken=taken, grams=grams, tops=tops)

    def not_finite(self) -> Stack | None:
        """A module with a factor that is not. Of a Gram only what is on the diagonal tells: a sum
        beside it can overflow alone, by rounding, and no factor is to blame."""
        if self.tops is not None and not _finite(self.tops):
            rows = self.tops.view(-1, self.tops.shape[-1])
            return next(s for s, top in zip(self.stack.each(), rows) if not _finite(top))
        if self.diagonals and not all(map(_finite, self.diagonals)):
            return self.stack
        return None


def _batches(parts: Sequence[_Part]) -> list[_Batch]:
    """Positions of parts with Grams, those of which is counted together; the Grams of all of their
    modules, [P, R, R] on their device, and the diagonals of these, [P, R] in the host's memory."""
    members: dict[Hashable, list[int]] = {}
    for k, x in enumerate(parts):
        members.setdefault((x.stack.adapters, x.stack.a.ranks, x.moved), []).append(k)
    sides: list[Tensor] = []
    for alike in members.values():
        pairs = [[g if g.dim() == 3 else g[None] for g in parts[k].grams or ()] for k in alike]
        sides += [side_by_side(side) for side in zip(*pairs)]
    squares = gather([x.diagonal(dim1=1, dim2=2) for x in sides])
    grams, diagonals = (zip(x[::2], x[1::2]) for x in (sides, squares))
    return [*zip(members.values(), grams, diagonals)]


def _unusual(parts: Sequence[_Part], batches: Sequence[_Batch]) -> list[dict[int, Diagonals]]:
    """The modules of every part with a row that is zero, not finite, or of no usual size, and the
    diagonals of their Grams."""
    found: list[dict[int, Diagonals]] = [{} for _ in parts]
    for chosen, _, (a, b) in batches:
        if not all(within(x, *USUAL) for x in (a, b)):
            fits = precision.usual(a) & precision.usual(b)
            rest = enumerate(fits.tolist())
            for k in chosen:
                own = enumerate(islice(rest, len(parts[k].stack.names)))
                found[k] = {p: (a[at].clone(), b[at].clone()) for p, (at, fit) in own if not fit}
    return found


def _with_grams(
    stacks: Sequence[Stack], wanted: Sequence[bool], backend: str, wide: bool, bare: bool
) -> list[_Part]:
    """The stacks with Grams where these are wanted."""
    if wide:
        known = [*zip(*wide_grams(stacks, backend, bare))]
        pairs: list[Pair | None] = [
            _with_scalings(s, pair, bare, torch.float32) for s, pair in zip(stacks, known)
        ]
        taken: list[Pair | None] = [*known]
    else:
        found = zip(*grams(stacks, wanted, backend))
        pairs = taken = [None if a is None or b is None else (a, b) for a, b in found]
    return [
        _Part(s, pair, scaled, scaled is not None) for s, pair, scaled in zip(stacks, taken, pairs)
    ]


def _looked_at(parts: Sequence[_Part], backend: str) -> Iterator[_Part]:
    """Those without Grams, split where the largest magnitudes do not tell that they are near 1: of
    these there are Grams then, which do."""
    sides = [side for x in parts for side in (x.stack.a, x.stack.b)]
    found = ops.block_largest(sides, backend=backend).cpu()
    sizes = [len(side.ranks) * side.modules for side in sides]
    pieces = iter(found.split(sizes))
    for x in parts:
        pair = [next(pieces).view(-1, len(x.stack.adapters)) for _ in "ab"]
        tops = torch.cat(pair, 1)
        calm = precision.calm(x.stack, tops).tolist()
        odd = {k: None for k, fits in enumerate(calm) if not fits}
        tops = tops[0] if x.stack.count is None else tops
        for part in replace(x, tops=tops).split(odd):
            alone = part.stack.count is None and (x.stack.count is not None or odd)
            yield _with_own(part, backend) if alone else part


def _with_own(part: _Part, backend: str) -> _Part:
    """With Grams to look at, where they are not usual."""
    ((a,), (b,)) = grams([part.stack], [True], backend)
    assert a is not None
    assert b is not None
    looked = replace(part, grams=(a, b))
    (odd,) = _unusual([looked], _batches([looked]))
    return next(looked.split(odd)) if odd else part


def _moved(plan: Plan, part: _Part) -> _Part:
    """Brought near 1 where it is not."""
    if part.diagonals is None:
        return part
    stack = precision.centred(plan, part.stack, part.diagonals)
    return part if stack is part.stack else replace(part, stack=stack, moved=part.diagonals)


def _again(parts: Sequence[_Part], wide: bool, bare: bool, backend: str) -> list[_Part]:
    """With the Grams, from float64 ones, of stacks that were moved."""
    moved = [x for x in parts if x.moved]
    plain = bare or not wide
    pairs = [*zip(*wide_grams([x.stack for x in moved], backend, plain))]
    known = [_with_scalings(x.stack, y, plain, torch.float64) for x, y in zip(moved, pairs)]
    squares = iter(gather([g.diagonal() for own in known for g in own]))
    rows = zip(pairs, known, zip(squares, squares))
    found = []
    for x in parts:
        if x.moved:
            pair, (a, b), diagonals = next(rows)
            taken = x.taken and (pair if wide else (a.float(), b.float()))
            x = replace(x, taken=taken, grams=(a, b), diagonals=diagonals)
        found.append(x)
    return found


def _counted(
    parts: Sequence[_Part], batches: Sequence[_Batch], sums: InterferenceSums, backend: str
) -> Sequence[Sequence[Sequence[float]]]:
    """||ΔW_i||_F of all, counted into the sums. batches: of those that are counted by Grams."""
    if sums.report == NONE:
        return [((),) * len(x.stack.names) for x in parts]
    norms: dict[int, Sequence[Sequence[float]]] = {}
    for chosen, pair, diagonals in batches:
        names = [parts[k].stack.names for k in chosen]
        rows, end = sums.add(names, parts[chosen[0]].stack, pair, diagonals), 0
        for k, own in zip(chosen, names):
            begin, end = end, end + len(own)
            norms[k] = rows[begin:end]
    if rest := [k for k, x in enumerate(parts) if not x.counted]:
        norms |= zip(rest, sums.add_norms([parts[k].stack for k in rest], backend))
    return [norms[k] for k in range(len(parts))]


def _with_scalings(stack: Stack, known: Pair, bare: bool, dtype: torch.dtype) -> Pair:
    """`wide_grams` with the scalings s_i in those of B."""
    a, b = known
    if bare:
        scales = torch.tensor(stack.b.scales, dtype=torch.float64)
        gains = each_row(scales, stack.b.ranks).to(b)
        b = gains[:, None] * b * gains
    return a.to(dtype), b.to(dtype)


def _check_finite(plan: Plan, parts: Sequence[_Part]) -> None:
    """AdapterError unless every factor is finite."""
    for x in parts:
        if stack := x.not_finite():
            raise not_finite(plan, stack)


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def not_finite(plan: Plan, stack: Stack) -> AdapterError:
    """Says which factor of a module is not."""
    for side, problem in (("A", stack.a), ("B", stack.b)):
        for i, block in zip(stack.adapters, problem.blocks):
            adapter = plan.adapters[i].name
            if not _finite(block):
                what = "NaN" if bool(torch.isnan(block).any()) else "an infinite value"
                remedy = "train or download it again, or leave it out"
                return AdapterError(adapter, stack.name, f"{what} in lora_{side}", remedy)
    raise AssertionError(f"no factor of {stack.name} explains its Gram matrix")
