"""The ops as C++ kernels: vectorised, threaded over problems, each problem's state in cache.

float32 arithmetic on float32, bfloat16 and float16 blocks (float64 ones are rounded to float32).
Results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..problem import Problem
from . import torch as library
from .torch import orthogonalize_factors, truncate

__all__ = [
    "all_finite",
    "apply",
    "apply_decouple",
    "block_gram",
    "gram",
    "orthogonalize",
    "orthogonalize_factors",
    "truncate",
]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

MAX_DESCENT_RANK = 1024
"""Above it the library's blocked GEMM takes over: up to here the kernel was measured faster."""


def gram(problems: Sequence[Problem], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """X X^T [R, R] of every problem, products and sums in `dtype` (float32 or float64)."""
    table, _alive = _describe(problems)
    out = [torch.empty(p.rank, p.rank, dtype=dtype) for p in problems]
    _C.gram(table, _addresses(out), dtype == torch.float64, torch.get_num_threads())
    return out


def block_gram(problems: Sequence[Problem]) -> list[Tensor]:
    """Each adapter's own X_i X_i^T in float64, packed: [sum r_i^2] a problem."""
    table, _alive = _describe(problems)
    out = [torch.empty(sum(r * r for r in p.ranks), dtype=torch.float64) for p in problems]
    _C.block_gram(table, _addresses(out), torch.get_num_threads())
    return out


def orthogonalize(
    grams: Sequence[Tensor],
    ranks: Sequence[tuple[int, ...]],
    penalty: str = "squared",
    gamma: float = 1.0,
    steps: int = 50,
    tol: float = 1e-6,
) -> tuple[list[Tensor], Tensor]:
    """C [R, R] of every problem and the descent's statistics [P, 5] (see descent.STATS)."""
    stats = torch.zeros(len(grams), 5, dtype=torch.float64)
    results: list[Tensor] = list(grams)
    small = [i for i, g in enumerate(grams) if g.shape[0] <= MAX_DESCENT_RANK]
    large = [i for i, g in enumerate(grams) if g.shape[0] > MAX_DESCENT_RANK]
    if large:
        chosen = [grams[i] for i in large]
        found, stats[large] = library.orthogonalize(
            chosen, [ranks[i] for i in large], penalty, gamma, steps, tol
        )
        for i, c in zip(large, found):
            results[i] = c
    inputs = [grams[i].float().contiguous() for i in small]
    outputs = [torch.empty_like(g) for g in inputs]
    rows = torch.zeros(len(small), 5, dtype=torch.float64)
    _C.orthogonalize(
        _addresses(inputs),
        [r for i in small for r in ranks[i]],
        [len(ranks[i]) for i in small],
        _addresses(outputs),
        rows.data_ptr(),
        penalty == "frobenius",
        gamma,
        steps,
        tol,
        torch.get_num_threads(),
    )
    stats[small] = rows
    for i, c in zip(small, outputs):
        results[i] = c
    return results, stats


def apply(
    coefficients: Sequence[Tensor | None], problems: Sequence[Problem], out_dtype: torch.dtype
) -> list[Tensor]:
    """C X [K, d] of every problem (None: X itself), in the memory layout of its first block."""
    table, _alive = _describe(problems)
    cs = _matrices(coefficients)
    rows = [p.rank if c is None else c.shape[0] for c, p in zip(cs, problems)]
    out = [
        torch.empty(p.d, k, dtype=out_dtype).T
        if p.in_columns
        else torch.empty(k, p.d, dtype=out_dtype)
        for k, p in zip(rows, problems)
    ]
    code, threads = DTYPES[out_dtype], torch.get_num_threads()
    _C.apply(table, _addresses(cs), rows, _addresses(out), code, threads)
    return out


def apply_decouple(
    coefficients: Sequence[Tensor | None],
    problems: Sequence[Problem],
    blocks: Sequence[Tensor],
    omegas: Sequence[Sequence[float]],
    scale: float,
    out_dtype: torch.dtype,
    full: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """A' [R, n] and the adapters' norms ||B_i A_i||_F [T] in float64, of every problem."""
    table, _alive = _describe(problems, rows_only=True)
    cs = _matrices(coefficients)
    packed = [k.contiguous() for k in blocks]
    whole = [h.contiguous() for h in full or ()]
    out = [torch.empty(p.rank, p.d, dtype=out_dtype) for p in problems]
    norms = [torch.empty(len(p.blocks), dtype=torch.float64) for p in problems]
    _C.apply_decouple(
        table,
        _addresses(cs),
        _addresses(packed),
        [w for omega in omegas for w in omega],
        scale,
        _addresses(whole),
        _addresses(out),
        DTYPES[out_dtype],
        _addresses(norms),
        torch.get_num_threads(),
    )
    return out, norms


def all_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each tensor (float32, bfloat16 or float16) holds neither NaN nor Inf.

    A tensor that is no dense piece of memory is copied first; a transposed one is not.
    """
    dense = [x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous() for x in tensors]
    codes = [DTYPES[x.dtype] for x in dense]
    counts = [x.numel() for x in dense]
    return _C.all_finite(_addresses(dense), counts, codes, torch.get_num_threads())


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _matrices(coefficients: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if c is None else c.float().contiguous() for c in coefficients]


def _describe(
    problems: Sequence[Problem], rows_only: bool = False
) -> tuple[_C.Problems, list[Tensor]]:
    """The kernels' table of problems, and the tensors to keep alive while it is used.

    A block whose memory is not laid out like its problem's first one is copied; one that is a
    slice of a larger matrix is not.
    """
    alive: list[Tensor] = []
    pitches: list[int] = []
    dtypes: list[int] = []
    columns: list[bool] = []
    for p in problems:
        in_columns = p.in_columns and not rows_only
        columns.append(in_columns)
        for block in p.blocks:
            code = DTYPES.get(block.dtype)
            if code is None:
                block, code = block.float(), 0
            step, pitch = block.stride()[::-1]
            if in_columns:
                step, pitch = pitch, step
            if step != 1 or pitch < block.shape[not in_columns]:
                block = block.T.contiguous().T if in_columns else block.contiguous()
                pitch = block.shape[not in_columns]
            alive.append(block)
            pitches.append(pitch)
            dtypes.append(code)
    table = _C.Problems(
        [block.data_ptr() for block in alive],
        [r for p in problems for r in p.ranks],
        pitches,
        dtypes,
        [scale for p in problems for scale in p.scales],
        [len(p.blocks) for p in problems],
        [p.d for p in problems],
        columns,
    )
    return table, alive
