"""Kills and Ctrl-C at random times, and two writers at once."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from random import Random

from domerge_fast.cli import main as cli

from . import judge
from .forks import Tally, child, wait
from .inputs import STATE
from .runs import Command, commands

WIDE = 48
"""Modules of so many times the usual size: a command takes long enough to be hit anywhere."""
ANSWER_SECONDS = 1.0
"""Ctrl-C is answered within half of this where nothing else runs on the machine."""
ESCAPED = 99


def kills(folder: Path, seed: int, count: int) -> Tally:
    """SIGKILL: the output is the old one or the new one, and the next run leaves nothing over."""
    made = commands(folder / "kills", WIDE)
    lengths = {command.name: _length(command) for command in made}
    tally = Tally()
    for number in range(count):
        random = Random(f"{seed} kill {number}")
        command = made[number % len(made)]
        command.reset()
        pid = child(lambda command=command: judge.run(*command.arguments).code)
        time.sleep(random.uniform(0, 1.2 * lengths[command.name]))
        os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        found = command.found()
        case = f"seed {seed}, kill {number}: {command.name}"
        if found not in ("old", "new"):
            tally.add(case, f"!{found}")
            continue
        command.reset(hidden=False)
        again = judge.run(*command.arguments)
        left = judge.hidden(command.output.parent)
        if again.code or command.found() != "new" or left:
            tally.add(case, f"!the next run: exit code {again.code}, {again.err[:300]!r}, {left}")
        else:
            tally.add(case, "had ended" if code == 0 else f"killed, {found} output")
    return tally


def interrupts(folder: Path, seed: int, count: int) -> Tally:
    """Ctrl-C: answered at once, with the old output or the new one, and nothing left over."""
    made = commands(folder / "interrupts", WIDE)
    lengths = {command.name: _length(command) for command in made}
    said = folder / "said"
    tally = Tally()
    for number in range(count):
        random = Random(f"{seed} Ctrl-C {number}")
        command = made[number % len(made)]
        command.reset()
        pid = child(lambda command=command: _interruptible(command.arguments, said))
        time.sleep(random.uniform(0, 1.2 * lengths[command.name]))
        started = time.monotonic()
        os.kill(pid, signal.SIGINT)
        code = wait(pid)
        took = time.monotonic() - started
        case = f"seed {seed}, Ctrl-C {number}: {command.name}"
        tally.add(case, _answer(command, code, took, said))
    return tally


def _interruptible(arguments: Sequence[str], said: Path) -> int:
    """A command whose errors go to a file; Ctrl-C counts only while it runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not by their numbers: pytest has streams of its own in a test.
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(said, "w", buffering=1)  # noqa: SIM115
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = cli.main(list(arguments))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return code
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        frames = traceback.extract_tb(error.__traceback__)
        inside = any("domerge_fast" in frame.filename for frame in frames)
        # Nobody can catch what comes before the first statement.
        return ESCAPED if inside and frames[-1].name != "main" else 130


def _answer(command: Command, code: int | None, took: float, said: Path) -> str:
    found, left = command.found(), judge.hidden(command.output.parent)
    lines = said.read_text().splitlines() if said.exists() else []
    if found not in ("old", "new") or left:
        return f"!{found}, left {left}"
    if took > ANSWER_SECONDS:
        return f"!answered after {took:.2f} s"
    if code == 0:
        return "had ended" if found == "new" else "!exit code 0, and nothing was written"
    if code in (-signal.SIGINT, 130) and not lines and found == "old":
        return "had not begun"
    if code != cli.INTERRUPTED or len(lines) != 1:
        return f"!exit code {code}: {lines[-3:]}"
    if ("nothing was written" in lines[0]) != (found == "old"):
        return f"!the output is {found}, but it says {lines[0]!r}"
    return f"interrupted, {found} output"


def writers(folder: Path, seed: int, count: int) -> Tally:
    """Two commands at once on one output: whole in the end, and what was promised is in it."""
    made = {command.name: command for command in commands(folder / "writers", wide=4)}
    tally = Tally()
    for number in range(count):
        name = ("overwrite", "add", "merge")[number % 3]
        command = made[name]
        command.reset()
        codes = _two(command, Random(f"{seed} writers {number}"))
        case = f"seed {seed}, writers {number}: {name}, exit codes {codes}"
        left = judge.hidden(command.output.parent)
        if left or not set(codes) <= {0, 2} or 0 not in codes:
            tally.add(case, f"!left {left}")
        elif name == "add":
            steps = len(json.loads((command.output / STATE).read_text())["steps"])
            right = steps == 1 + codes.count(0)
            tally.add(case, "both in, or one refused" if right else f"!{steps} adapters are in it")
        else:
            found = command.found()
            tally.add(case, "whole" if found == "new" else f"!{found}")
    return tally


def _two(command: Command, random: Random) -> list[int | None]:
    reading, writing = os.pipe()

    def work(delay: float) -> int:
        os.close(writing)
        os.read(reading, 1)
        time.sleep(delay)
        return judge.run(*command.arguments).code

    delays = [random.uniform(0, 0.01) for _ in range(2)]
    pids = [child(lambda delay=delay: work(delay)) for delay in delays]
    os.close(writing)  # both go on: there is nobody left who could write
    codes = [wait(pid) for pid in pids]
    os.close(reading)
    return codes


def _length(command: Command) -> float:
    """Seconds that the command takes."""
    samples = []
    for _ in range(3):
        command.reset()
        started = time.monotonic()
        code = wait(child(lambda: judge.run(*command.arguments).code))
        samples.append(time.monotonic() - started)
        if code:
            raise RuntimeError(f"{command.name} fails when left alone")
    return statistics.median(samples)
