"""C X of every problem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.side import Side
from ._backend import implementation, noting, op

__all__ = ["apply"]


@op
def apply(
    coefficients: Sequence[Tensor | None],
    problems: Sequence[Side],
    out_dtype: torch.dtype,
    *,
    backend: str = "auto",
    finite: list[Tensor] | None = None,
) -> list[Tensor]:
    """C X [K, d] of every problem, with C [K, R] or None for X itself (stacked, scaled, cast);
    [P, K, d] with C [P, K, R] for a side of P modules.

    Computed in float32, or with so many bits of C that what is lost is far below the last place of
    a result in 16 bits. Where the first block is the transpose of a row-major [d, r] matrix, so
    is the result: B sides come out as the transposes of row-major [m, K] matrices. finite: takes
    the results of which the backend saw, while it wrote them, that they are; of the others nothing
    is known.
    """
    pairs = zip(coefficients, problems, strict=True)
    for shape, rank, count in {(c.shape, p.rank, p.count) for c, p in pairs if c is not None}:
        lead, of_modules = ((), "") if count is None else ((count,), f"{count}, ")
        if len(shape) != len(lead) + 2 or (*shape[:-2], shape[-1]) != (*lead, rank):
            raise ValueError(f"C must be [{of_modules}K, {rank}], got {tuple(shape)}")
    module = implementation("apply", backend, problems, coefficients)
    results: list[Tensor] = module.apply(
        coefficients, problems, out_dtype, **noting(module, finite)
    )
    return results
