"""An output that is written by a job which may be stopped and started again: what it has done is
kept in the hidden folder beside the output (workplace.py), and gone on with by the same job.

In that folder lie `new`, what is written, and `job`, what is known of it: `plan.json`, which is
written when all is there that several processes need, says what job this is; the other files are
the job's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import OutputError, OutputWarning
from . import json_file
from .folder import Writing
from .replacing import Replacing, cannot_write, check_path

__all__ = ["Resumable", "put"]

JOB, PLAN = "job", "plan.json"


class Resumable:
    """One output, by one process: `open`; then `start`, unless it `goes_on` or `is_written`; and in
    the end `commit` and `finish`, or `give_up`. `let_go` leaves all as it is for the next one that
    opens it. They raise OutputError, or OSError where files cannot be written."""

    def __init__(self, target: Path, replacing: Replacing) -> None:
        check_path(target)
        self._writing = Writing(target, replacing)
        self._shown = target
        self.job = self._writing.hidden / JOB
        self.fresh = self._writing.fresh
        """The folder or the file that will take the target's place."""
        self.goes_on = self.is_written = False
        """Whether another run has begun it; and whether that one has put it in its place."""
        self.kept: Mapping[str, Any] = {}
        """What the first run has said at its start."""

    def open(self, identity: Mapping[str, Any]) -> None:
        """Lock the output, and see what is there. identity: what job this is, as JSON, by what
        people call its parts. OutputError where another job has left something."""
        self._writing.lock()
        found = self._left()
        if found is None:
            self._begin()
            return
        self._check(found["identity"], identity)
        self.kept = found["kept"]
        self.is_written = _number(self._shown) == found["number"]
        if not self.is_written:
            self._writing.go_on()
            self.goes_on = True

    def _begin(self) -> None:
        try:
            self._writing.begin()
            os.mkdir(self.job, 0o700)
        except BaseException:
            self._writing.undo()
            raise

    def start(self, identity: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
        """When all is there that is there from the start. kept: what later runs are told."""
        self._writing.flush()
        plan = {"identity": identity, "kept": kept, "number": _number(self.fresh)}
        put(self.job / PLAN, json.dumps(plan).encode())
        self.kept = kept

    def commit(self) -> None:
        """Put what is new in the target's place."""
        try:
            self._writing.commit()
        except BaseException:
            if not self._writing.is_committed():
                raise

    def finish(self) -> None:
        """Remove all but the output; last what tells that it was this job's."""
        with contextlib.suppress(OSError):  # told with the rest
            for name in os.listdir(self.job):
                if name != PLAN:
                    os.unlink(self.job / name)
        self._writing.finish()

    def give_up(self) -> None:
        """Remove all that was made. An OutputWarning tells what could not be."""
        if left := self._writing.undo():
            problem = f"was not written, but {left}"
            warnings.warn(OutputWarning(str(self._shown), problem, "remove that"), stacklevel=2)

    def let_go(self) -> None:
        self._writing.let_go()

    def cannot_write(self, error: OSError) -> OutputError:
        """That error in a line; what is done is kept."""
        kept = f"what is done is kept in {self.job.parent.name!r} beside it, for the same job"
        return cannot_write(self._shown, error, kept)

    def _left(self) -> dict[str, Any] | None:
        """What another run has written of itself."""
        try:
            found = json_file.parse((self.job / PLAN).read_bytes())
        except FileNotFoundError:
            return None
        except json_file.BadJson:
            found = None
        if not isinstance(found, dict) or not found.keys() >= {"identity", "kept", "number"}:
            raise self._other("is damaged")
        return found

    def _check(self, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for part in now:
            if then.get(part) != now[part]:
                raise self._other(f"had other {part}")

    def _other(self, what: str) -> OutputError:
        problem = f"a job that was stopped has begun it, and {what}"
        remedy = f"start that one again, or remove {self.job.parent.name!r} beside it"
        return OutputError(str(self._shown), problem, remedy)


def put(path: Path, data: bytes) -> None:
    """Write a file that is whole and on the disk from the moment that it has its name. OSError."""
    beside = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _number(path: Path) -> int | None:
    """Of the file or folder that has the name."""
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None
