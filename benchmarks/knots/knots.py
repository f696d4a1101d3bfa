"""The evaluation on the KnOTS sets: merges, scored on every task with its own frozen head.

    python benchmarks/knots/knots.py vit-b-32 --adapters adapters --data data --methods do linear \\
        --scales 0.1:3:0.1

README.md says what to download, and what is printed.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from data import TEST, VALIDATION, load
from knots_sets import SETS
from models import Images, Model, Sentences, heads_in
from torch import Tensor
from torch.utils.data import DataLoader

import domerge_fast as dm
from domerge_fast.errors import DomergeError, OptionError


@contextmanager
def added(model: Model, deltas: Mapping[str, Tensor], scale: float) -> Iterator[None]:
    """The model with scale ΔW added to its weights, which are as they were afterwards."""
    weights = {name: model.weight(name) for name in deltas}
    before = {name: weight.clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.copy_(weight.float() + scale * deltas[name].to(weight.device))
    yield
    for name, weight in weights.items():
        weight.copy_(before[name])


class Evaluation:
    """The tasks of a set with their rows, heads and adapters, and a model to score merges with."""

    def __init__(self, args: argparse.Namespace) -> None:
        chosen = SETS[args.set]
        self.base = args.base or chosen.base
        self.tasks = {name: task for name, task in chosen.tasks.items() if name in args.tasks}
        self.adapters = [dm.load(args.adapters / name, name) for name in self.tasks]
        self.rows = {name: load(name, task, args.data) for name, task in self.tasks.items()}
        heads = None if args.heads is None else heads_in(args.heads, self.tasks)
        kind = Images if args.set.startswith("vit") else Sentences
        self.model: Model = kind(self.base, args.device, getattr(torch, args.dtype))
        for module in sorted({name for adapter in self.adapters for name in adapter.modules}):
            self.model.weight(module)  # which refuses those that the base does not have
        self.heads = heads or self.model.heads(self.tasks, self.rows, self.adapters)
        self.loader = {"batch_size": args.batch, "num_workers": args.workers}
        published = {name: chosen.own[name] for name in self.tasks}
        self.own = published if args.own == "published" else self.measured()

    def merge(
        self, adapters: Sequence[dm.Adapter], spec: str, scale: float | None = None
    ) -> tuple[dict[str, Tensor], float]:
        """ΔW of every module and its λ. spec: a method, and its options as JSON after a blank.
        scale: None is the method's own."""
        method, _, text = spec.partition(" ")
        try:
            options = {"form": "deltas", "scale": scale, **json.loads(text or "{}")}
        except (TypeError, ValueError) as error:
            example = "write them as in 'ties {\"density\": 0.2}'"
            raise OptionError("methods", f"{text!r} is no JSON object", example) from error
        merged = dm.merge(adapters, method, whole="drop", base_model=self.base, **options)
        return {name: merged.delta(name) for name in merged.names}, merged.report.scale

    @torch.no_grad()
    def accuracies(
        self, deltas: Mapping[str, Tensor], scale: float, part: str, tasks: Sequence[str] = ()
    ) -> dict[str, float]:
        """In %, by task, of the base with scale ΔW."""
        with added(self.model, deltas, scale):
            return {name: self.accuracy(name, part) for name in tasks or self.tasks}

    def accuracy(self, name: str, part: str) -> float:
        task, rows, right = self.tasks[name], self.rows[name][part], 0
        for inputs, labels in DataLoader(rows, collate_fn=self.model.collate(task), **self.loader):
            logits = self.model.logits(inputs, self.heads[name])
            if task.masked is not None:
                logits[:, task.masked] = -math.inf
            right += int((logits.argmax(1).cpu() == labels).sum())
        return 100 * right / len(rows)

    def measured(self) -> dict[str, float]:
        """Every adapter alone on the test rows of its own task."""
        found: dict[str, float] = {}
        for name, adapter in zip(self.tasks, self.adapters):
            deltas, _ = self.merge([adapter], "linear", 1.0)
            found |= self.accuracies(deltas, 1.0, TEST, [name])
            print(f"own, {name}: {found[name]:.2f} %", file=sys.stderr, flush=True)
        if lost := [name for name, value in found.items() if not value]:
            problem = f"that of {lost[0]!r} gets no test row of its own task right"
            raise OptionError("adapters", problem, "check that base, heads and data belong to it")
        return found

    def normalized(self, accuracies: Mapping[str, float]) -> dict[str, float]:
        """In % of what the adapter of each task gets right."""
        return {name: 100 * value / self.own[name] for name, value in accuracies.items()}

    def score(self, spec: str, deltas: Mapping[str, Tensor], scale: float) -> float:
        """The mean normalized accuracy over the validation rows."""
        found = self.accuracies(deltas, scale, VALIDATION)
        mean = statistics.fmean(self.normalized(found).values())
        print(f"{spec}, scale {scale:g}: {mean:.2f} %", file=sys.stderr, flush=True)
        return mean


