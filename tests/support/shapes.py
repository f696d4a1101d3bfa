"""The shapes that hurt: one list of modules for the tests of every op, backend and method."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from domerge_fast.algebra.side import Side
from domerge_fast.backends.descent_rates import on_factors

CONVERGED = {"steps": 300, "tol": 1e-10}
"""A descent to the optimum."""

SCALINGS = (0.5, 2.0, 1.25, -0.75, 1.0)


@dataclass(frozen=True, eq=False)
class Case:
    """One module of T adapters: A_i [r_i, n], B_i [m, r_i] in float32, and the scaling of each."""

    a: list[Tensor]
    b: list[Tensor]
    scalings: list[float]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(len(a) for a in self.a)

    @property
    def ranks_read(self) -> tuple[int, ...]:
        """Without rows at the end that are zero on both sides, but for one: padding is not read."""
        used = [a.any(1) | b.any(0) for a, b in zip(self.a, self.b, strict=True)]
        return tuple(1 + max([0, *rows.nonzero().flatten().tolist()]) for rows in used)

    @property
    def as_read(self) -> Case:
        """As adapters of it are read."""
        ranks = self.ranks_read
        return Case(
            [a[:rank] for a, rank in zip(self.a, ranks, strict=True)],
            [b[:, :rank] for b, rank in zip(self.b, ranks, strict=True)],
            self.scalings,
        )

    @property
    def exact_rank(self) -> int:
        """The rank of a merge's factors where nothing is cut off."""
        return min(sum(self.ranks_read), self.a[0].shape[1], len(self.b[0]))

    @property
    def is_wide(self) -> bool:
        """Whether a side descends on its factors, as those with more rows than columns do. It does
        so by other steps than the literal method, to the same optimum."""
        sides = self.a[0].shape[1], len(self.b[0])
        kinds = itertools.product(sides, ("cpu", "torch"))
        return any(on_factors(sum(self.ranks), d, backend, tol=1.0) for d, backend in kinds)

    @property
    def weights(self) -> list[float]:
        """Weights of both signs and of different sizes."""
        return [(1.0, -0.5, 2.0)[i % 3] for i in range(len(self.a))]

    @property
    def omegas(self) -> list[float]:
        """The weights, their absolute values adding up to 1."""
        total = sum(map(abs, self.weights))
        return [w / total for w in self.weights]

    def rows(self, dtype: torch.dtype = torch.float32) -> Side:
        """The A side, as it is stored: row-major blocks [r_i, n]."""
        return Side(tuple(a.to(dtype) for a in self.a), (1.0,) * len(self.a))

    def columns(self, dtype: torch.dtype = torch.float32) -> Side:
        """The B side, as it is stored: transposes of row-major [m, r_i] matrices, scaled."""
        return Side(tuple(b.to(dtype).T for b in self.b), tuple(self.scalings))

    def exact_b(self) -> list[Tensor]:
        """Every B_i [m, r_i] in float64, scaled."""
        return [x.T for x in exact(self.columns())]

    def deltas(self) -> list[Tensor]:
        """Every ΔW_i [m, n] in float64."""
        return [b @ a.double() for a, b in zip(self.a, self.exact_b(), strict=True)]


SIDES: dict[str, Callable[..., Side]] = {"rows": Case.rows, "columns": Case.columns}


def exact(problem: Side) -> list[Tensor]:
    """The problem's blocks X_i [r_i, d] in float64, scaled."""
    return [s * x.double() for x, s in zip(problem.blocks, problem.scales, strict=True)]


def random_case(ranks: Sequence[int], n: int, m: int, seed: int = 0) -> Case:
    """Gaussian factors with columns of different sizes, and adapters that resemble each other."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shared_a, shared_b = gaussian(max(ranks), n), gaussian(m, max(ranks))
    sizes = torch.rand(n, generator=generator) + 0.1
    return Case(
        [(gaussian(r, n) + 0.5 * shared_a[:r]) * sizes for r in ranks],
        [gaussian(m, r) + 0.5 * shared_b[:, :r] for r in ranks],
        [SCALINGS[i % len(SCALINGS)] for i in range(len(ranks))],
    )


def _sized(*sizes: float) -> Case:
    """Three adapters, both factors of each multiplied by its size."""
    case = random_case((3, 4, 2), 41, 29)
    for a, b, size in zip(case.a, case.b, sizes, strict=True):
        a *= size
        b *= size
    return case


def _zero_factors() -> Case:
    case = random_case((3, 2, 4, 2), 23, 19)
    case.a[1].zero_()
    case.b[2].zero_()
    for factor in (case.a[0], case.b[0]):
        factor.zero_()
    return case


def _all_zero() -> Case:
    case = random_case((2, 3), 11, 13)
    for factor in (*case.a, *case.b):
        factor.zero_()
    return case


def _zero_columns() -> Case:
    case = random_case((3, 4), 21, 17)
    for a in case.a:
        a[:, 0] = 0
    case.a[1][:, 5] = 0
    case.b[0][3] = 0
    return case


def _duplicated() -> Case:
    case = random_case((4, 3), 37, 31)
    return Case([*case.a, case.a[0].clone()], [*case.b, case.b[0].clone()], [*case.scalings, 0.5])


def _shared_a() -> Case:
    case = random_case((4, 4, 4), 37, 31)
    return Case([case.a[0].clone() for _ in case.a], case.b, case.scalings)


CASES: dict[str, Case] = {
    "usual": random_case((16, 16, 16, 16), 128, 96),
    "whole vectors": random_case((8, 8, 8), 64, 32),
    "one row": random_case((1,), 5, 3),
    "one adapter": random_case((4,), 9, 7),
    "rank 1 before 64": random_case((1, 64), 75, 71),
    "rank 64 before 1": random_case((64, 1), 75, 71),
    "64 adapters": random_case((1, 2) * 32, 113, 101),
    "d below R": random_case((4, 5, 3), 7, 5),
    "d is 1": random_case((2, 1), 1, 1),
    "odd d": random_case((3, 5, 2), 61, 33),
    "R above 128": random_case((40, 50, 45), 151, 149),
    "R above 256": random_case((100, 70, 90), 281, 271),
    "zero factors": _zero_factors(),
    "all zero": _all_zero(),
    "zero columns": _zero_columns(),
    "duplicated": _duplicated(),
    "shared A": _shared_a(),
    "tiny": _sized(1e-8, 1e-8, 1e-8),
    "huge": _sized(1e4, 1e4, 1e4),
    "tiny beside huge": _sized(1e4, 1e-8, 1e4),
    "mixed sizes": _sized(1.0, 1000.0, 1.0),
}
