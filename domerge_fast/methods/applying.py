"""From coefficients (contract.py) to factors: cut in R x R where that is asked for, then applied, a
batch of modules at once.

Modules of a stack that come out with different ranks, or that are added with different
coefficients, are applied one by one: a batch has one shape, and one scale an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Stack
from ..algebra.side import Side, each_row
from ..algebra.threads import of_parts
from ..algebra.truncation import truncated
from ..errors import FlatCut
from .base import UNCUT, Cut, Settings, bare_sides
from .contract import Coefficients, batches
from .made import Factors
from .spectral import svc

__all__ = ["factors", "of_rows", "stacked"]

Product = tuple[Tensor | None, Side]
"""C [k, R], with P before it for a side of P modules, or None, and what it is applied to."""


@dataclass(frozen=True, eq=False)
class _Applied:
    """What becomes the factors of a stack. kept, energy: as in `Factors`."""

    a: Product
    b: Product
    kept: Sequence[float] = ()
    energy: Sequence[float] = ()


def stacked(stacks: Sequence[Stack], settings: Settings) -> list[Factors]:
    """λ sum_i w_i τ_i of every stack."""
    rows = (torch.tensor([s.weights], dtype=torch.float64) for s in stacks)
    found = [Coefficients(a=None, b=x.expand(len(s.names), -1)) for x, s in zip(rows, stacks)]
    return factors(stacks, found, settings, False)


def factors(
    stacks: Sequence[Stack],
    found: Sequence[Coefficients],
    settings: Settings,
    bare: bool,
    cut: Cut = UNCUT,
    dtype: torch.dtype | None = None,
) -> list[Factors]:
    """What coefficients stand for, times λ: of every stack, or of its modules one after the other.

    bare: those of B are of B^T without its scalings. cut: of those whose Grams are known; dtype:
    theirs. Raises FlatCut of a module.
    """
    chosen = [k for k, x in enumerate(found) if cut and x.grams]
    cuts = iter(_cut([(stacks[k], found[k]) for k in chosen], settings, bare, cut))
    whole = [
        next(cuts) if cut and x.grams else _whole(s, x, settings, bare)
        for s, x in zip(stacks, found)
    ]
    results: list[list[Factors]] = [[] for _ in stacks]
    for members, own in (
        (chosen, dtype or settings.dtype),
        (sorted({*range(len(stacks))} - {*chosen}), settings.dtype),
    ):
        given = [x for k in members for x in whole[k]]
        made = iter(_applied(given, own, settings.backend))
        for k in members:
            results[k] = [next(made) for _ in whole[k]]
    return [x for made in results for x in made]


def _applied(given: Sequence[_Applied], dtype: torch.dtype, backend: str) -> Iterator[Factors]:
    """The products; those with coefficients in float64 are formed in it: float32 products would
    lose their digits."""
    flat = [*(x.a for x in given), *(x.b for x in given)]
    wide = {k for k, (c, _) in enumerate(flat) if c is not None and c.dtype == torch.float64}
    rest = [flat[k] for k in range(len(flat)) if k not in wide]
    finite: list[Tensor] = []
    products = [c for c, _ in rest], [x for _, x in rest], dtype
    narrow = iter(ops.apply(*products, backend=backend, finite=finite))
    known = {*map(id, finite)}
    found = [_in_float64(*flat[k], dtype) if k in wide else next(narrow) for k in range(len(flat))]
    for x, a, bt in zip(given, found, found[len(given) :]):
        yield Factors.of(a, bt, known, kept=x.kept, energy=x.energy)


def _in_float64(c: Tensor | None, side: Side, dtype: torch.dtype) -> Tensor:
    assert c is not None
    return (side.stack(torch.float64).T @ c.T).to(dtype).T


def _sides(stack: Stack, bare: bool) -> tuple[Side, Side]:
    if not bare:
        return stack.a, stack.b
    a, b = bare_sides([stack])
    return a, b


def _one_by_one(stack: Stack, x: Coefficients) -> Iterator[tuple[Stack, Coefficients]]:
    for k, one in enumerate(stack.each()):
        yield one, x.of_modules(slice(k, k + 1))


def _whole(stack: Stack, x: Coefficients, settings: Settings, bare: bool) -> list[_Applied]:
    """The coefficients with λ, and what they are applied to."""
    alike = bool((x.b == x.b[:1]).all()) if x.a is None else len({*x.ranks}) == 1
    pairs = [(stack, x)] if alike else _one_by_one(stack, x)
    return [_scaled(s, own, settings, bare) for s, own in pairs]


def _scaled(stack: Stack, x: Coefficients, settings: Settings, bare: bool) -> _Applied:
    if x.a is None:
        gains = [settings.scale * c for c in x.b[0].tolist()]
        scales = tuple([g * c for g, c in zip(gains, stack.b.scales)])
        return _Applied((None, stack.a), (None, stack.b.scaled(scales)))
    a, b = _sides(stack, bare)
    c_b = settings.scale * _gains(x, settings) * x.b.double()
    return _Applied((_on(x.a, a), a), (_on(c_b, b), b))


def _gains(x: Coefficients, settings: Settings) -> Tensor | float:
    """What a calibration multiplies the rows of C_B by, [P, k, 1]."""
    return 1.0 if x.strengths is None else svc.gains(x.strengths, settings.projection)


def _on(c: Tensor, side: Side, dtype: torch.dtype = torch.float32) -> Tensor:
    """C of one shape with the side, where it is."""
    return (c[0] if side.count is None else c).to(side.device, dtype)


def of_rows(stack: Stack, x: Coefficients, settings: Settings) -> Tensor:
    """λ and all gains on the rows of B'^T, [P, k]."""
    if x.a is None:
        return settings.scale * each_row(x.b, stack.b.ranks)
    ones = torch.ones_like(x.b[..., :1], dtype=torch.float64)
    return (settings.scale * _gains(x, settings) * ones)[..., 0]


