"""Who takes which unit: 64 workers in simulated time, of which nothing waits in a test."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from random import Random

import pytest

from domerge_fast.costs import Shape, Unit, Workers, costs, units
from domerge_fast.distributed.claims import Claims

COUNT = 64
WORKERS = Workers(COUNT, 100e12, 40e9, 40e9)


class Store:
    """A store of torch.distributed as far as claims use it, and how often it is asked."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self.calls = 0

    def add(self, key: str, amount: int) -> int:
        self.calls += 1
        self.known[key] = self.known.get(key, 0) + amount
        return self.known[key]

    def set(self, key: str, value: str) -> None:
        self.calls += 1
        self.known[key] = 1

    def check(self, keys: list[str]) -> bool:
        self.calls += 1
        return all(key in self.known for key in keys)


def decoder(layers: int, hidden: int, key_value: int, feed_forward: int, rank: int) -> list[Shape]:
    wide = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    wide += [(feed_forward, hidden), (feed_forward, hidden), (hidden, feed_forward)]
    return [Shape(m, n, (rank,) * 200) for _ in range(layers) for m, n in wide]


JOBS = {
    "405B": decoder(126, 16384, 1024, 53248, 16),
    "70B": decoder(80, 8192, 1024, 28672, 16),
    "experts": [Shape(m, n, (8,) * 200) for m, n in [(768, 2048)] * 2 + [(2048, 768)]] * 6144,
}


def simulated(
    found: list[Unit], random: Random, slow: Mapping[int, float], latency: float
) -> tuple[list[float], list[int], int]:
    """When each worker has done its last unit, the units in the order in which they were taken, and
    how often the store was asked. A worker takes a unit while it works on the one before; files
    take up to a fifth more or less than planned, the store up to twice its latency."""
    store = Store()
    of_costs = [unit.cost for unit in found]
    claims = [Claims(store, of_costs, ()).free() for _ in range(COUNT)]  # type: ignore[arg-type]
    seconds = [WORKERS.seconds(u.flops, u.read, u.written) for u in found]
    ends, taken = [0.0] * COUNT, []

    def next_of(worker: int) -> tuple[int | None, float]:
        before = store.calls
        unit = next(claims[worker], None)
        return unit, sum(random.uniform(0, 2 * latency) for _ in range(store.calls - before))

    ahead: list[int | None] = [None] * COUNT
    queue = []
    for worker in range(COUNT):
        ahead[worker], took = next_of(worker)
        heapq.heappush(queue, (took, worker))
    while queue:
        now, worker = heapq.heappop(queue)
        unit = ahead[worker]
        if unit is None:
            continue
        taken.append(unit)
        ahead[worker], took = next_of(worker)
        length = seconds[unit] * random.uniform(0.8, 1.2) * slow.get(worker, 1.0)
        ends[worker] = now + max(length, took)
        heapq.heappush(queue, (ends[worker], worker))
    return ends, taken, store.calls


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("latency", [1e-4, 5e-3])
def test_64_workers_end_when_it_was_planned(name, latency):
    found, planned = list(units(JOBS[name])), costs(JOBS[name], WORKERS).seconds
    ends, taken, calls = simulated(found, Random(1), {}, latency)
    assert sorted(taken) == list(range(len(found)))
    assert max(ends) < 1.1 * planned
    assert min(ends) > 0.8 * planned
    assert calls <= 2 * len(found) + COUNT


@pytest.mark.parametrize("name", JOBS)
def test_slow_workers_take_less(name):
    """Four of them are three times as slow: the others end as if there were fewer workers. Those
    have a unit to end and one that was taken ahead."""
    found = list(units(JOBS[name]))
    planned = costs(JOBS[name], WORKERS).seconds * COUNT / (COUNT - 4 + 4 / 3)
    ends, taken, _ = simulated(found, Random(2), dict.fromkeys(range(4), 3.0), 1e-4)
    assert sorted(taken) == list(range(len(found)))
    assert max(ends[4:]) < 1.1 * planned
