"""Where results of ops lie in memory."""

import numpy
import pytest
import torch

from domerge_fast.backends.layout import side_by_side, together


@pytest.mark.parametrize("counts", [(1, 1), (2, 3, 1)])
def test_batches_that_follow_each_other_are_one_without_a_copy(counts):
    results, _ = together([(3, 3)] * len(counts), torch.float32, counts=counts)
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
