"""Which form of the descent takes less time, from shapes: R x R matrices, or the factors [R, d].

The rates are constants, of one thread and measured once by `python benchmarks/forms.py`: which form
a side takes decides the last digits of a merge, so it may not depend on how busy a machine is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .registry import AUTO, by_op, load

__all__ = [
    "CPU",
    "ESTIMATED_COLUMNS",
    "LEAST",
    "MAX_DESCENT_RANK",
    "PROBES",
    "STEPS",
    "TORCH",
    "CpuRates",
    "Rates",
    "factor_flops",
    "on_factors",
    "seconds",
]

MAX_DESCENT_RANK = 1024
"""Above it the library's blocked GEMM makes the descent on R x R matrices, on a CPU: up to here the
kernel was measured faster."""

LEAST = 256
"""Of R and d: of smaller ones products are not most of the time, and there is little to gain."""
STEPS = 3
"""Of a descent: 2 to 5 where norms are not far apart, as many in either form."""
ESTIMATED_COLUMNS = 512
"""The least d of which a descent on the factors estimates lines (factor_descent.py): of fewer
columns products with probes would cost most of what they save."""
PROBES = 16
"""Vectors of signs that a line is estimated with."""


@dataclass(frozen=True)
class Rates:
    """GFLOP/s of a descent on R x R matrices, of C X after it, and of a descent on the factors."""

    squares: float
    apply: float
    factors: float


@dataclass(frozen=True)
class CpuRates:
    """Those of the kernels of an instruction set. library: of R x R matrices beyond the kernel's
    size; half: of a descent on the factors with products of bfloat16, None where there are none."""

    squares: float
    library: float
    apply: float
    factors: float
    half: float | None = None

    def of(self, rank: int, half: bool) -> Rates:
        squares = self.squares if rank <= MAX_DESCENT_RANK else self.library
        return Rates(squares, self.apply, self.half if half and self.half else self.factors)


CPU = {
    "amx": CpuRates(120, 62, 270, 112, half=440),
    "avx512_bf16": CpuRates(173, 47, 175, 178, half=305),
    "avx512": CpuRates(115, 59, 115, 112),
    "avx2": CpuRates(65, 36, 66, 62),
    "baseline": CpuRates(23, 16, 24, 23),
}
"""By instruction set."""
PLANNED = CPU["avx512"]
"""What plans and estimates count with, so that they are the same on every machine."""
TORCH = Rates(52, 120, 58)
"""On a CPU. On a GPU the factors are taken one module after the other, which was not measured."""


def on_factors(rank: int, d: int, backend: str | None = None, tol: float = math.inf) -> bool:
    """Whether a side [R, d] descends on its factors, for the squared penalty: always where R > d,
    as R x R matrices would be larger than the factors; else where that takes less time. A backend
    that has no `descent_rates(rank, d, tol)`, "auto", or one for each op, descends on R x R
    matrices there. None for a backend: what a plan counts with, for any tol."""
    if rank > d:
        return True
    if rank < LEAST:
        return False
    if backend is None:
        rates = PLANNED.of(rank, half=False)
    else:
        several = backend == AUTO or by_op(backend)
        known = None if several else getattr(load(backend), "descent_rates", None)
        if known is None:
            return False
        rates = known(rank, d, tol)
    squares, factors = seconds(rank, d, rates)
    return factors < squares


def seconds(rank: int, d: int, rates: Rates) -> tuple[float, float]:
    """Of one thread, by a descent on R x R matrices with C X, and by one on the factors with exact
    lines: estimated ones take a quarter less of it. The Gram [R, R] is left out: what counts
    interference and finds λ wants it, too."""
    squares = (7 * STEPS - 4) * rank**3 / rates.squares + 2 * rank**2 * d / rates.apply
    return squares / 1e9, factor_flops(rank, d, STEPS, estimated=False) / rates.factors / 1e9


def factor_flops(rank: int, d: int, steps: float, estimated: bool) -> float:
    """Of a descent on the factors, with the Grams [d, d] of X and of what it starts from. Where
    lines are estimated a step has one Gram, and the last none, but products with probes."""
    if estimated:
        return (1 + 3 * steps) * rank * d**2 + 12 * PROBES * steps * rank * d
    return (2 + 4 * steps) * rank * d**2
