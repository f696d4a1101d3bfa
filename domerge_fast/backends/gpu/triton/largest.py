"""The largest magnitude of tensors, by its bits: Inf is above all numbers, NaN above Inf."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["largest"]

BLOCK = 4096
FORMS = {
    torch.float32: (tl.int32, 0x7FFFFFFF, 0),
    torch.bfloat16: (tl.int16, 0x7FFF, 16),
    torch.float16: (tl.int16, 0x7FFF, None),
}
"""The integer as which a value is read, its bits without the sign, and how far these are shifted
in a float32; None: they have to be converted."""


@triton.jit
def _find(
    address,
    count,
    ALIGNED: tl.constexpr,
    FORM: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest of a stretch."""
    place = tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), FORM)
    whole = count // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        at = address.to(tl.pointer_type(FORM)) + begin + place
        if ALIGNED:
            at = tl.max_contiguous(tl.multiple_of(at, 16), BLOCK)
        found = tl.maximum(found, (tl.load(at) & BITS).to(FORM))
    at = address.to(tl.pointer_type(FORM)) + whole + place
    rest = tl.load(at, mask=whole + place < count, other=0)
    found = tl.maximum(found, (rest & BITS).to(FORM))
    return tl.max(found, 0).to(FORM)


@triton.jit
def largest_kernel(
    tiles,
    tops,
    FORM: tl.constexpr,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(0)
    address, count = tl.load(tile + 1), tl.load(tile + 2)
    if address % 16 == 0:
        found = _find(address, count, True, FORM, BITS, BLOCK)
    else:
        found = _find(address, count, False, FORM, BITS, BLOCK)
    if SHIFT is None:
        size = found.to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    else:
        size = found.to(tl.int32) << SHIFT
    tl.atomic_max(tops + tl.load(tile), size)


def largest(dtype: torch.dtype, tiles: Tensor, tops: Tensor) -> None:
    """See Kernels.largest."""
    form, bits, shift = FORMS[dtype]
    largest_kernel[(len(tiles),)](tiles, tops, FORM=form, BITS=bits, SHIFT=shift, BLOCK=BLOCK)
