"""Ctrl-C inside a kernel, and threads that cannot be had."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.make import random_factors, write_adapter

import domerge_fast as dm
from domerge_fast.algebra.entry_rules import Draw, Election, Trim
from domerge_fast.algebra.side import Side
from domerge_fast.backends import cpu
from domerge_fast.engine import reader

GRAM = torch.eye(600) + 0.1


def problem(rank: int, d: int, count: int = 4) -> Side:
    generator = torch.Generator().manual_seed(rank)
    blocks = tuple(torch.randn(rank, d, generator=generator) for _ in range(count))
    return Side(blocks, (1.0,) * count)


def descend(times: int) -> object:
    return cpu.orthogonalize([GRAM] * times, [(150,) * 4] * times, steps=10_000, tol=0.0)


def wide_gram(times: int) -> object:
    return cpu.gram([problem(200, 4000)] * times)


def products(times: int) -> object:
    p = problem(200, 4000)
    return cpu.apply([torch.eye(p.rank)] * times, [p] * times, torch.bfloat16)


def entries(times: int) -> object:
    a, b = problem(256, 1000 * times, 2), problem(256, 512, 2)
    trims = [Trim()] * 2
    return cpu.entry_merge(a, b, trims, [1.0, 1.0], Election(), Draw(0, 0, (0, 1)), 1.0)


LONG = {
    "descent": (descend, 100),
    "gram": (wide_gram, 1000),
    "apply": (products, 400),
    "entries": (entries, 200),
}
"""A kernel's call, and how often it is repeated inside the one native call: for many seconds."""


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.fixture
def alarm() -> Iterator[list[float]]:
    """SIGALRM raises KeyboardInterrupt in the main thread; the list gets the time of it."""
    rung: list[float] = []

    def ring(*_: object) -> None:
        rung.append(time.monotonic())
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ring)
    yield rung
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed on Linux only")
@pytest.mark.parametrize("name", LONG)
def test_a_signal_ends_a_native_call_and_all_its_threads(name, two_threads, alarm):
    call, times = LONG[name]
    call(1)
    before = threads()
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    due = time.monotonic() + 0.3
    with pytest.raises(KeyboardInterrupt):
        call(times)
    assert threads() == before
    assert alarm
    assert time.monotonic() - due < 5, "half a second on a machine that has nothing else to do"


def test_a_call_after_an_interrupted_one_is_whole(two_threads, alarm):
    expected = descend(1)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(KeyboardInterrupt):
        descend(100)
    again = descend(1)
    assert torch.equal(again[0][0], expected[0][0])


def test_a_call_of_another_thread_goes_on(two_threads, alarm):
    """Python answers signals in its main thread alone: the others' calls end as they are."""
    expected, found = descend(1), []
    thread = threading.Thread(target=lambda: found.append(descend(1)))
    thread.start()
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    with pytest.raises(KeyboardInterrupt):
        time.sleep(10)
    thread.join()
    assert torch.equal(found[0][0][0], expected[0][0])


@pytest.fixture(scope="module")
def no_threads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which no thread can be started after the imports."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs cc and LD_PRELOAD")
    folder = tmp_path_factory.mktemp("shim")
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text("int pthread_create() { return 11; }\n")  # EAGAIN
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    path = os.pathsep.join([str(Path(dm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(code: str, environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True
    )


KERNELS = """
import torch
from domerge_fast.backends import cpu
from domerge_fast.algebra.side import Side
torch.set_num_threads(4)
x = torch.arange(24.0).reshape(4, 6)
found = cpu.gram([Side((x,), (1.0,))] * 20)
assert all(torch.equal(g, x @ x.T) for g in found)
"""


def test_kernels_do_without_threads_that_cannot_be_had(no_threads, tmp_path):
    done = run(KERNELS, no_threads, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


MERGE = """
import sys, torch
from domerge_fast.cli import main as cli
sys.exit(cli.main(["merge", "a", "-o", "out"]))
"""


def test_a_merge_without_threads_is_one_line(no_threads, tmp_path):
    write_adapter(tmp_path / "a", random_factors({"layer": (6, 8)}, 2))
    before = sorted(tmp_path.rglob("*"))
    done = run(MERGE, no_threads, tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "can't start new thread" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("method", ["do", "wudi", "opcm", "svd"])
@pytest.mark.parametrize("scale", [1.0, "auto"])
def test_a_merge_that_stops_leaves_no_thread(method, scale, monkeypatch):
    # Its frames live on with the error. What garbage is collected with them ends no thread.
    monkeypatch.setattr(reader, "GROUP_BYTES", 1)  # a module a group
    sizes = {f"layer.{k}": (6, 5) for k in range(4)}
    made = [dm.from_tensors(random_factors(sizes, 2, seed=k), name=f"a{k}") for k in (1, 2)]

    def stop(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough") as caught:
        dm.merge(made, method, scale=scale, progress=stop)
    assert caught.tb is not None
    assert not [t.name for t in threading.enumerate() if t.name.startswith("domerge")]
