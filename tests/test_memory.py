"""A streamed merge needs memory for a few groups of modules, however many modules there are."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from support.make import write_adapter
from support.merges import at_one
from support.processes import forked

import domerge_fast as dm
from domerge_fast.adapters.plan import GROUP_BYTES

RANK, SIZE = 32, 16384
MODULE = 2 * (2 * RANK * SIZE * 4)  # bytes of one module in both adapters, and merged
FEW, MANY = 24, 56  # modules: three groups and seven
FIELDS = ("VmHWM", "RssAnon", "RssFile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Adapters "one" and "two" of FEW and of MANY modules, in a folder named by that number."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        a = torch.randn(RANK, SIZE, generator=generator)
        b = torch.randn(SIZE, RANK, generator=generator)
        for count in (FEW, MANY):
            factors = {f"layers.{i}.q_proj": (a.clone(), b.clone()) for i in range(count)}
            write_adapter(folder / str(count) / name, factors)
    yield folder
    shutil.rmtree(folder)


def memory() -> dict[str, int]:
    """Bytes by field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {field: int(found[field].split()[0]) << 10 for field in FIELDS}


def measure(adapters: list[Path], options: dict[str, Any], pipe: Connection) -> None:
    """Merge, and send how far each field rose above its value before the merge."""
    torch.set_num_threads(1)  # in a new process; see conftest.py
    small = dm.from_tensors({"q": (torch.ones(2, 9), torch.ones(8, 2))})
    at_one(
        [small, small],
        **{key: v for key, v in options.items() if key not in ("output", "overwrite")},
    )
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel starts VmHWM again
    before, done = memory(), threading.Event()
    largest = dict(before)

    def watch() -> None:
        while not done.wait(0.002):
            largest.update({field: max(v, largest[field]) for field, v in memory().items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    merged = at_one(adapters, **options)
    done.set()
    watcher.join()
    largest["VmHWM"] = memory()["VmHWM"]
    pipe.send((len(merged.names), {field: largest[field] - before[field] for field in FIELDS}))


def growth(folder: Path, modules: int, **options: Any) -> dict[str, int]:
    adapters = [folder / str(modules) / name for name in ("one", "two")]
    process, pipe = forked(measure, adapters, options)
    merged, result = pipe.recv()
    process.join()
    assert merged == modules
    return result


@pytest.mark.parametrize("options", [{"method": "linear"}, {"method": "do", "steps": 2}], ids=str)
def test_a_streamed_merge_holds_a_few_groups(options, folder):
    few, many = (
        growth(folder, count, output=folder / "out", overwrite=True, **options)
        for count in (FEW, MANY)
    )
    added = (MANY - FEW) * MODULE
    for field in ("VmHWM", "RssAnon", "RssFile"):
        assert many[field] - few[field] < GROUP_BYTES < added / 3
    assert many["RssFile"] <= 3 * GROUP_BYTES
    assert many["VmHWM"] < 6 * GROUP_BYTES


def test_the_measure_sees_a_merge_that_holds_everything(folder):
    many = growth(folder, MANY, method="linear")
    assert many["RssAnon"] >= MANY * MODULE
    assert many["VmHWM"] > 6 * GROUP_BYTES
