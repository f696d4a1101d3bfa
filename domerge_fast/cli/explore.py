"""domerge-fast explore: a page with sliders for a merge, on this machine."""

from __future__ import annotations

import argparse
import contextlib
import typing
from pathlib import Path

from ..errors import DomergeError, OptionError, OutputError
from . import shared, streams

if typing.TYPE_CHECKING:
    from ..explore.trial import Trial

__all__ = ["COMMAND"]


def fill(parser: argparse.ArgumentParser) -> None:
    shared.add_sources(parser, "only the address is printed")
    add = parser.add_argument
    add("--port", type=int, default=0, help="of 127.0.0.1 (default: any that is free)")
    add("--folder", default=".", metavar="DIR", help="where merges are saved (default: here)")
    add("--model", metavar="FOLDER", help="a base model with its tokenizer, that writes texts")
    help = "text whose loss is shown, in UTF-8; several are shown one by one"
    add("--text", nargs="+", metavar="FILE", default=(), help=help)
    add("--length", type=int, default=128, help="tokens of a passage (default: 128)")
    add("--passages", type=int, default=4, help="of each text, evenly spread (default: 4)")


def run(args: argparse.Namespace) -> int:
    try:
        from ..explore.explorer import Explorer
        from ..explore.serve import serve
    except ImportError as error:
        problem = f"a page with sliders needs more ({error}); pip install 'domerge-fast[explore]'"
        raise DomergeError(problem) from error
    if args.text and not args.model:
        raise OptionError("model", "is not given, and losses are a model's", "give it too")
    folder = Path(args.folder)
    if not folder.is_dir():
        raise OutputError(args.folder, "is no folder", "make it first")
    given = {"backend": args.backend, "device": args.device, "base_model": args.base_model}
    if not args.quiet:
        streams.tell("reading the adapters …")
    explorer = Explorer(args.adapters, folder, _trial(args), **given)
    with contextlib.closing(explorer), contextlib.suppress(KeyboardInterrupt):
        serve(explorer, args.port, lambda address: _tell(args, address))
    return 0


def _trial(args: argparse.Namespace) -> Trial | None:
    from ..explore.trial import Trial
    from ..learning import causal

    if not args.model:
        return None
    model, tokenizer = causal.loaded(args.model, causal.place(args.device))
    data = causal.passages(args.text, tokenizer, args.length, args.passages)
    return Trial(model, tokenizer, data)


def _tell(args: argparse.Namespace, address: str) -> None:
    more = [] if args.quiet else ["Open it in a browser on this machine; Ctrl-C ends it."]
    streams.show([address, *more])


COMMAND = shared.Command("explore", "open a page with sliders for a merge", fill, run)
