"""strategy="ppo": Reinforced Model Merging's agent, the PPO of stable-baselines3.

Two networks of 64-64 tanh, an update of 40 epochs every 4 episodes, clip .2, γ .99, rate 3e-4,
entropy 1e-4, as the authors have them; returns without bootstrap (λ = 1). Episodes are evaluated
on few examples; the last tenth of the trials is for the merges that did best there, on all.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch

from ...errors import DomergeError
from .environment import STRAY, MergeEnv
from .loop import Loop
from .outcome import Outcome
from .rules import outcome_of
from .samplers import of_trial

try:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
except ImportError as error:
    problem = f"'ppo' needs stable-baselines3 ({error}); pip install 'domerge-fast[rl]'"
    raise DomergeError(problem) from error

__all__ = ["run"]

EPISODES_PER_UPDATE = 4

Values = dict[str, float | str]


def run(loop: Loop) -> None:
    """Train the agent for as many trials as there are, but those that the best get at the end.
    An agent is not kept: a study that is taken up again has its trials, and a new agent."""
    trials = loop.budget.trials
    finals = max(1, trials // 10) if len(loop.rules.rungs) > 1 else 0
    episodes = trials - finals
    started = time.monotonic()
    if loop.store.begun < episodes:
        agent = _Agent(loop, episodes, started)
        with _own_random():
            agent.learn()
    for values in _best(loop, finals):
        last = len(loop.rules.rungs) - 1
        if loop.late(started) or not _evaluated(loop, values, last, loop.rules.rungs[-1], trials):
            return


class _Agent:
    def __init__(self, loop: Loop, episodes: int, started: float) -> None:
        few, most = loop.rules.rungs[0], loop.rules.rungs[-1]
        examples = (few, most) if few is not None and most is not None else None
        self._loop, self._episodes, self._started = loop, episodes, started
        self.is_done = False
        self._env = MergeEnv(loop.layout, self._score, examples, episodes=episodes)

    def learn(self) -> None:
        groups = len(self._loop.layout.groups[0])
        steps = EPISODES_PER_UPDATE * max(2, groups)
        agent = PPO(
            "MlpPolicy",
            self._env,
            learning_rate=3e-4,
            n_steps=steps,
            batch_size=steps,
            n_epochs=40,
            gamma=0.99,
            gae_lambda=1.0,
            clip_range=0.2,
            ent_coef=1e-4,
            policy_kwargs={"net_arch": [64, 64], "activation_fn": torch.nn.Tanh},
            seed=of_trial(self._loop.seed, self._loop.store.begun) % 2**31,
            device="cpu",
        )
        # Episodes that go back, or astray, take more steps than groups; it ends by their number.
        agent.learn(100 * self._episodes * 2 * groups, callback=_Until(self))

    def _score(self, values: Values, examples: range | None) -> float:
        found = _evaluated(self._loop, values, 0, examples, self._episodes)
        if found is None:
            self.is_done = True
            return STRAY / 100
        self.is_done = self._loop.late(self._started)
        if not found.is_finite:
            return STRAY / 100
        full = self._loop.rules.is_full(0)
        return found.score - found.violation(self._loop.rules.limits, full)


class _Until(BaseCallback):
    def __init__(self, agent: _Agent) -> None:
        super().__init__()
        self._agent = agent

    def _on_step(self) -> bool:
        return not self._agent.is_done


def _evaluated(
    loop: Loop, values: Values, rung: int, examples: int | range | None, most: int
) -> Outcome | None:
    """What a merge gets on these examples, kept as a trial; None where `most` are done."""
    [outcome] = loop.evaluate([loop.layout.candidate(values)], examples)
    trial = loop.rules.finished(values, loop.layout.choices, rung, outcome)
    if not loop.store.add(trial, most):
        return None
    loop.show(min(loop.store.begun, loop.budget.trials), loop.budget.trials)
    return outcome


def _best(loop: Loop, count: int) -> list[Values]:
    """Of what was picked, the best by its mean over the windows it was evaluated on, without what
    was evaluated on all examples already."""
    found: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    done = set()
    for trial in loop.store.trials:
        picks = tuple(str(trial.params[c.name]) for c in loop.layout.choices)
        few = outcome_of(trial, 0)
        if outcome_of(trial, len(loop.rules.rungs) - 1):
            done.add(picks)
        elif few and few.is_finite:
            found.setdefault(picks, []).append(loop.rules.key(few, 0))
    means = {
        picks: tuple(statistics.fmean(part) for part in zip(*keys))
        for picks, keys in found.items()
        if picks not in done
    }
    best = sorted(means, key=lambda picks: (*means[picks], picks))[:count]
    return [{c.name: p for c, p in zip(loop.layout.choices, picks)} for picks in best]


@contextlib.contextmanager
def _own_random() -> Iterator[None]:
    """The states of all random numbers as they were, at the end: PPO seeds and draws from those
    that everybody has."""
    python, array, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(tensor)
