"""What only the whole model tells of a merge: λ where none is given, and what a calibration is
brought to. The model is gone through once for it; what is R x R by then is kept for the merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Stack
from ..algebra import powers
from ..algebra.full_precision import full_precision
from ..methods.base import UNCUT, Dense, Factors, Grams, Merged, bare_sides
from ..methods.contract import Found
from ..methods.running import Run
from ..methods.spectral import calibrated, schatten, space, svc
from ..storage.shelf import Shelf
from .finish import compressed, finished
from .scaling import Sums, rounded
from .work import Work

__all__ = ["Diagonals", "Whole"]

Diagonals = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Seen:
    """What is known of a module after the model was gone through: ||ΔW_i||_F, the diagonals of its
    Grams if it was brought near 1 by them, and what the method found."""

    norms: Sequence[float]
    diagonals: Diagonals | None
    found: Found | None


class Whole:
    """Gathers, then tells. Everything at λ = 1."""

    def __init__(self, work: Work, method: Run, of_weights: int) -> None:
        """of_weights: the power of two that was taken out of all weights."""
        self._work, self._method = work, method
        self._of_weights = 0 if work.merge_by_ratio else of_weights
        self._shelf = Shelf()
        rule = svc.SCALE if work.rule and work.calibrated else work.rule
        self._sums = Sums(rule, work.merge_by_ratio) if rule else None
        self._overlaps: dict[int, list[tuple[float, float]]] = {}
        self.projection = 1.0
        self.scales: dict[int, float] = {}
        """λ by the number of adapters that a module has, where it was looked for."""

    def add(
        self,
        stacks: Sequence[Stack],
        given: Sequence[Stack],
        known: Grams,
        seen: Sequence[tuple[Sequence[float], Diagonals | None]],
    ) -> None:
        """Count a group in. stacks: as the method takes them. given: as they were read, with
        weights. known: the Grams of these."""
        found, sizes = self._looked_for(stacks, given, None if self._work.pre else known)
        if self._sums:
            self._sums.add(given, self._blocks(given, known), sizes)
        for s, x, (norms, diagonals) in zip(given, found, seen):
            if x is not None and x.overlaps is not None:
                true = 4.0 ** sum(s.powers)
                for i, (inner, own) in zip(s.adapters, x.overlaps.T.tolist()):
                    self._overlaps.setdefault(i, []).append((true * inner, true * own))
            kept = x and x.kept()
            self._shelf.put(s.name, Seen(norms, diagonals, kept), _bytes(kept))

    def settle(self) -> None:
        """After the last group."""
        if self._work.calibrated:
            self.projection = svc.projection([*self._overlaps.values()])
        if self._sums:
            for count, scale in self._sums.scales().items():
                if count > 1:
                    self.scales[count] = rounded(math.ldexp(scale, -self._of_weights))

    def take(self, name: str) -> Seen:
        return self._shelf.take(name)

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
        """What the method finds, and the sizes of its merges: of none that stay as they are."""
        lone = self._work.alone
        chosen = [k for k, s in enumerate(given) if not (lone and len(s.adapters) == 1)]
        found: list[Found | None] = [None] * len(given)
        sizes: list[float | None] = [None] * len(given)
        part = known and ([known[0][k] for k in chosen], [known[1][k] for k in chosen])
        if chosen:
            pairs = self._found([stacks[k] for k in chosen], [given[k] for k in chosen], part)
            for k, x, size in zip(chosen, *pairs):
                found[k], sizes[k] = x, size
        return found, sizes

    def _found(
        self, stacks: Sequence[Stack], given: Sequence[Stack], known: Grams | None
    ) -> tuple[Sequence[Found | None], Sequence[float | None]]:
        work, method = self._work, self._method
        order = self._sums.rule.order if self._sums else None
        plain = replace(work.settings, scale=1.0, dtype=torch.float32)
        if method.in_parts and not work.calibrates_factors and not (order and work.post):
            wanted = replace(plain, order=order, calibrated=work.calibrated)
            found = method.find(stacks, wanted, known, work.at_cut)
            return found, [x.size for x in found]
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
        return nothing, sizes

    def _blocks(
        self, given: Sequence[Stack], known: Grams
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The diagonal blocks of the Grams, with scalings."""
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


def factors_of(work: Work, stacks: Sequence[Stack], merged: Merged) -> list[Factors]:
    """Merges as factors: dense ones are cut."""
    dense = [x for x in merged if isinstance(x, Dense)]
    if dense:
        return compressed(work, stacks, dense)[0]
    return [x for x in merged if isinstance(x, Factors)]


def _squares(stack: Stack) -> Tensor:
    """s_i^2 of every entry of packed blocks."""
    pairs = zip(stack.b.scales, stack.b.ranks)
    return torch.cat([torch.full((r * r,), c * c, dtype=torch.float64) for c, r in pairs])


def _sizes(stacks: Sequence[Stack], merged: Merged, order: int, backend: str) -> list[float]:
    """Schatten norms; of a dense ΔW, that of its projection on the adapters' joint spaces."""
    dense = [x.delta for x in merged if isinstance(x, Dense)]
    if dense:
        return projected(stacks, dense, order, backend)
    pairs = [(x.a, x.b) for x in merged if isinstance(x, Factors)]
    return schatten.of_products(pairs, order, backend)


@full_precision()
def projected(
    stacks: Sequence[Stack], deltas: Sequence[Tensor], order: int, backend: str
) -> list[float]:
    """||Q_B^T ΔW Q_A||_Sq, with orthonormal bases of what all B's and all A's span. The strongest
    directions of a merge lie there nearly whole, and a large q sees those alone."""
    sizes = [0.0] * len(stacks)
    for members, _, to_a, to_b in space.in_coordinates(stacks, backend):
        for p, k in enumerate(members):
            bare = bare_sides([stacks[k]])[1].stack(torch.float32)
            inner = (bare @ deltas[k] @ stacks[k].a.stack(torch.float32).T).double()
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
