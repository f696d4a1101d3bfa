"""Numbers of any size as exact powers of two, and results that keep their digits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import DomergeError
from ..storage.lazy import dtype_name
from .side import Side

__all__ = [
    "EXTREME",
    "MOST",
    "USUAL",
    "check_rounding",
    "exponent",
    "exponents",
    "extreme",
    "fitted",
    "magnitude",
    "product",
    "refusal",
    "scaled",
    "times",
]

USUAL = 2.0**-50, 2.0**50
"""What the squared norm of a row may be without being centred."""

LIMIT = 0.01
"""Largest share of an update that rounding may change."""


EXTREME = 30
"""log2 of the weights and λ that are left as they are."""


MOST = 600
"""log2 of what no product of float32 factors comes near."""


VANISHING = -1022.0
"""log2 of what makes zeros of all factors."""


TINY = 2.0**-100
"""Above it bfloat16 and float32 have all their digits."""


def extreme(value: float) -> int:
    """The power of two to take out of a number: 0 unless it is far from 1."""
    exponent = math.frexp(value)[1]
    return exponent if abs(exponent) > EXTREME else 0


def exponents(side: Side, diagonal: Tensor | None = None) -> list[float]:
    """log2 of the largest entry of every scaled block, nearly: -inf for zeros, inf for what is not
    finite. diagonal: squared norms of the rows, which tell it where they are usual."""
    if diagonal is None:
        return [exponent(block, scale) for block, scale in zip(side.blocks, side.scales)]
    low, high = USUAL
    tops = [float(rows.max()) for rows in diagonal.split(list(side.ranks))]
    return [
        float(math.frexp(top)[1] // 2) if low <= top <= high else exponent(block, scale)
        for block, scale, top in zip(side.blocks, side.scales, tops)
    ]


def exponent(block: Tensor, scale: float) -> float:
    top = float(magnitude(block))
    if not math.isfinite(top):
        return math.inf
    if top == 0 or scale == 0:
        return -math.inf
    return math.frexp(top)[1] + math.frexp(scale)[1]


def magnitude(x: Tensor) -> Tensor:
    """max |x|; NaN or Inf where an entry is."""
    low, high = torch.aminmax(x)
    return torch.maximum(high, -low)


def fitted(
    name: str, a: Tensor, b: Tensor, powers: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """2^(sum of powers) B A as factors of the dtype, for A [R, n] and B [m, R] in float32.

    As the powers say, where that is as exact as the dtype is; otherwise with the rows of A and the
    columns of B at one size, and zero where one of both is. DomergeError where neither comes
    within LIMIT.
    """
    total = sum(powers)
    if abs(total) > MOST:
        raise refusal(name, dtype, "large" if total > 0 else "small")
    rows, columns = a.double().square().sum(1), b.double().square().sum(0)
    of_a, of_b = (torch.full_like(rows, p) for p in powers)
    pair, error = _rounded(a, b, of_a, of_b, dtype)
    if error <= torch.finfo(dtype).eps:
        return pair
    size_a, size_b = torch.frexp(rows)[1].double() / 2, torch.frexp(columns)[1].double() / 2
    to_a = ((total + size_b - size_a) / 2).round()
    live = rows * columns != 0
    share_a, share_b = (torch.where(live, p, VANISHING) for p in (to_a, total - to_a))
    shared, least = _rounded(a, b, share_a, share_b, dtype)
    pair, error = min(((pair, error), (shared, least)), key=lambda found: found[1])
    if error <= LIMIT:
        return pair
    raise refusal(name, dtype, "large" if math.isinf(error) else "small", error)


def _rounded(
    a: Tensor, b: Tensor, to_a: Tensor, to_b: Tensor, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], float]:
    """Rows of A and columns of B times their powers of two in the dtype, and the error."""
    wide_a, wide_b = a.double(), b.double()
    pair = (wide_a * _two_to(to_a)[:, None]).to(dtype), (wide_b * _two_to(to_b)).to(dtype)
    if not all(bool(torch.isfinite(x).all()) for x in pair):
        return pair, math.inf
    rows, columns = wide_a.square().sum(1), wide_b.square().sum(0)
    off_a = (pair[0].double() * _two_to(-to_a)[:, None] - wide_a).square().sum(1)
    off_b = (pair[1].double() * _two_to(-to_b) - wide_b).square().sum(0)
    total = (rows * columns).sum()
    if total == 0:
        return pair, 0.0
    return pair, float(((off_a * columns + rows * off_b).sum() / total).sqrt())


def scaled(name: str, delta: Tensor, power: int) -> Tensor:
    """2^power ΔW in float32; DomergeError where it is beyond that."""
    if abs(power) > MOST:
        raise refusal(name, delta.dtype, "large" if power > 0 else "small")
    found = times(delta, power).to(delta.dtype)
    if not bool(magnitude(found).isfinite()):
        raise refusal(name, delta.dtype, "large")
    check_rounding(name, delta, times(found, -power), delta.dtype)
    return found


def product(name: str, a: Tensor, b: Tensor) -> Tensor:
    """B A in float32; DomergeError where it is beyond that."""
    found = b.float() @ a.float()
    if not TINY <= float(magnitude(found)) < math.inf:
        exact = b.double() @ a.double()
        if float(exact.abs().max()) > torch.finfo(torch.float32).max:
            raise refusal(name, torch.float32, "large")
        found = exact.float()
        check_rounding(name, exact, found, torch.float32)
    return found


def check_rounding(name: str, given: Tensor, found: Tensor, dtype: torch.dtype) -> None:
    """DomergeError where `found`, which is `given` after a rounding to dtype, is off by LIMIT."""
    if dtype != torch.float16 and bool(magnitude(found) >= TINY):
        return
    size = float(torch.linalg.vector_norm(given, dtype=torch.float64))
    off = float(torch.linalg.vector_norm(found.to(given.dtype) - given, dtype=torch.float64))
    if off > LIMIT * size:
        raise refusal(name, dtype, "small", off / size)


def refusal(name: str, dtype: torch.dtype, what: str, error: float = 1.0) -> DomergeError:
    """Of a result that is too "large" or too "small" for the dtype."""
    word = dtype_name(dtype)
    narrow = dtype != torch.float32
    if what == "large":
        remedy = "write it with dtype='float32'" if narrow else "use a smaller scale or weights"
        return DomergeError(f"module {name!r}: the merged update does not fit in {word}; {remedy}")
    remedy = "use a larger scale or weights"
    if narrow:
        remedy = f"write it with dtype='float32', or {remedy}"
    loss = f"rounding would change it by {100 * error:.3g} %"
    problem = f"the merged update is too small for {word} ({loss})"
    return DomergeError(f"module {name!r}: {problem}; {remedy}")


def times(x: Tensor, power: int) -> Tensor:
    """2^power x, in float64."""
    return x.double() * 2.0**power


def _two_to(powers: Tensor) -> Tensor:
    """2^p of whole numbers in float64, exactly."""
    bits = (powers.clamp(-1022, 1023).long() + 1023) << 52
    return bits.view(torch.float64)
