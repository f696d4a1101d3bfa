"""FP4 (E2M1), two numbers in a byte, the first in its lower half, with a factor for every group: a
power of two for 32 (MXFP4, as gpt-oss and compressed-tensors store it), or one in FP8 for 16 and
one for all (NVFP4). Source: OCP Microscaling Formats 1.0; the tensors that transformers 5.24 and
compressed-tensors 0.20 save.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....storage.safetensors_file import FileTensor
from .dequantized import Dequantized, Parts, Scheme, unpacked

__all__ = ["SCHEME", "Float4"]

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = torch.tensor((*_MAGNITUDES, *(-x for x in _MAGNITUDES)))
_BIAS = 127
"""Of the exponents that are factors."""


class Float4(Dequantized):
    """data: [m, ...] in bytes, with n / 2 bytes a row; scales: [m, n / group], exponents where they
    are in bytes. divisor: of all numbers."""

    def __init__(
        self,
        data: FileTensor,
        scales: FileTensor,
        shape: tuple[int, int],
        written: torch.dtype,
        divisor: FileTensor | None = None,
    ) -> None:
        super().__init__(data, shape, written)
        self._data, self._scales, self._divisor = data, scales, divisor

    def rows(self, start: int, stop: int) -> Tensor:
        made = _numbers(self._data.rows(start, stop), self._scales.rows(start, stop))
        return made if self._divisor is None else made / self._divisor.read().float()


class _Experts(Dequantized):
    """[E, n, m] of bytes [E, m, n / 32, 16] and exponents [E, m, n / 32]."""

    def __init__(self, data: FileTensor, scales: FileTensor, written: torch.dtype) -> None:
        experts, m, groups, nbytes = data.shape
        super().__init__(data, (experts, groups * nbytes * 2, m), written)
        self._data, self._scales = data, scales

    def rows(self, start: int, stop: int) -> Tensor:
        made = [
            _numbers(self._data.rows(k, k + 1)[0], self._scales.rows(k, k + 1)[0])
            for k in range(start, stop)
        ]
        return torch.stack(made).mT.contiguous()


def _numbers(data: Tensor, scales: Tensor) -> Tensor:
    """[m, n] of bytes [m, ...] and the factors of groups [m, g]."""
    m, groups = scales.shape
    found = _NUMBERS[unpacked(data.reshape(m, -1), 4).int()].reshape(m, groups, -1)
    if scales.dtype == torch.uint8:
        scales = torch.ldexp(torch.ones(m, groups), scales.int() - _BIAS)
    return (found * scales.float()[..., None]).reshape(m, -1)


def _read(parts: Parts) -> tuple[str, Dequantized]:
    data = parts.of("_blocks", torch.uint8)
    if len(data.shape) != 4 or data.shape[-1] != 16:
        parts.of("_blocks", torch.uint8, shape=(0, 0, 0, 16))
    scales = parts.of("_scales", torch.uint8, shape=data.shape[:3])
    return "", _Experts(data, scales, parts.written)


SCHEME = Scheme({"_blocks": ("_blocks", "_scales")}, _read)
