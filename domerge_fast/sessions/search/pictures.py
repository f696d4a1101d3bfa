"""Pictures of a study, by Optuna's functions for matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import DomergeError
from ._optuna import optuna
from .rules import Rules, outcome_of

__all__ = ["pictures"]


def pictures(study: optuna.Study, rules: Rules, folder: Path) -> list[Path]:
    """history.png (scores, trial by trial); also examples.png where there were few at first, or
    front.png of two or three objectives. DomergeError without matplotlib."""
    try:
        import matplotlib
        from matplotlib import pyplot
        from optuna.visualization import matplotlib as drawn
    except ImportError as error:
        problem = f"pictures need matplotlib ({error}); pip install 'domerge-fast[plot]'"
        raise DomergeError(problem) from error

    last = len(rules.rungs) - 1

    def score(trial: optuna.trial.FrozenTrial) -> float:
        found = outcome_of(trial, last)
        return found.score if found else float("nan")

    made: dict[str, Callable[[], Any]] = {
        "history": lambda: drawn.plot_optimization_history(study, target=score, target_name="score")
    }
    if last:
        made["examples"] = lambda: drawn.plot_intermediate_values(study)
    if 2 <= len(rules.objectives) <= 3:
        made["front"] = lambda: drawn.plot_pareto_front(study, target_names=[*rules.objectives])
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    # The functions choose a style for all that is drawn from then on.
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for name, draw in made.items():
            figure = draw().figure
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], bbox_inches="tight")
            pyplot.close(figure)
    return paths
