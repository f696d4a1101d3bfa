"""DO-Merging: orthogonalize the factors, then merge directions and magnitudes apart.

    1. Ahat, Bhat: descend on the overlap between adapters, each side on its own (ops.orthogonalize)
    2. ΔW_i = Bhat_i Ahat_i = D_i diag(mag_i), one magnitude a column (an input feature)
    3. ΔW = λ (sum_i ω_i D_i) diag(sum_i |ω_i| mag_i),  ω_i = w_i / sum |w| of the module's adapters

The result is exactly Bhat A' with A' [R, n]: a LoRA adapter of rank R, with no SVD. It follows
arXiv 2505.15875, for which no code was published; what the paper leaves open is an option here,
and docs/algorithm.md says which measurement chose each default.
Cost: two reads of the factors, 2 R^2 (m + n) flops and a few R x R products a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Stack
from ..algebra.host import gather
from ..algebra.powers import exponents
from ..algebra.side import Side
from ..errors import OptionError
from ..ops.orthogonalize import PENALTIES
from ..options import option
from .base import Chosen, Factors, Found, Halves, Merge, Method, Settings, grams
from .contract import Needs, alike
from .nested import directions
from .side_report import SideReport
from .spectral import schatten
from .weighted.combination import of_grams

__all__ = ["METHOD", "DoOptions", "orthogonalize"]

ABOVE = 1.15
"""How far norms with one magnitude an adapter are above those with one a column: 1.08 to 1.18 in
the trained adapters that we have."""

LINEAR = "linear"
"""What merges the directions in DO-Merging itself: their weighted sum."""


@dataclass(frozen=True)
class DoOptions:
    orthogonalize: bool = option(True, "push the adapters' factors apart before merging")
    decouple: bool = option(True, "merge column magnitudes and directions apart")
    penalty: str = option("squared", "norm in the overlap's penalty", PENALTIES)
    gamma: float = option(1.0, "weight of staying close to the given factors", low=0.0)
    sides: str = option("both", "which factors to orthogonalize", ("both", "A", "B"))
    steps: int = option(50, "most steps of the descent", low=0)
    tol: float = option(1e-3, "stop when a step lowers the objective by less, relatively", low=0.0)
    renormalize: bool = option(False, "bring the merged directions to unit length")
    directions: str = option(LINEAR, "the method that merges the directions")


@dataclass(frozen=True, eq=False)
class Descended(Found):
    """The sides after their descents; kept of them are C_A and C_B with what the descents report.
    A side that did not descend in R x R matrices has None, and descends again when it is wanted."""

    sides: tuple[Moved, Moved] | None = field(kw_only=True)
    a: tuple[Tensor, SideReport] | None = field(kw_only=True)
    b: tuple[Tensor, SideReport] | None = field(kw_only=True)

    def kept(self) -> Descended:
        return replace(self, sides=None)


def find(
    stacks: Sequence[Stack],
    grams_a: Sequence[Tensor | None],
    grams_b: Sequence[Tensor | None],
    options: DoOptions,
    settings: Settings,
) -> list[Descended]:
    """The descents."""
    a = orthogonalize([s.a for s in stacks], grams_a, "A", options, settings.backend)
    b = orthogonalize([s.b for s in stacks], grams_b, "B", options, settings.backend)
    kept = [(x.kept, y.kept) for x, y in zip(a, b)]
    sizes: Sequence[float | None] = [None] * len(stacks)
    if settings.order:
        sizes = _sizes(stacks, a, b, (grams_a, grams_b), options, settings)
    a, b = _sized(stacks, a, b)
    return [
        Descended(size, sides=sides, a=x, b=y)
        for size, sides, (x, y) in zip(sizes, zip(a, b), kept)
    ]


def make(
    stacks: Sequence[Stack], found: Sequence[Descended], options: DoOptions, settings: Settings
) -> list[Factors]:
    """The factors, from the descents."""
    rest = [k for k, x in enumerate(found) if x.sides is None]
    again = _again([stacks[k] for k in rest], [found[k] for k in rest], options, settings.backend)
    sides = [x.sides or next(again) for x in found]
    return _merged(stacks, [a for a, _ in sides], [b for _, b in sides], options, settings)


def merge(
    stacks: Sequence[Stack],
    grams_a: Sequence[Tensor | None],
    grams_b: Sequence[Tensor | None],
    options: DoOptions,
    settings: Settings,
) -> list[Factors]:
    return make(stacks, find(stacks, grams_a, grams_b, options, settings), options, settings)


def _merged(
    stacks: Sequence[Stack],
    a: Sequence[Moved],
    b: Sequence[Moved],
    options: DoOptions,
    settings: Settings,
) -> list[Factors]:
    backend = settings.backend
    b_hat = ops.apply([x.c for x in b], [x.problem for x in b], settings.dtype, backend=backend)
    if options.decouple:
        a_new, norms = _decouple(stacks, a, b_hat, options, settings)
    else:
        a_new, norms = _weigh(stacks, a, settings), [None] * len(stacks)
    return [
        Factors(an, bt.T, x.report, y.report, n)
        for an, bt, x, y, n in zip(a_new, b_hat, a, b, norms)
    ]


def _sizes(
    stacks: Sequence[Stack],
    a: Sequence[Moved],
    b: Sequence[Moved],
    grams: tuple[Sequence[Tensor | None], Sequence[Tensor | None]],
    options: DoOptions,
    settings: Settings,
) -> list[float]:
    """Schatten norms of the merges at λ = 1, nearly: with one magnitude an adapter in place of one
    a column, which is R x R alone, over `ABOVE`."""
    assert settings.order
    hats = [_moved(side, known, settings.backend) for side, known in zip((a, b), grams)]
    sizes = [0.0] * len(stacks)
    for members in alike(stacks):
        ranks = stacks[members[0]].a.ranks
        of_a, of_b = (torch.stack([side[k] for k in members]) for side in hats)
        gains = torch.tensor([stacks[k].omegas for k in members], dtype=torch.float64).to(of_b)
        if options.decouple:
            gains = gains * _magnitudes(of_a, of_b, ranks, gains, options.renormalize)
        rows = gains.repeat_interleave(torch.tensor(ranks).to(of_b.device), 1)
        weighed = rows[:, :, None] * of_b * rows[:, None]
        found = schatten.schatten(weighed, of_a, settings.order).tolist()
        for k, size in zip(members, found):
            sizes[k] = size / (ABOVE if options.decouple else 1.0)
    return sizes


def _moved(sides: Sequence[Moved], known: Sequence[Tensor | None], backend: str) -> list[Tensor]:
    """Xhat Xhat^T of every side in float64."""
    rest = [x.problem for x, g in zip(sides, known) if x.c is None or g is None]
    others = iter(ops.gram(rest, dtype=torch.float64, backend=backend))
    return [
        next(others) if x.c is None or g is None else x.c.double() @ g.double() @ x.c.double().T
        for x, g in zip(sides, known)
    ]


def _magnitudes(
    gram_a: Tensor, gram_b: Tensor, ranks: tuple[int, ...], omegas: Tensor, renormalize: bool
) -> Tensor:
    """The merged magnitude over each adapter's own, [P, T], from ||Bhat_i Ahat_i||_F."""
    inner = torch.stack([of_grams(x, y, ranks) for x, y in zip(gram_a, gram_b)])
    norms = inner.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    shares = (omegas.abs() * norms).sum(1, keepdim=True) * inverse
    if renormalize:
        units = omegas * inverse
        size = (units[:, None] @ inner @ units[..., None]).clamp_min(0).sqrt()[..., 0]
        shares = torch.where(size > 0, shares / size, shares)
    return shares


