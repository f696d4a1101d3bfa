"""The tables that launches on a GPU read (csrc/launches.h)."""

from __future__ import annotations

import struct
from array import array
from unittest.mock import Mock

import pytest
import torch
from support.shapes import CASES

from domerge_fast import _C
from domerge_fast.algebra.side import Side, table
from domerge_fast.backends.gpu import tables
from domerge_fast.backends.gpu.host import Gpu

CPU = torch.device("cpu")
SIZES = (16, 32, 64)


def described(problems: list[Side]) -> _C.LaunchTables:
    return tables.describe(problems).made


def rows(made: _C.LaunchTables, table: int) -> list:
    """Of a table, as lists."""
    return tables.upload(CPU, made)[table].tolist()


def results(sizes: list[int], dtype: torch.dtype = torch.float32) -> tuple[list[int], list[int]]:
    """Addresses of results that lie apart, and how far each is from the first, in elements."""
    places, at = [], 5
    for size in sizes:
        places.append(at)
        at += size + 3
    return [4096 + dtype.itemsize * x for x in places], [x - places[0] for x in places]


def side(ranks: tuple[int, ...], d: int, modules: int | None = None) -> Side:
    rank = sum(ranks)
    shape = (rank, d) if modules is None else (modules, rank, d)
    return Side.split(torch.ones(shape), ranks)


def test_a_table_finds_every_element():
    """Address, pitch and layout of each row, as a kernel reads them."""
    problems = [CASES["odd d"].rows(), CASES["rank 1 before 64"].columns()]
    table, _ = tables.describe(problems).uploaded()
    assert table.dtype == torch.float32
    blocks = [block for p in problems for block in p.blocks]
    for p, (first, rank, d, first_block, count, columns) in zip(
        problems, table.problems.tolist(), strict=True
    ):
        assert (rank, d, count, bool(columns)) == (p.rank, p.d, len(p.blocks), p.in_columns)
        stacked = torch.cat(p.blocks)
        for row, owner in enumerate(table.owner[first : first + rank].tolist()):
            assert first_block <= owner < first_block + count
            address, pitch, first_row, bits = table.blocks[owner].tolist()
            local = row - first_row
            step, stride = (pitch, 1) if columns else (1, pitch)
            elements = (address - blocks[owner].data_ptr()) // 4 + local * stride
            memory = blocks[owner].T if columns else blocks[owner]
            flat = memory.reshape(-1)
            assert torch.equal(flat[elements + step * torch.arange(d)], stacked[row])
            scale = p.scales[owner - first_block]
            assert torch.tensor(bits).view(torch.float64).item() == scale


@pytest.mark.parametrize(
    ("ranks", "d", "dtype", "even"),
    [
        ((16, 8), 64, torch.bfloat16, 8),
        ((16, 8), 64, torch.float32, 4),
        ((16, 4), 64, torch.bfloat16, 1),
        ((16, 8), 60, torch.bfloat16, 1),
        ((16, 8), 60, torch.float32, 4),
    ],
)
def test_reads_of_16_bytes_are_told_from_others(ranks, d, dtype, even):
    whole = torch.ones(sum(ranks), d, dtype=dtype)
    assert whole.data_ptr() % 16 == 0
    assert tables.describe([Side.split(whole, ranks)]).even == even
    assert tables.describe([Side.split(whole[1:], (ranks[0] - 1, ranks[1]))]).even == 1


