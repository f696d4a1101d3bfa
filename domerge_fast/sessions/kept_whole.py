"""Which of what adapters save whole a sequential merge keeps, and what it says of the rest.

There `whole` may name an adapter that is yet to come, by its number in the order they are added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..adapters import Adapter, Kept, keep
from ..adapters.adapter import called
from ..adapters.whole import AUTO, DROP, FROM, is_named, listed
from ..errors import OptionError, printable
from ..formats import tokenizer
from .state import State

__all__ = ["kept", "left_out", "missing"]


def kept(state: State, sources: Sequence[Adapter]) -> Kept:
    """Of the running sum's tensors and the new adapter's, which is the last of the sources."""
    weights = [1.0] * len(sources)
    if state.whole in (AUTO, DROP):
        return keep(sources, weights, state.whole, can_add=False)
    if is_named(sources[-1].name, len(state.steps) + 1, state.whole):
        if any(_named(state)):
            problem = f"two adapters are called {state.whole.removeprefix(FROM)!r}"
            raise OptionError("whole", problem, "start again, with its number in place of its name")
        return keep(sources, weights, f"from:{sources[-1].name}")
    if not any(running.carried for running in sources[:-1]):
        return Kept()
    return keep(sources, weights, f"from:{sources[0].name}")


def missing(state: State) -> tuple[str, ...]:
    """What is to be said where the adapter whose tensors are kept was never added."""
    if not state.whole.startswith(FROM) or any(_named(state)):
        return ()
    name = printable(state.whole.removeprefix(FROM))
    return (f"nothing that adapters save whole is kept: none that was added is called {name!r}",)


def _named(state: State) -> Iterator[bool]:
    """Of every adapter that was added, whether it is the one whose tensors are kept."""
    for k, step in enumerate(state.steps, 1):
        yield is_named(step.adapter, k, state.whole)


def left_out(state: State, found: Kept, new: Adapter) -> Iterator[str]:
    """What of the new adapter is not in the merge."""
    number = len(state.steps) + 1
    if state.whole == DROP:
        yield from found.notes
    elif state.whole != AUTO and new.carried and not is_named(new.name, number, state.whole):
        yield f"{called(number - 1, new)}: left out, saved whole: {listed(new.carried)}"
    if files := tokenizer.beside(new):
        yield f"{called(number - 1, new)}: its tokenizer is not copied ({', '.join(sorted(files))})"
