"""bitsandbytes: 4 bits (NF4, FP4) with a scale for every block, which may be quantized itself; and
8 bits with a scale for every row (LLM.int8).

4 bits, of the flattened weight, the first of two numbers in the upper half of a byte:
W_i = map[q_i] s[i // block], where s is stored, or s_j = map2[p_j] t[j // block2] + offset.
8 bits: W = s q / 127. Sources: arXiv 2305.14314 and 2208.07339; the tensors that bitsandbytes 0.50
saves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ....storage import json_file
from ..checkpoint import FLOATS, ORIGINAL
from .dequantized import Dequantized, Parts, Scheme
from .scaled import Scaled

__all__ = ["SCHEME"]

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_IN_FOUR = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_MOST_STATE = 1 << 16
_ROW_MAJOR = 0


@dataclass(frozen=True)
class _State:
    """shape: of the weight; block: weights with one scale; nested: scales with one scale of their
    own, None where they are stored as they are; offset: that is added to each scale then."""

    shape: tuple[int, ...]
    block: int
    nested: int | None
    offset: float


class _Blocks(Dequantized):
    def __init__(self, parts: Parts, kind: str) -> None:
        state = _state(parts, kind)
        size = math.prod(state.shape)
        blocks = -(-size // state.block)
        data = parts.of("", torch.uint8, *FLOATS)
        if data.nbytes != -(-size // 2):
            parts.of("", torch.uint8, shape=(-(-size // 2), 1))
        super().__init__(data, state.shape, parts.written)
        self._state, self._data = state, data
        self._map = parts.of(".quant_map", torch.float32, shape=(16,))
        if state.nested is None:
            self._scales = parts.of(".absmax", *FLOATS, shape=(blocks,))
            return
        self._scales = parts.of(".absmax", torch.uint8, shape=(blocks,))
        self._map_of_scales = parts.of(".nested_quant_map", torch.float32, shape=(256,))
        of_scales = (-(-blocks // state.nested),)
        self._of_scales = parts.of(".nested_absmax", torch.float32, shape=of_scales)

    def rows(self, start: int, stop: int) -> Tensor:
        row, block = math.prod(self.shape[1:]), self._state.block
        first, last = start * row // block, -(-stop * row // block)
        begin, end = first * block // 2, min(last * block // 2, self._data.nbytes)
        data = self._data.file.read(self._data.begin + begin, torch.uint8, (end - begin,))
        numbers = self._map.read()
        pairs = torch.stack([numbers[:, None].expand(16, 16), numbers.expand(16, 16)], -1)
        made = pairs.reshape(256, 2).index_select(0, data.int()).flatten()
        missing = (last - first) * block - len(made)
        made = torch.nn.functional.pad(made, (0, missing)).reshape(-1, block)
        made *= self._scale(first, last)[:, None]
        skipped = start * row - first * block
        return made.flatten()[skipped : skipped + (stop - start) * row].reshape(-1, *self.shape[1:])

    def _scale(self, first: int, last: int) -> Tensor:
        """Of blocks, in float32."""
        scales, nested = self._scales.rows(first, last), self._state.nested
        if nested is None:
            return scales.float()
        found = self._map_of_scales.read()[scales.int()]
        found *= self._of_scales.read()[torch.arange(first, last) // nested]
        return found + self._state.offset


def _state(parts: Parts, kind: str) -> _State:
    """What is stored as JSON. OptionError where it is not what bitsandbytes writes."""
    stored = parts.of(_STATE + kind, torch.uint8)
    if stored.nbytes > _MOST_STATE or not stored.nbytes:
        _refuse_state(parts, kind)
    try:
        fields = json_file.parse(bytes(stored.read().tolist()))
    except json_file.BadJson:
        _refuse_state(parts, kind)
    if not isinstance(fields, dict) or fields.get("quant_type") != kind:
        _refuse_state(parts, kind)
    shape, block = fields.get("shape"), fields.get("blocksize", 0)
    nested, offset = fields.get("nested_blocksize"), fields.get("nested_offset", 0.0)
    sizes = shape if isinstance(shape, list) and shape else [0]
    whole = [*sizes, block] if nested is None else [*sizes, block, nested]
    if {*map(type, whole)} != {int} or min(whole) < 1 or block % 2:
        _refuse_state(parts, kind)
    if not isinstance(offset, (int, float)) or not math.isfinite(offset):
        _refuse_state(parts, kind)
    return _State(tuple(sizes), block, nested, float(offset))


def _refuse_state(parts: Parts, kind: str) -> NoReturn:
    parts.refuse(f"has a {parts.stem + _STATE + kind!r} that does not describe a weight")


def _eight(parts: Parts) -> Dequantized:
    data = parts.of(".weight", torch.int8)
    if len(data.shape) != 2:
        parts.of(".weight", torch.int8, shape=(0, 0))
    if ".weight_format" in parts:
        layout = parts.of(".weight_format", torch.uint8, shape=()).read().item()
        if layout != _ROW_MAJOR:
            problem = f"stores {parts.stem + '.weight'!r} in a layout of one kind of GPU"
            parts.refuse(problem, ORIGINAL)
    scales = parts.of(".SCB", *FLOATS, shape=data.shape[:1])
    return Scaled(data, scales, (1, data.shape[1]), parts.written, divisor=127.0)


def _read(parts: Parts) -> tuple[str, Dequantized]:
    for kind in _KINDS:
        if _STATE + kind in parts:
            return "", _Blocks(parts, kind)
    return ".weight", _eight(parts)


SCHEME = Scheme(
    {
        **{_STATE + kind: ("", *_IN_FOUR, _STATE + kind) for kind in _KINDS},
        ".SCB": (".weight", ".SCB", ".weight_format"),
    },
    _read,
)