@dataclass(frozen=True, eq=False)
class _Cut:
    """C_A and C_B of a module after its cut, [1, k, R], the share of ||ΔW||_F^2 that is left, and
    that before it."""

    a: Tensor
    b: Tensor
    kept: float
    energy: float


def _cut(
    given: Sequence[tuple[Stack, Coefficients]], settings: Settings, bare: bool, cut: Cut
) -> Iterator[list[_Applied]]:
    """The coefficients of every stack after the cut, and what they are applied to."""
    parts = [
        (k, at)
        for k, (_, x) in enumerate(given)
        if x.grams
        for at in batches(len(x.b), x.grams[0].shape[1], x.grams[0].device)
    ]

    def of_part(part: tuple[int, slice]) -> list[_Cut]:
        stack, x = given[part[0]]
        try:
            return _of_modules(stack, x.of_modules(part[1]), settings, cut)
        except FlatCut as error:
            raise error.of(stack.names[part[1]][error.at]) from None

    def rank(part: tuple[int, slice]) -> int:
        return given[part[0]][1].b.shape[1]

    device = given[0][1].b.device if given else torch.device("cpu")
    modules = iter([x for own in of_parts(of_part, parts, device, rank) for x in own])
    for stack, _ in given:
        yield [*_smaller(stack, [next(modules) for _ in stack.names], bare)]


def _of_modules(stack: Stack, x: Coefficients, settings: Settings, cut: Cut) -> list[_Cut]:
    assert x.grams
    a, b = x.grams
    g = of_rows(stack, x, settings).to(a)
    b = g[:, :, None] * b * g[:, None]
    energies = (a * b).sum((1, 2)).tolist()
    found = []
    for k, part in enumerate(truncated(a, b, cut.rank, cut.energy, range(len(a)))):
        c_a, c_b = part.a, part.b * g[k]
        if x.a is not None:
            c_a, c_b = c_a @ x.a[k].to(c_a), c_b @ x.b[k].to(c_b)
        to = torch.float64 if part.cancels else torch.float32
        found.append(_Cut(c_a.to(to)[None], c_b.to(to)[None], part.kept, energies[k]))
    return found


def _smaller(stack: Stack, cuts: Sequence[_Cut], bare: bool) -> Iterator[_Applied]:
    """Of the stack, where all of its modules have one rank and none needs float64."""
    kinds = {(x.a.shape, x.a.dtype) for x in cuts}
    alike = len(kinds) == 1 and cuts[0].a.dtype == torch.float32
    pairs = [(stack, cuts)] if alike else zip(stack.each(), ([x] for x in cuts))
    for s, own in pairs:
        c_a, c_b = (torch.cat([getattr(x, side) for x in own]) for side in "ab")
        a, b = _sides(s, bare)
        yield _Applied(
            (_on(c_a, a, c_a.dtype), a),
            (_on(c_b, b, c_b.dtype), b),
            [x.kept for x in own],
            [x.energy for x in own],
        )
