"""DOGE: updates of one norm are added up, and one correction keeps what each does row by row.

    S = sum_i λ_i τ_i,  λ_i = η n / ||τ_i / w_i||_F,  n = mean_i ||τ_i / w_i||_F, of the module
    t_j[p] = τ_j[p] / ||τ_j[p]||, the direction of row p of update j
    D = (I - U U^T) D' that minimizes  sum_jp (t_j[p] · (τ_j - S - D)[p])^2 + damping ||D||_F^2
    ΔW = λ (S + D)

U: the first left singular vectors of [U_1 .. U_T], the left singular vectors of all updates side by
side; as many as `subspace` of those. w_i is in τ_i. D = Z A, so that ΔW has rank R: with one number
for every row and adapter,

    (K + damping) y = c,  D = (I - U U^T) (y[seg] ∘ B') A,  B'_j[p] = B_j[p] / ||τ_j[p]||
    (K y)[p, j] = t_j[p] · D[p],  c[p, j] = t_j[p] · (τ_j - S)[p]

by conjugate gradients, to the end. What is found does not depend on how updates are split into
factors, but it does on the rows of the weight.

From the paper: λ_i with η = 0.07, U, and one correction for all adapters off U, with one equation
for every row and adapter. The authors do not divide these by ||τ_j[p]||, take 400 steps of Adam of
1e-4 each, so that no entry of D moves further than 0.04, whatever the size of the adapters, and
stop there: there are fewer equations than unknowns, so that they could all be met. Adam divides
entry by entry, which brings rows to one size as we do, and leaves the space off U. Here damping
takes the place of stopping early. They mask ΔW by the largest 30 % of the entries of all updates,
which leaves no low rank; nothing is masked here. A module that one adapter alone has is left as it
is. Where U would end between equal singular values, it ends before these.

Cost: two reads of the factors, 2 R^2 (m + n) flops, T + 1 decompositions of R x R, and
2 R m (R + 2 k) flops a step for k vectors in U, in float64. Returns the exact result, of rank R at
most. Source: arXiv 2501.01230 and the authors' code in FusionBench.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Stack
from ..options import option
from . import applying
from .base import Method, Settings, bare_sides
from .contract import BATCH_BYTES
from .made import Factors
from .spectral import space

__all__ = ["METHOD"]

CLOSE = 1e-10
"""The equations are solved up to this share of their right side."""


@dataclass(frozen=True)
class DogeOptions:
    eta: float = option(
        0.3, "norm of every update in the sum to begin with, over their mean norm", low=0.0
    )
    subspace: float = option(
        1 / 6, "share of the left singular vectors that the correction stays off", low=0.0, high=1.0
    )
    damping: float = option(0.1, "weight of the norm of the correction", low=1e-4)


def merge(
    stacks: Sequence[Stack],
    grams_a: Sequence[Tensor | None],
    grams_b: Sequence[Tensor | None],
    options: DogeOptions,
    settings: Settings,
) -> list[Factors]:
    alone = [k for k, s in enumerate(stacks) if len(s.adapters) == 1]
    found = dict(zip(alone, applying.stacked([stacks[k] for k in alone], settings)))
    rest = [k for k, s in enumerate(stacks) if len(s.adapters) > 1]
    for members, corrected in _corrected([stacks[k] for k in rest], options, settings):
        copies = ops.apply(
            [None] * len(members),
            [stacks[rest[k]].a for k in members],
            settings.dtype,
            backend=settings.backend,
        )
        for k, a, b in zip(members, copies, corrected):
            found[rest[k]] = Factors(a, (settings.scale * b).to(settings.dtype))
    return [found[k] for k in range(len(stacks))]


def _corrected(
    stacks: Sequence[Stack], options: DogeOptions, settings: Settings
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Positions of stacks with B + Z [P, m, R] in float64: ΔW = (B + Z) A at λ = 1."""
    if not stacks:
        return
    for positions, x, _, to_b in space.in_coordinates(stacks, settings.backend):
        u = to_b.mT @ _shared(x, options.subspace)
        gains = options.eta * _equalizing(x, [stacks[k].weights for k in positions])
        for part in _alike([stacks[k] for k in positions]):
            members = [positions[p] for p in part]
            bare = torch.stack([_bare(stacks[k]) for k in members])
            rows = _Rows(
                b=bare * x.gains[part].mT,
                u=bare @ u[part],
                gram=x.a[part] @ x.a[part].mT,
                task=_task(x.ranks).to(bare),
            )
            yield members, rows.corrected(gains[part], options.damping)


