"""What a merge keeps of the tensors that adapters save whole: `modules_to_save`, and the weights of
embeddings that PEFT saves along (under `.base_layer.` where the embedding is adapted).

They have no factors, so the methods do not merge them. "auto" keeps a tensor that is the same in
all adapters that save it, or that one of them saves; several that differ become

    W0 + Σ w_i (W_i - W0)

with the weights as they were given, in float32 and rounded once, where W0 is at hand: in the base
model, in a live model's original module, or as a copy under `.base_layer.`; otherwise they are
refused. "drop" keeps none, "from:NAME" those of one adapter. Adapters of weight zero own nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import AdapterError, DomergeError, OptionError, some
from ..options import suggest
from ..storage.lazy import LazyTensor, dtype_name
from .adapter import Adapter, AdapterConfig, called
from .names import PREFIX, is_of_tokens, is_saved
from .whole_sum import CHOOSE, Sum, equal

__all__ = [
    "AUTO",
    "COPY",
    "DROP",
    "FROM",
    "NEW_HEADS",
    "WITH_HEAD",
    "Kept",
    "check_policy",
    "is_named",
    "keep",
    "lacks_head",
    "listed",
    "parameter",
]

AUTO, DROP, FROM = "auto", "drop", "from:"
COPY = ".base_layer."
# A model of these tasks gets a head beside its base model's weights: PEFT saves it without being
# told, and what it was before training is drawn anew whenever the model is loaded.
WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
NEW_HEADS = ("classifier", "score", "qa_outputs")
_START = "start again with whole='from:NAME' to take one adapter's, or 'drop' (--whole)"
_GIVE_BASE = f"give the base to add up the changes (--base), or {CHOOSE}"

Origin = Callable[[str], LazyTensor | None]
"""W0 of a parameter, by its name in the adapted model; None where it is not at hand."""


@dataclass(frozen=True)
class Kept:
    """tensors: by the keys PEFT writes. origins: W0 of those, where it is at hand. modules_to_save:
    for the config. owner: whose tensors they are, with "from:NAME". notes: for the report."""

    tensors: Mapping[str, LazyTensor] = field(default_factory=dict)
    origins: Mapping[str, LazyTensor] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    owner: Adapter | None = None
    notes: tuple[str, ...] = ()


def check_policy(whole: str) -> str:
    """ "auto", "drop" or "from:NAME"; OptionError for anything else."""
    is_name = isinstance(whole, str) and whole.startswith(FROM) and whole != FROM
    if not is_name and whole not in (AUTO, DROP):
        raise OptionError("whole", f"{whole!r} is not known", "say 'auto', 'drop' or 'from:NAME'")
    return whole


def named(name: str, adapters: Sequence[Adapter]) -> Adapter:
    """The adapter that is called so, or whose folder is, or that has this place (from 1)."""
    for way in range(3):
        found = [a for k, a in enumerate(adapters, 1) if _names(a.name, k)[way] == name]
        if len(found) == 1:
            return found[0]
    problem = f"no adapter is called {name!r}"
    raise OptionError("whole", problem, suggest(name, [a.name for a in adapters]))


def is_named(adapter: str, number: int, whole: str) -> bool:
    """Whether "from:NAME" names the adapter of this name, the others not being known."""
    return whole.removeprefix(FROM) in _names(adapter, number)


def _names(adapter: str, number: int) -> tuple[str, str, str]:
    return adapter, Path(adapter).name, str(number)


def keep(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    whole: str = AUTO,
    origin: Origin | None = None,
    can_add: bool = True,
) -> Kept:
    """What is kept of the adapters' carried tensors. origin: the base model's weights, if they are
    at hand. can_add: whether several that differ may be added up.

    Reads carried tensors and W0, nothing else. Raises AdapterError for tensors that differ or that
    are LoRA in another adapter, OptionError for a name that no adapter has.
    """
    merging = [(a, w) for a, w in zip(adapters, weights) if w != 0]
    if whole == DROP:
        return _dropped([a for a, _ in merging])
    owner = None
    owners = merging
    if whole.startswith(FROM):
        owner = named(whole.removeprefix(FROM), adapters)
        if not owner.carried:
            problem = f"adapter {owner.name!r} saves no tensor whole"
            raise OptionError("whole", problem, "name another adapter, or say 'drop'")
        owners = [(owner, 1.0)]
    origins = _Origins(adapters, origin)
    chosen: dict[str, LazyTensor] = {}
    for key in sorted({key for adapter, _ in owners for key in adapter.carried}):
        having = [(a, w, a.carried[key]) for a, w in owners if key in a.carried]
        if _is_untouched(key, having, [a for a, _ in merging], origins):
            continue
        chosen[key] = _one(key, having, origins if can_add else None)
        _check_under_factors(key, having[0][0], chosen[key], [a for a, _ in merging])
    known = {key: x for key, t in chosen.items() if (x := origins.of(key, t)) is not None}
    names = _modules_to_save([a for a, _ in owners], chosen)
    return Kept(
        chosen, known, names, owner, tuple(_notes(chosen, adapters, [a for a, _ in owners]))
    )


class _Origins:
    """W0 of carried tensors: the base's, and what adapters (or a live model) have kept of it."""

    def __init__(self, adapters: Sequence[Adapter], base: Origin | None) -> None:
        self._adapters = adapters
        self._base = base
        self.could_have_base = base is None and any(adapter.folder for adapter in adapters)

    def __call__(self, key: str, shape: tuple[int, ...]) -> LazyTensor | None:
        """W0 of this shape if there is one, or of another. DomergeError where adapters differ."""
        known = self.kept(key)
        if self._base is not None and (found := self._base(parameter(key))) is not None:
            known = [found] if found.shape == shape else [*known, found]
        fitting = [x for x in known if x.shape == shape] or known
        for other in fitting[1:]:
            if not equal(fitting[0], other):
                name = key.removeprefix(PREFIX)
                problem = f"{name!r}, which adapters save whole, was not the same in all of them"
                raise DomergeError(f"{problem} before training; {CHOOSE}")
        return fitting[0] if fitting else None

    def of(self, key: str, kept: LazyTensor) -> LazyTensor | None:
        """W0 of what is kept."""
        if isinstance(kept, Sum):
            return kept.origin
        return next((x for x in self.below(key)[::-1] if x.shape == kept.shape), None)

    def below(self, key: str) -> list[LazyTensor]:
        """What a LoRA of the module may be added to."""
        base = self._base(parameter(key)) if self._base is not None else None
        return [*self.kept(key), *([base] if base is not None else [])]

    def kept(self, key: str) -> list[LazyTensor]:
        """Those of adapters: saved along, of a live model, or below a LoRA."""
        path = parameter(key)
        found = [a.originals[path] for a in self._adapters if path in a.originals]
        if COPY not in key:
            stem, _, tensor = key.rpartition(".")
            copies = (a.carried.get(f"{stem}{COPY}{tensor}") for a in self._adapters)
            found += [copy for copy in copies if copy is not None]
        return found


