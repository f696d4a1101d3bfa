"""Lets the disk begin while more is computed, so that the flush at the end finds little to do."""

from __future__ import annotations

import ctypes
from io import FileIO

__all__ = ["STEP_BYTES", "begin_flush"]

STEP_BYTES = 64 << 20
"""Written to a file between two calls."""

_WRITE = 2  # SYNC_FILE_RANGE_WRITE

_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def begin_flush(file: FileIO) -> bool:
    """Start to write to the disk what the file holds so far, without waiting for the end of it.

    False where the system or the file system does not: `os.fsync` does all of it then, and errors
    are found by that.
    """
    return _sync_file_range is not None and _sync_file_range(file.fileno(), 0, 0, _WRITE) == 0
