"""The one reader of YAML from outside: plain values only, no key twice, no alias.

An alias can stand for a text that is longer than memory.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["BadYaml", "parse", "text"]

_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+")


class BadYaml(ValueError):
    """``str(error)`` says in a few words what is wrong."""


class _Loader(yaml.SafeLoader):
    """As safe_load, but for keys that occur twice, aliases, and 1e-3, which is a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise BadYaml(f"line {self.peek_event().start_mark.line + 1} has an alias")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found = super().construct_mapping(node, deep=deep)
        if len(found) != len(node.value):
            raise BadYaml(f"a key occurs twice in line {node.start_mark.line + 1} or below")
        return found


_Loader.yaml_implicit_resolvers = {
    first: list(known) for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse(data: bytes) -> Any:
    """The value of the only document, or BadYaml."""
    try:
        return yaml.load(data, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise BadYaml(f"{error.problem}{where}") from error
    except yaml.YAMLError as error:
        raise BadYaml("it is no text in UTF-8") from error
    except RecursionError as error:
        raise BadYaml("it is nested too deep") from error
    except BadYaml:
        raise
    except ValueError as error:  # of a value: a date that is none
        raise BadYaml(str(error)) from error


def text(plain: Any) -> str:
    """A mapping as YAML, in its order."""
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