def _alike(stacks: Sequence[Stack]) -> Iterator[list[int]]:
    """Positions of stacks of one shape, in batches."""
    by_size: dict[int, list[int]] = {}
    for k, s in enumerate(stacks):
        by_size.setdefault(s.b.d, []).append(k)
    for m, members in by_size.items():
        step = max(1, BATCH_BYTES // (8 * m * stacks[members[0]].rank))
        yield from (members[at : at + step] for at in range(0, len(members), step))


def _bare(stack: Stack) -> Tensor:
    """B without scalings [m, R] in float64."""
    return bare_sides([stack])[1].stack(torch.float64).mT


def _task(ranks: Sequence[int]) -> Tensor:
    """[R, T], 1 where the row is the adapter's."""
    return torch.block_diag(*(torch.ones(r, 1) for r in ranks))


def _shared(x: space.Coordinates, share: float) -> Tensor:
    """U in coordinates, [P, K_B, k], with zero columns where a module has fewer vectors."""
    parts = [space.svd(b, a, size)[0] for (b, a), size in zip(x.tasks(), x.norms.T)]
    stacked = torch.cat(parts, 2)
    values, vectors = torch.linalg.eigh(stacked @ stacked.mT)
    values, vectors = values.flip(1), vectors.flip(2)
    counts = (stacked != 0).any(1).sum(1)
    columns = [_before_equal(v, round(share * c)) for v, c in zip(values.tolist(), counts.tolist())]
    kept = torch.arange(max(columns), device=values.device) < torch.tensor(columns)[:, None].to(
        values.device
    )
    return vectors[..., : max(columns)] * kept[:, None]


def _before_equal(values: Sequence[float], count: int) -> int:
    """How many of descending values: this many, or fewer where the next one is equal."""
    count = min(count, len(values))
    while 0 < count < len(values) and values[count - 1] - values[count] <= (
        space.SUPPORT * values[0]
    ):
        count -= 1
    return count


def _equalizing(x: space.Coordinates, weights: Sequence[Sequence[float]]) -> Tensor:
    """n / ||τ_i / w_i||_F, [P, T]; 0 for updates of zero."""
    sizes = x.norms / torch.tensor(weights).abs().to(x.norms)
    present = sizes > 0
    mean = sizes.sum(1) / present.sum(1).clamp_min(1)
    return torch.where(present, mean[:, None] / sizes, 0.0)


@dataclass(frozen=True, eq=False)
class _Rows:
    """P modules of one shape in float64: the w_i s_i B_i side by side [P, m, R], U [P, m, k], A A^T
    [P, R, R], and which rows of A are whose [R, T]."""

    b: Tensor
    u: Tensor
    gram: Tensor
    task: Tensor

    def corrected(self, gains: Tensor, damping: float) -> Tensor:
        """B diag(λ_i) + Z [P, m, R], for λ_i [P, T]."""
        begin = self.b * self._spread(gains[:, None])
        wanted = self.sizes - self._dots(begin @ self.gram)
        return begin + self._moved(self._solution(wanted, damping))

    def _solution(self, wanted: Tensor, damping: float) -> Tensor:
        """y [P, m, T] with (K + damping) y = wanted."""
        y = torch.zeros_like(wanted)
        left = along = wanted
        energy = first = _dot(left, left)
        while (goes := energy > CLOSE**2 * first).any():
            image = self._dots(self._moved(along) @ self.gram) + damping * along
            step = torch.where(goes, energy / _dot(along, image), 0.0)
            y, left = y + step * along, left - step * image
            before, energy = energy, torch.where(goes, _dot(left, left), energy)
            along = left + torch.where(goes, energy / before, 0.0) * along
        return y

    def _moved(self, y: Tensor) -> Tensor:
        """(I - U U^T) (y[seg] ∘ B'), [P, m, R]."""
        z = self._spread(y) * self.unit
        return z - self.u @ (self.u.mT @ z)

    def _dots(self, z: Tensor) -> Tensor:
        """The rows of Z A times every t_j[p], [P, m, T], from Z A A^T."""
        return (self.unit * z) @ self.task

    def _spread(self, y: Tensor) -> Tensor:
        """y[seg] [P, m, R] of y [P, m, T]."""
        return y @ self.task.mT

    @cached_property
    def sizes(self) -> Tensor:
        """||τ_j[p]|| [P, m, T]."""
        own = self.gram * (self.task @ self.task.mT)
        return ((self.b @ own * self.b) @ self.task).clamp_min(0).sqrt()

    @cached_property
    def unit(self) -> Tensor:
        """B' [P, m, R]."""
        return self.b * self._spread(torch.where(self.sizes > 0, 1 / self.sizes, 0.0))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum((1, 2), keepdim=True)


METHOD = Method(
    "doge",
    "a sum of updates of one norm, and one correction that brings every adapter back",
    DogeOptions,
    merge,
    own_scale=True,
    cost="two reads of the factors, 2 R^2 m flops a step, R x R decompositions",
    source="arXiv 2501.01230",
)