def scales(text: str) -> list[float]:
    """START:STOP:STEP, both ends included."""
    try:
        start, stop, step = map(float, text.split(":"))
        found = [round(start + k * step, 10) for k in range(int((stop - start) / step + 1e-6) + 1)]
    except (ValueError, ZeroDivisionError, OverflowError):
        found = []
    if not found:
        raise OptionError("scales", f"{text!r} holds none", "write START:STOP:STEP, as 0.1:1:0.1")
    return found


def search(score: Callable[[float], float], scales: Sequence[float], patience: int) -> float:
    """The best scale: they are tried in order, until so many in a row were below the best. Of
    equal ones, the last; 1 of none."""
    best, highest, left = 1.0, -math.inf, patience
    for scale in scales:
        found = score(scale)
        if found >= highest:
            best, highest, left = scale, found, patience
        elif (left := left - 1) == 0:
            break
    return best


def run(args: argparse.Namespace) -> None:
    """Print the table, row by row."""
    grid = scales(args.scales) if args.scales else []
    bench = Evaluation(args)
    show("test accuracy, %", "scale", *bench.tasks, "average")
    show(*["---"] * (len(bench.tasks) + 3))
    show_accuracies("base", "", bench.accuracies({}, 0.0, TEST))
    show_accuracies(f"each adapter on its own task ({args.own})", "", bench.own)
    for spec in args.methods:
        deltas, scale = bench.merge(bench.adapters, spec, 1.0 if grid else None)
        factor = search(functools.partial(bench.score, spec, deltas), grid, args.patience)
        found = bench.accuracies(deltas, factor, TEST)
        show_accuracies(f"`{spec}`", f"{factor * scale:g}", found)
        show_accuracies(f"`{spec}`, normalized", f"{factor * scale:g}", bench.normalized(found))


def show_accuracies(label: str, scale: str, found: Mapping[str, float]) -> None:
    values = [*found.values(), statistics.fmean(found.values())]
    show(label, scale, *(f"{value:.2f}" for value in values))


def show(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--adapters", type=Path, required=True, help="a folder with one per task")
    parser.add_argument("--data", type=Path, help="a folder with one per task, before the hub")
    parser.add_argument("--heads", type=Path, help="TASK_head.pt in a folder, or a file of all")
    parser.add_argument("--base", help="a folder or another id of the base model")
    parser.add_argument("--methods", nargs="+", default=["do"], metavar="'NAME {JSON OPTIONS}'")
    parser.add_argument(
        "--scales", metavar="START:STOP:STEP", help="to try; else each method's own"
    )
    parser.add_argument("--patience", type=int, default=2, help="scales below the best in a row")
    parser.add_argument("--own", choices=("measured", "published"), default="measured")
    parser.add_argument("--tasks", nargs="+", help="some of the set's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="processes that read rows")
    args = parser.parse_args(arguments)
    known = SETS[args.set].tasks
    args.tasks = args.tasks or list(known)
    if unknown := [name for name in args.tasks if name not in known]:
        parser.error(f"{args.set} has no task {unknown[0]!r}; it has {', '.join(known)}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 after one line on stderr."""
    args = parsed(arguments)
    try:
        run(args)
    except DomergeError as error:
        print(f"knots.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