Having = Sequence[tuple[Adapter, float, LazyTensor]]


def parameter(key: str) -> str:
    """The name of a carried tensor in the adapted model, as it was before it was adapted."""
    return key.removeprefix(PREFIX).replace(COPY, ".")


def _is_untouched(key: str, having: Having, merging: Sequence[Adapter], origins: _Origins) -> bool:
    """Whether the tensors are what another adapter's LoRA is added to, and need not be kept.

    AdapterError if the LoRA is added to something else: there is no one module that is both.
    """
    if COPY in key:
        return False
    module = key.removeprefix(PREFIX).rpartition(".")[0]
    saving = [adapter for adapter, _, _ in having]
    for other in merging:
        lora = None if other in saving else _adapted(other, module)
        if lora is None:
            continue
        below = origins.below(key)
        if lora == module and all(any(equal(t, x) for x in below) for _, _, t in having):
            return True
        problem = f"is LoRA here, but adapter {saving[0].name!r} saves it whole ({key})"
        remedy = "train it the same way in all adapters, or say whole='drop' (--whole)"
        raise AdapterError(other.name, lora, problem, remedy)
    return False


def _adapted(adapter: Adapter, module: str) -> str | None:
    """The adapter's LoRA module that is ``module`` or one of its parents or children."""
    for name in adapter.modules:
        if name == module or name.startswith(f"{module}.") or module.startswith(f"{name}."):
            return name
    return None


def _one(key: str, having: Having, origins: _Origins | None) -> LazyTensor:
    """What the tensors of one key become."""
    first, _, widest = having[0]
    for adapter, _, tensor in having[1:]:
        if not equal(widest, tensor):
            return _sum(key, having, (first, adapter), origins)
        if tensor.dtype.itemsize > widest.dtype.itemsize:
            widest = tensor
    return widest


