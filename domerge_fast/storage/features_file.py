"""What the layers of a base model are given, by task, in one safetensors file: C = Σ x xᵀ / Σ xᵀx
[n, n] over the tokens x of a task, float32, once for all layers that share an input.

The tensor of input i and task j is called "i.j"; the metadata says what these are, as JSON.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DomergeError, OptionError, some
from .folder import whole_output
from .input_file import InputFile
from .marker import is_marked
from .replacing import Replacing
from .safetensors_file import FileTensor, SafetensorsFile
from .stream import SafetensorsWriter

__all__ = ["FeaturesFile", "Given", "write"]

SAID = "domerge_fast_features"
FORMAT = 1
REMEDY = "give a file that 'domerge-fast osrm features' wrote"

Given = tuple[Sequence[str], int]
"""The layers that share an input, and its n."""


class FeaturesFile:
    """tasks: their names. inputs: the number of the input of every layer. The sum over the tasks is
    kept of the input that was asked for last. OptionError for a file that is no such one, or
    changes while it is read."""

    def __init__(self, path: Path) -> None:
        refuse = functools.partial(_refusal, str(path))
        file = SafetensorsFile(path, refuse)
        self._tensors = file.tensors()
        self.input: InputFile = file.input
        try:
            said = json.loads(file.metadata[SAID])
            layers, self.tasks = said["inputs"], tuple(said["tasks"])
            self.inputs: dict[str, int] = {name: k for k, own in enumerate(layers) for name in own}
            shapes = [self._one(k, j).shape for k in range(len(layers)) for j in self.tasks]
        except (KeyError, ValueError, TypeError) as error:
            raise refuse("holds no inputs of layers by task", REMEDY) from error
        self._last: tuple[int, Tensor] | None = None
        if said.get("format") != FORMAT or any(len(x) != 2 or x[0] != x[1] for x in shapes):
            raise refuse("is damaged, or of another version", REMEDY)

    def others(self, layer: str, task: str | None) -> Tensor:
        """The mean of C over all tasks but one, [n, n] in float32; None: over all. OptionError for
        a layer that the file has nothing of, and where there is no other task."""
        if layer not in self.inputs:
            problem = f"has nothing of {layer!r}, but of {some([*self.inputs], 3)}"
            raise self.input.refuse(problem, "name all modules of the adapters when it is made")
        number, others = self.inputs[layer], [x for x in self.tasks if x != task]
        if not others:
            raise self.input.refuse(f"is of {task!r} alone", "give one of other tasks, too")
        if self._last is None or self._last[0] != number:
            self._last = number, self._total(number, layer)
        total = self._last[1]
        if task is not None and task in self.tasks:
            total = total - self._one(number, task).read()
        return (total / len(others)).float()

    def _total(self, number: int, layer: str) -> Tensor:
        """The sum over all tasks, in float64: what is left without one of them has its digits."""
        total = self._one(number, self.tasks[0]).read().double()
        for task in self.tasks[1:]:
            total += self._one(number, task).read()
        if not bool(total.isfinite().all()):
            raise self.input.refuse(f"has NaN or infinite values before {layer!r}", REMEDY)
        return total

    def _one(self, number: int, task: str) -> FileTensor:
        return self._tensors[f"{number}.{self.tasks.index(task)}"]


def write(
    path: Path,
    tasks: Sequence[str],
    given: Sequence[Given],
    found: Iterable[Mapping[str, Tensor]],
    overwrite: bool,
    force: bool,
) -> None:
    """Write C [n, n] by task of every input, in the order of `given`, as they are found: whole or
    not at all. OutputError."""
    sizes = {
        f"{k}.{j}": (torch.float32, (n, n))
        for k, (_, n) in enumerate(given)
        for j in range(len(tasks))
    }
    said = {"format": FORMAT, "tasks": [*tasks], "inputs": [[*names] for names, _ in given]}
    text = json.dumps(said, ensure_ascii=False)
    replacing = Replacing(overwrite, force, (), is_marked, file=True)
    with (
        whole_output(path, replacing) as fresh,
        SafetensorsWriter(fresh, sizes, 2 * len(json.dumps(text)) + 64) as writer,
    ):
        for k, of_tasks in enumerate(found):
            for j, task in enumerate(tasks):
                writer.add(f"{k}.{j}", of_tasks[task].float().cpu().contiguous())
        writer.describe({SAID: text})


def _refusal(path: str, problem: str, remedy: str) -> DomergeError:
    return OptionError("features", f"{path!r} {problem}", remedy)
