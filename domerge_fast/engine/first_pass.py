"""What only the whole model tells of a merge: λ where none is given, and what a calibration is
brought to. The model is gone through once for it; what is found by then is kept for the merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Stack
from ..algebra import powers
from ..algebra.full_precision import full_precision
from ..methods.base import UNCUT, Grams, bare_sides
from ..methods.contract import Found
from ..methods.made import Dense, Factors, Made
from ..methods.running import Run
from ..methods.spectral import calibrated, schatten, space, svc
from ..storage.shelf import Shelf
from .finish import compressed, finished
from .group import Group
from .precision import Diagonals
from .scaling import Sums, rounded
from .work import Work

__all__ = ["FirstPass", "Seen"]

Noted = tuple[list[dict[Any, list[float]]], dict[int, list[tuple[float, float]]]]
"""The sums for λ, and what a calibration needs, by adapter."""


@dataclass(frozen=True)
class Seen:
    """What is known of a stack after the model was gone through: how many modules it has (None: it
    is one by itself), ||ΔW_i||_F by module, the diagonals of its Grams if it was brought near 1 by
    them, and what the method found."""

    count: int | None
    norms: Sequence[Sequence[float]]
    diagonals: Diagonals | None
    found: Found | None


class FirstPass:
    """Gathers, then tells. Everything at λ = 1."""

    def __init__(self, work: Work, method: Run, of_weights: int) -> None:
        """of_weights: the power of two that was taken out of all weights."""
        self._work, self._method = work, method
        self._of_weights = 0 if work.merge_by_ratio else of_weights
        self._shelf = Shelf()
        self._rule = svc.SCALE if work.rule and work.calibrated else work.rule
        self._forget()
        self.projection = 1.0
        self.scales: dict[int, float] = {}
        """λ by the number of adapters that a module has, where it was looked for."""

    def again(self, work: Work) -> FirstPass:
        """Of the same merge by other work, with what is settled here."""
        found = FirstPass(work, self._method, self._of_weights)
        found.projection, found.scales = self.projection, self.scales
        return found

    def add(self, group: Group) -> None:
        """Count a group in, as it was read, with weights."""
        work = self._work
        taken = group if work.in_batches(self._method) else group.apart()
        stacks = work.before(taken.stacks)
        found, sizes = self._looked_for(stacks, taken.stacks, None if work.pre else taken.grams)
        if self._sums:
            self._sums.add(group.stacks, self._blocks(group), sizes)
        for s, x, norms, diagonals in zip(taken.stacks, found, taken.norms, taken.moved):
            if x is not None and x.overlaps is not None:
                true = 4.0 ** sum(s.powers)
                for i, pairs in zip(s.adapters, x.overlaps.permute(2, 0, 1).tolist()):
                    sums = self._overlaps.setdefault(i, [])
                    sums += [(true * inner, true * own) for inner, own in pairs]
            kept = x and x.kept()
            if kept and not self._shelf.has_room(_bytes(kept)):
                kept = kept.least()
            self._shelf.put(s.name, Seen(s.count, norms, diagonals, kept), _bytes(kept))

    def _forget(self) -> None:
        self._sums = Sums(self._rule, self._work.merge_by_ratio) if self._rule else None
        self._overlaps: dict[int, list[tuple[float, float]]] = {}

    def noted(self) -> Noted:
        """What groups were counted in for since this was asked for last, for `note`; what was
        found of their stacks stays here."""
        found = self._sums.plain() if self._sums else [], self._overlaps
        self._forget()
        return found

    def note(self, noted: Noted) -> None:
        """Count in what was noted of groups, here or elsewhere."""
        sums, overlaps = noted
        if self._sums:
            self._sums.take(sums)
        for i, own in overlaps.items():
            self._overlaps.setdefault(i, []).extend(own)

    def has(self, stack: Stack) -> bool:
        """Whether the stack's modules were in a group here."""
        return self._shelf.has(stack.name)

    def settle(self) -> None:
        """When what all groups have noted is counted in."""
        if self._work.calibrated:
            self.projection = svc.projection([*self._overlaps.values()])
        if self._sums:
            for count, scale in self._sums.scales().items():
                if count > 1:
                    self.scales[count] = rounded(math.ldexp(scale, -self._of_weights))

    def take(self, name: str) -> Seen:
        """name: of the stack's first module."""
        seen: Seen = self._shelf.take(name)
        return seen

    def scale(self, stack: Stack) -> tuple[float, int]:
        """(x, p): the λ of the settings, which is 1 where another is looked for, is multiplied by
        x 2^p; p is 0 unless that is far from 1."""
        count = len(stack.adapters)
        if self._sums is None:
            return 1.0, 0
        if count == 1:
            return 1.0, self._of_weights
        scale = math.ldexp(self.scales[count], self._of_weights)
        power = powers.extreme(scale)
        return math.ldexp(scale, -power), power

    def _looked_for(
        self, stacks: Sequence[Stack], given: Sequence[Stack], known: Grams | None
    ) -> tuple[Sequence[Found | None], Sequence[float | None]]:
        """What the method finds, and the sizes of its merges by module: of none that stay as they
        are."""
        lone = self._work.alone
        chosen = [k for k, s in enumerate(given) if not (lone and len(s.adapters) == 1)]
        found: list[Found | None] = [None] * len(given)
        sizes: list[Sequence[float | None]] = [[None] * len(s.names) for s in given]
        part = known and ([known[0][k] for k in chosen], [known[1][k] for k in chosen])
        if chosen:
            pairs = self._found([stacks[k] for k in chosen], [given[k] for k in chosen], part)
            for k, x, own in zip(chosen, *pairs):
                found[k], sizes[k] = x, own or sizes[k]
        return found, [size for own in sizes for size in own]

    def _found(
        self, stacks: Sequence[Stack], given: Sequence[Stack], known: Grams | None
    ) -> tuple[Sequence[Found | None], Sequence[Sequence[float] | None]]:
        work, method = self._work, self._method
        order = self._sums.rule.order if self._sums else None
        plain = replace(work.settings, scale=1.0, dtype=torch.float32)
        if method.in_parts and not work.calibrates_factors and not (order and work.post):
            wanted = replace(plain, order=order, calibrated=work.calibrated)
            found = method.find(stacks, wanted, known, work.at_cut)
            return found, [x.sizes for x in found]
        nothing: list[None] = [None] * len(stacks)
        if not order and not work.calibrated:
            return nothing, nothing
        cut = UNCUT if work.calibrated else work.at_cut
        merged = method(stacks, plain, known, cut, torch.float32)
        if work.calibrated:
            return calibrated.find(stacks, factors_of(work, given, merged), plain), nothing
        assert order
        if work.post:
            at_one = replace(work, settings=plain, deltas=False, rule=None)
            pairs = [r.tensors for r in finished(at_one, given, merged)]
            sizes = schatten.of_products([(a, b) for a, b in pairs], order, plain.backend)
        else:
            sizes = _sizes(given, merged, order, plain.backend)
        return nothing, [[size] for size in sizes]

    def _blocks(self, group: Group) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The diagonal blocks of the Grams, with scalings."""
        given, known = group.stacks, group.grams
        if any(gram is None for gram in known[0]):
            backend = self._work.settings.backend
            a, b = (ops.block_gram([getattr(s, x) for s in given], backend=backend) for x in "ab")
            return a, b
        a, b = (
            [schatten.packed(g, s.a.ranks) for g, s in zip(side, given) if g is not None]
            for side in known
        )
        if self._work.wide_grams(self._method) and self._method.bare:
            b = [x * _squares(s).to(x) for x, s in zip(b, given)]
        return a, b


def factors_of(work: Work, stacks: Sequence[Stack], merged: Made) -> list[Factors]:
    """Merges as factors: dense ones are cut."""
    dense = [x for x in merged if isinstance(x, Dense)]
    if dense:
        return compressed(work, stacks, dense)
    return [x for x in merged if isinstance(x, Factors)]


def _squares(stack: Stack) -> Tensor:
    """s_i^2 of every entry of packed blocks."""
    pairs = zip(stack.b.scales, stack.b.ranks)
    return torch.cat([torch.full((r * r,), c * c, dtype=torch.float64) for c, r in pairs])


def _sizes(stacks: Sequence[Stack], merged: Made, order: int, backend: str) -> list[float]:
    """Schatten norms; of a dense ΔW, that of its projection on the adapters' joint spaces."""
    dense = [x.delta for x in merged if isinstance(x, Dense)]
    if dense:
        return projected(stacks, dense, order, backend)
    pairs = [(x.a, x.b) for x in merged if isinstance(x, Factors)]
    return schatten.of_products(pairs, order, backend)


def projected(
    stacks: Sequence[Stack], deltas: Sequence[Tensor], order: int, backend: str
) -> list[float]:
    """||Q_B^T ΔW Q_A||_Sq, with orthonormal bases of what all B's and all A's span. The strongest
    directions of a merge lie there nearly whole, and a large q sees those alone."""
    sizes = [0.0] * len(stacks)
    for members, _, to_a, to_b in space.in_coordinates(stacks, backend):
        for p, k in enumerate(members):
            dtype = full_precision(deltas[k].device)
            bare, a = bare_sides([stacks[k]])[1].stack(dtype), stacks[k].a.stack(dtype)
            inner = (bare @ deltas[k].to(dtype) @ a.T).double()
            core = to_b[p] @ inner @ to_a[p].T
            one = torch.eye(len(core.T)).to(core)
            sizes[k] = float(schatten.schatten((core.T @ core)[None], one[None], order))
    return sizes


def _bytes(found: Found | None) -> int:
    """What the tensors of it take."""
    if found is None:
        return 0
    values = (getattr(found, f.name) for f in fields(found))
    parts = (part for x in values for part in (x if isinstance(x, tuple) else (x,)))
    return sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))
