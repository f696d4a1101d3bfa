"""How large a prepared merge is, and how much of every adapter is in it, at any coefficients, from
products that are made once: none of them has a side as long as a weight's, but of `do`.

With ΔW = L M R of a module, M = λ diag(g) or λ C, and the updates B_i A_i of adapters,

    ‖ΔW‖² = <M, L^T L M R R^T>        <ΔW, B_i A_i> = <M, L^T B_i A_i R^T>

and with magnitudes h of columns besides, M = λ diag(ω), both are sums over columns j,

    h_j² <ω ω^T, N_j>                 h_j <ω, q_ij>

of what L^T L, L^T B_i A_i and the directions R make of every two adapters.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.plan import Plan, Stack
from ..algebra.full_precision import full_precision
from ..engine.progress_bar import untold
from ..reading import read
from .coefficients import Kappa
from .kinds.alike import Alike, Inner
from .kinds.rotated import Cores
from .part import Bases
from .prepared import Prepared, check_stays

__all__ = ["Measured", "Measures"]

MOST_NUMBERS = 1 << 25
"""Of products, 128 MiB. Of more modules a part is measured, evenly spread."""

MOST_MODULES = 2048
"""What is worked out for each of them takes longer than its arithmetic."""

MOST_CUBES = 1 << 26
"""Sum of R³ over the modules of a method that works in R x R whenever coefficients change."""


@dataclass(frozen=True)
class Measured:
    """Of a merge ΔW and the updates ΔW_i of the adapters, over the measured modules together.

    norm: ‖ΔW‖_F. cosines: of ΔW with every ΔW_i. shares: <ΔW, ΔW_i> / ‖ΔW_i‖², 1 where all of an
    update is in the merge. modules: by name the shares of those that have it, by position. A share
    and a cosine are 0 where there is no update.
    """

    norm: float
    cosines: tuple[float, ...]
    shares: tuple[float, ...]
    modules: dict[str, dict[int, float]]


@dataclass(frozen=True, eq=False)
class Measures:
    """prepared: that of the measured modules, or of all where they depend on each other. norms:
    ‖ΔW_i‖_F of the adapters in the measured modules together. total: how many modules there are."""

    prepared: Prepared
    norms: tuple[float, ...]
    total: int
    _products: tuple[_Products, ...]

    @classmethod
    def of(
        cls,
        prepared: Prepared,
        most: int = MOST_NUMBERS,
        progress: Callable[[int, int], None] = untold,
    ) -> Measures:
        """Read the adapters' factors again, and keep products of theirs with the bases of what was
        prepared: at most so many numbers, but of one module at least. progress: is called after
        every module; an error that it raises stops it. OptionError for a method whose merges are
        made anew (kind "tiles")."""
        check_stays(prepared)
        chosen = set(_spread(prepared, most))
        places = [[k for k, n in enumerate(x.names) if n in chosen] for x in prepared.alike]
        parts = [x.part(at) for x, at in zip(prepared.alike, places) if at]
        loaded, _ = read(prepared.sources(), prepared.recipe.base_model)
        plan = Plan.make(loaded, [1.0] * len(loaded))
        products, done = [], 0
        for x in parts:
            made = []
            for name in x.names:
                made.append(_of_module(x, prepared.bases[name], plan.stack(name)))
                done += 1
                progress(done, len(chosen))
            products.append(type(made[0]).together(made, x))
        norms = torch.zeros(len(prepared.adapters), dtype=torch.float64)
        for own in products:
            norms[list(own.owners)] += own.squares.sum(0).cpu()
        measured = dataclasses.replace(prepared, alike=tuple(parts))
        return cls(measured, tuple(norms.sqrt().tolist()), len(prepared.modules), tuple(products))

    @property
    def modules(self) -> tuple[str, ...]:
        """Those that are measured."""
        return tuple(name for x in self.prepared.alike for name in x.names)

    def at(self, kappa: Kappa, scale: float | None = None) -> Measured:
        """Of the merge at coefficients, as `Prepared.merge` takes them. scale: λ of all modules;
        None: as it was prepared."""
        prepared = self.prepared if scale is None else self.prepared.at_scale(scale)
        expanded = prepared.expand(kappa).detach()
        square = 0.0
        along = torch.zeros(len(self.norms), dtype=torch.float64)
        modules: dict[str, dict[int, float]] = {}
        for products, inner in zip(self._products, prepared.inner(expanded)):
            own, dots = products.of(inner)
            square += float(own.sum())
            along[list(products.owners)] += dots.sum(0)
            rows = zip(products.names, _ratio(dots, products.squares.cpu()).tolist())
            modules |= {name: dict(zip(products.owners, row)) for name, row in rows}
        norm, norms = max(square, 0.0) ** 0.5, torch.tensor(self.norms, dtype=torch.float64)
        cosines, shares = _ratio(along, norm * norms), _ratio(along, norms.square())
        return Measured(norm, tuple(cosines.tolist()), tuple(shares.tolist()), modules)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(y > 0, x / y.where(y > 0, 1.0), 0.0)


def _spread(prepared: Prepared, most: int) -> Iterator[str]:
    """The modules that are measured: of every kind of them evenly over the model."""
    if any(isinstance(x, Cores) and x.calibrated for x in prepared.alike):
        yield from prepared.modules  # each one's merge depends on all others
        return
    numbers, cubes = 0, 0
    for x in prepared.alike:
        rank, count = sum(x.ranks), len(x.names)
        numbers += count * _KINDS[x.kind].numbers(x, max(prepared.shapes[n][1] for n in x.names))
        cubes += count * rank**3 * (x.kind == "rotated")
    count = len(prepared.modules)
    share = min(1.0, most / max(numbers, 1), MOST_CUBES / max(cubes, 1), MOST_MODULES / count)
    for x in prepared.alike:
        count = max(1, int(share * len(x.names)))
        yield from (x.names[k * len(x.names) // count] for k in range(count))


@dataclass(frozen=True, eq=False)
class _Products(abc.ABC):
    """Of P modules alike. squares: ‖B_i A_i‖² [P, T], in float64."""

    names: tuple[str, ...]
    owners: tuple[int, ...]
    ranks: tuple[int, ...]
    squares: Tensor

    @classmethod
    def together(cls, parts: Sequence[_Products], x: Alike) -> _Products:
        """Of modules of the same ranks: these are of one each."""
        own = [f.name for f in dataclasses.fields(cls)][3:]
        stacked = [torch.cat([getattr(part, name) for part in parts]) for name in own]
        return cls(x.names, x.owners, x.ranks, *stacked)

    @staticmethod
    @abc.abstractmethod
    def numbers(x: Alike, n: int) -> int:
        """How many a module of n columns keeps, about."""

    @abc.abstractmethod
    def of(self, inner: Inner) -> tuple[Tensor, Tensor]:
        """‖ΔW‖² [P] and <ΔW, B_i A_i> [P, T], in float64 on the CPU."""

    def _by_adapter(self, rows: Tensor) -> Tensor:
        """[.., R] -> [.., T], summed."""
        return torch.stack([x.sum(-1) for x in rows.split(list(self.ranks), -1)], -1)


@dataclass(frozen=True, eq=False)
class _Gains(_Products):
    """whole: (L^T L) o (R R^T) [P, k, k]. apart: the diagonals of L^T B_i A_i R^T, [P, T, k]."""

    whole: Tensor
    apart: Tensor

    @staticmethod
    def numbers(x: Alike, n: int) -> int:
        return sum(x.ranks) ** 2

    def of(self, inner: Inner) -> tuple[Tensor, Tensor]:
        assert inner.gains is not None
        gains = inner.gains.to(self.whole)[..., None]
        square = (gains * (self.whole @ gains)).sum((-1, -2))
        return square.double().cpu(), (self.apart @ gains)[..., 0].double().cpu()


@dataclass(frozen=True, eq=False)
class _Cores(_Products):
    """left: L^T L [P, K_B, K_B], right: R R^T [P, K_A, K_A]; of_b: L^T B [P, K_B, R], of_a: R A^T
    [P, K_A, R]."""

    left: Tensor
    right: Tensor
    of_b: Tensor
    of_a: Tensor

    @staticmethod
    def numbers(x: Alike, n: int) -> int:
        return 4 * sum(x.ranks) ** 2

    def of(self, inner: Inner) -> tuple[Tensor, Tensor]:
        assert inner.left is not None
        assert inner.right is not None
        left, right = inner.left.to(self.left), inner.right.to(self.left)
        square = (left.mT @ self.left @ left) * (right @ self.right @ right.mT)
        rows = ((left.mT @ self.of_b) * (right @ self.of_a)).sum(-2)
        return square.sum((-1, -2)).double().cpu(), self._by_adapter(rows).double().cpu()


@dataclass(frozen=True, eq=False)
class _Columns(_Products):
    """whole: N_j [P, n, T, T] and apart: q_ij [P, n, T, T], of adapter i and every block."""

    whole: Tensor
    apart: Tensor

    @staticmethod
    def numbers(x: Alike, n: int) -> int:
        return 2 * n * len(x.ranks) ** 2

    def of(self, inner: Inner) -> tuple[Tensor, Tensor]:
        assert inner.gains is not None
        assert inner.columns is not None
        firsts = [sum(self.ranks[:k]) for k in range(len(self.ranks))]
        omega = inner.gains.to(self.whole)[:, None, firsts, None]
        h = inner.columns.to(self.whole)
        square = (omega * (self.whole @ omega)).sum((-1, -2))
        dots = (self.apart @ omega)[..., 0]
        square, dots = (h.square() * square).sum(1), (h[..., None] * dots).sum(1)
        return square.double().cpu(), dots.double().cpu()


_KINDS: dict[str, type[_Products]] = {"gains": _Gains, "rotated": _Cores, "scaled": _Columns}


def _of_module(x: Alike, bases: Bases, stack: Stack) -> _Products:
    """Of one module, as of P = 1."""
    wide = full_precision(stack.a.device)
    ranks = list(x.ranks)
    a, bt = stack.a.stack(wide), stack.b.stack(wide)
    right, left = (basis.to(a) for basis in bases)
    pairs = zip(a.split(ranks), bt.split(ranks))
    squares = torch.stack([((p @ p.mT).double() * (q @ q.mT).double()).sum() for p, q in pairs])
    own = x.names[:1], x.owners, x.ranks, squares[None]
    of_b, of_a = left @ bt.mT, right @ a.mT
    whole = left @ left.mT
    if x.kind == "rotated":
        return _Cores(*own, whole[None], (right @ right.mT)[None], of_b[None], of_a[None])
    if x.kind == "gains":
        rows = (of_b * of_a).split(ranks, -1)
        apart = torch.stack([row.sum(-1) for row in rows])
        return _Gains(*own, (whole * (right @ right.mT))[None], apart[None])
    between = [right * (whole[:, p] @ right[p]) for p in _blocks(ranks)]
    along = [right * (of_b[:, p] @ a[p]) for p in _blocks(ranks)]
    return _Columns(*own, _of_blocks(between, ranks)[None], _of_blocks(along, ranks)[None])


def _blocks(ranks: Sequence[int]) -> Iterator[slice]:
    first = 0
    for rank in ranks:
        yield slice(first, first + rank)
        first += rank


def _of_blocks(rows: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """T tensors [R, n], summed over the rows of each block: [n, T, T]."""
    summed = [torch.stack([part.sum(0) for part in x.split(list(ranks))], -1) for x in rows]
    return torch.stack(summed, 1)
