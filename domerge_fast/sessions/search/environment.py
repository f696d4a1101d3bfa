"""Reinforced Model Merging (arXiv 2503.21272) as a Gymnasium environment: an agent walks through
the layers of a model and picks for each what it gets.

An episode begins at the first group of modules. An action picks one of K options for it: one
adapter alone, a prepared merge as it is, or nothing (the base model's layer); or it goes back one
group and takes what was picked there away. After the last group the merge is evaluated, and
the reward is 100 times its score. Who goes back from the first group, or takes more than 2 L
steps, gets -10. What was picked is the observation, [L K] with a 1 for every pick.

A merge is evaluated on `few` examples of `all`, another window of them each time. A *dynamic
average reward* evens out which one: r <- ρ r_last + (1 - ρ) r with ρ = `average` e / episodes in
episode e, begun anew every all / few episodes.

Other than in the authors' code nothing is copied and no layer is repeated or left out (a layer is
what the base has plus a part of the merge); going back takes a pick away, where there it stays and
the next one repeats the layer; and an episode has an end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ...errors import DomergeError
from .space import Layout

try:
    import gymnasium
except ImportError as error:
    problem = f"MergeEnv needs Gymnasium ({error}); pip install 'domerge-fast[rl]'"
    raise DomergeError(problem) from error

__all__ = ["STRAY", "MergeEnv"]

STRAY = -10.0
"""The reward of an episode that ends without a merge."""

Observation = np.ndarray[Any, np.dtype[np.float32]]


class MergeEnv(gymnasium.Env[Observation, np.int64]):
    """layout: of a space that picks. score: of what is picked for each choice, on a range of
    examples, or all (None). examples: (few, all), None where the evaluator decides. episodes: over
    which the average grows to its full share."""

    def __init__(
        self,
        layout: Layout,
        score: Callable[[dict[str, float | str], range | None], float],
        examples: tuple[int, int] | None = None,
        *,
        average: float = 0.8,
        episodes: int = 700,
        back: bool = True,
    ) -> None:
        choices = layout.choices
        self._names, self._options = [c.name for c in choices], choices[0].names
        self._score, self._examples = score, examples
        self._average, self._episodes = average, episodes
        self._windows = 1 if examples is None else math.ceil(examples[1] / examples[0])
        count = len(self._options)
        self.action_space = gymnasium.spaces.Discrete(count + back)
        self.observation_space = gymnasium.spaces.Box(0, 1, (len(choices) * count,), np.float32)
        self._picks: list[int] = []
        self._steps = self._episode = 0
        self._last: float | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self._picks, self._steps = [], 0
        return self._observation(), {}

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """The observation, reward, whether the episode is over, whether for its length, and
        {"picks": ...} where a merge was evaluated."""
        self._steps += 1
        if action < len(self._options):
            self._picks.append(int(action))
        elif not self._picks:
            return self._observation(), STRAY, True, False, {}
        else:
            self._picks.pop()
        if len(self._picks) == len(self._names):
            picks: dict[str, float | str] = {
                n: self._options[k] for n, k in zip(self._names, self._picks)
            }
            return self._observation(), self._reward(picks), True, False, {"picks": picks}
        over = self._steps >= 2 * len(self._names)
        return self._observation(), STRAY if over else 0.0, False, over, {}

    def _observation(self) -> Observation:
        made = np.zeros((len(self._names), len(self._options)), np.float32)
        made[range(len(self._picks)), self._picks] = 1
        return made.reshape(-1)

    def _reward(self, picks: dict[str, float | str]) -> float:
        """On the next window of examples, evened out."""
        window = self._episode % self._windows
        found = 100 * self._score(picks, self._range(window))
        if window and self._last is not None:
            share = self._average * min(1.0, self._episode / self._episodes)
            found = share * self._last + (1 - share) * found
        self._episode, self._last = self._episode + 1, found
        return found

    def _range(self, window: int) -> range | None:
        if self._examples is None:
            return None
        few, total = self._examples
        return range(window * few, min(total, (window + 1) * few))
