"""domerge-fast convert: an adapter in another format."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Iterator

from ..errors import printable
from . import flags, shared

if typing.TYPE_CHECKING:
    from ..api import Conversion

__all__ = ["COMMAND"]


def fill(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="a folder or file")
    shared.add_output(parser)
    add("--format", help=f"of: {', '.join(flags.known().formats)}")
    shared.add_runtime(parser, required=False)
    add("--whole", default="auto", help="of tensors saved whole: auto or drop")
    add("--dtype", help="float32, bfloat16 or float16 (default: as it is)")
    add("--base", metavar="FOLDER", help="the base model, where a runtime wants to know of it")
    add("--base-model", help="the name of the base model, where names of modules leave it open")
    add("-q", "--quiet", action="store_true", help="no summary")
    shared.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from .. import api

    given = shared.given(args)
    done = api.convert(given.pop("adapter"), args.output, **given)
    if not args.quiet or args.json:
        shared.show(args, done.plain(), lambda: _lines(done, args.output))
    return 0


def _lines(done: Conversion, output: str) -> Iterator[str]:
    yield from shared.notes(done.notes)
    yield f"{done.modules} modules written to {printable(output)} ({done.format})"


COMMAND = shared.Command("convert", "write an adapter in another format", fill, run)
