"""domerge-fast merge: adapters in, one out."""

from __future__ import annotations

import argparse
import os
import typing
from collections.abc import Sequence
from pathlib import Path

from ..errors import OptionError, OutputError, printable
from ..storage import json_file, side_file
from . import flags, shared, streams

if typing.TYPE_CHECKING:
    from ..recipe import Recipe

__all__ = ["COMMAND", "add_dry_run", "merged"]


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
    rules = 'of modules by name: a JSON list of {"modules": PATTERN, …} (docs/recipes.md)'
    add("--rules", type=_rules, default=(), metavar="JSON", help=rules)
    add("--base", metavar="FOLDER", help="the base model, e.g. for the form model")
    add("--whole", default="auto", help="of tensors saved whole: auto, drop or from:NAME")
    add("--max-device-memory", metavar="SIZE", help="of the device, e.g. 4GiB")
    add("--dtype", help="float32, bfloat16 or float16 (default: that of the inputs)")
    saved = "write the recipe, which 'domerge-fast run' repeats, as YAML"
    add("--save-recipe", metavar="FILE", help=saved)
    add_dry_run(parser)
    shared.add_json(parser)
    flags.add_method_options(parser, known.options)


def _scale(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, and not auto") from None


def _rules(text: str) -> object:
    try:
        return json_file.parse(text.encode())
    except json_file.BadJson as error:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no JSON ({error})") from None


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    help = "say what will be read, written and taken, and write nothing"
    parser.add_argument("--dry-run", action="store_true", help=help)


def run(args: argparse.Namespace) -> int:
    from ..recipe import Recipe

    if args.save_recipe is not None:
        _check_saved(args)
    given = shared.given(args)
    adapters = given.pop("adapters")
    recipe = Recipe.make(**{k: v for k, v in given.items() if k not in _BESIDE})
    return merged(args, recipe, adapters)


_BESIDE = ("overwrite", "force", "max_device_memory", "dry_run", "save_recipe")


def merged(args: argparse.Namespace, recipe: Recipe, adapters: Sequence[str] | None) -> int:
    """Merge as a recipe says, or tell what that takes."""
    from .. import api

    most = args.max_device_memory
    if args.dry_run:
        found = api.estimate(recipe, adapters, max_device_memory=most)
        shared.show(args, found.plain(), lambda: streams.table(found.summary()))
        return 0
    done = api.run(
        recipe,
        adapters,
        max_device_memory=most,
        progress=shared.shows_progress(args),
        output=args.output,
        overwrite=args.overwrite,
        force=args.force,
    )
    if getattr(args, "save_recipe", None) is not None:
        _save(args.save_recipe, done.report.recipe)
    if not args.quiet or args.json:
        written = f"written to {printable(args.output)}"
        plain = done.report.to_dict() | {"output": args.output}
        shared.show(args, plain, lambda: [*streams.table(done.report.summary()), written])
    return 0


def _check_saved(args: argparse.Namespace) -> None:
    """Before anything is merged."""
    side_file.check(args.save_recipe)
    if args.dry_run:
        raise OptionError("save_recipe", "a dry run writes nothing", "leave one of them out")
    if os.path.lexists(args.save_recipe) and not args.overwrite:
        raise OutputError(args.save_recipe, "is there already", "say --overwrite, or another name")


def _save(path: str, recipe: Recipe) -> None:
    """With the paths of the adapters and the base from anywhere."""
    from ..storage import yaml_file

    plain = recipe.absolute().plain()
    with side_file.told(path):
        Path(path).write_text(yaml_file.text(plain), encoding="utf-8")


COMMAND = shared.Command("merge", "merge adapters into one", fill, run)
