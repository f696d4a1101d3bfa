"""Cases in children of a warm parent: what a case does to its process stays there, and a case that
never ends or dies by a signal is a finding like another."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

SECONDS = 20.0
"""What a case may take before it counts as one that never ends."""


@dataclass
class Tally:
    """What a stage tried: how each case ended, and what was found wrong."""

    endings: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def add(self, case: str, ending: str) -> None:
        """A case that ended so; "!" in front marks a finding."""
        if ending.startswith("!"):
            self.endings["findings"] += 1
            self.findings.append(f"{case}: {ending[1:]}")
        else:
            self.endings[ending] += 1


def child(work: Callable[[], int]) -> int:
    """A forked child that ends with the code that `work` returns; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float = SECONDS) -> int | None:
    """A child's exit code, -n for signal n; None, and it is killed, if it does not end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def each(cases: Sequence[str], judge: Callable[[int], str]) -> Iterator[tuple[str, str]]:
    """(case, judge(its number)) of every case, judged in children that go on until one dies."""
    start = 0
    while start < len(cases):
        reading, writing = os.pipe()

        def work(start: int = start, writing: int = writing) -> int:
            for number in range(start, len(cases)):
                try:
                    ending = judge(number)
                except BaseException:
                    ending = f"!{traceback.format_exc()[-600:]}"
                os.write(writing, json.dumps(ending[:1500]).encode() + b"\n")
            return 0

        pid = child(work)
        os.close(writing)
        for ending in _lines(reading):
            yield cases[start], ending
            start += 1
        os.close(reading)
        code = wait(pid, 0.5)
        if start < len(cases):
            yield cases[start], "!never ended" if code is None else f"!the process died ({code})"
            start += 1


def _lines(reading: int) -> Iterator[str]:
    rest = b""
    while select.select([reading], [], [], SECONDS)[0]:
        data = os.read(reading, 1 << 16)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield json.loads(line)
