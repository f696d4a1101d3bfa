"""Reinforced Model Merging: the environment, and PPO on it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from support.make import random_factors, write_adapter

import domerge_fast as dm
from domerge_fast import Budget, MergeEnv, Space
from domerge_fast.sessions.search import ppo  # noqa: F401 - stable-baselines3 seeds as it is imported
from domerge_fast.sessions.search.environment import STRAY

SHAPES = {f"layers.{k}.q": (10, 12) for k in (0, 1, 10, 2)}
BACK = 4
"""The action after two adapters, a merge and nothing."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    paths = [
        write_adapter(folder / name, random_factors(SHAPES, 2, seed=k))
        for k, name in enumerate("ab")
    ]
    return dm.prepare(paths, "linear")


@pytest.fixture(scope="module")
def layout(prepared):
    return Space(groups="layer", pick=True).layout(prepared.modules, prepared.adapters, ["linear"])


def episode(env, actions):
    env.reset()
    for action in actions:
        *found, info = env.step(np.int64(action))
        if found[2] or found[3]:
            return found[1], found[2], info
    raise AssertionError("the episode goes on")


def test_layers_come_in_their_order(layout):
    assert layout.groups[0] == ("layer 0", "layer 1", "layer 2", "layer 10")


def test_it_is_an_environment(layout):
    check_env(MergeEnv(layout, lambda picks, examples: 0.5), skip_render_check=True)


def test_picks_are_evaluated_after_the_last_layer(layout, prepared):
    seen = []
    env = MergeEnv(layout, lambda picks, examples: seen.append((picks, examples)) or 0.25)
    reward, over, info = episode(env, [0, 1, BACK, 2, 3, 1])
    a, b = prepared.adapters
    wanted = {
        "layer 0 pick": f"{a} alone",
        "layer 1 pick": "all by linear",
        "layer 2 pick": "nothing",
        "layer 10 pick": f"{b} alone",
    }
    assert (reward, over, info["picks"]) == (25.0, True, wanted)
    assert seen == [(wanted, None)]


def test_the_observation_is_what_was_picked(layout):
    env = MergeEnv(layout, lambda picks, examples: 0.0)
    first, _ = env.reset()
    assert not first.any()
    env.step(np.int64(2))
    at, *_ = env.step(np.int64(3))
    assert at.reshape(4, 4).tolist()[:2] == [[0, 0, 1, 0], [0, 0, 0, 1]]
    assert env.step(np.int64(BACK))[0].reshape(4, 4)[1].sum() == 0


def test_who_goes_astray_gets_nothing(layout):
    env = MergeEnv(layout, lambda picks, examples: 1.0)
    assert episode(env, [BACK])[:2] == (STRAY, True)
    assert episode(env, [0, BACK] * 9)[:2] == (STRAY, False)


def test_rewards_are_evened_out_over_windows_of_examples(layout):
    scores, seen = iter([0.1, 0.5, 0.9, 0.2, 0.4]), []

    def score(picks, examples):
        seen.append(examples)
        return next(scores)

    env = MergeEnv(layout, score, (4, 10), average=0.5, episodes=2)
    found = [episode(env, [0, 0, 0, 0])[0] for _ in range(5)]
    assert seen == [range(0, 4), range(4, 8), range(8, 10), range(0, 4), range(4, 8)]
    # ρ = 0, .25, .5, and .5 from there on; the first window begins anew.
    second = 0.25 * 10 + 0.75 * 50
    third = 0.5 * second + 0.5 * 90
    assert found == pytest.approx([10, second, third, 20, 0.5 * 20 + 0.5 * 40])


class Matching:
    """The share of layers whose update is what it should be, each example another layer."""

    def __init__(self, prepared):
        a, b = (prepared.merge(k) for k in ([1.0, 0.0], [0.0, 1.0]))
        self.wanted = [(n, (a if i % 2 else b).delta(n)) for i, n in enumerate(prepared.modules)]
        self.seen = 0

    def __call__(self, merged, budget):
        chosen = range(budget) if isinstance(budget, int) else budget
        self.seen += len(chosen)
        right = [torch.equal(merged.delta(n), x) for n, x in (self.wanted[k % 4] for k in chosen)]
        return sum(right) / len(right)


def test_an_agent_learns_what_to_pick(prepared):
    matching = Matching(prepared)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    space = Space(groups="layer", pick=True)
    budget = Budget(130, fidelity=(4, 8))
    found = dm.search(prepared, matching, space, budget, strategy="ppo", seed=1)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert bool((torch.get_rng_state() == states[2]).all())
    assert len(found.trials) == 130
    assert found.best.complete
    assert found.best.score >= 0.75
    scores = [t.score for t in found.trials if not t.complete]
    assert sum(scores[-40:]) > 1.2 * sum(scores[:40])


def test_the_last_trials_are_for_the_best_on_all_examples(prepared):
    space = Space(groups="layer", pick=True)
    found = dm.search(
        *(prepared, Matching(prepared), space, Budget(30, fidelity=(2, 8))),
        strategy="ppo",
    )
    again = dm.search(
        *(prepared, Matching(prepared), space, Budget(30, fidelity=(2, 8))), strategy="ppo"
    )
    assert [t.values for t in again.trials] == [t.values for t in found.trials]
    complete = [t for t in found.trials if t.complete]
    assert [t.number for t in complete] == [27, 28, 29]
    assert all(t.examples == 8 for t in complete)
    assert len({str(t.values) for t in complete}) == 3
