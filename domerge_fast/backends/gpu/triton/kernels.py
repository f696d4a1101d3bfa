"""The launches of the Triton backend, as backends/gpu/host.py and gpu_entries.py want them."""

from __future__ import annotations

from . import (
    all_finite,
    apply,
    apply_decouple,
    block_gram,
    entries,
    gram,
    orthogonalize,
    roots,
)

__all__ = ["TritonKernels"]


class TritonKernels:
    """See backends.gpu.Kernels and backends.gpu_entries.EntryKernels."""

    gram = staticmethod(gram.gram)
    block_gram = staticmethod(block_gram.block_gram)
    apply = staticmethod(apply.apply)
    orthogonalize = staticmethod(orthogonalize.orthogonalize)
    roots = staticmethod(roots.roots)
    apply_decouple = staticmethod(apply_decouple.apply_decouple)
    all_finite = staticmethod(all_finite.all_finite)
    entry_counts = staticmethod(entries.entry_counts)
    entry_sums = staticmethod(entries.entry_sums)
    entry_merge = staticmethod(entries.entry_merge)

    def sizes(self, op: str) -> tuple[int, ...]:
        return {
            "gram": gram.SIZES,
            "orthogonalize": orthogonalize.SIZES,
            "apply": apply.SIZES,
            "apply_decouple": apply_decouple.SIZES,
        }[op]

    def columns(self, op: str, size: int) -> int:
        return apply.COLUMNS[size] if op == "apply" else apply_decouple.COLUMNS
