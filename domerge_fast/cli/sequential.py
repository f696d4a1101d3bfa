"""domerge-fast sequential: a merge that grows by one adapter at a time."""

from __future__ import annotations

import argparse
import dataclasses

from . import shared

__all__ = ["COMMAND"]


def fill(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION", parser_class=type(parser))
    start = actions.add_parser("start", help="start a merge of no adapters yet")
    start.add_argument("folder", metavar="STATE", help="folder to write")
    start.add_argument("--alpha", type=float, default=0.5, help="as for the method opcm")
    start.add_argument("--rank", type=int, help="truncate the sum in every add (default: exact)")
    start.add_argument("--base-model", help="the base model, where the configs disagree")
    start.add_argument("--whole", default="auto", help="tensors saved whole: auto, drop, from:NAME")
    shared.add_replacing(start)
    start.set_defaults(run=_start, parser=start)
    add = actions.add_parser("add", help="add adapters in this order, all or none")
    add.add_argument("folder", metavar="STATE", help="folder of the merge")
    add.add_argument("adapters", nargs="+", metavar="ADAPTER", help="a PEFT adapter folder")
    add.add_argument("--weight", type=float, default=1.0, help="of each (default: 1)")
    add.set_defaults(run=_add, parser=add)
    save = actions.add_parser("save", help="write the merged adapter")
    save.add_argument("folder", metavar="STATE", help="folder of the merge")
    shared.add_output(save)
    save.add_argument("--scale", type=float, default=1.0, help="factor on the merged update")
    save.add_argument("--dtype", help="float32, bfloat16 or float16 (default: that of the inputs)")
    save.set_defaults(run=_save, parser=save)
    for action in (start, add, save):
        shared.add_json(action)
        shared.add_verbose(action)


def _start(args: argparse.Namespace) -> int:
    from ..sessions.sequential import Sequential

    given = shared.given(args)
    Sequential.start(given.pop("folder"), **given)
    shared.show(args, {"folder": args.folder}, list)
    return 0


def _add(args: argparse.Namespace) -> int:
    from ..sessions.sequential import Sequential

    weights = [args.weight] * len(args.adapters)
    steps = Sequential.open(args.folder).add_all(args.adapters, weights)
    plain = {"folder": args.folder, "added": [dataclasses.asdict(step) for step in steps]}
    told = (
        line
        for step in steps
        for line in (
            f"{step.adapter}: norm {step.norm:.4g}, energy kept {100 * step.energy_kept:.2f} %",
            *shared.notes(step.notes),
        )
    )
    shared.show(args, plain, lambda: told)
    return 0


def _save(args: argparse.Namespace) -> int:
    from ..sessions.sequential import Sequential

    given = shared.given(args)
    report = Sequential.open(given.pop("folder")).save(args.output, **given).report
    shared.show_written(args, report)
    return 0


COMMAND = shared.Command("sequential", "merge adapters one at a time, by opcm", fill, _start)
