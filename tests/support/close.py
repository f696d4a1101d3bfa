"""How far results are from what they should be: every tolerance in the tests has a size.

Rounding differs between processors, libraries and their versions, so an error is a number only
beside the norm of something: of what is expected, or of the terms that were added up to it.
"""

from __future__ import annotations

from torch import Tensor


def distance(result: Tensor, expected: Tensor, size: float | None = None) -> float:
    """||result - expected||_F relative to a size, by default ||expected||_F; 0 for two zeros."""
    error = float((result.double() - expected.double()).norm())
    size = float(expected.double().norm()) if size is None else size
    return error / size if error else 0.0
