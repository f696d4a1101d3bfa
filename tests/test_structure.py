"""Which part of the package knows which: the order of docs/architecture.md."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import domerge_fast

ROOT = Path(domerge_fast.__file__).parent
ROOMS = (
    *("_version", "errors", "aliases", "options", "registry", "storage", "algebra"),
    *("adapters", "backends", "ops", "methods", "recipe", "results", "pages", "formats"),
    *("runtimes", "merged", "engine", "reading", "direction", "on_inputs", "base", "costs"),
    *(
        "parts",
        "job",
        "planning",
        "distributed",
        "dry_run",
        "conversion",
        "lists",
        "api",
        "unlearning",
        "sessions",
    ),
    *("evaluators", "osrm", "routing", "integrations", "learning", "explore", "bench", "cli"),
    "__main__",
)
"""The folders and files of the package, each of which may import what stands before it."""
LATE = {"cli"}
"""What imports in functions, so that a command starts without what it does not use."""


def modules() -> dict[str, ast.Module]:
    """By dotted name below the package; a package's own name is that of its folder."""
    paths = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
    names = (path.relative_to(ROOT).with_suffix("").parts for path in paths)
    return {
        ".".join(name[:-1] if name[-1] == "__init__" else name): ast.parse(path.read_text("utf-8"))
        for name, path in zip(names, paths, strict=True)
    }


TREES = modules()


def imports(name: str, node: ast.ImportFrom) -> Iterator[tuple[ast.alias, str, bool]]:
    """The modules of the package that a relative import names, and whether it takes them whole."""
    is_package = (ROOT / name.replace(".", "/")).is_dir()
    parts = name.split(".") if is_package else name.split(".")[:-1]
    parts = parts[: len(parts) - node.level + 1] + (node.module or "").split(".")
    stem = ".".join(filter(None, parts))
    for alias in node.names:
        full = f"{stem}.{alias.name}".lstrip(".")
        found = full if full in TREES else stem
        if found:
            yield alias, found, found == full


def relative(name: str, tree: ast.AST) -> Iterator[tuple[ast.ImportFrom, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            for _, found, _ in imports(name, node):
                yield node, found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_only_what_is_below_it(room):
    inside = {n: tree for n, tree in TREES.items() if n.split(".")[0] == room}
    known = {other.split(".")[0] for n, tree in inside.items() for _, other in relative(n, tree)}
    assert inside
    assert known - {room} <= set(ROOMS[: ROOMS.index(room)])


def test_every_room_has_its_place():
    assert {name.split(".")[0] for name in TREES} == set(ROOMS)


def test_nothing_is_imported_late_to_hide_a_circle():
    late = {
        name
        for name, tree in TREES.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for _ in relative(name, function)
    }
    assert {name.split(".")[0] for name in late} <= LATE


def test_no_two_modules_need_each_other():
    needs = {n: {other for _, other in relative(n, tree)} - {n} for n, tree in TREES.items()}
    # A package's own file gathers what lies in it, and counts as its members do.
    for name in [n for n in needs if any(other.startswith(f"{n}.") for other in needs)]:
        needs[name] = {other for other in needs[name] if not other.startswith(f"{name}.")}
    list(graphlib.TopologicalSorter(needs).static_order())


def defined(tree: ast.Module) -> set[str]:
    """The names that a module gives to its own functions, classes and values."""
    found = {x.name for x in tree.body if isinstance(x, (ast.FunctionDef, ast.ClassDef))}
    values = [x for x in tree.body if isinstance(x, (ast.Assign, ast.AnnAssign))]
    return found | {
        x.id
        for value in values
        for x in ast.walk(value)
        if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)
    }


def listed(tree: ast.Module) -> set[str] | None:
    """What `__all__` names, or None where there is none."""
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) == "__all__":
                return set(ast.literal_eval(node.value))
    return None


def taken() -> Iterator[tuple[str, str]]:
    """Modules with the names that others import from them, or reach by a module's own name."""
    for name, tree in TREES.items():
        modules: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                for alias, found, whole in imports(name, node):
                    if whole:
                        modules[alias.asname or alias.name] = found
                    else:
                        yield found, alias.name
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found = modules.get(node.value.id, name)
                if found != name and node.attr in defined(TREES[found]):
                    yield found, node.attr


TAKEN = set(taken())


def test_a_public_module_lists_what_others_take_from_it():
    public = {n: tree for n, tree in TREES.items() if "._" not in f".{n}" and tree.body[1:]}
    lacking = {
        name: sorted(names)
        for name, tree in public.items()
        if (names := {x for at, x in TAKEN if at == name} - (listed(tree) or set()))
        or listed(tree) is None
    }
    assert lacking == {}
