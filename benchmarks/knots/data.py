"""The rows of a task, in its validation and its test split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knots_sets import TESTS, Task, order
from models import library

from domerge_fast.errors import OptionError

VALIDATION, TEST = "validation", "test"
Rows = Any
"""A datasets.Dataset."""


def load(name: str, task: Task, folder: Path | None) -> dict[str, Rows]:
    """Validation and test rows of a task, from folder/name where that is, else from the hub."""
    local = folder is not None and (folder / name).exists()
    source = (str(folder / name),) if local else task.source
    if not source:
        problem = f"has no {name!r}, of which no copy with these splits is known"
        raise OptionError("data", problem, "put one there, as README.md says")
    datasets = library("datasets", "datasets")
    try:
        found = datasets.load_dataset(*source)
    except (OSError, RuntimeError, ValueError) as error:
        problem = f"{name!r} cannot be loaded from {' '.join(source)} ({error})"
        raise OptionError("data", problem, "put a copy there, as README.md says") from error
    needed = {task.part} if task.held else {VALIDATION, TEST}
    if lacking := sorted(needed - set(found)):
        problem = f"{name!r} has no split {lacking[0]!r}"
        raise OptionError("data", problem, "add it, as README.md says")
    return divide(name, task, {part: labelled(task, found[part]) for part in needed})


def labelled(task: Task, rows: Rows) -> Rows:
    """Sentence pairs with the task's three classes as labels, without rows of any other label."""
    if not task.labels:
        return rows
    texts, label = rows.select_columns(list(task.columns)), list(rows["label"])
    kept = [k for k, value in enumerate(label) if value in task.labels]
    classes = [task.labels[label[k]] for k in kept]
    return texts.select(kept).add_column("label", classes)


def divide(name: str, task: Task, found: Mapping[str, Rows]) -> dict[str, Rows]:
    """Validation and test rows: as they are, or a share of `task.part` and its rest."""
    if not task.held:
        return {part: found[part] for part in (VALIDATION, TEST)}
    rows = found[task.part]
    if name not in TESTS:
        seed = 42 if task.shuffled else None
        both = rows.train_test_split(task.held, shuffle=task.shuffled, seed=seed)
        return {VALIDATION: both["test"], TEST: both["train"]}
    if len(rows) != TESTS[name]:
        problem = f"{name!r} has {len(rows)} rows in {task.part!r}, and the set {TESTS[name]}"
        raise OptionError("data", problem, "put a whole copy there, in its published order")
    held = int(task.held * len(rows))
    return {VALIDATION: rows.select(order(name)[:held]), TEST: rows.select(order(name)[held:])}
