"""Which candidate is tried next: Optuna's samplers, by name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from ... import options
from ...errors import OptionError
from ._optuna import optuna
from .space import Choice

__all__ = ["HALVING", "STRATEGIES", "chosen", "of_trial", "sampler"]

STRATEGIES = ("auto", "tpe", "cma", "nsga2", "gp", "random", "ppo")
HALVING = ("tpe", "gp", "random")
"""What may be stopped at few examples; CMA-ES and NSGA-II compare whole generations."""

MOST_FOR_TPE = 60
"""Choices above which `auto` takes CMA-ES."""
SEPARABLE = 100
"""Choices above which CMA-ES keeps variances alone: its matrix has their square."""


def chosen(strategy: str, choices: Sequence[Choice], objectives: int, pick: bool) -> str:
    """The strategy by its name, once what it cannot do is not asked. OptionError."""
    options.choose("strategy", strategy, STRATEGIES)
    names = any(c.names for c in choices)
    if strategy == "auto":
        if objectives > 1:
            return "nsga2"
        return "cma" if len(choices) > MOST_FOR_TPE and not names else "tpe"
    if strategy == "cma" and names:
        problem = "CMA-ES searches numbers, and the space has a choice of names"
        raise OptionError("strategy", problem, "use 'tpe', or one method without pick")
    if strategy == "cma" and len(choices) < 2:
        raise OptionError("strategy", "CMA-ES needs two numbers or more", "use 'tpe'")
    if strategy in ("cma", "ppo") and objectives > 1:
        raise OptionError("strategy", f"{strategy!r} has one objective", "use 'nsga2' or 'tpe'")
    if strategy == "ppo" and not pick:
        raise OptionError("strategy", "'ppo' picks for each group", "use Space(pick=True)")
    return strategy


def sampler(
    strategy: str, seed: int, number: int, choices: int, trials: int
) -> optuna.samplers.BaseSampler:
    """For the trial of this number, so that a study that was left and taken up again goes on as it
    would have. trials: how many there will be in all."""
    own = of_trial(seed, number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if strategy == "tpe":
            return optuna.samplers.TPESampler(seed=own, multivariate=True)
        if strategy == "cma":
            return optuna.samplers.CmaEsSampler(seed=own, use_separable_cma=choices > SEPARABLE)
        if strategy == "nsga2":
            size = min(50, max(4, trials // 10))
            return optuna.samplers.NSGAIISampler(seed=own, population_size=size)
        if strategy == "gp":
            return optuna.samplers.GPSampler(seed=own)
        return optuna.samplers.RandomSampler(seed=own)


def of_trial(seed: int, number: int) -> int:
    """A seed of 32 bits."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
