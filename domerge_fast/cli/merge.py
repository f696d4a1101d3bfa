"""domerge-fast merge: adapters in, one out."""

from __future__ import annotations

import argparse

from ..errors import printable
from . import flags, shared, streams


def fill(parser: argparse.ArgumentParser) -> None:
    known = flags.known()
    shared.add_sources(parser, "no progress, no summary")
    shared.add_output(parser)
    add = parser.add_argument
    add("--method", default="auto", help=f"{', '.join(known.methods)} (default: auto)")
    add("--weights", nargs="+", type=float, metavar="W", help="one an adapter (default: 1 each)")
    found = "factor on the merged update, or auto: found from the adapters (default: auto, but 1 "
    found += "for methods that are a sum or set their norm themselves)"
    add("--scale", type=_scale, default=None, metavar="FACTOR|auto", help=found)
    add("--rank", type=int, help="truncate every module to this rank (default: the method's own)")
    add("--energy", type=float, help="truncate to the least rank that keeps this share")
    add("--ragged", action="store_true", help="write own ranks, not one (--energy implies it)")
    pre, post = ", ".join(known.pre), ", ".join(known.post)
    add("--pre", nargs="+", default=(), metavar="STEP", help=f"before the method, of: {pre}")
    add("--post", nargs="+", default=(), metavar="STEP", help=f"after the method, of: {post}")
    add("--form", default="adapter", help=f"{', '.join(known.forms)} (default: adapter)")
    add("--base", metavar="FOLDER", help="the base model, e.g. for the form model")
    add("--whole", default="auto", help="of tensors saved whole: auto, drop or from:NAME")
    add("--max-device-memory", metavar="SIZE", help="of the device, e.g. 4GiB")
    add("--dtype", help="float32, bfloat16 or float16 (default: that of the inputs)")
    shared.add_json(parser)
    flags.add_method_options(parser, known.options)


def _scale(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, and not auto") from None


def run(args: argparse.Namespace) -> int:
    from .. import api

    given = shared.given(args)
    progress = shared.shows_progress(args)
    merged = api.merge(given.pop("adapters"), output=args.output, progress=progress, **given)
    if not args.quiet or args.json:
        written = f"written to {printable(args.output)}"
        plain = merged.report.to_dict() | {"output": args.output}
        shared.show(args, plain, lambda: [*streams.table(merged.report.summary()), written])
    return 0


COMMAND = shared.Command("merge", "merge adapters into one", fill, run)
