"""Merges that all processes of a job call together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .. import options
from ..costs import UNIT_BYTES
from ..job import Progress
from ..merged import Merged
from ..reading import Source
from ..recipe import Recipe
from .group import Group, joined
from .work import Asked, Work

__all__ = ["merge", "run"]


def merge(
    adapters: Iterable[Source],
    method: str = "auto",
    *,
    output: str | os.PathLike[str],
    overwrite: bool = False,
    force: bool = False,
    verify: bool = False,
    max_device_memory: int | str | None = None,
    progress: Progress = False,
    unit_bytes: int = UNIT_BYTES,
    **given: Any,
) -> Merged | None:
    """`domerge_fast.merge` into an output by all processes of a job, each of which calls this.

    The processes are those of torch.distributed's process group where there is one, else those that
    torchrun has started. They need the same files under the same paths, and one instruction set or
    kind of GPU; with device "cuda" each takes the GPU of its number on its machine. The output has
    the same bytes whatever the number of processes.

    A job that was stopped goes on where it was when it is started again, with any number of
    processes; one of other adapters, options or versions is refused until what the first one has
    left is removed.

    unit_bytes: of factors that a process takes at once. progress: of this process alone. All other
    arguments are those of `domerge_fast.merge`. Returns the merge in the process of rank 0, None in
    the others, when the output is in its place. Raises as `merge` does, in all processes, and
    AdapterError for an adapter that is not on disk.
    """
    return run(
        Recipe.make(method=method, **given),
        adapters,
        output=output,
        overwrite=overwrite,
        force=force,
        verify=verify,
        max_device_memory=max_device_memory,
        progress=progress,
        unit_bytes=unit_bytes,
    )


def run(
    recipe: Recipe,
    adapters: Iterable[Source] | None = None,
    *,
    output: str | os.PathLike[str],
    overwrite: bool = False,
    force: bool = False,
    verify: bool = False,
    max_device_memory: int | str | None = None,
    progress: Progress = False,
    unit_bytes: int = UNIT_BYTES,
) -> Merged | None:
    """`domerge_fast.run` into an output by all processes of a job; the rest as of `merge`."""
    sources = [x.name for x in recipe.adapters] if adapters is None else adapters
    path = options.folder("output", output)
    asked = Asked(recipe, path, overwrite, force, verify, max_device_memory, unit_bytes)
    with joined() as group, _own_gpu(group, recipe):
        work = Work(group, asked)
        try:
            if group.is_first:
                return work.first(sources, progress)
            work.other(progress)
        except BaseException as error:
            if group.is_first or not group.is_finished:
                raise work.stopped(error) from error
        return None


@contextlib.contextmanager
def _own_gpu(group: Group, recipe: Recipe) -> Iterator[None]:
    """Where "cuda" is asked for, that is the GPU of this process."""
    if recipe.device != "cuda" or not torch.cuda.is_available():
        yield
        return
    with torch.cuda.device(group.local % torch.cuda.device_count()):
        yield
