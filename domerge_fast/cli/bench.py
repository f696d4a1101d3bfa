"""domerge-fast bench: the ops beside what this machine could reach."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Iterator

from . import shared, streams

if typing.TYPE_CHECKING:
    from ..bench.measure import Result

__all__ = ["COMMAND"]

DISAGREES = 1


def fill(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapters", nargs="*", metavar="ADAPTER", help="a PEFT adapter folder to measure with")
    usual = "adapters made in memory, as llama3-8b-8 (the default); a wrong name lists all"
    add("--workload", metavar="NAME", help=usual)
    add("--modules", type=int, metavar="N", help="only the first N (default: all that fit)")
    again = "a backend to measure, may be given again (default: all but reference)"
    add("--backend", action="append", default=[], metavar="NAME", dest="backends", help=again)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    add("--repeat", type=int, default=5, metavar="N", help="samples of a figure (default: 5)")
    shared.add_json(parser)
    add("--save-json", metavar="FILE", dest="to_json", help="write every figure")
    add("--plot", metavar="FILE", dest="to_plot", help="write a roofline and bars as PNG")
    add("--profile", metavar="FILE", help="write a Chrome trace of one merge")


def run(args: argparse.Namespace) -> int:
    from ..bench.command import bench

    tell = sys.stderr.isatty()
    result = bench(**shared.given(args), say=_say if tell else lambda what: None)
    if tell:
        _say("")
    shared.show(args, result.to_dict(), lambda: _lines(result))
    for backend, reason in result.refused.items():
        message = f"backend {backend!r} disagrees with the reference ({reason}): no figures for it"
        streams.tell(f"domerge-fast: error: {message}")
    return DISAGREES if result.refused else 0


def _lines(result: Result) -> Iterator[str]:
    for text in result.summary():
        yield from streams.wrap(text)
    if result.rows:
        yield from ("", *streams.table(result.table()))


def _say(what: str) -> None:
    """What is being done, in place of what was said before."""
    print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


SUMMARY = "measure the ops beside what this machine could reach"
COMMAND = shared.Command("bench", SUMMARY, fill, run)