def _sum(
    key: str, having: Having, unlike: tuple[Adapter, Adapter], origins: _Origins | None
) -> LazyTensor:
    first, other = unlike
    one, two = first.carried[key], other.carried[key]

    def refused(problem: str, remedy: str = CHOOSE) -> AdapterError:
        name = key.removeprefix(PREFIX)
        return AdapterError(other.name, None, f"{name!r}, saved whole, {problem}", remedy)

    if one.shape != two.shape:
        how = f"is {list(two.shape)}, in adapter {first.name!r} it is {list(one.shape)}"
        if COPY in key or (one.shape[1:] == two.shape[1:] and is_of_tokens(parameter(key))):
            how += ": the vocabulary was resized differently"
        raise refused(how)
    differs = f"differs from that of adapter {first.name!r}"
    if origins is None:
        raise refused(differs, _START)
    origin = origins(key, one.shape)
    if origin is None:
        remedy = _GIVE_BASE if origins.could_have_base else CHOOSE
        raise refused(f"{differs}, and its original is not at hand", remedy)
    if origin.shape != one.shape:
        how = f"{differs}; it was {list(origin.shape)} before training, now {list(one.shape)}"
        raise refused(how)
    dtypes = {tensor.dtype for _, _, tensor in having}
    if not all(dtype.is_floating_point for dtype in dtypes | {origin.dtype}):
        raise refused(f"{differs}, and is {dtype_name(one.dtype)}, which cannot be added up")
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    terms = tuple((weight, tensor) for _, weight, tensor in having)
    return Sum(key, origin, terms, dtype)


def _check_under_factors(
    key: str, owner: Adapter, tensor: LazyTensor, merging: Sequence[Adapter]
) -> None:
    """AdapterError for a copy of an adapted module's weight that its factors do not fit."""
    stem, copy, what = key.removeprefix(PREFIX).rpartition(COPY)
    if not copy or what != "weight":
        return
    for adapter in merging:
        if module := adapter.modules.get(stem):
            shape = (module.m, *module.a_shape[1:])
            if tensor.shape not in (shape, shape[::-1]):
                problem = f"saves its weight as {list(tensor.shape)}, adapter {adapter.name!r} "
                problem += f"adapts one of {module.m} outputs and {module.n} inputs"
                remedy = "adapters of one base, resized alike, can be merged"
                raise AdapterError(owner.name, stem, problem, remedy)


def _modules_to_save(owners: Sequence[Adapter], chosen: Collection[str]) -> list[str] | None:
    """What the configs say, but for modules of which nothing is kept: PEFT would miss them."""
    names = dict.fromkeys(name for a in owners for name in a.config.modules_to_save or ())
    carried = {key for adapter in owners for key in adapter.carried}

    def some(keys: Collection[str], name: str) -> bool:
        paths = (key.removeprefix(PREFIX) for key in keys if COPY not in key)
        return any(is_saved(path, [name]) for path in paths)

    return [n for n in names if some(chosen, n) or not some(carried, n)] or None


def _dropped(merging: Sequence[Adapter]) -> Kept:
    keys = {key for adapter in merging for key in adapter.carried}
    notes = [f"left out, saved whole by the adapters: {listed(keys)}"] if keys else []
    if any(lacks_head(adapter.config, None) for adapter in merging):
        notes.append("no task_type is written: PEFT would look for the head that was left out")
    return Kept(notes=tuple(notes))


def lacks_head(config: AdapterConfig, modules_to_save: list[str] | None) -> bool:
    """Whether an adapter of this task, with these modules saved whole, misses its head."""
    return config.task_type in WITH_HEAD and bool(config.modules_to_save) and not modules_to_save


def _notes(
    chosen: Mapping[str, LazyTensor], adapters: Sequence[Adapter], owners: Collection[Adapter]
) -> Iterator[str]:
    sums = [key for key, tensor in chosen.items() if isinstance(tensor, Sum)]
    if sums:
        yield f"the changes of tensors that adapters save whole were added up: {listed(sums)}"
    for k, adapter in enumerate(adapters):
        alone = [key for key in chosen if [a for a in owners if key in a.carried] == [adapter]]
        if alone and len(adapters) > 1:
            yield f"saved whole as in {called(k, adapter)}: {listed(alone)}"


def listed(keys: Collection[str]) -> str:
    """The names of tensors that are saved whole, in a sentence."""
    return some(sorted(key.removeprefix(PREFIX) for key in keys))
