"""FP8 in the files of DeepSeek, Qwen, fbgemm and AutoFP8: beside a weight the factors of its rows,
of its blocks or of all of it, by which it is multiplied whatever their name says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoint import FLOATS, ORIGINAL
from .dequantized import Dequantized, Parts, Scheme
from .scaled import Scaled, grid_of

__all__ = ["FLOATS_OF_8", "FOR_ACTIVATIONS", "SCHEME", "block_of", "read_scaled"]

FLOATS_OF_8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
)
SCALES = (*FLOATS, *(getattr(torch, x) for x in ("float8_e8m0fnu",) if hasattr(torch, x)))
FOR_ACTIVATIONS = (
    *("input_scale", "input_scale_ub", "activation_scale", "output_scale"),
    *("q_scale", "k_scale", "v_scale"),
)
_BLOCK = "weight_block_size"
_EXPERTS = ("gate_up_proj", "down_proj")


def block_of(sizes: object) -> tuple[int, int] | None:
    """Rows and columns of a block, as a config states them; None for anything else."""
    if isinstance(sizes, list) and [type(x) for x in sizes] == [int, int] and min(sizes) > 0:
        return sizes[0], sizes[1]
    return None


def read_scaled(parts: Parts, data: str, scales: str, block: tuple[int, int] | None) -> Dequantized:
    """A weight in FP8 with factors beside it."""
    stored, factors = parts.of(data, *FLOATS_OF_8), parts.of(scales, *SCALES)
    grid = grid_of(stored.shape, block, factors.shape) if len(stored.shape) > 1 else None
    if grid is None:
        shapes = f"{list(factors.shape)} for a weight {list(stored.shape)}"
        of_block = f" in blocks of {list(block)}" if block else ""
        parts.refuse(f"stores {parts.stem + scales!r} as {shapes}{of_block}", ORIGINAL)
    return Scaled(stored, factors, grid, parts.written)


def _read(parts: Parts) -> tuple[str, Dequantized]:
    scales = next(suffix for suffix in parts.tensors if "_scale" in suffix)
    data = scales.partition("_scale")[0]
    return data, read_scaled(parts, data, scales, block_of(parts.how.get(_BLOCK)))


def _check(how: Mapping[str, Any]) -> str | None:
    stated = how.get(_BLOCK)
    return None if stated is None or block_of(stated) else f"{_BLOCK}={str(stated)[:40]}"


SCHEME = Scheme(
    {
        **{f".weight{x}": (".weight", f".weight{x}") for x in ("_scale_inv", "_scale")},
        **{f".{x}_scale_inv": (f".{x}", f".{x}_scale_inv") for x in _EXPERTS},
    },
    _read,
    FOR_ACTIVATIONS,
    _check,
)
