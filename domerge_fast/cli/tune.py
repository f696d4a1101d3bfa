"""domerge-fast tune: a merge whose size is found on a text, for causal language models."""

from __future__ import annotations

import argparse
import sys
import typing

from ..errors import printable
from . import flags, shared, streams

if typing.TYPE_CHECKING:
    from ..learning.learned import Progress

__all__ = ["COMMAND"]

_MERGE = ("rank", "energy", "form", "format", "base", "dtype", "overwrite", "force")


def fill(parser: argparse.ArgumentParser) -> None:
    known = flags.known()
    shared.add_sources(parser, "no progress, no summary")
    shared.add_output(parser)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="the base model, with its tokenizer")
    more = "text that the merge is for, in UTF-8; several count alike"
    add("--text", required=True, nargs="+", metavar="FILE", help=more)
    tunable = ", ".join(name for name in known.methods if name != "auto")
    add("--method", default="tsvm", help=f"{tunable} (default: tsvm)")
    add("--evaluations", type=int, default=8, help="merges that are tried (default: 8)")
    add("--length", type=int, default=256, help="tokens of a passage (default: 256)")
    add("--passages", type=int, default=16, help="of each text, evenly spread (default: 16)")
    groups = 'patterns of modules that get a factor each, or "adapters"; 4 more merges each'
    add("--groups", nargs="+", default=(), metavar="PATTERN", help=groups)
    add("--rank", type=int, help="truncate every module to this rank (default: exact)")
    add("--energy", type=float, help="truncate to the least rank that keeps this share")
    add("--form", default="adapter", help=f"{', '.join(known.forms)} (default: adapter)")
    add("--format", help=f"how that is stored, of: {', '.join(known.formats)}")
    add("--base", metavar="FOLDER", help="the base model, for the form model")
    add("--dtype", help="float32, bfloat16 or float16 (default: that of the inputs)")
    shared.add_json(parser)
    flags.add_method_options(parser, known.options)


def run(args: argparse.Namespace) -> int:
    from ..learning import causal
    from ..learning.tune import tune
    from ..sessions.prepare import prepare

    given = shared.given(args)
    asked = {name: given.pop(name) for name in _MERGE}
    asked = {name: value for name, value in asked.items() if value is not None}
    folder, files = given.pop("model"), given.pop("text")
    length, most = given.pop("length"), given.pop("passages")
    evaluations, groups = given.pop("evaluations"), given.pop("groups")
    device = causal.place(given["device"])
    prepared = prepare(given.pop("adapters"), given.pop("method"), scale="auto", **given)
    model, tokenizer = causal.loaded(folder, device)
    found = tune(
        prepared,
        model,
        causal.passages(files, tokenizer, length, most),
        evaluations=evaluations,
        groups="adapters" if list(groups) == ["adapters"] else groups,
        progress=_progress(args),
    )
    report = found.save(args.output, **asked).report
    first, last = found.history[0].mean, min(step.mean for step in found.history)
    told = f"loss {first:.4f} as it was prepared, {last:.4f} as it is written"
    ended = ", ended by Ctrl-C" if found.interrupted else ""
    written = f"written to {printable(args.output)}"
    plain = report.to_dict() | {
        "output": args.output,
        "losses": [step.losses for step in found.history],
        "coefficients": found.coefficients.tolist(),
        "interrupted": found.interrupted,
    }
    if not args.quiet or args.json:
        lines = f"{told} ({len(found.history)} tried{ended})"
        shared.show(args, plain, lambda: [*streams.table(report.summary()), lines, written])
    return 0


def _progress(args: argparse.Namespace) -> Progress | None:
    if args.quiet or not sys.stderr.isatty():
        return None
    return lambda step, left: streams.tell(
        f"{step.number + 1} tried, loss {step.mean:.4f}, at most {left:.0f} s left"
    )


COMMAND = shared.Command("tune", "merge adapters, and find the size on a text", fill, run)
