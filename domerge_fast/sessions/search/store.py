"""The study of a search: in memory, or in a journal that several processes share and that outlives
them.

A journal is a file of JSON lines, to which Optuna appends. Beside it lies a folder with a file for
each worker, who holds its lock: trials of a worker without one are put back in the queue, with
what was found of them so far, by whoever comes next. Optuna keeps the state of CMA-ES there as a
pickle: open only journals that you trust.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from ... import options
from ...errors import OptionError
from ._optuna import optuna
from .locks import Worker, is_alive, locked
from .space import Choice

__all__ = ["LOST", "Store"]

NAME = "domerge_fast"
ASKED = "search"
LOST = "lost"
WORKER = "worker"
_FORMAT = 1

State = optuna.trial.TrialState
Sampler = optuna.samplers.BaseSampler


class Store:
    """A study, and this process's part in it. Close it, so that others see who is left."""

    def __init__(
        self, path: str | os.PathLike[str] | None, objectives: int, asked: Mapping[str, Any]
    ) -> None:
        """asked: what makes the trials of two searches comparable; OptionError where the study
        in the file has another one."""
        self._folder: Path | None = None
        storage: optuna.storages.BaseStorage = optuna.storages.InMemoryStorage()
        if path is not None:
            file = options.folder("storage", path)
            if not file.parent.is_dir():
                problem = f"there is no folder {str(file.parent)!r}"
                raise OptionError("storage", problem, "make it first")
            self._folder = file.with_name(f"{file.name}.workers")
            self._folder.mkdir(exist_ok=True)
            with self._alone():
                storage = _journal(file)
        with self._alone():
            self.study = _study(storage, objectives)
            self._compare({"format": _FORMAT, **asked})
            self._worker = Worker(self._folder) if self._folder else None

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def enqueue(self, starts: Sequence[Mapping[str, Any]]) -> None:
        """Candidates to begin with, where nothing was tried yet."""
        with self._alone():
            if not self.trials:
                for values in starts:
                    self.study.enqueue_trial(dict(values), skip_if_exists=True)

    def ask(
        self,
        most: int,
        count: int,
        sampler: Callable[[int], Sampler],
        choices: Sequence[Choice],
    ) -> list[tuple[optuna.Trial, dict[str, Any]]]:
        """The next candidates, `count` at most, with their values; fewer, or none, where `most`
        are begun or done. sampler: of the number of trials that there are."""
        found: list[tuple[optuna.Trial, dict[str, Any]]] = []
        with self._alone():
            self._put_back()
            while len(found) < count and self.begun < most:
                self.study.sampler = sampler(len(self.trials))
                trial = self.study.ask()
                if self._worker:
                    trial.set_user_attr(WORKER, self._worker.name)
                found.append((trial, {c.name: _value(trial, c) for c in choices}))
        return found

    def add(self, trial: optuna.trial.FrozenTrial, most: int) -> bool:
        """A trial that was made elsewhere, unless `most` are begun or done."""
        with self._alone():
            if self.begun >= most:
                return False
            self.study.add_trial(trial)
            return True

    @property
    def begun(self) -> int:
        """Trials that are done, or that a living worker is at."""
        return sum(t.state != State.WAITING and LOST not in t.user_attrs for t in self.trials)

    def give_up(self, trials: Sequence[optuna.Trial]) -> None:
        """Put trials that were begun back in the queue."""
        with self._alone():
            numbers = {t.number for t in trials}
            for trial in self.trials:
                if trial.number in numbers and trial.state == State.RUNNING:
                    self._put(trial)

    def close(self) -> None:
        if self._worker:
            with self._alone():
                self._worker.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One worker at a time, where there may be several."""
        if self._folder is None:
            yield
            return
        with locked(self._folder / "lock"):
            yield

    def _put_back(self) -> None:
        """Trials of workers that are dead. In memory there are none."""
        if self._folder is None:
            return
        alive: dict[str, bool] = {}
        for trial in self.trials:
            if trial.state != State.RUNNING:
                continue
            # A worker writes its name under the lock that is held here: without, it is dead.
            name = trial.user_attrs.get(WORKER, "")
            if name not in alive:
                alive[name] = bool(name) and is_alive(self._folder, name)
            if not alive[name]:
                self._put(trial)

    def _put(self, trial: optuna.trial.FrozenTrial) -> None:
        kept = {k: v for k, v in trial.user_attrs.items() if k != WORKER}
        self.study.enqueue_trial(trial.params, user_attrs=kept)
        self.study._storage.set_trial_user_attr(trial._trial_id, LOST, True)
        self.study.tell(trial.number, state=State.FAIL)

    def _compare(self, asked: Mapping[str, Any]) -> None:
        there = self.study.user_attrs.get(ASKED)
        if there is None:
            self.study.set_user_attr(ASKED, asked)
            return
        other = sorted(k for k in {*there, *asked} if there.get(k) != asked.get(k))
        if other:
            problem = f"the study there has other {', '.join(other)}, so its trials do not compare"
            raise OptionError("storage", problem, "choose another file, or search as there")


def _study(storage: optuna.storages.BaseStorage, objectives: int) -> optuna.Study:
    """The study, made where there is none. Optuna's own message of it is kept back."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        return optuna.create_study(
            storage=storage,
            study_name=NAME,
            directions=["maximize"] * objectives,
            load_if_exists=True,
        )
    finally:
        optuna.logging.set_verbosity(before)


def _journal(file: Path) -> optuna.storages.JournalStorage:
    """The storage in a file, without a line that a kill, or a full disk, has left half-written at
    its end. OptionError for a file that is something else, or damaged."""
    text = file.read_bytes() if file.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            is_ours = "op_code" in json.loads(line)
        except (ValueError, TypeError):
            is_ours = False
        if not is_ours:
            problem = f"{str(file)!r} is no journal of a search (line {number})"
            raise OptionError("storage", problem, "choose another file")
    if text and not whole:
        problem = f"{str(file)!r} is no journal of a search"
        raise OptionError("storage", problem, "choose another file")
    if len(whole) < len(text):
        os.truncate(file, len(whole))
    backend = optuna.storages.journal.JournalFileBackend(str(file), lock_obj=_JournalLock(file))
    return optuna.storages.JournalStorage(backend)


class _JournalLock(optuna.storages.journal.JournalFileOpenLock):
    """Optuna's own locks outlive who held them by half a minute."""

    def __init__(self, file: Path) -> None:
        self._path = file.with_name(f"{file.name}.workers") / "journal"
        self._file: FileIO | None = None

    def acquire(self) -> bool:
        self._file = FileIO(str(self._path), "a")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        if self._file is not None:
            self._file.close()


def _value(trial: optuna.Trial, choice: Choice) -> Any:
    if choice.names:
        return trial.suggest_categorical(choice.name, choice.names)
    return trial.suggest_float(choice.name, choice.low, choice.high)
