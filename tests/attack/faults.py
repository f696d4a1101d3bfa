"""System calls that fail: the n-th of a kind, once or for good, and calls that do half their work.

The shim has to be there when a process starts, so the cases run in forks of one that this module
starts for itself: `python -m attack.faults`, with shim.c preloaded.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from random import Random

from . import judge
from .forks import Tally, child, wait
from .runs import Command, commands

SOURCE = Path(__file__).with_name("shim.c")
CALLS = (
    *("write", "read", "open", "close", "fsync", "mkdir", "rename", "renameat2", "unlink"),
    *("rmdir", "flock", "stat"),
)
FAILURES = (
    (errno.EIO, False),
    (errno.EIO, True),
    (errno.ENOSPC, True),
    (errno.EACCES, True),
    (errno.EMFILE, False),
    (errno.ENOMEM, False),
)
SHORT = ("write", "read")


def attack(folder: Path, seed: int, count: int) -> Tally:
    """`count` faults, in forks of a process that has the shim."""
    shim = folder / "shim.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", shim, SOURCE, "-ldl"], check=True)
    words = [sys.executable, "-m", "attack.faults", folder, seed, count]
    done = subprocess.run(
        [str(word) for word in words],
        env=os.environ | {"LD_PRELOAD": str(shim)},
        cwd=SOURCE.parents[1],
        stdout=subprocess.PIPE,
        check=True,
    )
    found = json.loads(done.stdout)
    tally = Tally(findings=found["findings"])
    tally.endings.update(found["endings"])
    return tally


def _all(folder: Path, seed: int, count: int) -> Tally:
    word = f"{folder.name}/runs"
    made = commands(folder / "runs", wide=1)
    counts = {(c.name, kind): _calls(c, kind, word) for c in made for kind in CALLS}
    if unused := [kind for kind in CALLS if not any(counts[c.name, kind] for c in made)]:
        raise RuntimeError(f"no command calls {', '.join(unused)}")
    tally = Tally()
    for number in range(count):
        random = Random(f"{seed} fault {number}")
        command = made[number % len(made)]
        kind = random.choice([kind for kind in CALLS if counts[command.name, kind]])
        nth = random.randint(1, counts[command.name, kind])
        code, lasting = random.choice(FAILURES)
        half = kind in SHORT and random.random() < 0.1
        what = "half done" if half else f"{errno.errorcode[code]}{' from then on' * lasting}"
        case = f"seed {seed}, fault {number}: {command.name}, {kind} {nth}, {what}"
        arm = (kind.encode(), word.encode(), nth, code, int(lasting), int(half))
        tally.add(case, _one(command, arm, half))
    return tally


def _one(command: Command, arm: tuple, half: bool) -> str:
    command.reset()
    ended = _run(command, arm)
    if ended is None:
        return "!never ended, or died"
    ending, _ = ended
    found = command.found()
    if problem := _problem(ending, found, half):
        return f"!{problem}"
    left = judge.hidden(command.output.parent)
    if left and ending.code == 0 and not ending.err:
        return f"!left {left} and said nothing"
    command.reset(hidden=False)
    again = judge.run(*command.arguments)
    if again.code or command.found() != "new":
        return f"!the next run fails: {again.err[:300]}"
    if left := judge.hidden(command.output.parent):
        return f"!the next run leaves {left}"
    if ending.code == 0:
        return "done, and said what failed after it" if ending.err else "done"
    return "refused"


def _problem(ending: judge.Ending, found: str, half: bool) -> str | None:
    if found not in ("old", "new"):
        return f"{found}; exit code {ending.code}: {ending.err[:300]!r}"
    if half and (ending.code or found != "new"):
        return f"short calls are no error, exit code {ending.code}: {ending.err[:300]!r}"
    if ending.code == 0:
        if found == "old":
            return "exit code 0, and nothing was written"
        return None if _is_told(ending) else f"said {ending.err[:300]!r}"
    if found == "old":
        return ending.refusal()
    return f"the output is new, exit code {ending.code}: {ending.err[:300]!r}"


def _is_told(ending: judge.Ending) -> bool:
    """Whether what failed after the commit, if anything did, is told in one line."""
    lines = ending.err.splitlines()
    start = "domerge-fast: warning: "
    return not lines or (
        len(lines) == 1 and lines[0].startswith(start) and "was written, but" in lines[0]
    )


def _calls(command: Command, kind: str, word: str) -> int:
    """How often a command makes this call on its files."""
    command.reset()
    ended = _run(command, (kind.encode(), word.encode(), 0, 0, 0, 0))
    if ended is None or ended[0].code:
        raise RuntimeError(f"{command.name} fails without a fault: {ended}")
    return ended[1]


def _run(command: Command, arm: tuple) -> tuple[judge.Ending, int] | None:
    """How a child with the shim armed ended, and how many calls it counted."""
    shim = ctypes.CDLL(None)
    reading, writing = os.pipe()

    def work() -> int:
        shim.shim_arm(*arm)
        ending = judge.run(*command.arguments)
        calls = shim.shim_count()
        shim.shim_arm(b"", b"", 0, 0, 0, 0)
        os.write(writing, json.dumps([asdict(ending), calls]).encode()[:60_000])
        return 0

    pid = child(work)
    os.close(writing)
    code = wait(pid)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    if code != 0 or not data:
        return None
    ending, calls = json.loads(data)
    return judge.Ending(**ending), calls


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as place:
        result = _all(Path(place), int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps({"endings": result.endings, "findings": result.findings}))
