"""What every process does of a merge: the first reads what the adapters are and begins the output,
all merge, the first puts it in its place."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pickle
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..adapters import Adapter
from ..errors import AdapterError, DomergeError, Elsewhere
from ..formats.merge_folder import MergeFolder
from ..job import Done, Job, Progress
from ..merged import Merged
from ..planning import plan_job
from ..reading import Source, opened
from ..recipe import Recipe
from ..storage.digests import sha256
from ..storage.input_file import InputFile
from ..storage.replacing import cannot_write
from ..storage.resumable import Resumable, put
from .group import Group, Stop
from .identity import identity
from .journal import Journal, shown
from .places import Place, place_of
from .shared import Shared, SharedPass

__all__ = ["Asked", "Work"]

ADAPTERS, SUMS = "adapters", "sums"


@dataclass(frozen=True)
class Asked:
    """The arguments of a merge."""

    recipe: Recipe
    path: Path
    overwrite: bool
    force: bool
    verify: bool
    most: int | str | None
    unit_bytes: int

    def job(self, adapters: list[Adapter]) -> tuple[Job, MergeFolder]:
        """What is done, and how it is written; nothing is touched yet."""
        job = plan_job(self.recipe, adapters, self.most)
        job = dataclasses.replace(job, verify=self.verify)
        assert job.format.write
        return job, job.format.write(self.path, job.target, self.overwrite, self.force)


class Work:
    """Of one process: `first` or `other`, and if that raises, `stopped`."""

    def __init__(self, group: Group, asked: Asked) -> None:
        self._group, self._asked = group, asked
        self._output: Resumable | None = None
        self._keeps = False

    def first(self, sources: Iterable[Source], progress: Progress) -> Merged:
        adapters = _on_disk(opened(sources))
        job, folder = self._asked.job(adapters)
        known = identity(job, self._asked.unit_bytes)
        output = self._open(folder, known)
        journal = Journal(output.job)
        place = place_of(job, folder, output.fresh, journal)
        if not (output.goes_on or output.is_written):
            output.start(known, {"threads": torch.get_num_threads(), "begun": place.begin()})
        self._say(adapters, output, known)
        with _threads(output.kept["threads"]), _opened(place, output.is_written):
            done, shared, sums = self._merged(job, place, journal, output.is_written, progress)

            def report() -> Any:
                return job.report_beside(folder, done, sums)

            flushed = [x for one in shared.writing for x in one.beside]
            begun = output.kept["begun"]
            made = report() if output.is_written else place.finish(begun, flushed, report)
        if not output.is_written:
            job.check_inputs()
            self._keeps = True
            output.commit()
        self._group.leave()
        output.finish()
        return Merged(made, job.target, {}, self._asked.path, refit=job.refit)

    def other(self, progress: Progress) -> None:
        said = json.loads(self._group.begun())
        fresh, folder_of_job = Path(said["fresh"]), Path(said["job"])
        data = shown(folder_of_job / ADAPTERS).read_bytes()
        if hashlib.sha256(data).hexdigest() != said["sum"]:
            raise DomergeError("what the process of rank 0 has read arrives damaged; start again")
        job, folder = self._asked.job(pickle.loads(data))  # as rank 0 has written it
        for part, mine in identity(job, self._asked.unit_bytes).items():
            if mine != said["identity"][part]:
                problem = f"the process of rank {self._group.rank} has other {part} than that of 0"
                raise DomergeError(f"{problem}; start all alike, on machines of one kind")
        journal = Journal(folder_of_job)
        place = place_of(job, folder, fresh, journal)
        with _threads(said["threads"]), _opened(place, said["written"]):
            self._merged(job, place, journal, said["written"], progress)
        self._group.finished()
        self._group.leave()

    def stopped(self, error: BaseException) -> BaseException:
        """Tell the others, and clear away what nobody needs. What to raise."""
        if isinstance(error, OSError):
            error = self._cannot_write(error)
            self._keeps = True
        keeps = self._keeps or not isinstance(error, DomergeError)
        with contextlib.suppress(dist.DistError):  # whoever has the store may have gone
            if why := self._group.stopped:
                keeps = why.keeps
                error = error if isinstance(error, KeyboardInterrupt) else Elsewhere(why.line)
            elif not isinstance(error, KeyboardInterrupt):
                self._group.stop(Stop(_line(error), keeps))
            if not keeps:
                self._group.all_left()
        if self._output:
            if keeps:
                self._output.let_go()
            else:
                self._output.give_up()
        return error

    def _open(self, folder: MergeFolder, known: dict[str, Any]) -> Resumable:
        output = Resumable(self._asked.path, folder.replacing)
        try:
            output.open(known)
        except BaseException:
            output.let_go()
            raise
        self._output = output
        return output

    def _say(self, adapters: list[Adapter], output: Resumable, known: dict[str, Any]) -> None:
        """What the others need to know. The adapters go by a file: the store takes no large texts;
        they load it only if it is what is said here."""
        pickled = pickle.dumps(adapters, pickle.HIGHEST_PROTOCOL)
        put(output.job / ADAPTERS, pickled)
        said = {
            "job": str(output.job.resolve()),
            "fresh": str(output.fresh.resolve()),
            "sum": hashlib.sha256(pickled).hexdigest(),
            "identity": known,
            "threads": output.kept["threads"],
            "written": output.is_written,
        }
        self._group.tell("begun", json.dumps(said))

    def _merged(
        self, job: Job, place: Place, journal: Journal, is_written: bool, progress: Progress
    ) -> tuple[Done, Shared, _Sums]:
        """All modules, and the sums of all files, by all processes."""
        take, flush = (_drop, _drop) if is_written else (place.take, place.flush)
        shared = Shared(self._group, journal, self._asked.unit_bytes, flush)
        files = job.files
        sizes = [float(file.size) for file in files]
        summing = SharedPass(self._group, journal, SUMS, sizes, reads=self._group.is_first)

        def add_up(chosen: Iterable[int]) -> None:
            for k in chosen:
                summing.done(k, sha256(files[k]))

        rounds = summing.rounds()
        with ThreadPoolExecutor(1, "domerge-sums") as thread:
            first = thread.submit(add_up, next(rounds))
            done = job.merge(take, True, progress, shared)
            first.result()
        for chosen in rounds:
            add_up(chosen)
        return done, shared, _Sums(dict(zip(files, summing.results())))

    def _cannot_write(self, error: OSError) -> DomergeError:
        if self._output:
            return self._output.cannot_write(error)
        kept = "what is done is kept beside it, for the same job"
        return cannot_write(self._asked.path, error, kept)


@dataclass(frozen=True)
class _Sums:
    known: dict[InputFile, str]

    def of(self, files: Iterable[InputFile]) -> dict[str, str]:
        return {file.path.name: self.known[file] for file in files}


def _on_disk(adapters: list[Adapter]) -> list[Adapter]:
    """AdapterError for one that other processes cannot read."""
    for adapter in adapters:
        if not adapter.inputs:
            remedy = "save it, and give its folder"
            raise AdapterError(adapter.name, None, "is in the memory of one process", remedy)
    return adapters


def _drop(what: object) -> None:
    """Of an output that is complete: what is found of it may be gone, and is found again."""


def _line(error: BaseException) -> str:
    return str(error) if isinstance(error, DomergeError) else f"{type(error).__name__}: {error}"


def _opened(place: Place, is_written: bool) -> contextlib.AbstractContextManager[None]:
    """The place, to be written to; nothing more comes to one that is complete."""
    return contextlib.nullcontext() if is_written else place.opened()


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads in all processes: some results depend on it in their last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
