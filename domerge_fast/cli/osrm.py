"""domerge-fast osrm: adapters to start training from, and projections of trained ones, that other
tasks' texts hardly excite."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, printable
from . import shared, streams

if TYPE_CHECKING:
    from ..osrm.init import Initial
    from ..osrm.project import Projected

__all__ = ["COMMAND"]


def fill(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION", parser_class=type(parser))
    init = actions.add_parser("init", help="write what an adapter starts training from")
    init.add_argument("model", metavar="MODEL", help="the base model: a causal model's folder")
    init.add_argument("--task", help="the one to be trained (default: each, in OUT/TASK)")
    help = "linear layers, by the ends of their names"
    init.add_argument("--target-modules", nargs="+", required=True, metavar="NAME", help=help)
    init.add_argument("--rank", type=int, default=16, help="of the adapter (default: 16)")
    init.add_argument("--alpha", type=float, default=32, help="of the adapter (default: 32)")
    help = "project: at random off where the others have energy; smallest: where they have least"
    init.add_argument("--avoid", default="project", help=help)
    help = "for project: the share of the others' energy that is avoided (default: 0.99)"
    init.add_argument("--energy", type=float, default=0.99, help=help)
    help = "moments, or mean: off each task's mean alone, for comparison"
    init.add_argument("--statistic", default="moments", help=help)
    help = "of the rows of A: unit (1), or kaiming (0.577, as PEFT draws them)"
    init.add_argument("--norm", default="unit", help=help)
    init.add_argument("--seed", type=int, default=0, help="decides what is left open")
    init.set_defaults(run=_init, parser=init)
    project = actions.add_parser("project", help="take out of a trained adapter what they excite")
    project.add_argument("adapter", metavar="ADAPTER", help="a PEFT adapter of linear layers")
    help = "of 'osrm features', in place of --model and --texts"
    project.add_argument("--features", metavar="FILE", help=help)
    project.add_argument("--model", help="the base model: a causal model's folder")
    project.add_argument("--task", help="the adapter's own, if it is among the texts")
    help = "share of the others' energy that is taken out (default: 0.9)"
    project.add_argument("--energy", type=float, help=help)
    project.add_argument("-k", type=int, help="number of directions, in place of a share")
    project.set_defaults(run=_project, parser=project)
    features = actions.add_parser("features", help="write what layers are given by task, to a file")
    features.add_argument("model", metavar="MODEL", help="the base model: a causal model's folder")
    help = "linear layers, by the ends of their names"
    features.add_argument("--target-modules", nargs="+", required=True, metavar="NAME", help=help)
    features.set_defaults(run=_features, parser=features)
    for action in (init, project, features):
        help = "a task and its file of texts, one a line; for every task"
        needed = action is not project
        action.add_argument(
            "--texts", action="append", required=needed, metavar="TASK=FILE", help=help
        )
        help = "texts of a task, the first of its file (default: 256)"
        action.add_argument("--samples", type=int, default=256, help=help)
        action.add_argument("--length", type=int, default=128, help="tokens of a text, at most")
        help = "for the sums, as 4GiB; less takes more passes over the texts"
        action.add_argument("--max-memory", default="4GiB", help=help)
        shared.add_output(action)
        shared.add_json(action)
        shared.add_verbose(action)


def _files(texts: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        task, equals, file = text.partition("=")
        if not (task and equals and file):
            raise OptionError("texts", f"{text!r} is no TASK=FILE", "say, for one, law=law.txt")
        if task in found:
            raise OptionError("texts", f"{task!r} is given twice", "put its texts into one file")
        found[task] = file
    return found


def _given(args: argparse.Namespace) -> tuple[dict[str, Any], Any, Any]:
    """The options of the API, the model, and the batches."""
    from ..osrm.texts import batches_of, load_model, load_tokenizer

    given = shared.given(args)
    files, name = _files(given.pop("texts")), given.pop("model")
    tokenizer = load_tokenizer(name)
    batches = batches_of(tokenizer, files, given.pop("samples"), given.pop("length"))
    return given, load_model(name), batches


def _init(args: argparse.Namespace) -> int:
    from ..osrm.init import osrm_init, osrm_init_all

    given, model, batches = _given(args)
    if given["task"] is None:
        del given["task"]
        made = osrm_init_all(model, batches, output=args.output, **given)
    else:
        made = {given["task"]: osrm_init(model, batches, output=args.output, **given)}
    plain = {
        task: {
            "output": str(one.path),
            "tokens": dict(one.tokens),
            "modules": {name: dataclasses.asdict(x) for name, x in one.modules.items()},
        }
        for task, one in made.items()
    }
    shared.show(args, plain, lambda: _lines(list(made.values())))
    return 0


def _lines(made: Sequence[Initial]) -> Iterator[str]:
    head = ("task", "layers", "energy of the others'", "of its own")
    rows = [
        (
            printable(one.task),
            str(len(one.modules)),
            *(_mean([getattr(x, key) for x in one.modules.values()]) for key in ("others", "own")),
        )
        for one in made
    ]
    yield from streams.table([head, *rows], names=0)
    yield from streams.wrap("energy that A lets through, where random rows have 1")
    yield from (f"written to {printable(str(one.path))}" for one in made)


def _mean(values: Sequence[float | None]) -> str:
    known = [x for x in values if x is not None]
    return f"{sum(known) / len(known):.3g}" if known else ""


def _features(args: argparse.Namespace) -> int:
    from ..osrm.project import osrm_save_features

    given, model, batches = _given(args)
    made = osrm_save_features(model, batches, output=args.output, **given)
    plain = {"output": str(made), "tasks": [*batches]}
    shared.show(args, plain, lambda: [f"written to {printable(str(made))}"])
    return 0


def _project(args: argparse.Namespace) -> int:
    from ..osrm.project import osrm_project

    of_file, of_model = bool(args.features), bool(args.model and args.texts)
    if of_file == of_model or (of_file and (args.model or args.texts)):
        problem = "are needed, or a model with texts, and not both"
        raise OptionError("features", problem, "give --features, or --model and --texts")
    asked = {name: getattr(args, name) for name in ("energy", "k", "output", "overwrite", "force")}
    if args.features:
        made = osrm_project(args.adapter, args.features, task=args.task, **asked)
    else:
        made = _of_texts(args, asked)
    plain = {
        "output": args.output,
        "kept": made.kept,
        "modules": {name: dataclasses.asdict(x) for name, x in made.modules.items()},
    }
    kept = f"{100 * made.kept:.1f} % of ||ΔW||² is left of {len(made.modules)} layers"
    shared.show(args, plain, lambda: [kept, f"written to {printable(args.output)}"])
    return 0


def _of_texts(args: argparse.Namespace, asked: dict[str, Any]) -> Projected:
    """With what a model's layers are given, of one input at a time."""
    from .. import load, options
    from ..osrm.project import energies, projected

    given, model, batches = _given(args)
    adapter = load(args.adapter)
    most = options.size("max_memory", given["max_memory"]) or 0
    found = energies(model, batches, [*adapter.modules], args.task, most)
    return projected(adapter, found, **asked)


COMMAND = shared.Command("osrm", "keep adapters off other tasks' inputs", fill, _init)
