"""The processes that merge together: who they are, and what they tell each other through the store
of torch.distributed. No tensor goes through it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from ..errors import DomergeError, Elsewhere, OptionError

__all__ = ["Group", "Stop", "joined"]

BEGIN_SECONDS = 1800.0
"""For the first process to read the adapters and begin."""
LEAVE_SECONDS = 10.0
"""For the others to see that all is done."""
POLL_SECONDS = 0.01, 0.25
"""Between two looks at the store, for every process and at most: so it answers a hundred a second,
however many wait."""

_calls = 0
"""How many merges this process has shared in: all share in them in the same order."""


@dataclass(frozen=True)
class Stop:
    """Why all stop. keeps: whether what is done is kept for the same job."""

    line: str
    keeps: bool


@dataclass(frozen=True)
class Group:
    """store: for this merge alone. rank: of this process, of `count`; local: of those on this
    machine."""

    store: dist.Store
    rank: int
    count: int
    local: int

    @property
    def is_first(self) -> bool:
        """Whether this process plans, and puts the output in its place."""
        return self.rank == 0

    def tell(self, key: str, text: str = "") -> None:
        self.store.set(key, text)

    def told(self, key: str) -> str | None:
        """What somebody has told under this key."""
        return self.store.get(key).decode() if self.store.check([key]) else None

    def stop(self, why: Stop) -> None:
        """Let all others stop, unless somebody has before."""
        self.store.compare_set("stop", "", json.dumps([why.line, why.keeps]))

    @property
    def stopped(self) -> Stop | None:
        found = self.told("stop")
        return Stop(*json.loads(found)) if found else None

    def check(self) -> None:
        """Raise Elsewhere if somebody has stopped."""
        if why := self.stopped:
            raise Elsewhere(why.line)

    def waits(self, seconds: float, whatever: bool = False) -> Iterator[None]:
        """Again and again, with a pause between, until so much time is over, or all stop and it is
        not whatever happens."""
        each, longest = POLL_SECONDS
        pause = min(each * self.count, longest)
        end = time.monotonic() + seconds
        while True:
            if not whatever:
                self.check()
            yield
            if time.monotonic() > end:
                return
            time.sleep(pause)

    def begun(self) -> str:
        """What the first process says when it has begun."""
        for _ in self.waits(BEGIN_SECONDS):
            if (found := self.told("begun")) is not None:
                return found
        problem = f"the process of rank 0 has not begun within {BEGIN_SECONDS / 60:.0f} minutes"
        raise DomergeError(f"{problem}; start all processes of a job")

    def leave(self) -> None:
        """When all is done: the first process tells it, and waits until the others know."""
        if self.is_first:
            self.tell("finished")
        self.all_left()

    def all_left(self) -> None:
        """This process does nothing any more; the first one waits until that is so of the others,
        but not for one that hangs."""
        if not self.is_first:
            self.store.add("left", 1)
            return
        for _ in self.waits(LEAVE_SECONDS, whatever=True):
            if self.store.add("left", 0) >= self.count - 1:
                return

    @property
    def is_finished(self) -> bool:
        return self.told("finished") is not None

    def finished(self) -> None:
        """When the first process has put the output in its place."""
        for _ in self.waits(float("inf")):
            if self.is_finished:
                return


@contextmanager
def joined() -> Iterator[Group]:
    """The process group that there is, or the processes that torchrun, or whatever sets RANK,
    WORLD_SIZE, MASTER_ADDR and MASTER_PORT, has started. OptionError where there are none."""
    global _calls
    if not dist.is_available():
        remedy = "merge in one process, or install one with it"
        raise OptionError("distributed", "this torch has no torch.distributed", remedy)
    try:
        if dist.is_initialized():
            store: dist.Store = dist.distributed_c10d._get_default_store()
            rank, count = dist.get_rank(), dist.get_world_size()
        else:
            store, rank, count = next(iter(dist.rendezvous("env://")))
    except (ValueError, dist.DistError) as error:
        raise _unreachable(error) from error
    _calls += 1
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = dist.PrefixStore(f"domerge_fast/{attempt}/{count}/{_calls}", store)
    try:
        yield Group(own, rank, count, int(os.environ.get("LOCAL_RANK", "0")))
    except dist.DistError as error:
        raise _unreachable(error) from error


def _unreachable(error: Exception) -> DomergeError:
    reason = " ".join(str(error).split())[:120]
    remedy = "start the job by torchrun"
    return DomergeError(f"the other processes cannot be reached ({reason}); {remedy}")
