"""The weights of a base model that have a row for every token: what adapters save of them, when two
that are tied have to part, and how many rows they have in the end.

PEFT changes one side of a tied pair: LoRA on the embedding, or its name in `modules_to_save`, gives
the embedding a weight of its own and leaves the head as it was. What is saved along (a resized
embedding, the weight below a LoRA) is loaded into the pair.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...adapters import LazyTensor
from ...adapters.names import EMBEDDINGS, HEADS, is_of_tokens, is_saved
from ...adapters.stems import split
from ...adapters.whole import COPY, parameter
from ...adapters.whole_sum import equal
from ...storage.lazy import dtype_name
from ..target import Layout, Target
from .checkpoint import FLOATS, TIED, Checkpoint, parts, refusal

__all__ = ["Vocabulary", "check_replaceable", "check_twins", "is_token_layout", "settle"]

SIZE = "vocab_size"
_UNTIE = f"save the base with two weights and {TIED}=false, or write an adapter"
_OTHER = "give the base model the adapters were trained on, or write an adapter"
_WITHOUT_HEAD = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
# Where transformers models that have a head beside their backbone keep the embedding; their head is
# outermost, but in what was saved of a language model inside another.
_BACKBONES = {
    **dict.fromkeys(("model", "transformer", "gpt_neox", "model.decoder"), ""),
    "model.language_model": "",
    "language_model.model": "language_model.",
}


@dataclass
class Vocabulary:
    """replaced: what takes the place of a weight, by its name in the output. beside: weights that
    the base does not store, and a stored one whose file and dtype they take. config: fields of
    config.json that change. rows: of a resized vocabulary."""

    keys: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, LazyTensor] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    rows: int | None = None
    notes: tuple[str, ...] = ()


def settle(target: Target, base: Checkpoint, rename: Callable[[str], str]) -> Vocabulary:
    """Which weights there are, before any ΔW is added. `keys` are the names of token weights in the
    output, by those in the adapted model. OptionError, in one line, for what does not fit."""
    saved = {parameter(k): k for k in target.carried if is_of_tokens(parameter(k))}
    adapted = {f"{x.name}.weight" for x in target.layouts.values() if is_token_layout(x, base)}
    touched = sorted({*saved, *adapted})
    found = Vocabulary()
    if (
        base.is_tied
        and not adapted
        and _is_base_s_own([target.carried[k] for k in saved.values()], base)
    ):
        return found
    pair = _pair(base, touched) if any(map(_is_weight, touched)) else None
    for path in touched:
        found.keys[path] = pair[_side(path, base)] if pair and _is_weight(path) else rename(path)
    if len(set(found.keys.values())) < len(touched):
        problem = f"has one weight for {' and '.join(map(repr, touched[:2]))}"
        raise refusal(base.folder, problem, _UNTIE)
    for path, key in saved.items():
        found.replaced[found.keys[path]] = target.carried[key]
        own = base.tensors.get(pair[0] if pair and _is_weight(path) else found.keys[path])
        check_replaceable(found.keys[path], target.carried[key], own, base, same_rows=False)
    if pair:
        shared = {
            found.keys[p]: target.carried[k] for p, k in saved.items() if _is_shared(k, target)
        }
        _settle_pair(found, pair, shared, {found.keys[path] for path in adapted}, base)
    _resize(found, base)
    return found


def check_twins(changed: Collection[str], base: Checkpoint) -> None:
    """OptionError for a weight outside of layers, beside those known to be of tokens, that the base
    stores twice: a model of other names may tie the two, and loading it would undo the change."""
    own = {key: base.tensors[key] for key in changed if not split(key)[1]}
    for key, tensor in sorted(own.items() if base.is_tied else ()):
        for twin, other in base.tensors.items():
            apart = twin == key or len(tensor.shape) < 2 or tensor.shape != other.shape
            if not apart and not split(twin)[1] and equal(tensor, other):
                problem = f"may tie {key!r}, which the adapters change, to {twin!r} ({TIED})"
                raise refusal(base.folder, problem, _UNTIE)


def check_replaceable(
    key: str, tensor: LazyTensor, own: LazyTensor | None, base: Checkpoint, same_rows: bool = True
) -> None:
    """OptionError unless a tensor saved whole can take the place of the base's own."""
    if own is None:
        problem = f"has no {key!r}, which the adapters save whole"
        remedy = "load the base as the class that was trained and save it, or say whole='drop'"
        raise refusal(base.folder, problem, remedy)
    first = 0 if same_rows else 1
    floats = tensor.dtype in FLOATS and own.dtype in FLOATS
    alike = tensor.shape[first:] == own.shape[first:] and len(tensor.shape) == len(own.shape)
    if not alike or not (floats or tensor.dtype == own.dtype):
        problem = f"stores {key!r} as {_described(own)}, the adapters save it as "
        remedy = "give the base the adapters were trained on, or write an adapter"
        raise refusal(base.folder, problem + _described(tensor), remedy)