@dataclass(frozen=True, eq=False)
class Moved:
    """Xhat = C X of one side: a problem and its C (None for the identity)."""

    problem: Side
    c: Tensor | None
    report: SideReport | None

    @property
    def kept(self) -> tuple[Tensor, SideReport] | None:
        """What `Descended` keeps of it."""
        return None if self.c is None or self.report is None else (self.c, self.report)

    def times(self, gains: Sequence[float]) -> Moved:
        """Every adapter's Xhat_i times its own factor."""
        if self.c is None:
            scales = tuple(g * scale for g, scale in zip(gains, self.problem.scales))
            return replace(self, problem=self.problem.scaled(scales))
        rows = [g for g, r in zip(gains, self.problem.ranks) for _ in range(r)]
        return replace(self, c=torch.tensor(rows, device=self.c.device)[:, None] * self.c)


def both_sides(
    stacks: Sequence[Stack],
    grams_a: Sequence[Tensor | None],
    grams_b: Sequence[Tensor | None],
    options: DoOptions,
    backend: str,
) -> tuple[list[Moved], list[Moved]]:
    """Ahat and Bhat. Where adapters are far apart in size, that of their Ahat_i is in their Bhat_i:
    columns are measured in float32, and an update is the same with 2^-k Ahat_i and 2^k Bhat_i."""
    a = orthogonalize([s.a for s in stacks], grams_a, "A", options, backend)
    b = orthogonalize([s.b for s in stacks], grams_b, "B", options, backend)
    return _sized(stacks, a, b)


