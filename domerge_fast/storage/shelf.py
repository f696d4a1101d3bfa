"""What is kept of every module until the whole model is known: in memory, or in a file."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from typing import IO, Any

from torch import Tensor

from ..errors import OutputError

__all__ = ["Shelf"]

MOST_BYTES = 256 << 20
"""What is kept in memory."""
MOST_IN_FILE = 4 << 30
"""What there is room for in the file; more goes there only where it cannot be left out."""
FREE = 2
"""How many times that much is to be free on its disk."""


class _Pickler(pickle.Pickler):
    """Writes of tensors that share memory each one's own part: pickle alone would write all of it
    with every one."""

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, Tensor) and thing.untyped_storage().nbytes() > thing.nbytes:
            return thing.clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


class Shelf:
    """Objects by name, each taken back once. Those beyond `most_bytes` are in a temporary file
    without a name, which is gone with this object or the process."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._used = most_bytes, 0
        self._here: dict[str, Any] = {}
        self._there: dict[str, int] = {}
        self._file: IO[bytes] | None = None

    def has_room(self, size: int) -> bool:
        """Whether there is room for so many bytes: in memory, or in the file."""
        if self._used + size <= self._most:
            return True
        written = self._file.seek(0, 2) if self._file else 0
        free = shutil.disk_usage(tempfile.gettempdir()).free
        return written + size <= MOST_IN_FILE and FREE * size <= free

    def put(self, name: str, thing: Any, size: int) -> None:
        """size: bytes that it takes. OutputError where there is no room."""
        if self._used + size <= self._most:
            self._used += size
            self._here[name] = thing
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="domerge-")  # noqa: SIM115
            self._there[name] = self._file.seek(0, 2)
            _Pickler(self._file).dump(thing)
            self._file.flush()
        except OSError as error:
            problem = f"no room for intermediate results ({error.strerror})"
            remedy = "make room, or name another folder with TMPDIR"
            raise OutputError(tempfile.gettempdir(), problem, remedy) from error

    def has(self, name: str) -> bool:
        return name in self._here or name in self._there

    def take(self, name: str) -> Any:
        """What was put there under the name."""
        if name in self._here:
            return self._here.pop(name)
        assert self._file
        self._file.seek(self._there.pop(name))
        # Written by this process, and seen by nobody else.
        return pickle.load(self._file)
