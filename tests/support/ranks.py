"""Processes that merge one job together, as torchrun starts them: forked, so that none of them has
to import torch."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from attack.forks import child, wait

import domerge_fast as dm
from domerge_fast import distributed

Jobs = Sequence[Mapping[str, Any]]
"""The arguments of `distributed.merge`, one job after the other."""
SECONDS = 300.0
REFUSED = 2


def told(merged: dm.Merged) -> dict[str, Any]:
    """All that the report says, but for what took how long."""
    return {k: v for k, v in merged.report.to_dict().items() if k != "seconds"}


@contextmanager
def store() -> Iterator[int]:
    """The port of a store, which lives as long as the block: the agent's of torchrun.

    It has a process of its own. Its threads look up names; a process forked from here while one of
    them holds a lock of the C library would wait for that lock for ever.
    """
    reading, writing = os.pipe()
    parent = os.getpid()

    def serve() -> int:
        server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.write(writing, f"{server.port}\n".encode())
        while os.getppid() == parent:
            time.sleep(1)
        return 0

    pid = child(serve)
    os.close(writing)
    with os.fdopen(reading) as told:
        port = int(told.readline())
    try:
        yield port
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def start(
    port: int,
    count: int,
    jobs: Jobs,
    attempt: int = 0,
    before: Callable[[int], None] = lambda rank: None,
) -> list[int]:
    """The processes of so many ranks. before(rank): what each does first. A refusal is told on
    stderr, what the report says is beside the output ("….report")."""

    def work(rank: int) -> int:
        os.environ |= {
            **{"RANK": f"{rank}", "WORLD_SIZE": f"{count}", "LOCAL_RANK": f"{rank}"},
            **{"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"},
            **{"TORCHELASTIC_USE_AGENT_STORE": "True"},
            **{"TORCHELASTIC_RESTART_COUNT": f"{attempt}"},
        }
        before(rank)
        try:
            for given in jobs:
                done = distributed.merge(**given)
                if (done is not None) != (rank == 0):
                    return 1
                if done:
                    Path(f"{given['output']}.report").write_bytes(pickle.dumps(told(done)))
        except dm.DomergeError as error:
            print(f"rank {rank}: {error}", file=sys.stderr)
            return REFUSED
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    return [child(lambda rank=rank: work(rank)) for rank in range(count)]


def end(pids: Sequence[int]) -> list[int | None]:
    """The exit codes of the processes, None for one that had to be killed."""
    return [wait(pid, SECONDS) for pid in pids]


def merged(count: int, jobs: Jobs) -> None:
    """All jobs, by so many processes."""
    with store() as port:
        codes = end(start(port, count, jobs))
    assert codes == [0] * count
