"""The launches of the Triton backend, as backends/gpu/kernels.py and entries.py want them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import (
    apply,
    apply_decouple,
    block_gram,
    entries,
    gram,
    largest,
    orthogonalize,
    roots,
)

__all__ = ["TritonKernels"]


class TritonKernels:
    """See gpu.kernels.Kernels and gpu.entries.EntryKernels."""

    gram = staticmethod(gram.gram)
    block_gram = staticmethod(block_gram.block_gram)
    apply = staticmethod(apply.apply)
    orthogonalize = staticmethod(orthogonalize.orthogonalize)
    roots = staticmethod(roots.roots)
    apply_decouple = staticmethod(apply_decouple.apply_decouple)
    largest = staticmethod(largest.largest)
    entry_counts = staticmethod(entries.entry_counts)
    entry_sums = staticmethod(entries.entry_sums)
    entry_merge = staticmethod(entries.entry_merge)

    def splitting(self, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
        """None: a program splits what it reads of C."""

    def root_numbers(self, rank: int) -> int:
        return rank * rank

    def as_roots(self, roots: Tensor) -> Tensor:
        return roots.flatten(1).float()

    def sizes(self, op: str) -> tuple[int, ...]:
        return {
            "gram": gram.SIZES,
            "orthogonalize": orthogonalize.SIZES,
            "apply": apply.SIZES,
            "apply_decouple": apply_decouple.SIZES,
        }[op]

    def columns(self, op: str, size: int) -> int:
        return apply.COLUMNS[size] if op == "apply" else apply_decouple.COLUMNS
