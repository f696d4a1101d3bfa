"""What processes give to one output: modules at their places in its files, or kept beside it until
one process writes them in order."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..engine.pipeline import Batch, one_by_one
from ..formats.merge_folder import MergeFolder
from ..job import Job
from ..results.report import Report
from .journal import Journal

__all__ = ["Place", "Unit", "place_of"]

Unit = tuple[str, int]
"""A pass and the number of one of its units."""


class Place(ABC):
    """Takes the modules of one unit after the other. fresh: the new folder or file."""

    def __init__(self, job: Job, folder: MergeFolder, fresh: Path, journal: Journal) -> None:
        self.job, self.folder, self.fresh, self.journal = job, folder, fresh, journal

    @abstractmethod
    def begin(self) -> Any:
        """By one process, before all others. What it returns is for `finish`, as JSON."""

    @abstractmethod
    def opened(self) -> AbstractContextManager[None]:
        """By every process, to give modules."""

    @abstractmethod
    def take(self, batches: Sequence[Batch]) -> None:
        """The sink of a merge."""

    @abstractmethod
    def flush(self, unit: Unit) -> Any:
        """All of a unit was taken, and is now on the disk. What it returns is for `finish`."""

    @abstractmethod
    def finish(
        self, begun: Any, flushed: Sequence[tuple[Unit, Any]], report: Callable[[], Report]
    ) -> Report:
        """By one process, when all modules are there: the rest of the output."""


class _AtOnce(Place):
    """Every module has its place in the files."""

    def begin(self) -> Any:
        with self.folder.begun(self.fresh):
            return self.folder.noted()

    @contextmanager
    def opened(self) -> Iterator[None]:
        self._fresh_sink()
        with self.folder.attached(self.fresh):
            yield

    def take(self, batches: Sequence[Batch]) -> None:
        self._sink(batches)

    def flush(self, unit: Unit) -> Any:
        self._fresh_sink()
        for path in [self.fresh] if self.folder.is_file else self.fresh.iterdir():
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(file)
            finally:
                os.close(file)
        return self.folder.noted()

    def finish(
        self, begun: Any, flushed: Sequence[tuple[Unit, Any]], report: Callable[[], Report]
    ) -> Report:
        for noted in (begun, *(x for _, x in flushed)):
            self.folder.take_note(noted)
        made = report()
        self.folder.finish(made)
        return made

    def _fresh_sink(self) -> None:
        refit, add = self.job.refit, self.folder.add
        self._sink = one_by_one(self.job.plan, refit.sink(add) if refit else add)


class _InTheEnd(Place):
    """Modules are kept as they are merged."""

    def begin(self) -> Any:
        return None

    @contextmanager
    def opened(self) -> Iterator[None]:
        self._kept: list[tuple[str, tuple[Tensor, ...]]] = []
        self._sink = one_by_one(self.job.plan, self._keep)
        yield

    def _keep(self, name: str, *tensors: Tensor) -> None:
        self._kept.append((name, tuple(x.detach().cpu().clone() for x in tensors)))

    def take(self, batches: Sequence[Batch]) -> None:
        self._sink(batches)

    def flush(self, unit: Unit) -> Any:
        of_pass, number = unit
        self.journal.put(f"{of_pass}.modules", number, self._kept)
        self._kept = []

    def finish(
        self, begun: Any, flushed: Sequence[tuple[Unit, Any]], report: Callable[[], Report]
    ) -> Report:
        refit, add = self.job.refit, self.folder.add
        add = refit.sink(add) if refit else add
        with self.folder.begun(self.fresh):
            for (of_pass, number), _ in flushed:
                for name, tensors in self.journal.get(f"{of_pass}.modules", number):
                    add(name, *tensors)
            made = report()
            self.folder.finish(made)
        return made


def place_of(job: Job, folder: MergeFolder, fresh: Path, journal: Journal) -> Place:
    """Of a format in which all modules have their places, at once; what fuses or splits them needs
    several at once, in the end."""
    placed = folder.is_placed and (job.refit is None or job.refit.renames)
    return (_AtOnce if placed else _InTheEnd)(job, folder, fresh, journal)
