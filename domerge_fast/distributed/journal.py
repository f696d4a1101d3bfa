"""What is found of every unit, in a file that has its name from the moment that it is whole: of a
job that is stopped, what is in there is not done again."""

from __future__ import annotations

import contextlib
import io
import os
import time
from pathlib import Path
from typing import Any

import torch

from ..storage.resumable import put

__all__ = ["Journal", "shown"]

SHOW_SECONDS = 60.0
"""What a network file system may take to show another machine a new file."""


class Journal:
    """Entries by pass and unit, in a folder: tensors, numbers, texts, and lists, tuples and dicts
    of these. OSError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def known(self, of_pass: str) -> set[int]:
        """The units of a pass that are there."""
        names = (name.split("-") for name in os.listdir(self.folder))
        return {int(x[1]) for x in names if len(x) == 2 and x[0] == of_pass and x[1].isdecimal()}

    def put(self, of_pass: str, unit: int, entry: Any) -> None:
        buffer = io.BytesIO()
        torch.save(entry, buffer)
        put(self._path(of_pass, unit), buffer.getvalue())

    def get(self, of_pass: str, unit: int) -> Any:
        """An entry that is known to be there."""
        return torch.load(shown(self._path(of_pass, unit)), weights_only=True)

    def _path(self, of_pass: str, unit: int) -> Path:
        return self.folder / f"{of_pass}-{unit}"


def shown(path: Path) -> Path:
    """A file that somebody has written, when it can be seen from here."""
    end = time.monotonic() + SHOW_SECONDS
    while not os.path.exists(path) and time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            os.listdir(path.parent)  # so that it is looked for again
        time.sleep(0.05)
    return path
