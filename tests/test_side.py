"""Sides as kernels are told of them: made once, alike however the side came about."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from domerge_fast import ops
from domerge_fast.algebra.described import FACTOR_DTYPES
from domerge_fast.algebra.side import Side, table
from domerge_fast.backends.layout import GAP, placed
from domerge_fast.storage.shelf import Shelf

RANKS = (2, 1, 3)
D = 5
every_dtype = pytest.mark.parametrize("dtype", FACTOR_DTYPES)


def matrices(dtype: torch.dtype = torch.float32, d: int = D) -> list[Tensor]:
    """Stored factors [r_i, d] of three adapters."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(r, d, generator=generator).to(dtype) for r in RANKS]


def told(side: Side) -> tuple[bytes, bytes, bytes]:
    return table([side])[:3]


@every_dtype
@pytest.mark.parametrize("d", [D, 1])
def test_of_stored_matrices_kernels_are_told_what_the_blocks_say(dtype, d):
    scales = (1.0, 2.0, -0.0)
    a = matrices(dtype, d)
    assert told(Side.of(a, scales, RANKS, d)) == told(Side(a, scales))
    b = [x.T.contiguous() for x in matrices(dtype, d)]
    lazy, plain = Side.of(b, scales, RANKS, d, transposed=True), Side([x.T for x in b], scales)
    assert lazy.in_columns == plain.in_columns
    assert all(map(torch.equal, lazy.blocks, plain.blocks))
    if d > 1:
        assert told(lazy) == told(plain)
    assert torch.equal(ops.gram([lazy])[0], ops.gram([plain])[0])


@every_dtype
@pytest.mark.parametrize("transposed", [False, True])
def test_of_rows_of_one_matrix_kernels_are_told_what_the_blocks_say(dtype, transposed):
    x = torch.cat(matrices(dtype))
    x = x.T.contiguous().T if transposed else x
    side = Side.split(x, RANKS)
    plain = Side(x.split_with_sizes(list(RANKS)), (1.0,) * 3)
    assert told(side) == told(plain)
    assert all(map(torch.equal, side.blocks, plain.blocks))


def test_rows_of_a_matrix_with_gaps_are_copied():
    x = torch.cat(matrices(d=2 * D))[:, ::2]
    plain = Side([block.contiguous() for block in x.split(list(RANKS))], (1.0,) * 3)
    assert torch.equal(ops.gram([Side.split(x, RANKS)])[0], ops.gram([plain])[0])


def test_other_scales_leave_the_blocks_where_they_are():
    side = Side.of(matrices(), (1.0, 1.0, 1.0), RANKS, D)
    scales = (0.0, -0.0, 3.0)
    scaled = side.scaled(scales)
    assert told(scaled) == told(Side(side.blocks, scales))
    assert told(scaled)[0] == told(side)[0]
    assert struct.unpack("=4q4q4q", told(scaled)[2])[7] != 0  # the sign of -0.0


def test_sides_alike_share_their_layout():
    one, other = (Side.of(matrices(), (1.0,) * 3, RANKS, D) for _ in range(2))
    assert one.layout is other.layout
    assert one.scaled((2.0,) * 3).layout is not one.layout


def test_copies_are_made_once():
    side = Side([x.double() for x in matrices()], (1.0,) * 3)
    assert side.ready() is side.ready()
    assert side.ready().layout.dtypes == (torch.float32,) * 3
    assert side.ready(rows_only=True).ready() is side.ready(rows_only=True)


def test_results_share_an_allocation_without_touching():
    shapes = [(3, 5), (2, 2), (3, 5), (7,)]
    results, begins = placed(shapes, torch.float64)
    for k, (x, shape) in enumerate(zip(results, shapes, strict=True)):
        assert x.shape == shape
        assert x.is_contiguous()
        x.fill_(k)
    assert [x.unique().tolist() for x in results] == [[0.0], [1.0], [2.0], [3.0]]
    assert begins.tolist() == [x.data_ptr() for x in results]
    assert all((at - begins[0]) % (8 * GAP) == 0 for at in begins)
    found, begins = placed([], torch.float64)
    assert (found, begins.tolist()) == ([], [])


def test_a_merge_keeps_no_more_of_a_result_than_it_holds(tmp_path, monkeypatch):
    """On the shelf, what shares the memory of a group is written alone."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shelf = Shelf(0)
    memory = torch.arange(1 << 16, dtype=torch.float32)
    for k in range(4):
        shelf.put(str(k), memory[k : k + 8], 32)
    assert shelf._file.seek(0, 2) < memory.nbytes
    assert torch.equal(shelf.take("3"), memory[3:11])
