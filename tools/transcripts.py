"""Runs the commands that pages show, and puts into the pages what they print.

    python tools/transcripts.py docs/quickstart.md    # rewrites what stands below the commands

In a page, blocks of ```python and ```console are run in their order, in one folder. A line of a
console block that begins with `$ ` is a command: `domerge-fast` with its arguments, where * stands
for any names, `python examples/NAME.py`, or `ls`. What follows, up to the next one, is what it
prints. A page that says `<!-- begins as PAGE -->` has what the first block of that page makes.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from domerge_fast.cli.main import main as domerge

BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.M | re.S)
BEGINS = re.compile(r"^<!-- begins as (\S+) -->$", re.M)
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(str(x.relative_to(ROOT)) for x in ROOT.glob("examples/*.py"))
WIDTH = "80"
"""Columns of what is printed."""


def commands(block: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with what stands below it."""
    for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def answer(command: str) -> str:
    """What a command prints, to either stream, an example to standard output alone; trailing blanks
    of lines are cut off."""
    words = [sorted(glob.glob(x)) if "*" in x else [x] for x in shlex.split(command)]
    program, *arguments = [x for found in words for x in found]
    if program == "ls":
        return "".join(f"{name}\n" for name in sorted(os.listdir(*arguments)))
    if program == "python" and arguments[0] in EXAMPLES:
        script = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
        done = subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True)
        return re.sub(r" +$", "", done.stdout, flags=re.M)
    if program != "domerge-fast":
        raise ValueError(f"{command}: a page shows commands of domerge-fast, examples, and ls")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        domerge(arguments)
    return re.sub(r" +$", "", printed.getvalue(), flags=re.M)


def run(page: str, folder: Path) -> str:
    """The page with what its commands print now, run in `folder` of this process."""
    names: dict[str, object] = {}
    shown = f"{folder.resolve()}{os.sep}"

    def filled(block: re.Match[str]) -> str:
        language, text = block.groups()
        if language == "python":
            exec(text, names)
            return block[0]
        lines = "".join(f"$ {command}\n{answer(command)}" for command, _ in commands(text))
        return f"```console\n{lines.replace(shown, '')}```"

    before = os.getcwd()
    os.chdir(folder)
    try:
        for path in BEGINS.findall(page):
            filled(next(BLOCK.finditer((ROOT / path).read_text(encoding="utf-8"))))
        return BLOCK.sub(filled, page)
    finally:
        os.chdir(before)


def main() -> None:
    os.environ["COLUMNS"] = WIDTH
    for name in sys.argv[1:]:
        path = Path(name)
        with tempfile.TemporaryDirectory() as folder:
            path.write_text(run(path.read_text(encoding="utf-8"), Path(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