def _sized(
    stacks: Sequence[Stack], a: Sequence[Moved], b: Sequence[Moved]
) -> tuple[list[Moved], list[Moved]]:
    """The sides, with the sizes of adapters that are far apart in B alone."""
    a, b = list(a), list(b)
    for k, s in enumerate(stacks):
        if s.far:
            sizes = [e if math.isfinite(e) else 0.0 for e in exponents(a[k].problem)]
            a[k] = a[k].times([2.0**-e for e in sizes])
            b[k] = b[k].times([2.0**e for e in sizes])
    return a, b


def _again(
    stacks: Sequence[Stack], found: Sequence[Descended], options: DoOptions, backend: str
) -> Iterator[tuple[Moved, Moved]]:
    """The sides of which C is known, or there is none, or they descend once more."""
    a = _of_side([s.a for s in stacks], [x.a for x in found], "A", options, backend)
    b = _of_side([s.b for s in stacks], [x.b for x in found], "B", options, backend)
    return zip(*_sized(stacks, a, b))


def _of_side(
    problems: Sequence[Side],
    found: Sequence[tuple[Tensor, SideReport] | None],
    side: str,
    options: DoOptions,
    backend: str,
) -> list[Moved]:
    rest = [p for p, x in zip(problems, found) if x is None]
    missing = iter(orthogonalize(rest, [None] * len(rest), side, options, backend))
    return [next(missing) if x is None else Moved(p, *x) for p, x in zip(problems, found)]


def orthogonalize(
    problems: Sequence[Side],
    grams: Sequence[Tensor | None],
    side: str,
    options: DoOptions,
    backend: str,
) -> list[Moved]:
    """Xhat of A or B sides, where the options do not leave that side as it is.

    grams: float32 ones, None where `METHOD.needs_grams` is false.
    """
    sides = [Moved(p, None, None) for p in problems]
    if not options.orthogonalize or options.sides not in ("both", side):
        return sides
    rule: dict[str, Any] = {"gamma": options.gamma, "steps": options.steps, "tol": options.tol}
    wide = [i for i, p in enumerate(problems) if _is_wide(p, options)]
    square = [i for i, p in enumerate(problems) if not _is_wide(p, options)]
    if square:
        c, stats = ops.orthogonalize(
            [g for i in square if (g := grams[i]) is not None],
            [problems[i].ranks for i in square],
            penalty=options.penalty,
            backend=backend,
            **rule,
        )
        for i, matrix, row in zip(square, c, stats.tolist()):
            sides[i] = Moved(problems[i], matrix, SideReport(int(row[0]), *row[1:]))
    if wide:
        x, stats = ops.orthogonalize_factors([problems[i] for i in wide], backend=backend, **rule)
        for i, moved, row in zip(wide, x, stats.tolist()):
            problem = Side.split(moved, problems[i].ranks)
            sides[i] = Moved(problem, None, SideReport(int(row[0]), *row[1:]))
    return sides


