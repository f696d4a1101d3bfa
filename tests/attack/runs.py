"""Commands that write, and whether what they write is whole: the old output, or the new one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import judge
from .inputs import FILE, STATE, adapter, base_model, copy, lora_file

SAME_EVERY_TIME = (".safetensors", ".json")
"""Of these files a command always writes the same bytes; a card has times in it."""


@dataclass(frozen=True)
class Command:
    """A command on its own folder: arguments, the output, and that as it is after it."""

    name: str
    arguments: tuple[str, ...]
    output: Path
    old: Path | None
    """A copy of the output before it; None: there is none."""
    new: dict[str, bytes]

    def reset(self, hidden: bool = True) -> None:
        """The output as it was before the command; nothing hidden beside it, or what there is."""
        for path in [*self.output.parent.iterdir()]:
            if path == self.output or (hidden and path.name.startswith(".")):
                judge.remove(path)
        if self.old:
            copy(self.old, self.output)

    def found(self) -> str:
        """ "old", "new", or what is torn."""
        now = contents(self.output)
        if now == self.new:
            return "new"
        if now == (contents(self.old) if self.old else {}):
            return "old"
        return f"torn: {sorted(now)}"


def contents(output: Path) -> dict[str, bytes]:
    """The files that are the same every time, of a folder or one alone; of others only that they
    are there."""
    if not output.exists():
        return {}
    return {
        path.name: path.read_bytes() if path.name.endswith(SAME_EVERY_TIME) else b""
        for path in (sorted(output.iterdir()) if output.is_dir() else [output])
    }


def commands(folder: Path, wide: int) -> list[Command]:
    """A new merge, one over an older one, a whole model, one adapter more, a file over an older."""
    a = adapter(folder / "in" / "a", 4, 1, wide)
    b = adapter(folder / "in" / "b", 2, 2, wide)
    base = base_model(folder / "in" / "base", wide)
    state = folder / "in" / "state"
    _must("sequential", "start", state)
    _must("sequential", "add", state, a)
    older = folder / "in" / "older"
    _must("merge", a, "-o", older, "-q")
    one, two = (lora_file(folder / "in" / x, 4, k, wide) / FILE for k, x in enumerate("xy"))
    older_file = folder / "in" / "out.safetensors"
    _must("merge", one, "-o", older_file, "-q")
    made = []
    for name, words, old in (
        ("merge", ["merge", a, b, "-q", "-o", "OUT"], None),
        ("overwrite", ["merge", a, b, "-q", "--overwrite", "-o", "OUT"], older),
        ("model", ["merge", a, b, "-q", "--form", "model", "--base", base, "-o", "OUT"], None),
        ("add", ["sequential", "add", "OUT", b], state),
        ("file", ["merge", one, two, "-q", "--overwrite", "-o", "OUT"], older_file),
    ):
        output = folder / name / ("out.safetensors" if old == older_file else "out")
        output.parent.mkdir(parents=True)
        words = [str(output) if word == "OUT" else str(word) for word in words]
        command = Command(name, tuple(words), output, old, {})
        command.reset()
        _must(*words)
        command.new.update(contents(output))
        if name == "add" and STATE not in command.new:
            raise RuntimeError("the state was not written")
        command.reset()
        made.append(command)
    return made


def _must(*arguments: object) -> None:
    if (ending := judge.run(*arguments)).code:
        raise RuntimeError(f"a good input is refused: {ending.err}")
