"""C X of float32 factors with sums so long that a product in blocks makes it faster than `apply`'s
kernel, on a CPU: a merge of hundreds of adapters as one matrix. For a result of 16 bits where AMX
multiplies, of numbers in two bfloat16 parts (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _C
from ..algebra.full_precision import full_precision
from ..algebra.side import Side

__all__ = ["apart", "is_long"]

MAX_RANK = 1024
"""Above it blocks were measured faster."""

Apply = Callable[[Sequence[Tensor | None], Sequence[Side], torch.dtype], list[Tensor]]


def is_long(c: Tensor | None, p: Side) -> bool:
    """Whether the product is one of these."""
    if c is None or c.dim() == 3 or p.rank <= MAX_RANK or p.in_columns:
        return False
    exact = full_precision(p.device) == torch.float32
    return exact and {x.dtype for x in p.blocks} == {torch.float32}


def apart(
    apply: Apply,
    coefficients: Sequence[Tensor | None],
    problems: Sequence[Side],
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """Of all problems, the others by `apply`."""
    long = [is_long(c, p) for c, p in zip(coefficients, problems)]
    rest = [k for k, own in enumerate(long) if not own]
    chosen = [coefficients[k] for k in rest], [problems[k] for k in rest]
    others = iter(apply(*chosen, out_dtype) if rest else ())
    return [
        _product(c, p, out_dtype) if own and c is not None else next(others)
        for c, p, own in zip(coefficients, problems, long)
    ]


def _product(c: Tensor, p: Side, out_dtype: torch.dtype) -> Tensor:
    """Does not depend on how many threads there are."""
    x = p.blocks[0] if p.scales == (1.0,) else p.stack(torch.float32)
    left, right = c.float().mT.contiguous(), x.contiguous()
    sums = torch.empty(len(c), p.d)
    sizes = (p.rank, len(c), p.d)
    half, threads = out_dtype != torch.float32, torch.get_num_threads()
    _C.long_product(left.data_ptr(), right.data_ptr(), *sizes, sums.data_ptr(), half, threads)
    return sums.to(out_dtype)
