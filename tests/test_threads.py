"""Small matrices on many threads, each of which has torch's ops to itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import pytest
import torch

from domerge_fast.algebra.threads import LARGE, in_threads, of_parts

HERE = torch.device("cpu")


def threads_of_a_new_one() -> int:
    """How many threads torch's ops have in a thread that begins now."""
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def own_threads(_: object) -> tuple[int, int]:
    return torch.get_num_threads(), threading.get_ident()


@pytest.mark.parametrize("parts", [1, 2, 9])
def test_ops_of_a_part_have_one_thread_and_all_others_what_they_had(threads, parts):
    threads(3)
    found = in_threads(own_threads, range(parts), HERE)
    assert {count for count, _ in found} == {1}
    assert threading.get_ident() not in {thread for _, thread in found}
    assert torch.get_num_threads() == 3
    assert threads_of_a_new_one() == 3


def test_parts_of_a_part_are_worked_on_where_it_is(threads):
    threads(3)

    def outer(_: object) -> list[tuple[int, int]]:
        return [own_threads(None), *in_threads(own_threads, range(2), HERE)]

    for found in in_threads(outer, range(2), HERE):
        assert len(set(found)) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("count", [1, 3])
def test_one_thread_and_a_gpu_work_here(threads, count, device):
    threads(count)
    found = in_threads(own_threads, range(4), torch.device(device))
    alone = count == 1 or device == "cuda"
    assert (found == [(count, threading.get_ident())] * 4) == alone


def test_several_parts_are_worked_on_at_once_and_come_back_in_order(threads):
    threads(2)
    both = threading.Barrier(2, timeout=60)

    def run(part: int) -> int:
        both.wait()
        time.sleep(0.02 * (1 - part))
        return part

    assert in_threads(run, range(2), HERE) == [0, 1]


@pytest.mark.parametrize("count", [1, 2])
def test_the_error_of_the_first_part_is_raised(threads, count):
    threads(count)

    def run(part: int) -> None:
        time.sleep(0.02 * (3 - part))
        raise ValueError(f"part {part}")

    with pytest.raises(ValueError, match="part 0"):
        in_threads(run, range(3), HERE)


def test_no_part_keeps_gradients_where_the_caller_keeps_none(threads):
    threads(2)
    x = torch.ones(2, requires_grad=True)
    run: Callable[[int], bool] = lambda part: (part * x).requires_grad  # noqa: E731
    with torch.no_grad():
        assert in_threads(run, range(2), HERE) == [False, False]


def test_large_matrices_have_all_threads_of_torch(threads):
    threads(3)
    ranks = [4, LARGE, 8, LARGE + 1]

    def run(part: Sequence[int]) -> list[tuple[int, int]]:
        return [(k, torch.get_num_threads()) for k in part]

    found = of_parts(run, [[0, 2], [1], [3]], HERE, lambda part: max(ranks[k] for k in part))
    assert found == [[(0, 1), (2, 1)], [(1, 3)], [(3, 3)]]
