"""The ops as Triton kernels: all problems of an op in one launch, whatever their shapes.

With TRITON_INTERPRET=1 set before the first import of triton they run on the CPU, in Python.
"""

from __future__ import annotations

from ..entries import GpuEntries
from ..host import Gpu
from .kernels import TritonKernels

__all__ = [
    "BATCHES",
    "apply",
    "apply_decouple",
    "block_gram",
    "block_largest",
    "block_products",
    "entry_counts",
    "entry_merge",
    "entry_sums",
    "gram",
    "largest",
    "orthogonalize",
    "orthogonalize_factors",
    "truncate",
]

BATCHES = True
"""Ops take sides of several modules."""

_gpu = Gpu(TritonKernels)

apply = _gpu.apply
apply_decouple = _gpu.apply_decouple
block_gram = _gpu.block_gram
block_largest = _gpu.block_largest
block_products = _gpu.block_products
gram = _gpu.gram
largest = _gpu.largest
orthogonalize = _gpu.orthogonalize
orthogonalize_factors = _gpu.orthogonalize_factors
truncate = _gpu.truncate

_entries = GpuEntries(TritonKernels)

entry_counts = _entries.entry_counts
entry_merge = _entries.entry_merge
entry_sums = _entries.entry_sums
