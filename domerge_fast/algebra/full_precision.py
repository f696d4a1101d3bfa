"""The dtype in which products of torch are as exact as float32, whatever the process allows."""

from __future__ import annotations

import torch

__all__ = ["full_precision"]


def full_precision(device: torch.device, dtype: torch.dtype = torch.float32) -> torch.dtype:
    """`dtype`, or float64 in place of float32 where torch may multiply that in bfloat16 or TF32, as
    code that trains often allows."""
    if dtype == torch.float32 and _is_reduced(device.type):
        return torch.float64
    return dtype


def _is_reduced(device: str) -> bool:
    library = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    # Torch below 2.9 has no such setting by device; later ones refuse to tell the old one where the
    # new one was used.
    allowed = getattr(getattr(library, "matmul", None), "fp32_precision", None)
    if allowed is None:
        return torch.get_float32_matmul_precision() != "highest"
    return allowed not in ("none", "ieee")
