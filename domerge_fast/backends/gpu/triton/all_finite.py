"""Whether tensors hold neither NaN nor Inf: values whose exponent has all bits set."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["all_finite"]

BLOCK = 4096
FORMS = {
    torch.float32: (tl.int32, 0x7F800000),
    torch.bfloat16: (tl.int16, 0x7F80),
    torch.float16: (tl.int16, 0x7C00),
}
"""The integer as which a value is read, and its exponent's bits."""


@triton.jit
def _find(
    address,
    count,
    ALIGNED: tl.constexpr,
    FORM: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 where values of a stretch are not finite, else 0."""
    place = tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), FORM)
    whole = count // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        at = address.to(tl.pointer_type(FORM)) + begin + place
        if ALIGNED:
            at = tl.max_contiguous(tl.multiple_of(at, 16), BLOCK)
        found |= ((tl.load(at) & BITS) == BITS).to(FORM)
    at = address.to(tl.pointer_type(FORM)) + whole + place
    rest = tl.load(at, mask=whole + place < count, other=0)
    found |= ((rest & BITS) == BITS).to(FORM)
    return tl.max(found.to(tl.int32), 0)


@triton.jit
def all_finite_kernel(tiles, flags, FORM: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    tile = tiles + 3 * tl.program_id(0)
    address, count = tl.load(tile + 1), tl.load(tile + 2)
    if address % 16 == 0:
        found = _find(address, count, True, FORM, BITS, BLOCK)
    else:
        found = _find(address, count, False, FORM, BITS, BLOCK)
    if found != 0:
        tl.store(flags + tl.load(tile), 0)


def all_finite(dtype: torch.dtype, tiles: Tensor, flags: Tensor) -> None:
    """See Kernels.all_finite."""
    form, bits = FORMS[dtype]
    all_finite_kernel[(len(tiles),)](tiles, flags, FORM=form, BITS=bits, BLOCK=BLOCK)
