"""domerge-fast merge: adapters in, one out."""

from __future__ import annotations

import argparse
import os
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import OptionError, OutputError
from ..storage import json_file, side_file
from . import flags, shared, streams

if typing.TYPE_CHECKING:
    from ..merged import Merged
    from ..recipe import Recipe

__all__ = ["COMMAND", "add_beside", "check_beside", "merged"]


def fill(parser: argparse.ArgumentParser) -> None:
    known = flags.known()
    shared.add_sources(parser, "no progress, no summary")
    shared.add_output(parser)
    add = parser.add_argument
    add("--method", default="auto", help=f"{', '.join(known.methods)} (default: auto)")
    add("--weights", nargs="+", type=float, metavar="W", help="one an adapter (default: 1 each)")
    found = "factor on the merged update, or auto: found from the adapters (default: auto, but 1 "
    found += "for methods that are a sum or set their norm themselves)"
    add("--scale", type=shared.scale, default=None, metavar="FACTOR|auto", help=found)
    add("--rank", type=int, help="truncate every module to this rank (default: the method's own)")
    add("--energy", type=float, help="truncate to the least rank that keeps this share")
    add("--ragged", action="store_true", help="write own ranks, not one (--energy implies it)")
    pre, post = ", ".join(known.pre), ", ".join(known.post)
    add("--pre", nargs="+", default=(), metavar="STEP", help=f"before the method, of: {pre}")
    add("--post", nargs="+", default=(), metavar="STEP", help=f"after the method, of: {post}")
    add("--features", metavar="FILE", help="what layers are given by task, for osrm_project")
    share = "share of other tasks' energy that osrm_project takes out (default: 0.9)"
    add("--features-energy", type=float, metavar="SHARE", help=share)
    add("--form", default="adapter", help=f"{', '.join(known.forms)} (default: adapter)")
    formats = f"how that is stored, of: {', '.join(known.formats)} (default: as the adapters are)"
    add("--format", help=formats)
    shared.add_runtime(parser, required=False)
    those = "weights of modules whose names match, in place of --weights; may be given again"
    add("--weights-for", type=_pair, action="append", metavar="PATTERN=W,W", help=those)
    rules = 'of modules by name: a JSON list of {"modules": PATTERN, …} (docs/recipes.md)'
    add("--rules", type=_rules, default=(), metavar="JSON", help=rules)
    add("--base", metavar="FOLDER", help="the base model, e.g. for the form model")
    add("--whole", default="auto", help="of tensors saved whole: auto, drop or from:NAME")
    add("--dtype", help="float32, bfloat16 or float16 (default: that of the inputs)")
    add_beside(parser, "full")
    flags.add_method_options(parser, known.options)


def _pair(text: str) -> tuple[str, list[float]]:
    """A pattern and the weights of the modules that it matches."""
    pattern, _, weights = text.rpartition("=")
    try:
        found = [float(w) for w in weights.split(",")]
    except ValueError:
        found = []
    if not pattern or not found:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is no PATTERN=W,W")
    return pattern, found


def _by_pattern(pairs: Sequence[tuple[str, list[float]]]) -> dict[str, list[float]]:
    found = dict(pairs)
    if len(found) < len(pairs):
        patterns = [pattern for pattern, _ in pairs]
        twice = next(x for x in patterns if patterns.count(x) > 1)
        raise OptionError("weights_for", f"{twice!r} is given twice", "give it once")
    return found


def _rules(text: str) -> object:
    try:
        return json_file.parse(text.encode())
    except json_file.BadJson as error:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no JSON ({error})") from None


def add_beside(parser: argparse.ArgumentParser, report: str) -> None:
    """What may be asked of any merge beside what it is made of. report: which is the usual one."""
    add = parser.add_argument
    said = f"of the adapters, in the report: details, full, norms or none (default: {report})"
    add("--report", help=said)
    shared.add_pages(parser)
    saved = "write the recipe, which 'domerge-fast run' repeats, as YAML"
    add("--save-recipe", metavar="FILE", help=saved)
    add("--max-device-memory", metavar="SIZE", help="of the device, e.g. 4GiB")
    again = "merge some modules again by the reference, and write nothing if they differ"
    add("--verify", action="store_true", help=again)
    dry = "say what will be read, written and taken, and write nothing"
    add("--dry-run", action="store_true", help=dry)
    shared.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..recipe import Recipe

    check_beside(args)
    given = shared.given(args)
    adapters = given.pop("adapters")
    given["weights_for"] = _by_pattern(given["weights_for"] or ())
    recipe = Recipe.make(**{k: v for k, v in given.items() if k not in _BESIDE})
    return merged(args, recipe, adapters)


_BESIDE = ("overwrite", "force", "verify", "max_device_memory", "dry_run", "save_recipe")


def merged(args: argparse.Namespace, recipe: Recipe, adapters: Sequence[str] | None) -> int:
    """Merge as a recipe says, or tell what that takes."""
    from .. import api

    most, together = args.max_device_memory, _has_others()
    is_first = not together or os.environ["RANK"] == "0"
    if args.dry_run:
        if is_first:
            found = api.estimate(recipe, adapters, max_device_memory=most)
            shared.show(args, found.plain(), lambda: streams.table(found.summary()))
        return 0
    run: Callable[..., Merged | None] = api.run
    if together:
        from ..distributed import run
    done = run(
        recipe,
        adapters,
        max_device_memory=most,
        progress=is_first and shared.shows_progress(args),
        output=args.output,
        overwrite=args.overwrite,
        force=args.force,
        verify=args.verify,
    )
    if done is None:  # rank 0 tells of it
        return 0
    if args.save_recipe is not None:
        _save(args.save_recipe, done.report.recipe)
    shared.write_pages(args, done.report)
    if not args.quiet or args.json:
        shared.show_written(args, done.report)
    return 0


def _has_others() -> bool:
    """Whether this is one of the processes of a job, as torchrun or the like starts them."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def check_beside(args: argparse.Namespace) -> None:
    """What is written beside the merge, before anything is merged."""
    for name in ("save_recipe", "html", "plots", "verify"):
        if args.dry_run and getattr(args, name) not in (None, False):
            raise OptionError(name, "a dry run writes nothing", "leave one of them out")
    shared.check_pages(args)
    if args.save_recipe is None:
        return
    side_file.check(args.save_recipe)
    if os.path.lexists(args.save_recipe) and not args.overwrite:
        raise OutputError(args.save_recipe, "is there already", "say --overwrite, or another name")


def _save(path: str, recipe: Recipe) -> None:
    """With the paths of the adapters and the base from anywhere."""
    from ..storage import yaml_file

    plain = recipe.absolute().plain()
    with side_file.told(path):
        Path(path).write_text(yaml_file.text(plain), encoding="utf-8")


COMMAND = shared.Command("merge", "merge adapters into one", fill, run)
