r"""Regular expressions that need no going back: all of them follow a name at once.

Understood: literals, `.`, escaped punctuation, classes in brackets, `\d \w \s` and their opposites,
groups, `|`, repetitions (how greedy does not matter for whether there is a match), `^` and `$`.
Refused: what no automaton can do (back-references, looking around), and what is too large.
Source: K. Thompson, Regular expression search algorithm, 1968.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeAlias

__all__ = ["Automaton", "BadPattern", "parse"]

Test: TypeAlias = Callable[[str], bool]
Node: TypeAlias = tuple
"""("test", Test), ("start",), ("end",), ("all", nodes), ("any", nodes), ("repeat", node, low, high)
with high None for no bound."""

_MOST_STATES = 10_000
_MOST_WORK = 2_000_000
"""States gone through, but for what was found before: a second or so."""
_MOST_NESTED = 30

_CLASSES: dict[str, Test] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
    "D": lambda c: not c.isdecimal(),
    "W": lambda c: not (c.isalnum() or c == "_"),
    "S": lambda c: not c.isspace(),
}
_BOUNDS = re.compile(r"\{(?:(\d+)|(\d*),(\d*))\}")


def _any(c: str) -> bool:
    return c != "\n"


class BadPattern(ValueError):
    """``str(error)`` is what is wrong with `key`, in a few words."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(problem)
        self.key = key


def parse(key: str) -> Node:
    """The expression of a key; BadPattern for what is not understood."""
    return _Parser(key).whole()


class _Parser:
    def __init__(self, key: str) -> None:
        self.key, self.at, self.depth = key, 0, 0

    def whole(self) -> Node:
        found = self.alternatives()
        if self.at < len(self.key):
            raise self.error("has a ')' too many")
        return found

    def alternatives(self) -> Node:
        found = [self.sequence()]
        while self.take("|"):
            found.append(self.sequence())
        return ("any", found)

    def sequence(self) -> Node:
        found: list[Node] = []
        while self.at < len(self.key) and self.key[self.at] not in "|)":
            found.append(self.repeated(self.item()))
        return ("all", found)

    def item(self) -> Node:
        c = self.next()
        if c == "(":
            return self.group()
        if c == "[":
            return ("test", self.brackets())
        if c == "\\":
            return ("test", self.escaped())
        if c == ".":
            return ("test", _any)
        if c in "^$":
            return ("start",) if c == "^" else ("end",)
        if c in "*+?" or (c == "{" and _BOUNDS.match(self.key, self.at - 1)):
            raise self.error("has nothing to repeat")
        return ("test", c.__eq__)

    def group(self) -> Node:
        if self.take("?") and not self.take(":"):
            raise self.error("has a group of a kind that is not understood")
        self.depth += 1
        if self.depth > _MOST_NESTED:
            raise self.error("is nested too deeply")
        found = self.alternatives()
        self.depth -= 1
        if not self.take(")"):
            raise self.error("has a '(' that is not closed")
        return found

    def repeated(self, item: Node) -> Node:
        bounds = self.bounds()
        if bounds is None:
            return item
        if item[0] in ("start", "end"):
            raise self.error("repeats what has no width")
        low, high = bounds
        if high is not None and low > high:
            raise self.error("repeats something less than it does")
        self.take("?")
        if self.bounds():
            raise self.error("repeats a repetition")
        return ("repeat", item, low, high)

    def bounds(self) -> tuple[int, int | None] | None:
        """Of the repetition that comes next, if there is one."""
        if found := _BOUNDS.match(self.key, self.at):
            self.at = found.end()
            exact, low, high = found.groups()
            if any(len(x or "") > 4 for x in found.groups()):
                raise self.error("repeats something too often")
            if exact:
                return int(exact), int(exact)
            return int(low or 0), int(high) if high else None
        for c, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(c):
                return bounds
        return None

    def escaped(self) -> Test:
        c = self.next()
        if c in _CLASSES:
            return _CLASSES[c]
        if c.isascii() and c.isalnum():
            raise self.error(f"has an escape that is not understood (\\{c})")
        return c.__eq__

    def brackets(self) -> Test:
        other = self.take("^")
        tests: list[Test] = []
        while True:
            c = self.next()
            if c == "]" and tests:
                break
            test = self.escaped() if c == "\\" else c.__eq__
            literal = None if test in _CLASSES.values() else self.key[self.at - 1]
            if self.key.startswith("-", self.at) and not self.key.startswith("-]", self.at):
                self.at += 1
                test = self.range(literal)
            tests.append(test)
        if other:
            return lambda x: not any(test(x) for test in tests)
        return lambda x: any(test(x) for test in tests)

    def range(self, low: str | None) -> Test:
        high: str | None = self.next()
        if high == "\\":
            high = None if self.escaped() in _CLASSES.values() else self.key[self.at - 1]
        if low is None or high is None or low > high:
            raise self.error("has a range that is none")
        first, last = low, high
        return lambda c: first <= c <= last

    def next(self) -> str:
        if self.at == len(self.key):
            raise self.error("ends too early")
        self.at += 1
        return self.key[self.at - 1]

    def take(self, c: str) -> bool:
        found = self.key.startswith(c, self.at)
        self.at += found
        return found

    def error(self, problem: str) -> BadPattern:
        return BadPattern(self.key, problem)


