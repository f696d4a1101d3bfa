"""domerge-fast streamed: a merge of adapters that are read in batches, which goes on with more."""

from __future__ import annotations

import argparse
import dataclasses

from . import shared, streams

__all__ = ["COMMAND"]


def fill(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION", parser_class=type(parser))
    start = actions.add_parser("start", help="start a merge of no adapters yet")
    start.add_argument("folder", metavar="STATE", help="folder to write")
    start.add_argument("--gamma", type=float, default=1.0, help="as for the method do")
    start.add_argument("--tol", type=float, default=1e-3, help="as for the method do")
    start.add_argument("--base-model", help="the base model, where the configs disagree")
    start.add_argument("--whole", default="auto", help="tensors saved whole: auto, drop, from:NAME")
    shared.add_replacing(start)
    start.set_defaults(run=_start, parser=start)
    add = actions.add_parser("add", help="add adapters, all or none")
    add.add_argument("folder", metavar="STATE", help="folder of the merge")
    add.add_argument("adapters", nargs="+", metavar="ADAPTER", help="a folder or file")
    add.add_argument("--weight", type=float, default=1.0, help="of each (default: 1)")
    add.set_defaults(run=_add, parser=add)
    save = actions.add_parser("save", help="write the merge")
    save.add_argument("folder", metavar="STATE", help="folder of the merge")
    shared.add_output(save)
    save.add_argument("--scale", type=shared.scale, help="factor on the merge, or auto (default)")
    save.add_argument("--rank", type=int, help="truncate every module to this rank")
    save.add_argument("--form", default="adapter", help="adapter or deltas")
    save.add_argument("--format", help="of what is written (domerge-fast formats)")
    save.add_argument("--dtype", help="float32, bfloat16 or float16 (default: that of the inputs)")
    save.set_defaults(run=_save, parser=save)
    for action in (start, add, save):
        shared.add_json(action)
        shared.add_verbose(action)


def _start(args: argparse.Namespace) -> int:
    from ..sessions.streamed import Streamed

    given = shared.given(args)
    Streamed.start(given.pop("folder"), **given)
    shared.show(args, {"folder": args.folder}, list)
    return 0


def _add(args: argparse.Namespace) -> int:
    from ..engine.streamed import estimated
    from ..sessions.streamed import Streamed

    weights = [args.weight] * len(args.adapters)
    found = Streamed.open(args.folder).add_all(args.adapters, weights)
    line = (
        f"{found.adapters} adapters added, those before read again for {found.again} modules; left "
        f"to the optimum, as estimated: {estimated(found.left, found.few)}"
    )
    plain = {"folder": args.folder, **dataclasses.asdict(found)}
    shared.show(args, plain, lambda: streams.wrap(line))
    return 0


def _save(args: argparse.Namespace) -> int:
    from ..sessions.streamed import Streamed

    given = shared.given(args)
    report = Streamed.open(given.pop("folder")).save(args.output, **given).report
    shared.show_written(args, report)
    return 0


COMMAND = shared.Command("streamed", "merge adapters in batches, by do", fill, _start)
