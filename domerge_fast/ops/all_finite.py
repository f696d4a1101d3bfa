"""Whether tensors hold neither NaN nor Inf: what a merge writes has to pass this."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._backend import implementation, op

__all__ = ["all_finite"]


@op
def all_finite(tensors: Sequence[Tensor], *, backend: str = "auto") -> list[bool]:
    """One bool a tensor. It depends on the values, so it is no torch.library op."""
    return implementation(backend, tensors).all_finite(tensors)
