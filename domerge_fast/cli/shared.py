"""What commands have in common: their options, and how they show what they found."""

from __future__ import annotations

import argparse
import json
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import printable
from ..registry import usable
from . import flags, streams

if typing.TYPE_CHECKING:
    from ..results.report import Interference, Report

__all__ = [
    "Command",
    "add_json",
    "add_output",
    "add_pages",
    "add_replacing",
    "add_runtime",
    "add_sources",
    "add_verbose",
    "check_pages",
    "given",
    "notes",
    "scale",
    "show",
    "show_written",
    "shows_progress",
    "write_pages",
]


@dataclass(frozen=True)
class Command:
    """A command: what it is called, what it does in a few words, its options, and what it runs.

    fill(parser) adds the options; run(args) returns the exit code. Neither imports what only
    another command, or the help, does not need.
    """

    name: str
    summary: str
    fill: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    why_not: Callable[[], str | None] = usable


_OWN = ("run", "parser", "full_parser", "verbose", "quiet", "output", "json", "html", "plots")


def given(args: argparse.Namespace) -> dict[str, Any]:
    """What was given that is an argument of the API."""
    found = {name: value for name, value in vars(args).items() if name not in _OWN}
    if found.get("report") is None:
        found.pop("report", None)
    return found


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Before a command, after it and after its action: `main` sees it wherever it is."""
    help, nothing = "show tracebacks", argparse.SUPPRESS
    parser.add_argument("-v", "--verbose", action="store_true", default=nothing, help=help)


def add_pages(parser: argparse.ArgumentParser) -> None:
    """Pages and pictures of a report."""
    help = "write a page of figures; implies --report details"
    parser.add_argument("--html", metavar="FILE", help=help)
    help = "write the same figures as pictures (PNG); implies --report details"
    parser.add_argument("--plots", metavar="DIR", help=help)


def check_pages(args: argparse.Namespace) -> None:
    """Before anything is computed: where pages and pictures go, what they need of this machine, and
    of the report, where none is asked for."""
    if args.html is not None:
        from ..pages.page import check_html

        check_html(args.html)
    if args.plots is not None:
        from ..pages.plots import check_plots

        check_plots(args.plots)
    if args.report is None and (args.html is not None or args.plots is not None):
        args.report = "details"


def write_pages(args: argparse.Namespace, found: Report | Interference) -> None:
    """Those that were asked for."""
    if args.html is not None:
        from ..pages.page import write_html

        write_html(found, args.html)
    if args.plots is not None:
        from ..pages.plots import write_plots

        write_plots(found, args.plots)


def add_json(parser: argparse.ArgumentParser) -> None:
    help = "print one JSON object in place of what people read"
    parser.add_argument("--json", action="store_true", help=help)


def add_sources(parser: argparse.ArgumentParser, quiet: str) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="a folder or file")
    parser.add_argument("--base-model", help="the base model, where the configs disagree")
    add_place(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help=quiet)


def add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="auto", help="auto, or one that doctor lists")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="folder or file to write"
    )
    add_replacing(parser)


def add_runtime(parser: argparse.ArgumentParser, required: bool) -> None:
    help = f"the program that loads it, of: {', '.join(flags.known().runtimes)} (docs/serving.md)"
    kind = {"dest": "runtime", "metavar": "RUNTIME", "required": required}
    parser.add_argument("--for", "--runtime", help=help, **kind)  # type: ignore[arg-type]


def add_replacing(parser: argparse.ArgumentParser) -> None:
    help = "replace an existing output of domerge-fast"
    parser.add_argument("--overwrite", action="store_true", help=help)
    help = "replace also what others wrote, if all its files have names of the same form"
    parser.add_argument("--force", action="store_true", help=help)


def shows_progress(args: argparse.Namespace) -> bool:
    return not args.quiet and sys.stderr.isatty()


def scale(text: str) -> float | str:
    """Of --scale."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, and not auto") from None


def show(args: argparse.Namespace, plain: Any, lines: Callable[[], Iterable[str]]) -> None:
    """One JSON object where it was asked for, otherwise the lines."""
    streams.show([as_json(plain)] if args.json else lines())


def show_written(args: argparse.Namespace, report: Report) -> None:
    """What was written to `args.output`."""
    plain = report.to_dict() | {"output": args.output}
    written = f"written to {printable(args.output)}"
    show(args, plain, lambda: [*streams.table(report.summary()), written])


def as_json(plain: Any) -> str:
    return json.dumps(plain, indent=2, ensure_ascii=False)


def notes(of: Sequence[str]) -> list[str]:
    return [line for note in of for line in streams.wrap(f"note: {note}")]
