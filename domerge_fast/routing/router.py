"""Which merge a query goes to, and of which adapters each is made.

Queries are clustered by their embeddings; in every cluster the adapters that did best there are
merged, with weights by how well they did; a query goes to the merge of the nearest centre.
Source: arXiv 2505.19797 (The Avengers), which sends queries to whole models; a merge of one adapter
(`top=1`) is that. There the centres, means of unit vectors, keep their lengths, so that tight
clusters attract; here they have length 1.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import options
from ..api import merge
from ..errors import OptionError, is_text
from ..merged import Merged
from ..reading import Source
from . import saved
from .clusters import centres_of, labels_of, means_of, scores_of, unit_rows

__all__ = ["Router"]

SCORE, RANK = "score", "rank"
NAMES = "cluster-{:02d}"
BETA = 3.0


@dataclass(frozen=True, eq=False)
class Router:
    """From `fit` or `open`.

    centres: [K, d], unit rows, float32. adapters: their names, T. scores: mean of each in every
    cluster [K, T], NaN where it was run on none of its queries; run: on how many. overall: mean of
    each over all clusters' queries [T]. queries: of every cluster. names: the folder that is served
    for each cluster. beta: of the softmax over distances.
    """

    centres: Tensor
    adapters: tuple[str, ...]
    scores: Tensor
    run: Tensor
    overall: Tensor
    queries: tuple[int, ...]
    names: tuple[str, ...]
    beta: float = BETA

    @classmethod
    def fit(
        cls,
        embeddings: Any,
        scores: Any,
        *,
        clusters: int = 64,
        seed: int = 0,
        adapters: Sequence[str] | None = None,
        beta: float = BETA,
    ) -> Router:
        """Cluster queries, and average scores in every cluster.

        embeddings: [queries, d] of any embedding model, as a tensor, array or lists; lengths do
            not matter. Nothing is downloaded.
        scores: [queries, T] of every adapter, in [0, 1]; NaN where it was not run.
        clusters: K; those that no query is nearest to are left out. seed: of k-means.
        adapters: T names; None: "0", "1", … beta: of `route`.

        Raises OptionError for tables that do not fit, DomergeError without scikit-learn (the extra
        "route").
        """
        points = unit_rows("embeddings", embeddings)
        table = scores_of(scores, len(points))
        options.check("clusters", clusters, int, low=1)
        if clusters > len(points):
            problem = f"{clusters} are more than the {len(points)} queries"
            raise OptionError("clusters", problem, "say fewer, or give more queries")
        options.check("seed", seed, int, low=0, high=2**32 - 1)
        beta = options.check("beta", beta, float)
        if not beta > 0:
            raise OptionError("beta", f"{beta!r} is not positive", "give a positive number")
        labels = labels_of(points, clusters, seed)
        centres, counts = centres_of(points, labels)
        means, run = means_of(table, labels)
        return cls(
            centres.float(),
            _names(adapters, table.shape[1]),
            means,
            run,
            table.nanmean(0),
            tuple(counts.tolist()),
            tuple(NAMES.format(k) for k in range(len(centres))),
            beta,
        )

    def coefficients(self, top: int = 3, power: float = 1.0, by: str = SCORE) -> Tensor:
        """Weights of the adapters in every cluster [K, T], float64, whose sum is 1.

        The `top` adapters with the best mean scores there, the first of equal ones, have weights
        in proportion to score^power, or to (1 / place)^power with by="rank"; all others 0. An
        adapter that was run on none of a cluster's queries is not taken where others were; where
        none was, the means over all queries decide.
        """
        options.check("top", top, int, low=1)
        if top > len(self.adapters):
            problem = f"{top} are more than the {len(self.adapters)} adapters"
            raise OptionError("top", problem, "say fewer")
        options.check("power", power, float, low=0.0)
        options.choose("by", by, (SCORE, RANK))
        kappa = torch.zeros(len(self.centres), len(self.adapters), dtype=torch.float64)
        for row, scores in zip(kappa, self.scores):
            means = self.overall if scores.isnan().all() else scores
            order = torch.sort(means.nan_to_num(-1.0), descending=True, stable=True).indices[:top]
            best = order[~means[order].isnan()]
            places = torch.arange(1, len(best) + 1, dtype=torch.float64)
            weights = means[best] if by == SCORE else 1 / places
            weights = weights**power if weights.any() else torch.ones_like(weights)
            row[best] = weights / weights.sum()
        return kappa

    def serving(self, kappa: Tensor, names: str = NAMES) -> Router:
        """The router of merges with these coefficients [K, T]: clusters with the same ones share
        the folder of the first of them. names: of the folders, with a place for a number."""
        if tuple(kappa.shape) != (len(self.centres), len(self.adapters)):
            problem = f"has the shape {list(kappa.shape)}"
            remedy = f"give [{len(self.centres)}, {len(self.adapters)}], as coefficients() does"
            raise OptionError("kappa", problem, remedy)
        called = _called(names, len(kappa))
        first: dict[tuple[float, ...], str] = {}
        shared = [first.setdefault(tuple(row), name) for row, name in zip(kappa.tolist(), called)]
        return dataclasses.replace(self, names=tuple(shared))

    def merge(
        self,
        adapters: Sequence[Source],
        output: str | os.PathLike[str],
        *,
        method: str = "auto",
        top: int = 3,
        power: float = 1.0,
        by: str = SCORE,
        names: str = NAMES,
        **given: Any,
    ) -> tuple[Router, dict[str, Merged]]:
        """Merge every cluster's adapters into a folder of its own in `output`, each of which
        appears whole or not at all; clusters with the same coefficients share one.

        adapters: T, in the order of the scores' columns. top, power, by: as of `coefficients`. The
        rest, and what is raised, as of `merge`; adapters with coefficient 0 are not read.

        Returns the router whose `route` names these folders, and the merges by name.
        """
        sources = list(adapters)
        if len(sources) != len(self.adapters):
            problem = f"are {len(sources)}, and scores are of {len(self.adapters)}"
            raise OptionError("adapters", problem, "give them in the order of the scores")
        kappa = self.coefficients(top, power, by)
        router = self.serving(kappa, names)
        place = options.folder("output", output)
        made: dict[str, Merged] = {}
        for name, row in zip(router.names, kappa.tolist()):
            if name not in made:
                own = [(source, w) for source, w in zip(sources, row) if w]
                weights = [w for _, w in own]
                made[name] = merge(
                    [source for source, _ in own],
                    method,
                    weights=weights,
                    output=place / name,
                    **given,
                )
        return router, made

    def route(self, embedding: Any, top: int = 1) -> list[tuple[str, float]]:
        """The folders for a query [d], of the nearest centres first, with the probability of each:
        softmax(beta cos) over all clusters, added up over those that share a folder."""
        options.check("top", top, int, low=1)
        given = torch.as_tensor(embedding)
        if given.ndim != 1:
            raise OptionError("embedding", f"has the shape {list(given.shape)}", "give one, [d]")
        unit = unit_rows("embedding", given[None], self.centres.shape[1])[0]
        near = self.centres.double() @ unit
        shares: dict[str, float] = {}
        chances = torch.softmax(self.beta * near, 0)
        for k in torch.sort(near, descending=True, stable=True).indices.tolist():
            shares[self.names[k]] = shares.get(self.names[k], 0.0) + float(chances[k])
        return list(shares.items())[:top]

    def save(
        self, folder: str | os.PathLike[str], *, overwrite: bool = False, force: bool = False
    ) -> None:
        """Write centres.safetensors and router.json to a folder of their own, whole or not at all.
        overwrite, force: as for `merge`. OutputError."""
        plain = {
            "adapters": self.adapters,
            "names": self.names,
            "queries": self.queries,
            "beta": self.beta,
            "overall": self.overall.tolist(),
            "scores": self.scores.tolist(),
            "run": self.run.tolist(),
        }
        path = options.folder("folder", folder)
        saved.write(path, self.centres, plain, overwrite, force)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Router:
        """What `save` has written. OptionError for anything else."""
        centres, plain = saved.read(folder)
        return cls(
            centres,
            tuple(plain["adapters"]),
            torch.tensor(plain["scores"], dtype=torch.float64),
            torch.tensor(plain["run"]),
            torch.tensor(plain["overall"], dtype=torch.float64),
            tuple(plain["queries"]),
            tuple(plain["names"]),
            plain["beta"],
        )


def _names(adapters: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if adapters is None:
        return tuple(map(str, range(count)))
    found = tuple(adapters)
    if isinstance(adapters, str) or not all(map(is_text, found)) or len(set(found)) != count:
        problem = f"{str(adapters)[:40]} are not {count} names"
        raise OptionError("adapters", problem, "give each column of the scores one of its own")
    return found


def _called(names: str, count: int) -> list[str]:
    """Names of folders from a pattern."""
    try:
        found = [names.format(k) for k in range(count)]
    except (ValueError, IndexError, KeyError, AttributeError) as error:
        problem = f"{names!r} has no place for a number"
        raise OptionError("names", problem, f"say {NAMES!r}") from error
    if len(set(found)) != count or any({"/", "\\", "\0"} & set(name) for name in found):
        problem = f"{names!r} does not give each cluster a folder of its own"
        raise OptionError("names", problem, f"say {NAMES!r}")
    return found
