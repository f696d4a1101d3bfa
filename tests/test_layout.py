"""Where results of ops lie in memory."""

import contextlib
import mmap
import weakref

import numpy
import pytest
import torch

from domerge_fast.backends import layout
from domerge_fast.backends.layout import (
    LARGE,
    LEAST,
    PIECE,
    placed,
    recycled,
    side_by_side,
)
from domerge_fast.storage.buffers import Pieces


@pytest.mark.parametrize("counts", [(1, 1), (2, 3, 1)])
def test_batches_that_follow_each_other_are_one_without_a_copy(counts):
    results, _ = placed([(3, 3)] * len(counts), torch.float32, counts=counts)
    for k, x in enumerate(results):
        x.fill_(k)
    whole = side_by_side(results)
    assert whole.data_ptr() == results[0].data_ptr()
    assert whole[:, 0, 0].tolist() == [float(k) for k, n in enumerate(counts) for _ in range(n)]


@pytest.mark.parametrize("counts", [(1, 1), (2, 3, 1)])
def test_batches_that_follow_each_other_in_several_allocations_are_copied(counts):
    """An allocator may give neighbours: then the memory of the first ends where the next begins."""
    numbers, batches, first = numpy.arange(64, dtype=numpy.float32), [], 0
    for count in counts:
        piece = torch.from_numpy(numbers[first : first + 9 * count])
        batches.append(piece.view(count, 3, 3))
        first += 9 * count
    assert torch.equal(side_by_side(batches), torch.cat(batches))


def test_batches_with_gaps_are_copied():
    whole = torch.arange(36.0).view(4, 3, 3)
    assert torch.equal(side_by_side([whole[:1], whole[2:]]), whole[[0, 2, 3]])


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recycled"])
def test_large_results_are_pieces_that_are_freed_with_the_last_tensor(monkeypatch, again):
    """And that are kept for others only where results are let go one after the other."""
    made: list[weakref.ref[Pieces]] = []

    class Watched(Pieces):
        def __init__(self) -> None:
            super().__init__()
            made.append(weakref.ref(self))

    monkeypatch.setattr(layout, "Pieces", Watched)
    size = LEAST if again else LARGE
    with recycled() if again else contextlib.nullcontext():
        (first, second), _ = placed([(size, 1), (3, 1)], torch.uint8)
        address = first.data_ptr()
        assert address % mmap.PAGESIZE == 0
        (pieces,) = made
        del first
        assert pieces() is not None
        second.fill_(1)
        del second
        assert (pieces() is not None) == again
        (other,), _ = placed([(size, 1)], torch.uint8)
        assert len(made) == (1 if again else 2)
        assert not again or other.data_ptr() == address


def memories(**given) -> list[int]:
    """How many results share an allocation, of some around PIECE bytes."""
    shapes = [(PIECE // 4 - 64,), (PIECE // 2,), (PIECE // 4 + 64,), (64,), (2 * PIECE,), (1,)]
    results, _ = placed(shapes, torch.bfloat16, **given)
    assert [x.shape for x in results] == shapes
    for k, x in enumerate(results):
        x.fill_(k)
    assert [x.unique().tolist() for x in results] == [[float(k)] for k in range(len(shapes))]
    found = [x.untyped_storage().data_ptr() for x in results]
    return [found.count(at) for at in dict.fromkeys(found)]


def test_results_that_are_kept_share_no_more_than_a_piece():
    assert memories(kept=True) == [1, 1, 2, 1, 1]
    assert memories() == [6]
    with recycled():
        assert memories(kept=True) == [6]
