"""On what evidence "auto" takes a backend for an op.

`ROWS` is the table: `registry.choose` reads it, and docs/kernels.md shows it. A better row is an
entry here, with the run or the count that it stands on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

__all__ = ["EVIDENCE", "ROWS", "Row", "ranked"]

EVIDENCE = {
    "measured": "merges were timed beside those of the other backends: `benchmarks/results/`",
    "predicted": "run on a CPU against the oracle; the model of its machine code has a time for it",
    "run": "run on a CPU against the oracle; nothing tells its time beside another's",
    "interpreted": "run by Triton's interpreter against the oracle; needs a compiler at first",
    "library": "torch's own calls, held against the oracle",
}
"""What a backend stands on, the strongest first."""

ALL: tuple[str, ...] = ()
BFLOAT16 = (torch.bfloat16,)
FLOAT32 = (torch.float32,)


@dataclass(frozen=True)
class Row:
    """device: torch's type of it, None for any. ops: those of registry.OPS, empty for all. dtypes:
    of what they read, empty for all."""

    device: str | None
    backend: str
    ops: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    evidence: str

    def is_of(self, device: str, op: str, dtype: torch.dtype) -> bool:
        here = self.device in (None, device)
        return here and op in (self.ops or (op,)) and dtype in (self.dtypes or (dtype,))


BY_LIBRARY = ("block_products", "orthogonalize_factors", "truncate")
"""Ops that both GPU backends leave to torch."""
OF_FACTORS = ("gram", "block_gram", "apply", "apply_decouple")

ROWS = (
    Row("cpu", "cpu", OF_FACTORS, BFLOAT16, "measured"),
    Row("cpu", "cpu", ("orthogonalize",), FLOAT32, "measured"),
    Row("cpu", "cpu", ALL, (), "run"),
    Row("cuda", "cuda", OF_FACTORS, BFLOAT16, "predicted"),
    Row("cuda", "cuda", ("gram", "orthogonalize"), FLOAT32, "predicted"),
    Row("cuda", "cuda", BY_LIBRARY, (), "library"),
    Row("cuda", "cuda", ALL, (), "run"),
    Row("cuda", "triton", BY_LIBRARY, (), "library"),
    Row("cuda", "triton", ALL, (), "interpreted"),
    Row(None, "torch", ALL, (), "library"),
)
"""Of a backend the first row that is of a device, op and dtype holds. A backend without one is
taken only by name."""


@cache
def ranked(device: str, op: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends with a row for an op on a dtype there, by falling evidence; of equals in the
    order of the table."""
    strength = {word: k for k, word in enumerate(EVIDENCE)}
    found: dict[str, int] = {}
    for row in ROWS:
        if row.is_of(device, op, dtype):
            found.setdefault(row.backend, strength[row.evidence])
    return tuple(sorted(found, key=lambda name: found[name]))
