"""Small tensors in the host's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["gather", "lengths"]

Maybe = TypeVar("Maybe", Tensor, Tensor | None)


def gather(tensors: Sequence[Maybe]) -> list[Maybe]:
    """Small tensors of one dtype in the host's memory, in one copy that is waited for."""
    present = [x for x in tensors if x is not None]
    if not present or present[0].device.type == "cpu":
        return list(tensors)
    flat = torch.cat([x.flatten() for x in present]).cpu()
    pieces = iter(flat.split([x.numel() for x in present]))
    return [x if x is None else next(pieces).view(x.shape) for x in tensors]


def lengths(squares: Tensor) -> Tensor:
    """Norms [.., T] of their squares, 0 of what rounding made negative."""
    # In rows that do not touch: of 100 numbers without gaps MKL opens all of torch's threads, which
    # takes milliseconds where others want their cores.
    return pad(squares.clamp_min(0), (0, 1))[..., :-1].sqrt()
