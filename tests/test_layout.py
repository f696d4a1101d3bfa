"""Where results of ops lie in memory."""

import contextlib
import mmap
import weakref

import numpy
import pytest
import torch

from domerge_fast.backends import layout
from domerge_fast.backends.layout import LARGE, recycled, side_by_side, together
from domerge_fast.storage.buffers import Pieces


@pytest.mark.parametrize("counts", [(1, 1), (2, 3, 1)])
def test_batches_that_follow_each_other_are_one_without_a_copy(counts):
    results = together([(3, 3)] * len(counts), torch.float32, counts=counts)
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
    with recycled() if again else contextlib.nullcontext():
        first, second = together([(LARGE, 1), (3, 1)], torch.uint8)
        address = first.data_ptr()
        assert address % mmap.PAGESIZE == 0
        (pieces,) = made
        del first
        assert pieces() is not None
        second.fill_(1)
        del second
        assert (pieces() is not None) == again
        (other,) = together([(LARGE, 1)], torch.uint8)
        assert len(made) == (1 if again else 2)
        assert not again or other.data_ptr() == address
