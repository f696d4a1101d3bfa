"""The ops that methods are written in: one file each, one call for all modules of a group."""

from . import library  # noqa: F401, registers torch.ops.domerge_fast
from .apply import apply
from .apply_decouple import apply_decouple
from .block_products import block_products
from .entries import entry_counts, entry_merge, entry_sums
from .gram import block_gram, gram
from .largest import block_largest, largest
from .orthogonalize import orthogonalize, orthogonalize_factors
from .truncate import truncate

__all__ = [
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
