"""Every matrix product of torch with its result changed in the last bit, as another BLAS may.

DOMERGE_TEST_PERTURB=1 installs it for a whole run of the tests (conftest.py). It replaces torch's
own CPU kernels, below autograd, so it is met in every thread and mode, and in the products that
matmul, einsum, linear and the rest are made of. What changes depends on nothing but the bytes of
the result and where in it they lie: repeats stay equal, and nothing is symmetric by chance.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

ENVIRONMENT = "DOMERGE_TEST_PERTURB"
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addmv", "dot", "vdot", "_addmm_activation")
PRODUCTS += ("convolution", "_scaled_dot_product_flash_attention_for_cpu")
"""What all other products come down to."""

EXACT = {torch.float64: 16, torch.float32: 6, torch.bfloat16: 2, torch.float16: 2}
"""Zero bits at the end, by dtype, that tell of a sum which is exact in any order (0, small whole
numbers, powers of two): it is the same everywhere, and stays."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LIBRARY = torch.library.Library("aten", "IMPL")


def last_bit(x: Tensor) -> Tensor:
    """x with the last bit of about half of its entries flipped, in place."""
    if x.dtype in EXACT and x.numel():
        bits = x.view(_BITS[x.itemsize])
        words, place = bits.long(), torch.arange(x.numel()).view(x.shape)
        mixed = (words ^ place * 0x9E3779B97F4A7C1) * 0x2545F4914F6CDD1D
        inexact = words & ((1 << EXACT[x.dtype]) - 1) != 0
        bits ^= ((mixed >> 40 & 1) * inexact).to(bits.dtype)
    return x


def install() -> None:
    """For the rest of this process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*operators may also be overridden", UserWarning)
        for name in (*PRODUCTS, *(f"{name}_" for name in PRODUCTS)):
            packet = getattr(torch.ops.aten, name, None)
            for overload in packet.overloads() if packet else ():
                if "dtype" not in overload:  # for CUDA alone
                    _replace(getattr(packet, overload))


def _replace(op: torch._ops.OpOverload) -> None:
    kernel = torch.library.get_kernel(op, "CPU")

    def perturbed(keys: torch.DispatchKeySet, *args: Any, **options: Any) -> Any:
        result = kernel.call_boxed(keys, *args, **options)
        last_bit(result[0] if isinstance(result, tuple) else result)
        return result

    _LIBRARY.impl(op, perturbed, "CPU", with_keyset=True, allow_override=True)
