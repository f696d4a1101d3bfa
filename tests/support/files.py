"""What is in folders, before and after; disks that are full and folders that are locked."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import domerge_fast as dm

from .make import write_pair

PAGE = os.sysconf("SC_PAGE_SIZE")
NOBODY = 65534


def load_bytes(folder: Path) -> bytes:
    """Of an adapter in a folder, its weights."""
    return (folder / "adapter_model.safetensors").read_bytes()


def state(folder: Path) -> dict[str, str]:
    """Every path below a folder, with a hash of what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = state(folder)
    yield
    assert state(folder) == before


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own, mounted with these options (size=, nr_inodes=)."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


@contextlib.contextmanager
def locked_folder(mode: int) -> Iterator[tuple[list[Path], Path]]:
    """A pair of adapters and a folder "locked" with this mode, for a process without privileges."""
    with tempfile.TemporaryDirectory() as name:
        adapters = write_pair(Path(name))
        for path in Path(name).rglob("*"):
            path.chmod(0o755)
        os.chmod(name, 0o755)
        locked = Path(name, "locked")
        locked.mkdir()
        locked.chmod(mode)
        dm.merge(adapters)  # imports what it needs while it may
        before = os.geteuid()
        os.seteuid(before or NOBODY)
        try:
            yield adapters, locked
        finally:
            os.seteuid(before)
            locked.chmod(0o755)