def _is_wide(problem: Side, options: DoOptions) -> bool:
    """Whether descending on Xhat is cheaper than on R x R matrices."""
    return problem.rank > problem.d and options.penalty == "squared"


def _decouple(
    stacks: Sequence[Stack],
    a: Sequence[Moved],
    b_hat: Sequence[Tensor],
    options: DoOptions,
    settings: Settings,
) -> tuple[list[Tensor], list[Sequence[float] | None]]:
    merged_b = [Side.split(x, s.b.ranks) for s, x in zip(stacks, b_hat)]
    full = None
    if options.renormalize:
        whole = [Side((x,), (1.0,)) for x in b_hat]
        full = ops.gram(whole, dtype=torch.float64, backend=settings.backend)
    a_new, norms = ops.apply_decouple(
        [x.c for x in a],
        [x.problem for x in a],
        ops.block_gram(merged_b, backend=settings.backend),
        [s.omegas for s in stacks],
        settings.scale,
        settings.dtype,
        full=full,
        backend=settings.backend,
    )
    return a_new, [n.tolist() for n in gather(norms)]


def _weigh(stacks: Sequence[Stack], a: Sequence[Moved], settings: Settings) -> list[Tensor]:
    """λ ω_i Ahat_i: task arithmetic on the orthogonalized factors."""
    weighed = [x.times([settings.scale * w for w in s.omegas]) for s, x in zip(stacks, a)]
    return ops.apply(
        [x.c for x in weighed],
        [x.problem for x in weighed],
        settings.dtype,
        backend=settings.backend,
    )


def prepare(groups: Iterable[Sequence[Stack]], options: DoOptions, settings: Settings) -> Merge:
    """`merge`, or another method for the directions."""
    if settings.inner is None or _plain(settings.inner):
        return merge
    if not options.decouple or options.renormalize:
        name, value = "directions", options.directions
        if value == LINEAR:
            name, value = "power", settings.inner.options.power
        problem = f"{value!r} needs decouple, and sets the norm of directions itself"
        raise OptionError(name, problem, "leave decouple and renormalize as they are")
    backend = settings.backend

    def take_apart(
        stacks: Sequence[Stack],
        grams_a: Sequence[Tensor | None],
        grams_b: Sequence[Tensor | None],
    ) -> list[directions.Apart]:
        a, b = both_sides(stacks, grams_a, grams_b, options, backend)
        sides = [*a, *b]
        hats = ops.apply(
            [x.c for x in sides], [x.problem for x in sides], torch.float32, backend=backend
        )
        rows = zip(stacks, hats, hats[len(stacks) :], a, b)
        return [directions.apart(s, x, yt, (p.report, q.report)) for s, x, yt, p, q in rows]

    def whole() -> Iterator[list[Stack]]:
        for group in groups:
            found = grams(group, [METHOD.needs_grams(s, options) for s in group], backend)
            yield [x.stack for x in take_apart(group, *found)]

    return directions.prepare(whole, take_apart, settings)


def _plain(inner: Chosen) -> bool:
    """Whether it merges the directions as DO-Merging itself does."""
    return inner.method.name == LINEAR and inner.options.power == 1


METHOD = Method(
    "do",
    "DO-Merging: orthogonalize, then merge directions and magnitudes apart",
    DoOptions,
    merge,
    needs_grams=lambda stack, options: (
        options.orthogonalize and not (_is_wide(stack.a, options) and _is_wide(stack.b, options))
    ),
    dense=None,
    inner="directions",
    by_ratio=lambda options: True,
    prepare=prepare,
    halves=Halves(find, make),
    takes=lambda options: Needs(torch.float32),
    cost="two reads, 2 R^2 (m + n) flops, R x R steps",
    source="arXiv 2505.15875",
)
