"""What a format is: how an adapter is stored, or a merge written."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from ..adapters import Adapter
from ..registry import usable
from .merge_folder import MergeFolder
from .target import Target

__all__ = ["Format", "Read", "holds"]


Read = Callable[[Path, str], Adapter]
"""(path, what messages call it) -> the adapter there; made by `from_tensors` or `assemble`, which
do the checks. AdapterError for whatever cannot be merged exactly."""


def _nothing(target: Target, ranks: Collection[int]) -> tuple[str, ...]:
    return ()


def _nowhere(path: Path) -> bool:
    return False


@dataclass(frozen=True)
class Format:
    """A row of `FORMATS`. Its name is what `form` calls a merge that is written so.

    recognises(path): whether what lies there is of this format; quick, raises nothing. read: None
    where it is only written. write(path, target, overwrite, force) -> the folder that a merge is
    written to, module by module; None where it is only read. dense: whether that is given ΔW, not
    A and B. needs_base: whether it is made of the base model (`Target.base`). notes(target, ranks):
    what whoever uses the output has to know, of modules of these ranks.
    """

    name: str
    summary: str
    recognises: Callable[[Path], bool] = _nowhere
    read: Read | None = None
    write: Callable[[Path, Target, bool, bool], MergeFolder] | None = None
    dense: bool = False
    needs_base: bool = False
    notes: Callable[[Target, Collection[int]], tuple[str, ...]] = _nothing
    why_not: Callable[[], str | None] = usable


def holds(path: Path, file: str) -> bool:
    """Whether a folder, or a folder in it, has this file."""
    if not os.path.isdir(path):
        return False
    return os.path.isfile(path / file) or any(map(os.path.isfile, path.glob(f"*/{file}")))
