"""How far results are from what they should be: every tolerance in the tests has a size.

Rounding differs between processors, libraries and their versions, so an error is a number only
beside the norm of something: of what is expected, or of the terms that were added up to it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def distance(result: Tensor, expected: Tensor, size: float | None = None) -> float:
    """||result - expected||_F relative to a size, by default ||expected||_F; 0 for two zeros."""
    error = float((result.double() - expected.double()).norm())
    size = float(expected.double().norm()) if size is None else size
    if error == 0:
        return 0.0
    return error / size if size else math.inf


def assert_close(
    result: Tensor,
    expected: Tensor,
    share: float = 1e-6,
    size: float | None = None,
    name: str = "the result",
) -> None:
    """||result - expected||_F is at most a share of a size, by default of ||expected||_F."""
    assert result.shape == expected.shape, name
    found = distance(result, expected, size)
    assert found <= share, f"{name}: off by {found:.3g} of its size, {share:.3g} allowed"


def assert_within(
    result: Tensor,
    expected: Tensor,
    size: Tensor | float,
    tolerance: float = 1e-5,
    name: str = "the result",
) -> None:
    """|result - expected| <= tolerance * size, besides one rounding of the result's dtype."""
    assert result.shape == expected.shape, name
    info = torch.finfo(result.dtype)
    allowed = tolerance * size + info.eps / 2 * expected.abs() + info.smallest_normal * info.eps
    error = (result.double() - expected).abs()
    worst = float((error / allowed).nan_to_num(math.inf).max())
    assert worst <= 1, f"{name}: {worst:.3g} times the error allowed"
