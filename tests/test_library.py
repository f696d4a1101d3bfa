"""The ops as torch.library entries: schemas, fakes, and functions compiled around them."""

from __future__ import annotations

import pytest
import torch
from support.close import assert_close
from support.on_device import FAST, move, split
from support.shapes import CASES, SIDES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from domerge_fast.backends import registry
from domerge_fast.ops import library

NAMES = ("odd d", "rank 1 before 64", "one adapter")
OPS = (
    "gram",
    "block_gram",
    "block_products",
    "orthogonalize",
    "orthogonalize_factors",
    "apply",
    "apply_decouple",
    "largest",
    "block_largest",
    "entry_counts",
    "entry_sums",
    "entry_merge",
)

every_op = pytest.mark.parametrize("op", OPS)
every_backend = pytest.mark.parametrize("backend", FAST)
every_layout = pytest.mark.parametrize("layout", SIDES)


def entry(op: str):
    return getattr(torch.ops.domerge_fast, op).default


def arguments(op: str, layout: str, backend: str) -> tuple:
    """Three modules as the flat lists that an op is registered with, on the backend's device."""
    backend, device = split(backend)
    problems = [SIDES[layout](CASES[name]) for name in NAMES]
    flat = library.flatten(problems)
    ranks = [rank for p in problems for rank in p.ranks]
    c = [None, torch.ones(3, problems[1].rank), torch.eye(4)]
    packed = [torch.eye(sum(r * r for r in p.ranks)).double()[0] for p in problems]
    case = CASES[NAMES[0]]
    factors = ([a.float() for a in case.a], [b.float().T for b in case.b], case.scalings)
    count = len(case.a)
    rule = ([0.0, 1.0, 0.5, 0.0, 1.0] * count, [True] * count, 1, 2, list(range(count)))
    found = {
        "gram": (*flat, torch.float64, backend),
        "block_gram": (*flat, backend),
        "block_products": ([torch.ones(5, 5)] * 2, [torch.eye(5)] * 2, [2, 3], backend),
        "orthogonalize": (
            [torch.eye(p.rank) + 0.1 for p in problems],
            *(ranks, flat[1], "frobenius", 1.0, 2, 0.0, backend),
        ),
        "orthogonalize_factors": (*flat, 1.0, 2, 0.0, backend),
        "apply": (c, *flat, torch.bfloat16, backend),
        "apply_decouple": (
            [None, torch.eye(65), None],
            *(*flat, packed, [0.5] * len(ranks), 1.0, torch.float16),
            [torch.eye(p.rank).double() for p in problems],
            backend,
        ),
        "largest": (flat[0], backend),
        "block_largest": (*flat, backend),
        "entry_counts": (*factors, [], backend),
        "entry_sums": (*factors, *rule, backend),
        "entry_merge": (*factors, *rule, [1.0] * count, "total", True, "count", 2.0, backend),
    }[op]
    return move(found, device)


def call(op: str, args: tuple) -> list[Tensor]:
    found = entry(op)(*args)
    return [found] if isinstance(found, Tensor) else found


def describe(tensors: list[Tensor]) -> list[tuple]:
    return [(x.shape, x.stride(), x.dtype, x.device) for x in tensors]


def test_every_op_is_registered():
    """All but those whose results depend on values in more than numbers."""
    assert {name for name in OPS if hasattr(torch.ops.domerge_fast, name)} == set(OPS)
    assert set(registry.OPS) - set(OPS) == {"truncate"}


@every_op
def test_opcheck(op):
    results = torch.library.opcheck(entry(op), arguments(op, "rows", "auto"))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


@every_backend
@every_layout
@every_op
def test_fake_results_have_the_shapes_strides_and_dtypes_of_real_ones(op, layout, backend):
    args = arguments(op, layout, backend)
    real = describe(call(op, args))
    with FakeTensorMode() as mode:
        fake_args = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args)
        fake = describe(call(op, fake_args))
    assert fake == real


@every_backend
@every_op
def test_inputs_are_neither_changed_nor_returned(op, backend):
    args = arguments(op, "rows", backend)
    inputs = torch.utils._pytree.tree_leaves(args)
    inputs = [x for x in inputs if isinstance(x, Tensor)]
    before = [x.clone() for x in inputs]
    results = call(op, args)
    assert all(map(torch.equal, inputs, before))
    memory = {x.untyped_storage().data_ptr() for x in inputs}
    owned = [x.untyped_storage().data_ptr() for x in results]
    assert memory.isdisjoint(owned)
    assert len(set(owned)) == len(owned)


@every_backend
def test_a_function_of_ops_compiles_whole(backend):
    blocks, counts, scales, *_, backend = arguments("gram", "columns", backend)

    def merge(blocks: list[Tensor]) -> list[Tensor]:
        grams = entry("gram")(blocks, counts, scales, torch.float32, backend)
        ranks = [3, 5, 2, 1, 64, 4]
        *c, _ = entry("orthogonalize")(grams, ranks, counts, "squared", 1.0, 3, 0.0, backend)
        moved = entry("apply")(list(c), blocks, counts, scales, torch.float32, backend)
        return [2 * x for x in moved]

    compiled = torch.compile(merge, backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(blocks), merge(blocks), strict=True):
        assert_close(one, other)
