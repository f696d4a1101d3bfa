"""How large DO-Merging's results are, nearly, from R x R matrices or, where these are larger, M
itself: with one magnitude an adapter in place of one a column.

    M = sum_i g_i τ_i,  g_i = ω_i (sum_j |ω_j| ||τ_j||_F) / ||τ_i||_F,  τ_i = Bhat_i Ahat_i

Products are in float32, as the Grams are: of a norm about 1e-7 is lost. Of adapters that are far
apart in size, or that cancel, they are in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Stack
from ..algebra.full_precision import full_precision
from ..algebra.side import Side, each_row
from ..algebra.threads import of_parts
from .base import Grams
from .contract import batches
from .moved import Moved
from .spectral import schatten
from .spectral.space import NOISE
from .weighted.combination import of_grams

__all__ = ["ABOVE", "Module", "Rule", "Turn", "of_moved", "sizes"]

ABOVE = 1.15
"""How far norms with one magnitude an adapter are above those with one a column: 1.08 to 1.18 in
the trained adapters that we have."""

LEFT = 0.1
"""Of the squared norm that adapters would have together if they were orthogonal: where less is
left, float32 has lost digits."""

Turn = tuple[Tensor | None, Tensor]
"""C and X X^T of one side of a stack, Xhat = C X; None for the identity."""

Moves = Sequence[Moved]

Module = tuple[Stack, Turn, Turn]
"""A stack with its A and its B."""


@dataclass(frozen=True)
class Rule:
    """order: q of the norm. decouple: False for g_i = ω_i. renormalize: whether the sum of the
    ω_i τ_i / ||τ_i||_F is brought to norm 1."""

    order: int
    decouple: bool
    renormalize: bool


def of_moved(
    stacks: Sequence[Stack], sides: tuple[Moves, Moves], grams: Grams, rule: Rule, backend: str
) -> list[list[float]]:
    """Schatten norms of the merges at λ = 1, nearly: with one magnitude an adapter in place of one
    a column, over `ABOVE`. sides: of A and of B, after their descents; grams: before these."""
    dense = [_is_large(s) for s in stacks]
    at = [k for k, is_dense in enumerate(dense) if not is_dense]
    given = [([x[k] for k in at], [g[k] for k in at]) for x, g in zip(sides, grams)]
    turns = [_turns(side, known, backend) for side, known in given]
    rest = iter(sizes([*zip([stacks[k] for k in at], *turns)], rule) if at else ())
    of_a, of_b = sides
    found = [
        _of_matrices(s, a, b, rule, backend) if is_dense else next(rest)
        for s, a, b, is_dense in zip(stacks, of_a, of_b, dense)
    ]
    above = ABOVE if rule.decouple else 1.0
    return [[size / above for size in own] for own in found]


def _is_large(stack: Stack) -> bool:
    """Whether R x R matrices are larger than the square of ΔW."""
    return stack.rank > min(stack.a.d, stack.b.d)


def _of_matrices(stack: Stack, a: Moved, b: Moved, rule: Rule, backend: str) -> list[float]:
    """Where R exceeds m or n: ||M||_Sq of every module from M [m, n] itself, 2 R m n flops, and its
    square on the smaller side."""
    pair = ops.apply([a.c, b.c], [a.problem, b.problem], torch.float32, backend=backend)
    hats = [x if x.dim() == 3 else x[None] for x in pair]
    blocks = ops.block_gram([Side.split(x, stack.a.ranks) for x in hats], backend=backend)
    omegas = torch.tensor(stack.omegas, dtype=torch.float64, device=hats[0].device)
    found = []
    for x, yt, own_a, own_b in zip(*hats, *(k.view(len(hats[0]), -1) for k in blocks)):
        norms = _norms(own_a, own_b, stack.a.ranks)
        gains = omegas
        if rule.decouple:
            inverse = torch.where(norms > 0, 1 / norms, 0.0)
            gains = omegas * (omegas.abs() * norms).sum() * inverse
        apart = float((gains * norms).square().sum())
        dtype = torch.float64 if stack.far else full_precision(x.device)
        merged = _merged(x, yt, gains, stack, dtype)
        whole = float(torch.linalg.vector_norm(merged, dtype=torch.float64)) ** 2
        if dtype != torch.float64 and not whole >= LEFT * apart:
            merged = _merged(x, yt, gains, stack, torch.float64)
            whole = float(torch.linalg.vector_norm(merged)) ** 2
        size = schatten.of_matrix(merged, rule.order)
        if rule.renormalize and whole > 0:  # of the sum of the ω_i τ_i / ||τ_i||_F
            size *= float((omegas.abs() * norms).sum()) / whole**0.5
        found.append(size)
    return found


def _merged(a: Tensor, bt: Tensor, gains: Tensor, stack: Stack, dtype: torch.dtype) -> Tensor:
    """sum_i g_i τ_i [m, n]."""
    rows = each_row(gains, stack.a.ranks).to(dtype)
    return (rows[:, None] * bt.to(dtype)).mT @ a.to(dtype)


def _norms(blocks_a: Tensor, blocks_b: Tensor, ranks: Sequence[int]) -> Tensor:
    """||τ_i||_F [T] from Ahat_i Ahat_i^T and Bhat_i^T Bhat_i, packed; 0 where τ_i is noise."""
    parts = (blocks_a * blocks_b).split([r * r for r in ranks])
    squares = torch.stack([x.sum() for x in parts])
    sizes = torch.stack([x[:: r + 1].clamp_min(0).sqrt().sum() for x, r in zip(parts, ranks)])
    return torch.where(squares > (NOISE * sizes) ** 2, squares.sqrt(), 0.0)


def _turns(sides: Moves, known: Sequence[Tensor | None], backend: str) -> list[Turn]:
    """C and X X^T of every side; None with Xhat Xhat^T of those that have no C."""
    given = [None if x.c is None and x.report else g for x, g in zip(sides, known)]
    rest = [x.problem for x, g in zip(sides, given) if g is None]
    others = iter(ops.gram(rest, dtype=torch.float64, backend=backend))
    return [(x.c, next(others) if g is None else g) for x, g in zip(sides, given)]


def sizes(modules: Sequence[Module], rule: Rule) -> list[list[float]]:
    """||M||_Sq of every module, stack by stack."""
    parts = [
        (k, at)
        for k, (s, _, (_, gram)) in enumerate(modules)
        for at in batches(len(s.names), s.rank, gram.device)
    ]

    def found(part: tuple[int, slice]) -> list[float]:
        k, at = part
        stack, *turns = modules[k]
        a, b = ((c if c is None else _rows(c, at), _rows(gram, at)) for c, gram in turns)
        return _sizes(stack, a, b, rule)

    device = modules[0][1][1].device
    results = of_parts(found, parts, device, lambda part: modules[part[0]][0].rank)
    of_stacks: list[list[float]] = [[] for _ in modules]
    for (k, _), own in zip(parts, results):
        of_stacks[k] += own
    return of_stacks


def _rows(x: Tensor, at: slice) -> Tensor:
    """Those of some modules, [P, R, R]."""
    return x[at] if x.dim() == 3 else x[None]


def _sizes(stack: Stack, a: Turn, b: Turn, rule: Rule) -> list[float]:
    """Of modules of a stack."""
    found, left = _found(stack, a, b, rule, full_precision(a[1].device))
    rest = [k for k in range(len(found)) if stack.far or not left[k] >= LEFT]
    if rest:
        a, b = ((c if c is None else c[rest], gram[rest]) for c, gram in (a, b))
        for k, size in zip(rest, _found(stack, a, b, rule, torch.float64)[0]):
            found[k] = size
    return found


def _found(
    stack: Stack, a: Turn, b: Turn, rule: Rule, dtype: torch.dtype
) -> tuple[list[float], list[float]]:
    """||M||_Sq, and ||M||_F^2 over sum_i g_i^2 ||τ_i||_F^2."""
    of_a, of_b = _turned(a, dtype), _turned(b, dtype)
    ranks = stack.a.ranks
    inner = of_grams(of_a.double(), of_b.double(), ranks)
    omegas = torch.tensor(stack.omegas, dtype=torch.float64).to(inner.device).expand(len(inner), -1)
    gains = omegas * _magnitudes(inner, omegas, rule) if rule.decouple else omegas
    rows = each_row(gains, ranks).to(dtype)
    found = schatten.schatten(rows[:, :, None] * of_b * rows[:, None], of_a, rule.order)
    whole = _squares(gains, inner)
    apart = (gains.square() * inner.diagonal(dim1=1, dim2=2)).sum(1)
    return found.tolist(), torch.where(apart > 0, whole / apart, 1.0).tolist()


def _turned(side: Turn, dtype: torch.dtype) -> Tensor:
    """Xhat Xhat^T [P, R, R]."""
    c, grams = side
    grams = grams.to(dtype)
    if c is None:
        return grams
    c = c.to(dtype)
    return c @ grams @ c.mT


def _magnitudes(inner: Tensor, omegas: Tensor, rule: Rule) -> Tensor:
    """The merged magnitude over each adapter's own, [P, T], from the <τ_i, τ_j> [P, T, T]."""
    norms = inner.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    shares = (omegas.abs() * norms).sum(1, keepdim=True) * inverse
    if rule.renormalize:
        size = _squares(omegas * inverse, inner).clamp_min(0).sqrt()[:, None]
        shares = torch.where(size > 0, shares / size, shares)
    return shares


def _squares(gains: Tensor, inner: Tensor) -> Tensor:
    """||sum_i g_i τ_i||_F^2, [P]."""
    return (gains[:, None] @ inner @ gains[..., None])[:, 0, 0]
