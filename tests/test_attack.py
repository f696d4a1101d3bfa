"""The attacks, a few of each; and that they find what is planted."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from attack import faults, interrupts, judge, mutants, together
from attack.runs import commands

from domerge_fast.cli import main as cli
from domerge_fast.storage import folder as folders

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's system calls")


def test_damaged_files_are_refused_or_merged_to_what_they_say(tmp_path: Path) -> None:
    tally = mutants.attack(tmp_path, seed=7, count=60)
    assert tally.findings == []
    assert sum(tally.endings.values()) == 60
    assert tally.endings["refused"] > 10


def test_failing_calls_leave_the_old_output_or_the_new_one(tmp_path: Path) -> None:
    tally = faults.attack(tmp_path, seed=7, count=12)
    assert tally.findings == []
    assert sum(tally.endings.values()) == 12


@pytest.mark.parametrize(
    "attack", [interrupts.kills, together.kills, interrupts.interrupts, interrupts.writers]
)
def test_a_command_may_end_at_any_time(attack, tmp_path: Path) -> None:
    tally = attack(tmp_path, seed=7, count=4)
    assert tally.findings == []
    assert sum(tally.endings.values()) == 4


def _crash(arguments: list[str]) -> int:
    print("Traceback: something", file=sys.stderr)
    return 1


def _leave(arguments: list[str]) -> int:
    folder = Path(
        arguments[arguments.index("-o") + 1] if "-o" in arguments else arguments[2]
    ).parent
    (folder / ".left.partial").touch()
    return REAL(arguments)


def _write_nothing(arguments: list[str]) -> int:
    return 0


def _double(arguments: list[str]) -> int:
    if arguments[0] == "merge" and "linear" in arguments:
        return REAL([*arguments, "--scale", "2"])
    return REAL(arguments)


REAL = cli.main


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        (_crash, "exit code 1"),
        (_leave, "left ['.left.partial']"),
        (_write_nothing, "exit code 0"),
        (_double, "off by"),
        (lambda arguments: os._exit(3), "the process died (3)"),
    ],
)
def test_a_planted_fault_is_found(planted, found, tmp_path: Path, monkeypatch) -> None:
    real = mutants.each

    def each(*args):
        monkeypatch.setattr(cli, "main", planted)
        return real(*args)

    monkeypatch.setattr(mutants, "each", each)
    tally = mutants.attack(tmp_path, seed=1, count=48)
    assert any(found in finding for finding in tally.findings), tally.findings


def test_a_torn_output_is_found(tmp_path: Path, monkeypatch) -> None:
    command = commands(tmp_path, wide=1)[1]
    real = folders._swap

    def swap(fresh: Path, target: Path) -> None:
        with open(next(target.glob("*.safetensors")), "r+b") as file:
            file.write(b"torn")
        real(fresh, target) if target.name != "out" else os._exit(0)

    monkeypatch.setattr(folders, "_swap", swap)
    pid = os.fork()
    if not pid:
        judge.run(*command.arguments)
        os._exit(1)
    os.waitpid(pid, 0)
    assert command.found().startswith("torn")
