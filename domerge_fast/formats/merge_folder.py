"""What all formats of a written merge have in common."""

from __future__ import annotations

import contextlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ..errors import OutputError
from ..results.card import CARD, Heading, model_card
from ..results.report import Report
from ..storage.folder import whole_output
from ..storage.marker import all_marked, is_marked
from ..storage.replacing import Replacing, check_apart, check_path, is_same
from .target import Target

__all__ = ["MergeFolder"]

Folder = TypeVar("Folder", bound="MergeFolder")

SUFFIXES = (".safetensors", ".gguf")
"""Of names that mean a file, not a folder."""


class MergeFolder(ABC):
    """A merge written module by module. The folder appears when `finish` was called and the block
    ends without an error; otherwise nothing does.

    names: patterns of the file names of the format. file: of a format that is one file, its name in
    a folder. Where the path ends as that does, it is the file itself (`is_file`), without a card.
    is_ours: of a format without safetensors and GGUF files, which have our mark: whether a folder,
    or the file, is as this package has written it, so that `overwrite` replaces it.
    """

    heading: Heading
    notes: tuple[str, ...] = ()
    """What the report has to say of the form."""
    is_placed: bool = False
    """Whether all modules have their places in the files from the start: several processes may then
    add modules, in any order. `begin` is for the first of them, `attached` for each."""
    is_attached: bool = False
    """Whether another process has begun the files that are opened."""
    add: Callable[..., None]
    """Write one module: its name, and what the form keeps of it (A and B, or ΔW)."""

    def __init__(
        self,
        path: Path,
        target: Target,
        overwrite: bool,
        force: bool,
        names: Collection[str],
        file: str | None = None,
        is_ours: Callable[[Path], bool] | None = None,
    ) -> None:
        check_path(path)
        self.is_file = _names_file(path, file)
        self._check_inputs(path, target)
        self._target = target
        is_ours = is_ours or (is_marked if self.is_file else all_marked)
        self.replacing = Replacing(overwrite, force, names, is_ours, self.is_file)
        self._whole = whole_output(path, self.replacing)

    def _check_inputs(self, path: Path, target: Target) -> None:
        """OutputError where something would be written over an adapter or into its folder."""
        if self.is_file and any(is_same(path, file.path) for file in target.files):
            raise OutputError(str(path), "is one of the adapters to merge", "give another file")
        for folder in () if self.is_file else target.inputs:
            check_apart(path, folder, "one of the adapters to merge")

    def __enter__(self: Folder) -> Folder:
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(self._whole)
            self._open(self._folder, stack)
            self._opened = stack.pop_all()
        return self

    @contextlib.contextmanager
    def begun(self, folder: Path) -> Iterator[None]:
        """In a folder that somebody else puts in its place, or in a file: begin the files, and
        close them when the block ends."""
        self._folder = folder
        with contextlib.ExitStack() as files:
            self._open(folder, files)
            yield

    @contextlib.contextmanager
    def attached(self, folder: Path) -> Iterator[None]:
        """The same with files that have been begun, where all modules have their places."""
        self.is_attached = True
        with self.begun(folder):
            yield

    def noted(self) -> Any:
        """What `finish` has to know of the modules added since this was asked for last, as lists,
        dicts, texts and numbers, for `take_note`."""
        return None

    def take_note(self, noted: Any) -> None:
        """Of what was noted elsewhere."""
        assert noted is None

    @abstractmethod
    def _open(self, folder: Path, files: contextlib.ExitStack) -> None:
        """Start the files that modules are added to; they are closed with `files`. folder: the file
        itself where `is_file`."""

    @abstractmethod
    def finish(self, report: Report) -> None:
        """Write everything but the modules, which have all been added."""

    def _write_json(self, name: str, value: Mapping[str, object]) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        (self._folder / name).write_text(text + "\n", encoding="utf-8")

    def _write_card(self, report: Report) -> None:
        if self.is_file:
            return
        base = self._target.config["base_model_name_or_path"]
        card = model_card(self.heading, report, None if base is None else str(base))
        # Names of adapters may come from anywhere, and hold what UTF-8 cannot.
        (self._folder / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return self._opened.__exit__(kind, error, trace)


def _names_file(path: Path, file: str | None) -> bool:
    """Whether an output is the one file of its format, by its name. OutputError for a file's name
    where the format is a folder."""
    if os.path.isdir(path):
        return False
    if file is None and path.suffix in SUFFIXES:
        remedy = "give a folder, or name a format that is one file (domerge-fast formats)"
        if path.suffix == ".gguf":
            remedy = "give a folder, or say format='gguf' (--format gguf)"
        raise OutputError(str(path), "is the name of a file, and a folder is written", remedy)
    return file is not None and path.suffix == Path(file).suffix
