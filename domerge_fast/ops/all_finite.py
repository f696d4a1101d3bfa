"""Whether tensors hold neither NaN nor Inf: what a merge writes has to pass this."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import _library


def all_finite(tensors: Sequence[Tensor], *, backend: str = "auto") -> list[bool]:
    """One bool a tensor. It depends on the values, so it is no torch.library op."""
    return _library.implementation(backend, tensors).all_finite(tensors)
