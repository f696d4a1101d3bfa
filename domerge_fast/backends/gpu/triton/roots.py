"""S [r, r] with ||K||_* S^T S = K of every block's Gram K, by Cholesky with diagonal pivoting.

In float64, a row of S at a time: the row of K at the pivot, less what earlier rows account for.
Semidefinite matrices need no special case: where what is left is rounding, rows are zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["roots"]

SMALL = 32
LARGE = 256
CHUNK = 32
"""Earlier rows that are subtracted at a time."""


@triton.jit
def _root(gram, rank, rows, out, norms, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """rows: workspace in float64, of the shape of the result."""
    place = tl.arange(0, SIZE)
    live = place < rank
    left = tl.load(gram + place * (rank + 1), mask=live, other=0.0)
    trace = tl.sum(left, 0)
    norm = tl.sqrt(tl.maximum(trace, 0.0))
    inverse = tl.where(trace > 0, 1.0 / tl.where(trace > 0, norm, 1.0), 0.0)
    negligible = 1e-16 * rank.to(tl.float64) * trace
    left = tl.where(live, left, -1.0)
    for k in range(0, rank):
        largest = tl.max(left, 0)
        pivot = tl.argmax(left, 0)
        row = tl.zeros((SIZE,), tl.float64)
        if largest > negligible:
            row = tl.load(gram + pivot * rank + place, mask=live, other=0.0)
            for first in range(0, k, CHUNK):
                earlier = first + tl.arange(0, CHUNK)
                factor = tl.load(rows + earlier * rank + pivot, mask=earlier < k, other=0.0)
                at = rows + earlier[:, None] * rank + place[None, :]
                known = tl.load(at, mask=(earlier < k)[:, None] & live[None, :], other=0.0)
                row -= tl.sum(factor[:, None] * known, 0)
            # Negative: used up, or not there; later rows are zero in these columns.
            row = tl.where(left < 0, 0.0, row / tl.sqrt(largest))
            left = tl.where(place == pivot, -1.0, left - row * row)
            tl.store(rows + k * rank + place, row, mask=live)
            tl.debug_barrier()
        tl.store(out + k * rank + place, (row * inverse).to(tl.float32), mask=live)
    tl.store(norms, norm.to(tl.float32))


@triton.jit
def roots_kernel(
    work, rows, out, norms, SMALL: tl.constexpr, LARGE: tl.constexpr, CHUNK: tl.constexpr
):
    one = work + 3 * tl.program_id(0)
    gram = tl.load(one).to(tl.pointer_type(tl.float64))
    rank, offset = tl.load(one + 1), tl.load(one + 2)
    rows, out, norms = rows + offset, out + offset, norms + tl.program_id(0)
    if rank <= SMALL:
        _root(gram, rank, rows, out, norms, SMALL, CHUNK)
    else:
        _root(gram, rank, rows, out, norms, LARGE, CHUNK)


def roots(work: Tensor, out: Tensor, norms: Tensor) -> None:
    """See Kernels.roots."""
    rows = torch.empty_like(out, dtype=torch.float64)
    roots_kernel[(len(work),)](
        work, rows, out, norms, SMALL=SMALL, LARGE=LARGE, CHUNK=CHUNK, num_warps=8
    )