@pytest.mark.parametrize("chunk", [64, 1000])
@pytest.mark.parametrize("size", [16, 64])
def test_gram_tiles_cover_every_lower_tile_once(size, chunk):
    problems = [CASES[name].rows() for name in ("R above 128", "odd d", "one row")]
    out, offsets = results([p.rank**2 for p in problems])
    made = described(problems)
    ((found, tiles_at, sums_at, parts),) = made.gram([size], out, chunk)
    tiles, sums = rows(made, tiles_at), rows(made, sums_at)
    assert found == size
    covered = [(k, i, j, c) for k, i, j, begin, end, *_ in tiles for c in range(begin, end)]
    heights = [-(-p.rank // size) for p in problems]
    expected = {
        (k, i, j, column)
        for k, p in enumerate(problems)
        for i in range(heights[k])
        for j in range(i + 1)
        for column in range(p.d)
    }
    assert set(covered) == expected
    assert len(covered) == len(expected)
    assert all(t[6] == offsets[t[0]] for t in tiles)
    assert sorted(t[5] for t in tiles if t[5] >= 0) == list(range(parts))
    for k, i, j, first, number, offset in sums:
        of_parts = [t for n in range(first, first + number) for t in tiles if t[5] == n]
        begins = [t[3] for t in of_parts]
        assert begins == sorted(begins)
        assert all(t[:3] == [k, i, j] for t in of_parts)
        assert offset == offsets[k]
    widths = [t[4] - t[3] for t in tiles]
    assert widths == sorted(widths, reverse=True)


def test_problems_are_served_by_the_smallest_size_that_holds_them():
    problems = [side((16,), 8), side((9, 8), 8), side((300,), 8), side((1,), 8)]
    out, _ = results([p.rank**2 for p in problems])
    made = described(problems)
    plans = made.gram((16, 32, 128), out, 4096)
    served = {size: {t[0] for t in rows(made, tiles)} for size, tiles, *_ in plans}
    assert served == {16: {0, 3}, 32: {1}, 128: {2}}


def test_own_grams_follow_each_other_and_the_costly_come_first():
    problems = [side((2, 3), 10), side((4,), 10, 2), side((1, 5), 20)]
    out, offsets = results([13, 16, 16, 26], torch.float64)
    made = described(problems)
    found = rows(made, made.block_gram(out))
    expected = [(0, 0, 2, 0), (0, 1, 3, 4), (1, 2, 4, 0), (2, 3, 4, 0), (3, 4, 1, 0), (3, 5, 5, 1)]
    assert sorted(map(tuple, found)) == [(p, b, r, offsets[p] + x) for p, b, r, x in expected]
    costs = [(10, 10, 10, 20)[p] * r * r for p, _, r, _ in found]
    assert costs == sorted(costs, reverse=True)


def test_descents_know_where_their_adapters_begin():
    ranks, counts = [(2, 3), (16, 1, 4), (7,)], [1, 2, 1]
    out, offsets = results([25, 441, 441, 49])
    made = _C.LaunchTables()
    starts_at, plans = made.orthogonalize(SIZES, [100, 200, 300, 400], out, ranks, counts)
    starts = rows(made, starts_at)
    found = {size: (rows(made, work), adapters) for size, work, adapters in plans}
    assert {size: most for size, (_, most) in found.items()} == {16: 2, 32: 3}
    every = {row[5]: row for own, _ in found.values() for row in own}
    sides = [0, 1, 1, 2]
    for k, (address, rank, adapters, first, offset, _) in every.items():
        own = ranks[sides[k]]
        assert (address, rank, adapters, offset) == (
            100 * (k + 1),
            sum(own),
            len(own),
            offsets[k],
        )
        assert starts[first : first + adapters + 1] == [sum(own[:i]) for i in range(len(own) + 1)]
    assert sorted(every) == [0, 1, 2, 3]


def test_tiles_of_products_cover_every_result_once():
    problems = [side((40,), 300), side((5, 6), 1, 2), side((20,), 128)]
    heights, counts = [40, 11, 3], [1, 2, 1]
    out, offsets = results([12000, 11, 11, 384])
    made = described(problems)
    made.coefficients([0, 32, 64, 0], heights, counts)
    work, plans = made.apply(SIZES, (64, 128, 100), out, 4)
    rows_of = [40, 11, 11, 3]
    expected = [[0, 40, offsets[0]], [32, 11, offsets[1]], [64, 11, offsets[2]], [0, 3, offsets[3]]]
    assert rows(made, work) == expected
    served = {}
    for size, tiles in plans:
        width = dict(zip(SIZES, (64, 128, 100)))[size]
        found = rows(made, tiles)
        members = {k for k, *_ in found}
        served[size] = members
        assert found == [
            [k, row, column]
            for k in sorted(members)
            for row in range(0, rows_of[k], size)
            for column in range(0, [300, 1, 1, 128][k], width)
        ]
    assert served == {16: {1, 2, 3}, 64: {0}}


def test_parts_are_read_in_place_of_what_they_are_of():
    problems = [side((40,), 30), side((5, 6), 30, 2)]
    made = described(problems)
    made.coefficients([0, 4096, 8192], [40, 33], [1, 2])
    asked: list[tuple[int, int]] = []

    def numbers(height: int, rank: int) -> int:
        asked.append((height, rank))
        return height * rank

    assert made.part_numbers(numbers) == 2 * 368  # 363, from multiples of 16 on
    assert asked == [(33, 11)]
    tiles, work = made.split(1 << 20, 16)
    out, _ = results([1200, 990, 990])
    of_products, _ = made.apply(SIZES, (64, 64, 64), out, 4)
    assert rows(made, tiles) == [[k, row] for k in (1, 2) for row in (0, 16, 32)]
    parts = [1 << 20, (1 << 20) + 4 * 368]
    assert rows(made, work) == [[0, 40, 0], [4096, 33, parts[0]], [8192, 33, parts[1]]]
    assert [row[0] for row in rows(made, of_products)] == [0, *parts]


def test_roots_begin_at_aligned_places_and_the_large_are_left_out():
    made = described([side((5, 300), 30), side((7,), 30, 2)])
    work, places, total = made.roots([1000, 9_000_000, 10_000_000], lambda r: r * r, 256)
    sizes = [32, 90000, 64, 64]  # from multiples of 16 on
    begins = [sum(sizes[:k]) for k in range(4)]
    assert (rows(made, places), total) == (begins, sum(sizes))
    addresses = [1000, 1000 + 8 * 25, 9_000_000, 10_000_000]
    expected = zip(addresses, [5, 0, 7, 7], begins)
    assert rows(made, work) == [list(row) for row in expected]


def test_slots_of_decoupled_results():
    problems = [side((5, 6), 300, 2), side((20,), 64)]
    out, offsets = results([3300, 3300, 1280], torch.bfloat16)
    made = described(problems)
    made.coefficients([8, 16, 24], [11, 20], [2, 1])
    given = (64, 128, 100), out, 2, [(0.25, -0.75), (1.0,)], [2, 1]
    work, weights, slots, plans = made.apply_decouple(SIZES, *given)
    assert rows(made, work) == [[at, x] for at, x in zip((8, 16, 24), offsets)]
    found = struct.unpack("=5d", struct.pack("=5q", *rows(made, weights)))
    assert found == (0.25, -0.75, 0.25, -0.75, 1.0)
    assert slots == 5
    by_size = {size: (rows(made, tiles), rank) for size, tiles, rank in plans}
    assert by_size == {
        16: ([[k, 64 * slot, slot] for k in (0, 1) for slot in range(5)], 11),
        32: ([[2, 0, 0]], 20),
    }


def test_stretches_of_tensors_by_dtype():
    made = _C.LaunchTables()
    plans = made.largest([1000, 2000, 3000], [10, 4, 5], [1, 0, 1], [4, 2, 2], 4)
    assert {code: rows(made, tiles) for code, tiles in plans} == {
        0: [[1, 2000, 4]],
        1: [[0, 1000, 4], [0, 1008, 4], [0, 1016, 2], [2, 3000, 4], [2, 3008, 1]],
    }


def test_stretches_of_blocks():
    x, y = torch.ones(2, 5, 7), torch.ones(9, 3).bfloat16().T
    problems = [Side.split(x, (2, 3)), Side.split(y, (1, 2))]
    assert problems[0].is_dense
    assert not problems[1].is_dense  # the rows of an adapter among those of others
    made = _C.LaunchTables()
    ((code, tiles),) = made.block_largest(*table(problems[:1])[:3], [4, 2, 2], 8)
    at = [x.data_ptr() + 4 * 7 * row for row in (0, 2, 5, 7)]
    sizes = [14, 21, 14, 21]
    assert code == 0
    assert rows(made, tiles) == [
        [k, at[k] + 4 * first, min(8, sizes[k] - first)]
        for k in range(4)
        for first in range(0, sizes[k], 8)
    ]


def test_tables_begin_at_16_bytes_and_keep_their_shapes():
    made = _C.LaunchTables()
    given = [([1, 2, 3], 0), ([4, 5, 6], 3), ([], 2), ([7], 0)]
    tables_of = [made.add(*own) for own in given]
    found = tables.upload(CPU, made)
    assert [found[k].tolist() for k in tables_of] == [[1, 2, 3], [[4, 5, 6]], [], [7]]
    assert [x.shape for x in found] == [(3,), (1, 3), (0, 2), (1,)]
    assert all((x.data_ptr() - found[0].data_ptr()) % 16 == 0 for x in found)


def test_tables_that_are_read_cannot_become_more():
    made = _C.LaunchTables()
    assert made.largest_rank == 0
    assert tables.upload(CPU, made) == []
    made.add([1, 2], 0)
    (found,) = tables.upload(CPU, made)
    with pytest.raises(RuntimeError, match="more"):
        made.add([3], 0)
    del made
    assert found.tolist() == [1, 2]


@pytest.mark.parametrize("values", [array("i", [1, 2]), array("f", [1, 2])])
def test_numbers_of_other_sizes_are_refused(values):
    with pytest.raises(TypeError):
        _C.LaunchTables().add(values, 0)


def test_the_largest_of_blocks_whatever_lies_beside(monkeypatch):
    """Dense sides of many modules are read as they are; others become so."""
    monkeypatch.setattr(Side, "blocks", property(blocks := Mock(side_effect=Side.blocks.fget)))
    whole = [Side.of(list(torch.ones(6, 3, 5)), (1.0,) * 2, (3, 3), 5, count=3)]
    moved = Side([torch.ones(3, 5), torch.ones(2, 5)], (1.0, 1.0))
    gaps = Side([torch.ones(4, 9)[:, :5]], (1.0,))
    seen: list[list[list[int]]] = []

    class Kernels:
        def largest(self, dtype, tiles, tops):
            seen.append(tiles.tolist())

    gpu = Gpu(Kernels)
    assert gpu.block_largest(whole).shape == (6,)
    assert not blocks.called
    assert gpu.block_largest([*whole, moved, gaps]).shape == (9,)
    assert [row[2] for row in seen[-1]] == [15] * 7 + [10, 20]
    assert {*(call.args[0] for call in blocks.call_args_list)}.isdisjoint(whole)


def test_numbers_that_do_not_agree_are_refused():
    made = _C.LaunchTables()
    with pytest.raises(ValueError, match="address"):
        made.describe(b"\0" * 8, b"\0" * 32, b"\0" * 64, 4)
    with pytest.raises(ValueError, match="block"):
        _C.LaunchTables().describe(b"\0" * 8, b"\0" * 32, b"\0" * 32, 4)
    made = described([side((5,), 30)])
    with pytest.raises(ValueError, match="C"):
        made.coefficients([0, 0], [5], [1])
