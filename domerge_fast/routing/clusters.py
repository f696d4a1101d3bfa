"""Clusters of queries by their embeddings, and how well adapters do in each."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import DomergeError, OptionError

__all__ = ["centres_of", "labels_of", "means_of", "scores_of", "unit_rows"]

ROUNDS = 1000
"""Of k-means, at most."""


def unit_rows(name: str, embeddings: Any, width: int | None = None) -> Tensor:
    """Embeddings [queries, d] at length 1, float64; OptionError for what is none. width: d, if it
    is known."""
    found = _table(name, embeddings)
    if found.ndim != 2 or 0 in found.shape or (width and found.shape[1] != width):
        problem = f"have the shape {list(found.shape)}"
        raise OptionError(name, problem, f"give [queries, {width or 'd'}]")
    lengths = torch.linalg.vector_norm(found, dim=1)
    if not torch.isfinite(lengths).all() or (lengths == 0).any():
        bad = int((~(lengths > 0) | ~torch.isfinite(lengths)).nonzero()[0])
        problem = f"row {bad} is zero, NaN or infinite"
        raise OptionError(name, problem, "leave that query out, or embed it again")
    return found / lengths[:, None]


def scores_of(scores: Any, queries: int) -> Tensor:
    """Scores [queries, T] in [0, 1], NaN where an adapter was not run, in float64."""
    found = _table("scores", scores)
    if found.ndim != 2 or len(found) != queries or not found.shape[1]:
        problem = f"have the shape {list(found.shape)}, and there are {queries} queries"
        raise OptionError("scores", problem, "give [queries, adapters]")
    known = found[~found.isnan()]
    if not ((known >= 0) & (known <= 1)).all():
        remedy = "give 1 for right and 0 for wrong, or a share, and NaN where one was not run"
        raise OptionError("scores", "are not all between 0 and 1", remedy)
    if (never := found.isnan().all(0)).any():
        problem = f"adapter {int(never.nonzero()[0])} has none for any query"
        raise OptionError("scores", problem, "run it, or leave it out")
    return found


def _table(name: str, given: Any) -> Tensor:
    try:
        return torch.as_tensor(given, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        problem = f"are a {type(given).__name__} that is no table of numbers"
        raise OptionError(name, problem, "give a tensor, an array or lists") from error


def labels_of(points: Tensor, clusters: int, seed: int) -> Tensor:
    """The cluster of every point [queries]: k-means from k-means++ (scikit-learn)."""
    kmeans = _kmeans()
    found = kmeans(
        clusters, n_init=1, max_iter=ROUNDS, algorithm="elkan", random_state=seed, copy_x=True
    )
    with warnings.catch_warnings():
        # Where there are less different points than clusters: the others are empty, and left out.
        warnings.simplefilter("ignore")
        return torch.from_numpy(found.fit_predict(points.numpy())).long()


@functools.cache
def _kmeans() -> Any:
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        needs = "routing needs scikit-learn"
        raise DomergeError(f"{needs} ({error}); pip install 'domerge-fast[route]'") from error
    return KMeans


def centres_of(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of every cluster that has a point at length 1 [K, d], and its points [K]. Clusters
    are in the order of their first points."""
    order = list(dict.fromkeys(labels.tolist()))
    members = [labels == label for label in order]
    means = torch.stack([points[own].mean(0) for own in members])
    return torch.nn.functional.normalize(means, dim=1), torch.stack([own.sum() for own in members])


def means_of(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean score of every adapter in every cluster [K, T], NaN where it was run on none of its
    queries, and on how many it was run [K, T]."""
    order = list(dict.fromkeys(labels.tolist()))
    own = [scores[labels == label] for label in order]
    run = torch.stack([(~x.isnan()).sum(0) for x in own])
    return torch.stack([x.nanmean(0) for x in own]), run
