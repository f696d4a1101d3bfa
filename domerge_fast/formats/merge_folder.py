"""What all forms of a written merge have in common."""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from ..results.card import CARD, Heading, model_card
from ..results.report import Report
from ..storage.folder import Replacing, check_apart, check_path, whole_folder
from ..storage.marker import all_marked
from .target import Target

__all__ = ["MergeFolder"]

Folder = TypeVar("Folder", bound="MergeFolder")


class MergeFolder(ABC):
    """A merge written module by module. The folder appears when `finish` was called and the block
    ends without an error; otherwise nothing does.

    names: patterns of the file names of the form.
    """

    heading: Heading
    notes: tuple[str, ...] = ()
    """What the report has to say of the form."""
    add: Callable[..., None]
    """Write one module: its name, and what the form keeps of it (A and B, or ΔW)."""

    def __init__(
        self, path: Path, target: Target, overwrite: bool, force: bool, names: Collection[str]
    ) -> None:
        check_path(path)
        for folder in target.inputs:
            check_apart(path, folder, "one of the adapters to merge")
        self._target = target
        self._whole = whole_folder(path, Replacing(overwrite, force, names, all_marked))

    def __enter__(self: Folder) -> Folder:
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(self._whole)
            self._open(self._folder, stack)
            self._opened = stack.pop_all()
        return self

    @abstractmethod
    def _open(self, folder: Path, files: contextlib.ExitStack) -> None:
        """Start the files that modules are added to; they are closed with `files`."""

    @abstractmethod
    def finish(self, report: Report) -> None:
        """Write everything but the modules, which have all been added."""

    def _write_json(self, name: str, value: Mapping[str, object]) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        (self._folder / name).write_text(text + "\n", encoding="utf-8")

    def _write_card(self, report: Report) -> None:
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
