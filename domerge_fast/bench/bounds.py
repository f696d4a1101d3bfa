"""What an op must do at least, and what this machine reaches: copied bytes and GEMM flops a second.

Bytes: every input read once, every output written once. Flops: products and sums of the method's
large terms, a multiply-add as two; a symmetric result is counted once. Left out are terms that do
not grow with d or with R^3, so a bound is never too high.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.side import Side
from . import timing

__all__ = [
    "NOTHING",
    "Rates",
    "Work",
    "apply",
    "apply_decouple",
    "block_gram",
    "gram",
    "measure",
    "orthogonalize",
    "orthogonalize_factors",
    "truncate",
]

PASSES = {
    "16-bit": {"bfloat16": 1, "tf32": 1, "float32": 1},
    "mixed": {"bfloat16": 2, "tf32": 2, "float32": 1},
    "float32": {"tf32": 3, "float32": 1},
    "float64": {"float64": 1},
}
"""An arithmetic -> the GEMM rates it may run at, and how many such products it then takes: of a
float32 factor two bfloat16 parts have what shows in a result of 16 bits; products of 16-bit factors
are exact in all."""

COPY_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}
"""Several times any last-level cache."""
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
GEMM_SECONDS = 2.0
"""That one may take: where it would take longer, one of a quarter of the size is measured."""
SAMPLES = 7


@dataclass(frozen=True)
class Work:
    """Bytes to move, and flops by arithmetic (the names in PASSES)."""

    bytes: float
    flops_in: Mapping[str, float]

    @property
    def flops(self) -> float:
        return sum(self.flops_in.values())

    def __add__(self, other: Work) -> Work:
        both = {*self.flops_in, *other.flops_in}
        flops = {k: self.flops_in.get(k, 0.0) + other.flops_in.get(k, 0.0) for k in both}
        return Work(self.bytes + other.bytes, flops)


NOTHING = Work(0, {})


@dataclass(frozen=True)
class Rates:
    """Bytes a second of a copy (read and written), and flops a second of a GEMM by its dtype."""

    copy: float
    gemm: Mapping[str, float]

    def seconds(self, work: Work) -> tuple[float, str]:
        """The least time for the work, and which of "bytes" and "flops" takes it."""
        moving = work.bytes / self.copy
        computing = sum(n / self._of(arithmetic) for arithmetic, n in work.flops_in.items())
        return (moving, "bytes") if moving >= computing else (computing, "flops")

    def _of(self, arithmetic: str) -> float:
        passes = PASSES[arithmetic]
        return max(self.gemm[k] / count for k, count in passes.items() if k in self.gemm)


def gram(problems: Sequence[Side]) -> Work:
    """X X^T [R, R] in float32: R (R + 1) / 2 inner products of length d."""
    total = NOTHING
    for p in problems:
        flops = p.rank * (p.rank + 1) * p.d
        total += Work(_bytes(p.blocks) + 4 * p.rank**2, {_arithmetic(p): flops})
    return total


def block_gram(problems: Sequence[Side]) -> Work:
    """X_i X_i^T [r_i, r_i] in float64."""
    total = NOTHING
    for p in problems:
        flops = sum(r * (r + 1) for r in p.ranks) * p.d
        total += Work(_bytes(p.blocks) + 8 * sum(r * r for r in p.ranks), {"float64": flops})
    return total


def orthogonalize(ranks: Sequence[int], steps: Sequence[float]) -> Work:
    """7 R^3 a step: (V H) C, P G, (D G) C^T, and (D G) D^T, which is symmetric; 3 R^3 for the
    first, where C is I."""
    total = NOTHING
    for rank, count in zip(ranks, steps):
        total += Work(8 * rank**2, {"float32": rank**3 * max(7 * count - 4, 0)})
    return total


def orthogonalize_factors(problems: Sequence[Side], steps: Sequence[float]) -> Work:
    """R d^2 for S = Y^T Y, then 3 R d^2 a step: Y S, and S of where it leads, which the last needs
    not."""
    total = NOTHING
    for p, count in zip(problems, steps):
        flops = p.rank * p.d**2 * max(1, 3 * count)
        total += Work(_bytes(p.blocks) + 4 * p.rank * p.d, {"16-bit": flops})
    return total


def apply(
    coefficients: Sequence[Tensor | None], problems: Sequence[Side], dtype: torch.dtype
) -> Work:
    """C X [K, d]; no flops without a C."""
    total = NOTHING
    for c, p in zip(coefficients, problems):
        rows = p.rank if c is None else len(c)
        moved = _bytes(p.blocks) + _matrix(c) + rows * p.d * dtype.itemsize
        total += Work(moved, _product(c, p))
    return total


def apply_decouple(
    coefficients: Sequence[Tensor | None], problems: Sequence[Side], dtype: torch.dtype
) -> Work:
    """C X, and ||S_i x|| of every column with a triangular S_i [r_i, r_i]."""
    total = NOTHING
    for c, p in zip(coefficients, problems):
        squares = sum(r * r for r in p.ranks)
        moved = _bytes(p.blocks) + _matrix(c) + 8 * squares + p.rank * p.d * dtype.itemsize
        norms = Work(moved, {"float32": (squares + p.rank) * p.d})
        total += norms + Work(0, _product(c, p))
    return total


def truncate(pairs: Sequence[tuple[Tensor, Tensor]], rank: int, dtype: torch.dtype) -> Work:
    """Both Grams in float64, and the products of the factors with [k, R] matrices."""
    total = NOTHING
    for a, b in pairs:
        full, length = len(a), a.shape[1] + len(b)
        k = min(rank, full)
        products = "mixed" if a.element_size() == b.element_size() == 2 else "float32"
        flops = {"float64": full * (full + 1) * length, products: 2 * full * k * length}
        total += Work(_bytes((a, b)) + k * length * dtype.itemsize, flops)
    return total


def block_products(x: Sequence[Tensor], y: Sequence[Tensor], ranks: Sequence[int]) -> Work:
    """Every pair of entries is multiplied and added, in float64."""
    entries = sum(m.numel() for m in x)
    return Work(_bytes((*x, *y)) + 8 * len(x) * len(ranks) ** 2, {"float64": 2 * entries})


def largest(tensors: Sequence[Tensor]) -> Work:
    return Work(_bytes(tensors) + 8 * len(tensors), {})


def block_largest(problems: Sequence[Side]) -> Work:
    return largest([block for p in problems for block in p.blocks])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _matrix(c: Tensor | None) -> int:
    return 0 if c is None else 4 * c.numel()


def _product(c: Tensor | None, p: Side) -> dict[str, float]:
    if c is None:
        return {}
    arithmetic = "mixed" if _arithmetic(p) == "16-bit" else "float32"
    return {arithmetic: 2.0 * c.numel() * p.d}


def _arithmetic(p: Side) -> str:
    return "16-bit" if all(block.element_size() == 2 for block in p.blocks) else "float32"


def measure(device: torch.device) -> Rates:
    """The best of several copies and of several GEMMs in every dtype that the ops may use."""
    gemm = {name: _gemm(name, device) for name in ("float32", "bfloat16", "float64")}
    if device.type == "cuda":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        gemm["tf32"] = _gemm("float32", device)
        torch.set_float32_matmul_precision(before)
    return Rates(_copy(device), gemm)


def _copy(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES[device.type] // 8, dtype=torch.float64, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_times(lambda: target.copy_(source), device))


def _gemm(name: str, device: torch.device) -> float:
    """A small one first: where a processor has no instructions for bfloat16, one of the whole size
    takes a minute."""
    whole = GEMM_SIZE[device.type] // (2 if name == "float64" else 1)
    rate = _gemm_of(whole // 4, name, device)
    return rate if 2 * whole**3 > rate * GEMM_SECONDS else _gemm_of(whole, name, device)


def _gemm_of(size: int, name: str, device: torch.device) -> float:
    x, y = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
    return 2 * size**3 / min(_times(lambda: x @ y, device))


def _times(call: timing.Call, device: torch.device) -> list[float]:
    return timing.take_turns({"": call}, device, SAMPLES)[""]
