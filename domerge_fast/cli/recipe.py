"""domerge-fast recipe: what a merge was made by."""

from __future__ import annotations

import argparse

from . import shared

__all__ = ["COMMAND"]


def fill(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION", parser_class=type(parser))
    show = actions.add_parser("show", help="print the recipe of a merge, to be run again")
    show.add_argument(
        "recipe", metavar="MERGED", help="a merge (folder or file), its card, or a recipe"
    )
    show.set_defaults(run=_show, parser=show)
    shared.add_json(show)
    shared.add_verbose(show)


def _show(args: argparse.Namespace) -> int:
    from ..recipe import Recipe, plain_of
    from ..storage import yaml_file

    plain = Recipe.of_plain(plain_of(args.recipe)).plain()
    shared.show(args, plain, lambda: yaml_file.text(plain).splitlines())
    return 0


COMMAND = shared.Command("recipe", "show what a merge was made by", fill, _show)
