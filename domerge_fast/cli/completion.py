"""domerge-fast completion: a script for a shell, made from the parser."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping

from . import flags, shared

__all__ = ["COMMAND"]

SHELLS = ("bash", "zsh", "fish")
Words = Mapping[str, tuple[str, ...]]
"""By what stands before: a command, or a command and an action, and "" at first."""


def fill(parser: argparse.ArgumentParser) -> None:
    help = 'e.g. eval "$(domerge-fast completion bash)"'
    parser.add_argument("shell", choices=SHELLS, help=help)
    shared.add_json(parser)


def run(args: argparse.Namespace) -> int:
    script = "\n".join(SCRIPTS[args.shell](dict(_words("", args.full_parser())), _values()))
    shared.show(args, {"shell": args.shell, "script": script}, lambda: [script])
    return 0


def _words(before: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What may follow: options and the names of commands or actions."""
    found: list[str] = []
    for action in parser._actions:
        found += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices
            for name, inner in action.choices.items():
                yield from _words(f"{before} {name}".strip(), inner)
        elif not action.option_strings and action.choices:
            found += action.choices
    yield before, tuple(found)


def _values() -> dict[str, tuple[str, ...]]:
    """What may follow an option, where that is a word."""
    known = flags.known()
    inner = tuple(name for name in known.methods if name != "auto")
    of_methods = {f"--{x.name.replace('_', '-')}": x.choices for x in known.options if x.choices}
    return of_methods | {
        "--method": known.methods,
        "--inner": inner,
        "--directions": inner,
        "--pre": known.pre,
        "--post": known.post,
        "--form": known.forms,
        "--format": known.formats,
        "--for": known.runtimes,
        "--runtime": known.runtimes,
        "--dtype": ("float32", "bfloat16", "float16"),
        "--backend": ("auto", "cpu", "torch", "reference", "cuda", "triton"),
        "--device": ("auto", "cpu", "cuda"),
        "--whole": ("auto", "drop"),
    }


def _bash(words: Words, values: Words) -> Iterator[str]:
    """Files where no word fits, as everywhere in bash."""
    yield "_domerge_fast() {"
    yield '  local word="${COMP_WORDS[COMP_CWORD]}" last="${COMP_WORDS[COMP_CWORD-1]}" known='
    yield '  case "$last" in'
    for flag, choices in values.items():
        yield f"    {flag}) known={shlex.quote(' '.join(choices))} ;;"
    yield "  esac"
    yield '  if [ -z "$known" ]; then'
    yield '    local before="${COMP_WORDS[1]} ${COMP_WORDS[2]}"'
    yield '    [ "$COMP_CWORD" -le 1 ] && before=""'
    yield '    [ "$COMP_CWORD" -eq 2 ] && before="${COMP_WORDS[1]}"'
    yield '    case "$before" in'
    for before, choices in sorted(words.items(), key=lambda pair: -len(pair[0])):
        pattern = f"{shlex.quote(before)}{'*' if before else ''}"
        yield f"      {pattern}) known={shlex.quote(' '.join(choices))} ;;"
    yield "    esac"
    yield "  fi"
    yield '  COMPREPLY=($(compgen -W "$known" -- "$word"))'
    yield "}"
    yield "complete -o default -F _domerge_fast domerge-fast"


def _zsh(words: Words, values: Words) -> Iterator[str]:
    """By bash's, which zsh can run."""
    yield "autoload -U +X compinit && compinit"
    yield "autoload -U +X bashcompinit && bashcompinit"
    yield from _bash(words, values)


def _fish(words: Words, values: Words) -> Iterator[str]:
    for before, choices in words.items():
        seen = [f"__fish_seen_subcommand_from {name}" for name in before.split()]
        where = shlex.quote("; and ".join(seen) or "__fish_use_subcommand")
        for word in choices:
            if word.startswith("--"):
                of_it = f" -x -a {shlex.quote(' '.join(values[word]))}" if word in values else ""
                yield f"complete -c domerge-fast -n {where} -l {word[2:]}{of_it}"
            elif not word.startswith("-"):
                yield f"complete -c domerge-fast -f -n {where} -a {word}"


SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
SUMMARY = "print a script that completes commands in bash, zsh or fish"
COMMAND = shared.Command("completion", SUMMARY, fill, run)
