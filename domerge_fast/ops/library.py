"""The ops as torch.ops.domerge_fast.*, for those who compile or trace functions around them.

Sides travel as flat lists: `blocks` (every block of every side), `counts` (blocks a side) and
`scales` (one a block). Fakes give the shapes of the results, so that the ops work under
torch.compile and FakeTensor, and every result has memory of its own. The package itself calls the
functions in the files beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, islice

import torch
from torch import Tensor

from ..algebra.entry_rules import HIGH_BITS, LOW_BITS, Draw, Election, Trim
from ..algebra.side import Side
from ..backends.descent import STATS
from ..backends.factor_descent import FACTOR_STATS
from .apply import apply
from .apply_decouple import apply_decouple
from .block_products import block_products
from .entries import entry_counts, entry_merge, entry_sums
from .gram import block_gram, gram
from .largest import block_largest, largest
from .orthogonalize import orthogonalize, orthogonalize_factors

__all__: list[str] = []

NAMESPACE = "domerge_fast"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
SIDES = "Tensor[] blocks, int[] counts, float[] scales"

Flat = tuple[list[Tensor], list[int], list[float]]


def flatten(sides: Sequence[Side]) -> Flat:
    return (
        [block for x in sides for block in x.blocks],
        [len(x.blocks) for x in sides],
        [scale for x in sides for scale in x.scales],
    )


def unflatten(
    blocks: Sequence[Tensor], counts: Sequence[int], scales: Sequence[float]
) -> list[Side]:
    pairs = iter(zip(blocks, scales, strict=True))
    parts = [tuple(zip(*islice(pairs, count))) for count in counts]
    return [Side(*part) for part in parts]


def _define(name: str, schema: str, run: Callable, fake: Callable) -> None:
    """Register domerge_fast::<name> for every device."""
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)


def _apart(results: Iterable[Tensor]) -> list[Tensor]:
    """The results, of which those that share memory are copied."""
    seen: set[int] = set()
    found = []
    for x in results:
        memory = x.untyped_storage().data_ptr()
        found.append(x.clone() if memory in seen else x)
        seen.add(memory)
    return found


def _split(values: Sequence, counts: Sequence[int]) -> list[tuple]:
    ends = list(accumulate(counts))
    return [tuple(values[end - count : end]) for end, count in zip(ends, counts)]


def _gram(blocks, counts, scales, dtype, backend):
    return _apart(gram(unflatten(blocks, counts, scales), dtype=dtype, backend=backend))


def _fake_gram(blocks, counts, scales, dtype, backend):
    sides = unflatten(blocks, counts, scales)
    return [x.blocks[0].new_empty(x.rank, x.rank, dtype=dtype) for x in sides]


def _block_gram(blocks, counts, scales, backend):
    return _apart(block_gram(unflatten(blocks, counts, scales), backend=backend))


def _fake_block_gram(blocks, counts, scales, backend):
    sides = unflatten(blocks, counts, scales)
    sizes = [sum(r * r for r in x.ranks) for x in sides]
    return [x.blocks[0].new_empty(n, dtype=torch.float64) for x, n in zip(sides, sizes)]


def _block_products(x, y, ranks, backend):
    return block_products(x, y, ranks, backend=backend)


def _fake_block_products(x, y, ranks, backend):
    return x[0].new_empty(len(x), len(ranks), len(ranks), dtype=torch.float64)


def _orthogonalize(grams, ranks, counts, penalty, gamma, steps, tol, backend):
    rule = {"penalty": penalty, "gamma": gamma, "steps": steps, "tol": tol}
    c, stats = orthogonalize(grams, _split(ranks, counts), backend=backend, **rule)
    return [*_apart(c), stats]


def _fake_orthogonalize(grams, ranks, counts, penalty, gamma, steps, tol, backend):
    stats = grams[0].new_empty(len(grams), len(STATS), dtype=torch.float64)
    return [*(torch.empty_like(g) for g in grams), stats]


def _orthogonalize_factors(blocks, counts, scales, gamma, steps, tol, backend):
    sides = unflatten(blocks, counts, scales)
    x, stats = orthogonalize_factors(sides, gamma=gamma, steps=steps, tol=tol, backend=backend)
    return [*_apart(x), stats]


def _fake_orthogonalize_factors(blocks, counts, scales, gamma, steps, tol, backend):
    sides = unflatten(blocks, counts, scales)
    stats = blocks[0].new_empty(len(sides), len(FACTOR_STATS), dtype=torch.float64)
    return [*(x.blocks[0].new_empty(x.rank, x.d, dtype=torch.float32) for x in sides), stats]


def _apply(coefficients, blocks, counts, scales, out_dtype, backend):
    sides = unflatten(blocks, counts, scales)
    return _apart(apply(coefficients, sides, out_dtype, backend=backend))


def _fake_apply(coefficients, blocks, counts, scales, out_dtype, backend):
    results = []
    for c, x in zip(coefficients, unflatten(blocks, counts, scales)):
        rows = x.rank if c is None else c.shape[0]
        shape = (x.d, rows) if x.in_columns else (rows, x.d)
        result = x.blocks[0].new_empty(shape, dtype=out_dtype)
        results.append(result.T if x.in_columns else result)
    return results


def _apply_decouple(
    coefficients, x, counts, scales, grams, omegas, scale, out_dtype, full, backend
):
    a, norms = apply_decouple(
        coefficients,
        unflatten(x, counts, scales),
        grams,
        _split(omegas, counts),
        scale,
        out_dtype,
        full=full or None,
        backend=backend,
    )
    return _apart([*a, *norms])


def _fake_apply_decouple(
    coefficients, x, counts, scales, grams, omegas, scale, out_dtype, full, backend
):
    sides = unflatten(x, counts, scales)
    a = [p.blocks[0].new_empty(p.rank, p.d, dtype=out_dtype) for p in sides]
    return [*a, *(p.blocks[0].new_empty(len(p.ranks), dtype=torch.float64) for p in sides)]


def _largest(tensors, backend):
    return largest(tensors, backend=backend)


def _fake_largest(tensors, backend):
    return tensors[0].new_empty(len(tensors), dtype=torch.float64)


def _block_largest(blocks, counts, scales, backend):
    return block_largest(unflatten(blocks, counts, scales), backend=backend)


def _fake_block_largest(blocks, counts, scales, backend):
    return blocks[0].new_empty(len(blocks), dtype=torch.float64)


def _updates(
    a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float]
) -> tuple[Side, Side]:
    return Side(tuple(a), (1.0,) * len(a)), Side(tuple(b), tuple(scales))


def _rule(
    numbers: Sequence[float], rescales: Sequence[bool], seed: int, module: int, adapters: list[int]
) -> tuple[list[Trim], Draw]:
    rows = zip(*[iter(numbers)] * 5)
    trims = [
        Trim(low, high, keep, spread, gain, rescale)
        for (low, high, keep, spread, gain), rescale in zip(rows, rescales, strict=True)
    ]
    return trims, Draw(seed, module, tuple(adapters))


def _entry_counts(a, b, scales, prefixes, backend):
    return entry_counts(*_updates(a, b, scales), prefixes or None, backend=backend)


def _fake_entry_counts(a, b, scales, prefixes, backend):
    bins = 1 << (LOW_BITS if prefixes else HIGH_BITS)
    return a[0].new_empty(len(a), bins, dtype=torch.int64)


def _entry_sums(a, b, scales, *rest):
    *rule, backend = rest
    return entry_sums(*_updates(a, b, scales), *_rule(*rule), backend=backend)


def _fake_entry_sums(a, b, scales, *rest):
    return a[0].new_empty(len(a), 2, dtype=torch.float64)


def _entry_merge(a, b, scales, numbers, rescales, seed, module, adapters, weights, *rest):
    sign, weighted, mean, scale, backend = rest
    trims, draw = _rule(numbers, rescales, seed, module, adapters)
    election = Election(sign, weighted, mean)
    sides = _updates(a, b, scales)
    return entry_merge(*sides, trims, weights, election, draw, scale, backend=backend)


def _fake_entry_merge(a, b, scales, *rest):
    return a[0].new_empty(b[0].shape[1], a[0].shape[1], dtype=torch.float32)


_FACTORS = "Tensor[] a, Tensor[] b, float[] scales"
_RULE = "float[] trims, bool[] rescales, int seed, int module, int[] adapters"

_define("gram", f"({SIDES}, ScalarType dtype, str backend) -> Tensor[]", _gram, _fake_gram)
_define("block_gram", f"({SIDES}, str backend) -> Tensor[]", _block_gram, _fake_block_gram)
_define(
    "block_products",
    "(Tensor[] x, Tensor[] y, int[] ranks, str backend) -> Tensor",
    _block_products,
    _fake_block_products,
)
_define(
    "orthogonalize",
    "(Tensor[] grams, int[] ranks, int[] counts, str penalty, float gamma, int steps, float tol, "
    "str backend) -> Tensor[]",
    _orthogonalize,
    _fake_orthogonalize,
)
_define(
    "orthogonalize_factors",
    f"({SIDES}, float gamma, int steps, float tol, str backend) -> Tensor[]",
    _orthogonalize_factors,
    _fake_orthogonalize_factors,
)
_define(
    "apply",
    f"(Tensor?[] coefficients, {SIDES}, ScalarType out_dtype, str backend) -> Tensor[]",
    _apply,
    _fake_apply,
)
_define(
    "apply_decouple",
    f"(Tensor?[] coefficients, {SIDES}, Tensor[] grams, float[] omegas, float scale, "
    "ScalarType out_dtype, Tensor[] full, str backend) -> Tensor[]",
    _apply_decouple,
    _fake_apply_decouple,
)
_define("largest", "(Tensor[] tensors, str backend) -> Tensor", _largest, _fake_largest)
_define("block_largest", f"({SIDES}, str backend) -> Tensor", _block_largest, _fake_block_largest)
_define(
    "entry_counts",
    f"({_FACTORS}, int[] prefixes, str backend) -> Tensor",
    _entry_counts,
    _fake_entry_counts,
)
_define(
    "entry_sums", f"({_FACTORS}, {_RULE}, str backend) -> Tensor", _entry_sums, _fake_entry_sums
)
_define(
    "entry_merge",
    f"({_FACTORS}, {_RULE}, float[] weights, str sign, bool weighted, str mean, float scale, "
    "str backend) -> Tensor",
    _entry_merge,
    _fake_entry_merge,
)
