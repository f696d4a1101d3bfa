"""The launches of the Triton backend, as backends/gpu.py wants them."""

from __future__ import annotations

from . import all_finite, apply, apply_decouple, block_gram, gram, orthogonalize, roots


class TritonKernels:
    """See backends.gpu.Kernels."""

    gram = staticmethod(gram.gram)
    block_gram = staticmethod(block_gram.block_gram)
    apply = staticmethod(apply.apply)
    orthogonalize = staticmethod(orthogonalize.orthogonalize)
    roots = staticmethod(roots.roots)
    apply_decouple = staticmethod(apply_decouple.apply_decouple)
    all_finite = staticmethod(all_finite.all_finite)

    def sizes(self, op: str) -> tuple[int, ...]:
        return {
            "gram": gram.SIZES,
            "orthogonalize": orthogonalize.SIZES,
            "apply": apply.SIZES,
            "apply_decouple": apply_decouple.SIZES,
        }[op]

    def columns(self, op: str, size: int) -> int:
        return apply.COLUMNS[size] if op == "apply" else apply_decouple.COLUMNS
