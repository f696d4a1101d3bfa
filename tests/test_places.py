"""Where matrices lie, asked in C or one by one: the same is said."""

import struct

import pytest
import torch
from torch import Tensor

from domerge_fast import _C
from domerge_fast.algebra.described import starts
from domerge_fast.storage import buffers
from domerge_fast.storage.buffers import InTurn, Lying, are_row_major, as_tensor, places, spread


@pytest.fixture(params=["in C", "one by one"], autouse=True)
def way(request, monkeypatch):
    if request.param == "one by one":
        monkeypatch.setattr(buffers, "EXCHANGE", None)
    elif buffers.EXCHANGE is None:
        pytest.skip("this torch does not tell it in C")


def alike() -> list[Tensor]:
    """Of two modules: a matrix of a file's rows, one of 16 bits, and one that is trained."""
    return [
        x
        for _ in range(2)
        for x in (
            torch.ones(8, 4)[2:5],
            torch.ones(2, 6, dtype=torch.bfloat16),
            torch.nn.Parameter(torch.ones(1, 3)),
        )
    ]


def test_addresses_of_matrices_that_are_alike_module_by_module():
    given = alike()
    found = places(given, 3)
    assert found
    assert struct.unpack("=6Q", found) == tuple(x.data_ptr() for x in given)
    assert are_row_major(given)


def test_columns_at_some_positions_are_as_one_list():
    columns = [[torch.ones(2, 3) for _ in range(4)], [torch.ones(5, 3) for _ in range(4)]]
    given = InTurn(columns, struct.pack("=3q", 3, 0, 2))
    expected = [column[k] for k in (3, 0, 2) for column in columns]
    assert len(given) == 6
    assert all(x is y for x, y in zip(given, expected, strict=True))
    assert all(x is y for x, y in zip(given[2:5], expected[2:5], strict=True))
    assert given[3] is columns[1][0]
    assert places(given, 2) == places(expected, 2) != places(columns[0], 1)
    columns[1][2] = columns[0][2]
    assert places(given, 2) is None


def test_a_position_that_a_column_lacks_is_refused():
    with pytest.raises(IndexError):
        places(InTurn([[torch.ones(1, 1)]], struct.pack("=q", 1)), 1)


UNLIKE = {
    "rows": torch.ones(4, 4),
    "columns": torch.ones(3, 5),
    "dtype": torch.ones(3, 4, dtype=torch.float16),
    "transposed": torch.ones(4, 3).T,
    "with gaps": torch.ones(3, 8)[:, :4],
    "three dimensions": torch.ones(3, 4, 1),
}


@pytest.mark.parametrize("odd", UNLIKE)
def test_nothing_is_said_where_one_is_unlike_the_others(odd):
    given = alike()
    assert places([*given[:3], UNLIKE[odd], *given[4:]], 3) is None


@pytest.mark.parametrize("odd", ["transposed", "with gaps", "three dimensions"])
def test_what_is_no_row_major_matrix(odd):
    given = alike()
    assert not are_row_major([*given, UNLIKE[odd]])
    assert are_row_major([*given, UNLIKE["rows"], UNLIKE["dtype"]])


def test_one_column_may_have_any_stride():
    given = [torch.ones(3, 1), torch.ones(1, 3).T, torch.ones(1, 6)[:, :3]]
    assert are_row_major(given)
    assert places(given[:2], 1)


def test_what_lies_in_a_piece_of_memory_beside_tensors():
    memory = torch.arange(24.0)
    lying = [Lying(memory, memory.data_ptr() + 4 * at, at, (3, 4)) for at in (0, 12)]
    given = [lying[0], torch.ones(3, 4)]
    expected = struct.pack("=2Q", lying[0].data_ptr(), given[1].data_ptr())
    assert places(given, 1) == expected
    assert places([lying[0], torch.ones(3, 5)], 1) is None
    assert places(lying, 1) == struct.pack("=2Q", *(x.data_ptr() for x in lying))


def test_tensors_that_are_trained_lose_that_where_they_are_used():
    trained = torch.nn.Parameter(torch.ones(2, 2))
    assert not as_tensor(trained).requires_grad
    assert as_tensor(trained).data_ptr() == trained.data_ptr()


def test_shares_are_cut_where_they_add_up_to_one():
    shares = struct.pack("=6d", 0.5, 0.5, 0.25, 2.0, 0.75, 0.5)
    assert _C.cut(shares, 0) == [2, 3, 4, 5, 6]
    assert _C.cut(shares, 1) == [2, 4, 6]
    assert _C.cut(shares, 3) == [3, 6]
    assert _C.cut(b"", 0) == []


def test_positions_by_number_in_the_order_of_the_first():
    which, names = struct.pack("=5q", 7, 2, 0, 2, 0), tuple("abcde")
    assert _C.by_number(which, names, 1, 5) == [
        (2, ("b", "d"), struct.pack("=2q", 1, 3)),
        (0, ("c", "e"), struct.pack("=2q", 2, 4)),
    ]
    assert _C.by_number(which, names, 2, 2) == []


def test_what_is_no_exchange_api_is_refused():
    with pytest.raises(TypeError):
        _C.places(None, (Tensor,), [torch.ones(1, 1)], 1)


def test_runs_are_the_addresses_of_a_tensor_s_matrices():
    x = torch.ones(3, 5, 5)[:, 1:]
    assert starts(x) == (x.data_ptr(), 4 * 5 * 5, 3)
    assert starts(x[0]) == (x.data_ptr(), 0, 1)
    assert starts(x[0], dims=1) == (x.data_ptr(), 4 * 5, 4)
    expected = [y.data_ptr() + more for y in (*x, x[1]) for more in (0, 20)]
    assert spread([starts(x), starts(x[1])], [0, 20]) == struct.pack("=8Q", *expected)
    same = x[:1].expand(2, 4, 5)
    assert spread([starts(same)]) == struct.pack("=2Q", *[x.data_ptr()] * 2)
    assert spread([]) == b""


def test_a_buffer_of_other_than_whole_numbers_is_refused():
    with pytest.raises(TypeError):
        _C.spread([], b"1234567")
