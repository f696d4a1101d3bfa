"""compressed-tensors (llm-compressor): integers packed into words or as they are, FP8, FP4.

What a weight is, its tensors say; config.json has the size of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..checkpoint import FLOATS, ORIGINAL
from .dequantized import Dequantized, Parts, Scheme, unpacked
from .float4 import Float4
from .float8 import FOR_ACTIVATIONS, block_of, read_scaled
from .integers import Grouped
from .scaled import Scaled, grid_of

__all__ = ["SCHEME"]

_WEIGHT, _PACKED, _SHAPE = ".weight", ".weight_packed", ".weight_shape"
_SCALE, _ZERO, _GROUPS = ".weight_scale", ".weight_zero_point", ".weight_g_idx"
_GLOBAL = ".weight_global_scale"
_ALL = (_PACKED, _WEIGHT, _SCALE, _ZERO, _GROUPS, _SHAPE, _GLOBAL)
_OF_16 = 16
_OF_32 = 32


class _Words(Grouped):
    """Words [m, n bits / 32], factors [m, g]; zeros [m bits / 32, g], or half the range."""

    def __init__(self, parts: Parts) -> None:
        self._words = parts.of(_PACKED, torch.int32)
        m, n = (int(x) for x in parts.of(_SHAPE, torch.int64, torch.int32, shape=(2,)).read())
        self._factors = parts.of(_SCALE, *FLOATS)
        groups = self._factors.shape[-1] if len(self._factors.shape) == 2 else 0
        words = self._words.shape[-1]
        self._bits = next((b for b in (4, 8) if -(-n * b // 32) == words), 0)
        shapes = self._words.shape == (m, words) and self._factors.shape == (m, groups)
        if not self._bits or not shapes or not groups or n < 1:
            _refuse(parts)
        super().__init__(self._words, (m, n), parts.written)
        self._zeros = None
        if _ZERO in parts:
            rows = -(-m * self._bits // 32)
            self._zeros = parts.of(_ZERO, torch.int32, shape=(rows, groups))
        of_columns = None
        if _GROUPS in parts:
            of_columns = parts.of(_GROUPS, torch.int32, torch.int64, shape=(n,)).read().long()
        if of_columns is not None and bool((of_columns != -1).any()):  # -1: none were chosen
            if not 0 <= int(of_columns.min()) <= int(of_columns.max()) < groups:
                _refuse(parts)
            self.groups = of_columns
        elif n % groups:
            _refuse(parts)

    def numbers(self, start: int, stop: int) -> Tensor:
        return unpacked(self._words.rows(start, stop), self._bits)[:, : self.shape[1]]

    def factors(self, start: int, stop: int) -> Tensor:
        return self._factors.rows(start, stop)

    def zeros(self, start: int, stop: int) -> Tensor:
        if self._zeros is None:
            return torch.full((1, 1), float(1 << (self._bits - 1)))
        each = 32 // self._bits
        first = start // each
        found = unpacked(self._zeros.rows(first, -(-stop // each)).T, self._bits)
        return found[:, start - first * each : stop - first * each].T


def _integers(parts: Parts) -> Dequantized:
    """Of 8 bits, with a factor for all, for each row, or for each group of a row."""
    data, factors = parts.of(_WEIGHT, torch.int8), parts.of(_SCALE, *FLOATS)
    grid = _grid(parts, data.shape, factors.shape)
    zeros = None
    if _ZERO in parts:
        zeros = parts.of(_ZERO, torch.int8, torch.int32, *FLOATS, shape=factors.shape)
    return Scaled(data, factors, grid, parts.written, zeros)


def _grid(parts: Parts, shape: tuple[int, ...], factors: tuple[int, ...]) -> tuple[int, int]:
    """The block of each factor."""
    if len(shape) == len(factors) == 2:
        m, n = shape
        if factors[0] == m and factors[1] > 1 and n % factors[1] == 0:
            return 1, n // factors[1]
    found = grid_of(shape, _block(parts.how), factors) if len(shape) > 1 else None
    if found is None:
        _refuse(parts)
    return found


def _four(parts: Parts) -> Dequantized:
    data = parts.of(_PACKED, torch.uint8)
    if len(data.shape) != 2:
        _refuse(parts)
    m, n = data.shape[0], 2 * data.shape[1]
    size = _OF_16 if _GLOBAL in parts else _OF_32
    kinds = (torch.float8_e4m3fn,) if _GLOBAL in parts else (torch.uint8,)
    if n % size:
        _refuse(parts)
    scales = parts.of(_SCALE, *kinds, shape=(m, n // size))
    divisor = parts.of(_GLOBAL, torch.float32, shape=(1,)) if _GLOBAL in parts else None
    return Float4(data, scales, (m, n), parts.written, divisor)


def _read(parts: Parts) -> tuple[str, Dequantized]:
    stored = parts.tensors.get(_PACKED) or parts.tensors.get(_WEIGHT)
    if stored is None:
        parts.refuse(f"has a {parts.stem + _SCALE!r} without a weight")
    if stored.dtype == torch.uint8:
        return _WEIGHT, _four(parts)
    asymmetric = [x.get("symmetric") is False for x in _weights(parts.how)]
    if stored.dtype in (torch.int32, torch.int8) and asymmetric and all(asymmetric):
        parts.of(_ZERO, torch.int8, torch.int32, *FLOATS)
    if stored.dtype == torch.int32:
        return _WEIGHT, _Words(parts)
    if stored.dtype == torch.int8:
        return _WEIGHT, _integers(parts)
    return _WEIGHT, read_scaled(parts, _WEIGHT, _SCALE, _block(parts.how))


def _weights(how: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = how.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights


def _block(how: Mapping[str, Any]) -> tuple[int, int] | None:
    """The one size of blocks that is stated."""
    stated = {block_of(x.get("block_structure")) for x in _weights(how)} - {None}
    return stated.pop() if len(stated) == 1 else None


def _check(how: Mapping[str, Any]) -> str | None:
    return "a transform_config" if how.get("transform_config") else None


def _refuse(parts: Parts) -> NoReturn:
    shapes = ", ".join(f"{x} {list(t.shape)}" for x, t in parts.tensors.items())
    parts.refuse(
        f"stores {parts.stem!r} in shapes that do not belong together ({shapes})", ORIGINAL
    )


SCHEME = Scheme({_PACKED: _ALL, _SCALE: _ALL}, _read, FOR_ACTIVATIONS, _check)
