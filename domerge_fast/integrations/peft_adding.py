"""A merge as a new adapter of a live model of PEFT's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..adapters import Adapter
from ..adapters.names import PREFIX, Spelling
from ..errors import DomergeError
from ..formats.peft.gather import joined
from ..formats.peft.write import WHERE, rank_fields, wrappers
from ..merged import Merged

__all__ = ["add"]


def add(
    tuner: LoraModel,
    name: str,
    merged: Merged,
    sources: Sequence[Adapter],
) -> None:
    """Inject the merge of these sources as an adapter of this name and fill it; an error leaves the
    model without it."""
    paths = _paths(tuner)
    layouts = merged.target.layouts
    plain = [name for name in merged.names if not layouts[name].slice]
    places = {name: paths.get(name, name) for name in plain}
    ranks: dict[str, int] = {}
    for key, rank in _ranks(merged).items():
        owner, _, last = key.rpartition(".")
        place = places.get(key) or f"{paths.get(owner, owner)}.{last}"
        ranks[place] = rank
    fields: dict[str, Any] = dict(merged.target.config) | rank_fields(ranks)
    named = fields["target_modules"] == sorted(plain)
    if (named and _ambiguous(tuner, plain)) or set(places.values()) != set(plain):
        fields |= dict.fromkeys(WHERE)
        fields["target_modules"] = "|".join(map(re.escape, places.values())) or []
    # PEFT has all adapters of a model name the same ones, as they are named in its configs.
    if len(plain) < len(merged.names):
        targets = (getattr(x, "target_parameters", None) for x in tuner.peft_config.values())
        fields["target_parameters"] = sorted(next(filter(None, targets)))
    replication = fields.pop("layer_replication")
    config = LoraConfig(**fields)
    with _same_trained(tuner):
        tuner.peft_config[name] = config
        try:
            # On the meta device: the initial values would only be thrown away.
            tuner.inject_adapter(tuner.model, name, low_cpu_mem_usage=True)
            _fill(tuner, name, merged, sources)
            _fill_saved(tuner, name, merged)
        except BaseException:
            tuner.delete_adapter(name)
            raise
    # Only now: on injecting, PEFT would replicate the model's layers once more.
    config.layer_replication = replication


def _ranks(merged: Merged) -> dict[str, int]:
    """The rank of every module, and of every parameter that is adapted as it is."""
    found: dict[str, int] = {}
    for name, report in merged.report.modules.items():
        key = merged.target.layouts[name].key
        found[key] = max(found.get(key, 0), report.rank)
    return found


def _paths(tuner: LoraModel) -> dict[str, str]:
    """By the name of every module that adapters have, where it is in the model: there are more
    components in that where something is wrapped, in `torch.compile` for one."""
    modules = tuner.model.named_modules(remove_duplicate=False)
    kinds = LoraLayer, ModulesToSaveWrapper
    paths = [path for path, module in modules if isinstance(module, kinds)]
    spell = Spelling([PREFIX + path for path in paths])
    return {spell(PREFIX + path): path for path in paths}


def _ambiguous(tuner: LoraModel, names: Sequence[str]) -> bool:
    """Whether another module's name ends in one of these, which PEFT takes for the same."""
    ends = tuple(f".{name}" for name in names)
    others = {path for path, _ in tuner.model.named_modules()} - set(names)
    return any(path.endswith(ends) for path in others)


@contextmanager
def _same_trained(tuner: LoraModel) -> Iterator[None]:
    """Keep what is trained: PEFT 0.18 freezes the active adapters when it adds a frozen one."""
    before = [(parameter, parameter.requires_grad) for parameter in tuner.parameters()]
    try:
        yield
    finally:
        for parameter, trained in before:
            parameter.requires_grad = trained


def _fill(tuner: LoraModel, name: str, merged: Merged, sources: Sequence[Adapter]) -> None:
    """Give every injected layer its factors, on the device of those they are made of."""
    adapted = {key: tuner.model.get_submodule(path) for key, path in _paths(tuner).items()}
    layers = {
        key: layer
        for key, layer in adapted.items()
        if isinstance(layer, LoraLayer) and name in layer.r
    }
    filled = _filled(merged)
    for path in sorted(layers.keys() ^ filled.keys()):
        problem = "the adapters' layers are not those that their configs select"
        raise DomergeError(f"module {path!r}: {problem}; correct their target_modules")
    for path, layer in layers.items():
        names = filled[path]
        layout = merged.target.layouts[names[0]]
        source = next(source for source in sources if names[0] in source.modules)
        device = source.stored[names[0]][0].read().device
        a, b = (
            nn.Parameter(factor.to(device), requires_grad=False)
            for factor in layout.stored(*_factors(merged, names, layer.r[name]))
        )
        if layout.kind == "embedding":
            layer.lora_embedding_A[name], layer.lora_embedding_B[name] = a, b
        else:
            layer.lora_A[name].weight, layer.lora_B[name].weight = a, b


def _filled(merged: Merged) -> dict[str, list[str]]:
    """The merged modules by the path of the layer that has their factors."""
    layouts = merged.target.layouts
    paths = wrappers(layouts.values())
    found: dict[str, list[str]] = {}
    for name in merged.names:
        found.setdefault(paths.get(layouts[name].key, name), []).append(name)
    return found


def _factors(merged: Merged, names: Sequence[str], rank: int) -> tuple[Tensor, Tensor]:
    """A and B of a layer: those of a module, or of a parameter's matrices, padded to a rank."""
    piece = merged.target.layouts[names[0]].slice
    if piece is None or piece.index is None:
        return merged.factors(names[0])
    pairs = {}
    for name in names:
        own = merged.target.layouts[name].slice
        assert own
        assert own.index is not None
        pairs[own.index] = merged.factors(name)
    return joined(pairs, piece.count, rank)


def _fill_saved(tuner: LoraModel, name: str, merged: Merged) -> None:
    """Give every module that is saved whole its tensors."""
    for path, place in _paths(tuner).items():
        wrapper = tuner.model.get_submodule(place)
        if isinstance(wrapper, ModulesToSaveWrapper) and name in wrapper.modules_to_save:
            stem = f"{PREFIX}{path}."
            kept = merged.target.carried.items()
            own = {key.removeprefix(stem): x.read() for key, x in kept if key.startswith(stem)}
            wrapper.modules_to_save[name].load_state_dict(own)
