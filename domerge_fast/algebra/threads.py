"""Small matrices on many threads: every part of the work is one thread's, with torch's ops in it.

Torch shares each op among all of its threads, which wait for the next one by spinning. With
matrices of a hundred rows they wait longer than they work, and many times longer where others want
the same cores. What a part gives does not depend on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, Thread
from typing import TypeVar

import torch

__all__ = ["HERE", "LARGE", "in_order", "in_threads", "of_parts"]

HERE = torch.device("cpu")

LARGE = 1024
"""Rows of matrices on which torch's threads work longer than they wait."""

_ONE_AT_A_TIME = Lock()

Part = TypeVar("Part")
Result = TypeVar("Result")


def in_threads(
    run: Callable[[Part], Result], parts: Sequence[Part], device: torch.device
) -> list[Result]:
    """run(part) of every part, as many at once as torch has threads, without gradients; of errors
    that of the first part is raised. device: where the matrices are; one after the other on a GPU.
    """
    threads = torch.get_num_threads()
    if threads == 1 or device.type != "cpu" or not parts:
        return [run(part) for part in parts]
    with ThreadPoolExecutor(min(threads, len(parts)), "domerge-small", _alone) as pool:
        return list(pool.map(torch.no_grad()(run), parts))


def of_parts(
    run: Callable[[Part], Result],
    parts: Sequence[Part],
    device: torch.device,
    rank: Callable[[Part], int],
) -> list[Result]:
    """`in_threads`. rank: how many rows the matrices of a part have; large ones are worked on here,
    one after the other."""
    large = [k for k, part in enumerate(parts) if rank(part) >= LARGE]
    small = [k for k, part in enumerate(parts) if rank(part) < LARGE]
    found = dict(zip(large, map(run, [parts[k] for k in large])))
    found |= zip(small, in_threads(run, [parts[k] for k in small], device))
    return [found[k] for k in range(len(parts))]


def in_order(parts: Sequence[Sequence[int]], results: Sequence[Sequence[Result]]) -> list[Result]:
    """The results of parts that are positions, one a position, in the order of these."""
    found = {k: x for part, own in zip(parts, results) for k, x in zip(part, own)}
    return [found[k] for k in range(len(found))]


def _alone() -> None:
    """This thread has torch's ops to itself. Threads that begin later would have as few for theirs
    as were set last: they get what they had."""
    with _ONE_AT_A_TIME:
        usual = torch.get_num_threads()
        torch.set_num_threads(1)
        again = Thread(target=torch.set_num_threads, args=(usual,))
        again.start()
        again.join()
