"""What people see in a terminal: colours, lines that fit, and how long it will take."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from support.make import random_factors, write_adapter

import domerge_fast as dm
from domerge_fast.cli import streams

COLOUR = "\x1b["
CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
LONG = "a-very-long-name-of-an-adapter-that-nobody-would-type-" * 3
WIDE = "適応器" * 20


def run(folder: Path, columns: int, *arguments: str, **environment: str) -> tuple[int, str]:
    """`in_terminal`, of domerge-fast."""
    return in_terminal(folder, columns, "-m", "domerge_fast", *arguments, **environment)


def in_terminal(folder: Path, columns: int, *arguments: str, **environment: str) -> tuple[int, str]:
    """The exit code of Python, and what a terminal of so many columns is sent: standard output and
    error."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "TERM")}
    here = str(Path(dm.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        stdout=theirs,
        stderr=theirs,
        env=inherited | {"TERM": "xterm", "PYTHONPATH": here} | environment,
    )
    os.close(theirs)
    pieces: list[bytes] = []
    reader = threading.Thread(target=_read, args=(ours, pieces))
    reader.start()
    code = process.wait()
    reader.join()
    os.close(ours)
    return code, b"".join(pieces).decode()


def _read(end: int, pieces: list[bytes]) -> None:
    while True:
        try:
            piece = os.read(end, 1 << 16)
        except OSError:  # Linux says so when the other end is closed
            return
        if not piece:
            return
        pieces.append(piece)


def shown(text: str) -> list[str]:
    """The lines that are left to see."""
    lines = [
        CONTROL.sub("", line).split("\r")[-1] for line in text.replace("\r\n", "\n").split("\n")
    ]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    shapes = {f"model.layers.{i}.self_attn.q_proj": (16, 24) for i in range(40)}
    for k, name in enumerate((LONG, WIDE, "plain")):
        write_adapter(path / name, random_factors(shapes, 2, seed=k))
    return path


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_and_titles_are_bold(folder, columns):
    code, text = run(folder, columns, "inspect", LONG, WIDE, "plain")
    assert code == 0
    assert max(map(streams.cells, shown(text))) <= columns
    assert f"{COLOUR}1mcosine between the updates" in text
    assert "a-" in text
    assert "…" in text


@pytest.mark.parametrize("given", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_nobody_gets_colours_who_wants_none(folder, given):
    code, text = run(folder, 80, "inspect", "-q", "plain", LONG, **given)
    assert code == 0
    assert COLOUR not in text
    code, text = run(folder, 80, "inspect", "none", **given)
    assert code == 2
    assert COLOUR not in text


def test_a_merge_tells_how_long_it_takes_and_leaves_lines_that_fit(folder):
    code, text = run(folder, 80, "merge", LONG, WIDE, "plain", "-o", "out", "--verify")
    assert code == 0
    assert re.search(r"\d% .* of 80", text)
    lines = shown(text)
    assert max(map(streams.cells, lines)) <= 80
    assert not [line for line in lines if "left" in line and "%" in line and " of 80" in line]
    assert any(line.startswith("verified") for line in lines)


def test_an_error_is_red(folder):
    code, text = run(folder, 80, "inspect", "none")
    assert code == 2
    assert f"domerge-fast: {COLOUR}31merror:{COLOUR}0m adapter 'none'" in text


def test_a_pipe_gets_no_colours(folder):
    done = subprocess.run(
        [sys.executable, "-m", "domerge_fast", "inspect", "plain", LONG],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(dm.__file__).parents[1])},
    )
    assert done.returncode == 0
    assert COLOUR not in done.stdout + done.stderr
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("text", "count"), [("plain", 5), ("適応", 4), ("e\u0301", 1), ("…", 1), ("", 0)]
)
def test_columns_of_a_text(text, count):
    assert streams.cells(text) == count


@pytest.mark.parametrize(
    "name", [LONG, WIDE, "適a" * 40, "ab"], ids=["long", "wide", "mixed", "ab"]
)
@pytest.mark.parametrize("most", [1, 2, 3, 13, 40])
def test_names_lose_their_middle(name, most):
    text = streams.shorten(name, most)
    assert streams.cells(text) <= max(most, 1)
    assert text == name or "…" in text
    if most >= 13 and text != name:
        assert text[0] == name[0]
        assert text[-1] == name[-1]


def test_what_controls_a_terminal_is_escaped():
    lines = streams.table([("a\x1b[31m\u202e", "b\r")], names=0)
    assert lines == ["a\\x1b[31m\\u202e  b\\r"]
    assert streams.wrap("note: \x1b]0;x") == ["note: \\x1b]0;x"]


BAR = """
import sys, time
from domerge_fast.engine.progress_bar import shown

try:
    with shown(True, 448) as show:
        time.sleep(1.2)
        show(1, 448)
        sys.stderr.write("^C")  # as a terminal does
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print("interrupted")
"""


def screen(text: str, columns: int) -> list[str]:
    """The lines that a terminal shows in the end: what is too long goes on in the next one."""
    lines, at = [[" "] * columns], 0
    for letter in text.replace("\r\n", "\n"):
        if letter == "\r":
            at = 0
        elif letter == "\n" or at == columns:
            lines.append([" "] * columns)
            at = 0
        if letter not in "\r\n":
            lines[-1][at] = letter
            at += 1
    return [found for line in lines if (found := "".join(line).rstrip())]


@pytest.mark.parametrize("columns", [80, 200])
def test_ctrl_c_leaves_nothing_of_the_bar(columns, tmp_path):
    code, text = in_terminal(tmp_path, columns, "-c", BAR)
    assert code == 0
    first, *_, last = [x for x in re.split("[\r\n]", text) if "of 448" in x]
    assert first.endswith(" 0 of 448")
    assert re.search(r"1 of 448,  ?0\.\d\d modules/s, \d+:\d\d left", last)
    assert screen(text, columns) == ["interrupted"]
