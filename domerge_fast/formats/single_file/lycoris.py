"""What LyCORIS has besides LoRA as factors of a plain one, exactly: LoHa, LoKr, whole updates.

LoHa is the product of two matrices entry by entry, (w1_a w1_b) ∘ (w2_a w2_b): of rank r², with the
products of all pairs of rows as A, and of columns as B. LoKr is Kronecker's product of w1 and w2,
either stored whole or as w_a w_b:

    kron(w1_a w1_b, w2_a w2_b) = kron(w1_a, w2_a) kron(w1_b, w2_b)

where for one that is stored whole the unit matrix stands on its shorter side. A convolution's w_b
has its kernel in the second dimension, or in dimensions of its own, or is in Tucker's form with t
before it. Where such factors have more rows than the update has rank, and of an update that is
stored whole (`diff`), one of them is the unit matrix, and the other the update itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

from ...errors import AdapterError
from ...storage.lazy import LazyTensor, Turned
from ...storage.made import (
    ColumnPairs,
    Folded,
    Kronecker,
    Multiplied,
    RowPairs,
    Shaped,
    beside_unit,
    flat,
)
from ..peft.assemble import check_dtype
from .grammar import ALPHA, DIFF, KINDS, LOHA, LOKR

__all__ = ["factors", "is_dense", "is_one", "missing", "rank"]

_AGAIN = "save it again with the tool that trained it"
_CONVOLUTION = re.compile(
    r"(?:.*[._])?(?:(?:(?:down|up|input|output)_blocks|mid(?:dle)?_block)[._].*[._]"
    r"(?:conv[12]?|op|in_layers[._]2|out_layers[._]3)|input_blocks[._]0[._]0|conv_(?:in|out))"
)
"""Names of the U-Nets' convolutions of 3x3, whose kernel no shape tells where it is in the second
dimension. To the update that makes no difference, and to readers of a plain LoRA it does."""

Pair = tuple[LazyTensor, LazyTensor]  # A, B
Parts = Mapping[str, tuple[str, LazyTensor]]
"""By part: the key and the tensor."""


def is_one(parts: Collection[str]) -> bool:
    """Whether a module with these parts is one of these."""
    return not {*LOHA, *LOKR, DIFF}.isdisjoint(parts)


def missing(parts: Collection[str]) -> list[str]:
    """What such a module lacks."""
    if DIFF in parts:
        return []
    if not {*LOHA}.isdisjoint(parts):
        wanted = {*LOHA[:4], *(LOHA[4:] if {*LOHA[4:]} & {*parts} else ())}
        return sorted(wanted - {*parts})
    found: list[str] = []
    for name in ("lokr_w1", "lokr_w2"):
        lacking = {f"{name}_a", f"{name}_b"} - {*parts}
        if name not in parts and lacking:
            found += sorted(lacking) if len(lacking) == 1 else [name]
    return found


def rank(parts: Parts) -> int | None:
    """What alpha is over; None for what has no scale, which is stored whole: an update, or both
    matrices of a LoKr."""
    by = ("hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    shapes = (parts[part][1].shape for part in by if part in parts)
    return next((shape[0] if shape else 0 for shape in shapes), None)


def factors(adapter: str, module: str, parts: Parts) -> Pair:
    """A [R, n] and B [m, R], or of a convolution [R, in, k...] and [m, R, 1...]. AdapterError for
    parts that do not fit together."""
    tensors = {part: tensor for part, (_, tensor) in parts.items() if part != ALPHA}
    for part, tensor in tensors.items():
        check_dtype(adapter, module, repr(parts[part][0]), tensor.dtype)
    kind = KINDS[next(part for part in parts if part != ALPHA)]
    made = {"LoHa": _loha, "LoKr": _lokr, DIFF: _whole}[kind](tensors)
    if made is None:
        shapes = ", ".join(f"{part} {list(x.shape)}" for part, x in tensors.items())
        raise AdapterError(adapter, module, f"has parts that do not fit ({shapes})", _AGAIN)
    a, b = made
    if len(a.shape) == 2 and a.shape[1] % 9 == 0 and _CONVOLUTION.fullmatch(module):
        a = Shaped(a, (a.shape[0], a.shape[1] // 9, 3, 3))
    return a, Shaped(b, (*b.shape, *[1] * (len(a.shape) - 2)))


def _loha(tensors: Mapping[str, LazyTensor]) -> Pair | None:
    one = _half(tensors, "hada_w1", "hada_t1")
    two = _half(tensors, "hada_w2", "hada_t2")
    if not one or not two or (_outer(one) != _outer(two)):
        return None
    (a, b), (a2, b2) = one, two
    pair = RowPairs(a, a2), ColumnPairs(b, b2)
    return _thin(pair, Multiplied(((b, a), (b2, a2))))


def _lokr(tensors: Mapping[str, LazyTensor]) -> Pair | None:
    one = _side(tensors, "lokr_w1", "")
    two = _side(tensors, "lokr_w2", "lokr_t2")
    if not one or not two or len(one[0].shape) != 2:
        return None
    (a, b), (a2, b2) = one, two
    pair = Kronecker(a, a2), Kronecker(b, b2)
    whole = (Multiplied(((y, x),)) for x, y in (one, two))
    return _thin(pair, Kronecker(*whole))


def _whole(tensors: Mapping[str, LazyTensor]) -> Pair | None:
    return beside_unit(tensors[DIFF]) if _is_matrix(tensors[DIFF]) else None


def _side(tensors: Mapping[str, LazyTensor], name: str, middle: str) -> Pair | None:
    """A and B of one of LoKr's two matrices."""
    if name not in tensors:
        return _half(tensors, name, middle)
    alone = not {f"{name}_a", f"{name}_b", middle} & {*tensors}
    return beside_unit(tensors[name]) if alone and _is_matrix(tensors[name]) else None


def _half(tensors: Mapping[str, LazyTensor], name: str, middle: str) -> Pair | None:
    """A and B whose product is one of the two matrices; None where they do not fit."""
    b, a = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if not (_is_matrix(a) and _is_matrix(b)) or math.prod(b.shape[2:]) != 1:
        return None
    b = flat(b)
    if middle in tensors:
        mid, b = tensors[middle], Turned(b)
        if not _is_matrix(mid) or math.prod(a.shape[2:]) != 1 or mid.shape[1] != a.shape[0]:
            return None
        a = Folded(mid, a)
    return (a, b) if a.shape[0] == b.shape[1] else None


def _is_matrix(x: LazyTensor) -> bool:
    return len(x.shape) >= 2 and 0 not in x.shape


def _outer(pair: Pair) -> tuple[int, ...]:
    return pair[1].shape[0], *pair[0].shape[1:]


def _thin(pair: Pair, whole: LazyTensor) -> Pair:
    """The factors, unless they have more rows than the update can have rank."""
    m, n = whole.shape[0], math.prod(whole.shape[1:])
    return pair if pair[0].shape[0] <= min(m, n) else beside_unit(whole)


def is_dense(pair: Pair) -> bool:
    """Whether factors are the update beside the unit matrix, or as large."""
    (rank, *inputs), (m, *_) = pair[0].shape, pair[1].shape
    return rank >= min(m, math.prod(inputs))