def _described(tensor: LazyTensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def _is_base_s_own(saved: Collection[LazyTensor], base: Checkpoint) -> bool:
    """Whether what is saved is the base's tied weight, under whatever name: nothing changes."""
    stored = [tensor for key, tensor in base.tensors.items() if is_of_tokens(key)]
    return all(any(equal(tensor, own) for own in stored) for tensor in saved)


def is_token_layout(layout: Layout, base: Checkpoint) -> bool:
    """Whether a module has a row or a column for every token."""
    sizes = [(part.get(SIZE),) for part in parts(base.config)]
    embeds = layout.kind == "embedding" and layout.inputs in sizes
    return embeds or is_of_tokens(f"{layout.name}.weight")


def _is_weight(path: str) -> bool:
    return path.endswith(".weight")


def _side(path: str, base: Checkpoint) -> int:
    """0 for the embedding, 1 for the head."""
    return int(path.split(".")[-2] in HEADS)


def _is_shared(key: str, target: Target) -> bool:
    """Whether PEFT loads a tensor into the base's weight, and into what is tied to it."""
    return COPY in key or not is_saved(parameter(key), target.whole.modules_to_save or ())


def _pair(base: Checkpoint, touched: Collection[str]) -> tuple[str, str] | None:
    """The embedding and the head that loading makes one weight; None where it does not.

    OptionError where that cannot be told, or the name of a head that is not stored.
    """
    architectures = base.config.get("architectures") or [""]
    if not base.is_tied or str(architectures[0]).endswith(_WITHOUT_HEAD):
        return None
    stored = [key for key in base.tensors if is_of_tokens(key) and _is_weight(key)]
    embeddings = [key for key in stored if key.split(".")[-2] in EMBEDDINGS]
    heads = [key for key in stored if key not in embeddings]
    if len(embeddings) == len(heads) == 1:
        if equal(base.tensors[embeddings[0]], base.tensors[heads[0]]):
            return embeddings[0], heads[0]
        if not _states_tied(base):
            return None
    elif len(embeddings) == 1 and not heads:
        parent, _, name = embeddings[0].removesuffix(".weight").rpartition(".")
        if parent in _BACKBONES:
            head = "embed_out" if name == "embed_in" else "lm_head"
            return embeddings[0], f"{_BACKBONES[parent]}{head}.weight"
    paths = " and ".join(map(repr, [*touched][:2]))
    problem = f"may tie {paths}, which the adapters change, to another weight ({TIED})"
    raise refusal(base.folder, problem, _UNTIE)


def _states_tied(base: Checkpoint) -> bool:
    return any(part.get(TIED) is not None for part in parts(base.config))


def _settle_pair(
    found: Vocabulary,
    pair: tuple[str, str],
    shared: Mapping[str, LazyTensor],
    adapted: set[str],
    base: Checkpoint,
) -> None:
    """What is loaded into the pair is in both; they stay one weight if nothing sets them apart."""
    embedding, head = pair
    for one, other in (pair, pair[::-1]):
        if one in shared and other not in found.replaced:
            found.replaced[other] = shared[one]
    before = [found.replaced.get(key, base.tensors[embedding]) for key in pair]
    alone = adapted & set(pair)
    if not alone and (before[0] is before[1] or equal(*before)):
        if head not in base.tensors:
            found.replaced.pop(head, None)
        return
    found.replaced |= dict(zip(pair, before))
    if head not in base.tensors:
        found.beside[head] = embedding
    found.config = _changed(base.config, TIED, False, always=True)
    found.notes += (f"{embedding!r} and {head!r} are two weights now ({TIED} is false)",)


def _resize(found: Vocabulary, base: Checkpoint) -> None:
    """All weights that have a row for every token, with as many rows as the adapters give them."""
    sizes = {}
    for key in {**base.tensors, **found.beside}:
        if is_of_tokens(key) or key in found.keys.values():
            own = base.tensors[found.beside.get(key, key)]
            sizes[key] = own.shape[:1], found.replaced.get(key, own).shape[:1]
    resized = {key: pair for key, pair in sizes.items() if pair[0] != pair[1]}
    if not resized:
        return
    first, (before, after) = min(resized.items())
    for key, (then, now) in sorted(sizes.items()):
        if then == before and now != after:
            problem = f"would have {after[0]} rows in {first!r}, but {now[0]} in {key!r}"
            remedy = "save both with the adapters (save_embedding_layers=True), or resize the base"
            raise refusal(base.folder, problem, remedy)
    if not any(part.get(SIZE) for part in parts(base.config)):
        raise refusal(base.folder, f"has no {SIZE} in config.json to change", _OTHER)
    found.config = _changed(found.config or base.config, SIZE, after[0])
    found.rows = after[0]
    found.notes += (f"the vocabulary has {after[0]} rows now, and had {before[0]} in the base",)


def _changed(
    config: Mapping[str, Any], name: str, value: Any, always: bool = False
) -> Mapping[str, Any]:
    """The config with another value of a field wherever it is; `always`: also where it is not."""
    changed = dict(config) | ({name: value} if always or name in config else {})
    if isinstance(text := config.get("text_config"), dict) and (always or name in text):
        changed["text_config"] = dict(text) | {name: value}
    return changed