class Automaton:
    """``first(name)``: the least index of the keys that match. keys: (index, key, parsed)."""

    def __init__(self, keys: Iterable[tuple[int, str, Node]]) -> None:
        self._tests: list[Test | None] = []
        self._guards: list[str] = []  # "start" or "end" where a state may be left only there
        self._next: list[list[int]] = []
        self._accepts: dict[int, int] = {}
        self._known: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._found: dict[frozenset[int], int | None] = {}
        self._work = 0
        self._key = ""
        begins = self._state()
        dot = self._state(begins, test=".".__eq__)
        before = self._state(dot, test=_any)  # with the dot, the (.*\.)? that PEFT puts in front
        self._next[before].append(before)
        for index, key, node in keys:
            self._key = key
            accept = self._state()
            self._accepts[accept] = index
            self._next[begins].append(self._made(node, accept))
        self._first = self._closed([begins, dot, before], "start")

    def first(self, name: str) -> int | None:
        states = self._first
        for c in name:
            known = self._known.get((states, c))
            if known is None:
                after = [n for s in states if (t := self._tests[s]) and t(c) for n in self._next[s]]
                known = self._closed(after)
                self._work += len(states)
                if self._work > _MOST_WORK:
                    raise BadPattern(self._key, "takes too long to match, or one before it does")
                self._known[states, c] = known
            states = known
        if states not in self._found:
            ends = self._closed(states, "end") & self._accepts.keys()
            self._found[states] = min((self._accepts[state] for state in ends), default=None)
        return self._found[states]

    def _state(self, *after: int, test: Test | None = None, guard: str = "") -> int:
        self._tests.append(test)
        self._guards.append(guard)
        self._next.append(list(after))
        if len(self._next) > _MOST_STATES:
            raise BadPattern(self._key, "is too large, or those before it are")
        return len(self._next) - 1

    def _made(self, node: Node, after: int) -> int:
        """The state in which a node begins that goes on to `after`."""
        kind, *parts = node
        if kind == "test":
            return self._state(after, test=parts[0])
        if kind == "all":
            for part in reversed(parts[0]):
                after = self._made(part, after)
            return after
        if kind == "any":
            return self._state(*[self._made(part, after) for part in parts[0]])
        if kind == "repeat":
            inner, low, high = parts
            return self._repeated(inner, low, high, after)
        return self._state(after, guard=kind)

    def _repeated(self, node: Node, low: int, high: int | None, after: int) -> int:
        if high is None:
            again = self._state(after)
            self._next[again].append(self._made(node, again))
            after = again
        for _ in range(0 if high is None else high - low):
            after = self._state(self._made(node, after), after)
        for _ in range(low):
            after = self._made(node, after)
        return after

    def _closed(self, states: Iterable[int], where: str = "") -> frozenset[int]:
        """With all states that are reached without a character."""
        found, ahead = set(states), list(states)
        while ahead:
            state = ahead.pop()
            if self._tests[state] or self._guards[state] not in ("", where):
                continue
            self._work += 1
            for after in self._next[state]:
                if after not in found:
                    found.add(after)
                    ahead.append(after)
        return frozenset(found)
