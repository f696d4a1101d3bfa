"""Kills of processes that merge one job together, at random times: started again, it goes on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from random import Random
from typing import Any

from support import ranks

import domerge_fast as dm
from domerge_fast.distributed import group

from . import judge
from .forks import Tally, wait
from .inputs import FILE, adapter, base_model, lora_file
from .runs import Command, contents

WIDE = 48
"""Modules of so many times the usual size: a job takes long enough to be hit anywhere."""
UNIT_BYTES = 1
"""Every module is a unit."""
MOST = 3
"""Processes."""

Job = tuple[Command, dict[str, Any]]
"""The output, and what is asked of all processes."""


def kills(folder: Path, seed: int, count: int) -> Tally:
    """SIGKILL of one process, then a polite end of the others as by torchrun, or SIGKILL of all,
    once or twice: the output is the old one or the new one, and the next start ends the job."""
    usual, group.LEAVE_SECONDS = group.LEAVE_SECONDS, 0.5
    made = _jobs(folder / "together")
    lengths = {command.name: _length(command, given) for command, given in made}
    tally = Tally()
    for number in range(count):
        command, given = made[number % len(made)]
        case = f"seed {seed}, job {number}: {command.name}"
        random = Random(f"{seed} job {number}")
        tally.add(case, _case(command, given, random, lengths[command.name]))
    group.LEAVE_SECONDS = usual
    return tally


def _case(command: Command, given: dict[str, Any], random: Random, length: float) -> str:
    command.reset()
    with ranks.store() as port:
        for attempt in range(random.randint(1, 2)):
            pids = ranks.start(port, random.randint(1, MOST), [given], attempt, _quiet)
            time.sleep(random.uniform(0, 1.2 * length))
            for pid in pids if random.random() < 0.25 else [random.choice(pids)]:
                os.kill(pid, signal.SIGKILL)
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            for pid in pids:
                wait(pid, ranks.SECONDS)
            if (found := command.found()) not in ("old", "new"):
                return f"!{found}"
        codes = ranks.end(ranks.start(port, random.randint(1, MOST), [given], 2, _quiet))
    left = judge.hidden(command.output.parent)
    # Of a job that had ended, and has left nothing, nobody knows any more.
    had_ended = found == "new" and not given["overwrite"] and set(codes) == {ranks.REFUSED}
    if command.found() != "new" or left or not (set(codes) == {0} or had_ended):
        return f"!the next start: exit codes {codes}, the output is {command.found()}, {left}"
    return f"killed, {found} output"


def _jobs(folder: Path) -> list[Job]:
    """A new merge, one over an older one, a whole model, and a file that is written in the end."""
    pair = [adapter(folder / "in" / x, 4, k, WIDE) for k, x in enumerate("ab")]
    base = base_model(folder / "in" / "base", WIDE)
    files = [lora_file(folder / "in" / x, 4, k, WIDE) / FILE for k, x in enumerate("xy")]
    older = folder / "in" / "older"
    dm.merge(pair[:1], output=older)
    made = []
    for name, sources, asked, old in (
        ("merge", pair, {"method": "tsvm", "scale": "auto"}, None),
        ("overwrite", pair, {"method": "do"}, older),
        ("model", pair, {"method": "do", "form": "model", "base": str(base)}, None),
        ("file", files, {"method": "do"}, None),
    ):
        output = folder / name / "out"
        output.parent.mkdir()
        paths = [str(path) for path in sources]
        given = {"adapters": paths, "output": str(output), "overwrite": old is not None, **asked}
        command = Command(name, (), output, old, {})
        dm.merge(**given)
        command.new.update(contents(output))
        made.append((command, {**given, "unit_bytes": UNIT_BYTES}))
    return made


def _quiet(rank: int) -> None:
    """What a process that is ended says is not looked at."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _length(command: Command, given: dict[str, Any]) -> float:
    """Seconds that the job takes two processes."""
    command.reset()
    started = time.monotonic()
    ranks.merged(2, [given])
    return time.monotonic() - started
