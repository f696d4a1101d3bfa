"""What the page tries a merge on: a model's losses on texts, and what it writes after a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import options
from ..errors import OptionError
from ..learning.batches import Runner
from ..learning.causal import continued
from ..learning.losses import chosen as chosen_loss
from ..sessions.prepared import Prepared
from .worker import Check

__all__ = ["MOST_CHARACTERS", "MOST_TOKENS", "Losses", "Prompt", "Trial"]

MOST_TOKENS = 256
"""That are written: on a CPU, of a model of 8B, some minutes."""

MOST_CHARACTERS = 4000
"""Of a prompt."""


@dataclass(frozen=True)
class Prompt:
    """A text, and how many tokens are written after it at most."""

    text: str
    tokens: int

    @classmethod
    def of(cls, text: Any, tokens: Any) -> Prompt:
        """Of JSON. OptionError for what is none."""
        if not isinstance(text, str) or not 0 < len(text) <= MOST_CHARACTERS:
            remedy = f"give 1 to {MOST_CHARACTERS} characters"
            raise OptionError("prompt", "is no text of that length", remedy)
        return cls(text, options.check("tokens", tokens, int, low=1, high=MOST_TOKENS))


@dataclass(frozen=True)
class Losses:
    """Mean loss by text: of the model without adapters, and with each of them alone."""

    base: Mapping[str, float]
    adapters: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Trial:
    """A causal model with its tokenizer, and batches by text for losses, {} for none."""

    model: Any
    tokenizer: Any
    data: Mapping[str, Sequence[Any]]

    def losses(
        self, prepared: Prepared, weights: Sequence[float], check: Check
    ) -> Mapping[str, float]:
        """By text, the mean with a merge on the model."""
        with prepared.attach(self.model) as live:
            live.set(weights)
            runner = Runner(self.model, chosen_loss("cross_entropy"), None)
            return runner.mean({name: _checked(x, check) for name, x in self.data.items()})

    def text(
        self, prepared: Prepared, weights: Sequence[float], prompt: Prompt, check: Check
    ) -> str:
        """What the model writes after the prompt with a merge on it."""
        with prepared.attach(self.model) as live:
            live.set(weights)
            return continued(self.model, self.tokenizer, prompt.text, prompt.tokens, check)


def _checked(batches: Sequence[Any], check: Check) -> Iterator[Any]:
    for batch in batches:
        check()
        yield batch
