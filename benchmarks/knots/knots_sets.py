"""The three KnOTS sets: models, tasks, data, splits, and the accuracies that the authors divide by.

Facts of github.com/gstoica27/KnOTS at baa35e8 (configs/, dataset/, eval_scripts/); README.md says
what of this was found how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Task:
    """source: the arguments of datasets.load_dataset, () where no copy with the right splits is
    known. held: the share of `part` that is its validation split; 0: it has one of its own.
    shuffled: whether that share is drawn, with seed 42. columns: of the two sentences. labels: what
    stands for which class, where it is not itself. masked: the class that the task lacks."""

    source: tuple[str, ...] = ()
    held: float = 0.0
    part: str = "test"
    shuffled: bool = True
    columns: tuple[str, str] = ("premise", "hypothesis")
    labels: Mapping[Any, int] = field(default_factory=dict)
    masked: int | None = None


@dataclass(frozen=True)
class Set:
    """own: of each adapter on its own task, the accuracies in % that the authors divide by."""

    base: str
    tasks: Mapping[str, Task]
    own: Mapping[str, float]


VISION = {
    "stanford_cars": Task(("tanganke/stanford_cars",), held=0.2),
    "dtd": Task(),
    "eurosat": Task(),
    "gtsrb": Task(("tanganke/gtsrb",), held=0.2),
    "mnist": Task(("ylecun/mnist",), held=0.2),
    "resisc45": Task(),
    "sun397": Task(("tanganke/sun397",), held=0.2),
    "svhn": Task(("ufldl-stanford/svhn", "cropped_digits"), held=0.2),
}
TEXTS = ("text1", "text2")
THREE = {0: 0, 1: 1, 2: 2}
"""Entailment, neutral, contradiction; rows of any other label are left out."""
TWO = {0: 0, 1: 2}
"""Entailment or not: the second counts as contradiction."""
NLI = {
    "snli": Task(("stanfordnlp/snli",), labels=THREE),
    "mnli": Task(("SetFit/mnli",), 0.2, "validation", False, TEXTS, THREE),
    "sick": Task(("RobZamp/sick",), columns=("sentence_A", "sentence_B"), labels=THREE),
    "qnli": Task(("SetFit/qnli",), 0.2, "validation", True, TEXTS, TWO, masked=1),
    "rte": Task(("SetFit/rte",), 0.5, "validation", True, TEXTS, TWO, masked=1),
    "scitail": Task(
        ("allenai/scitail", "tsv_format"), labels={"entails": 0, "neutral": 1}, masked=2
    ),
}

SETS = {
    "vit-b-32": Set(
        "openai/clip-vit-base-patch32",
        VISION,
        dict(zip(VISION, (74.0, 58.3, 99.0, 92.7, 99.3, 88.4, 64.5, 96.2))),
    ),
    "vit-l-14": Set(
        "openai/clip-vit-large-patch14",
        VISION,
        dict(zip(VISION, (99.767, 70.053, 98.593, 97.199, 99.525, 95.698, 79.597, 97.724))),
    ),
    "llama3-8b": Set(
        "meta-llama/Meta-Llama-3-8B",
        NLI,
        dict(zip(NLI, (92.498, 90.308, 91.582, 94.485, 89.855, 96.519))),
    ),
}

TESTS = {"stanford_cars": 8041, "gtsrb": 12630, "mnist": 10000, "sun397": 19850, "svhn": 26032}
"""Test images of the tasks without a validation split, in the order in which they are drawn."""


def order(task: str) -> np.ndarray:
    """The test images of such a task, shuffled: the first fifth is the validation split.

    One generator draws all five, one after the other. It gives the authors' own lists
    (dataset/shuffled_idxs), entry for entry.
    """
    generator = np.random.RandomState(420)
    return {name: generator.permutation(size) for name, size in TESTS.items()}[task]
