"""domerge-fast run: the merge that a recipe says, or a card."""

from __future__ import annotations

import argparse
import dataclasses

from .. import options
from ..errors import OptionError
from . import merge, shared

__all__ = ["COMMAND"]


def fill(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="YAML or JSON, a card, or a merge (folder or file)")
    add("--adapters", metavar="DIR", help="below which adapters are found by their files' sums")
    add("--base", metavar="FOLDER", help="the base model, in place of the recipe's")
    add("-o", "--output", metavar="OUT", help="folder or file to write")
    shared.add_replacing(parser)
    add("--backend", help="in place of the recipe's")
    add("--device", help="in place of the recipe's")
    add("-q", "--quiet", action="store_true", help="no progress, no summary")
    merge.add_beside(parser, "the recipe's")


def run(args: argparse.Namespace) -> int:
    from ..recipe import REPORTS, Recipe

    if args.output is None and not args.dry_run:
        raise OptionError("output", "is not given", "say where to write (-o OUT), or --dry-run")
    merge.check_beside(args)
    if args.report is not None:
        options.choose("report", args.report, REPORTS)
    recipe = Recipe.read(args.recipe, args.adapters, args.base)
    given = {name: getattr(args, name) for name in ("backend", "device", "report")}
    recipe = dataclasses.replace(recipe, **{k: v for k, v in given.items() if v is not None})
    return merge.merged(args, recipe, None)


SUMMARY = "merge as a recipe says, or the card of another merge"
COMMAND = shared.Command("run", SUMMARY, fill, run)
