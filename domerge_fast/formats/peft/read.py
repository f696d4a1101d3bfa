"""PEFT LoRA adapters: saved folders, and adapters of a live PeftModel.

Neither ``peft`` nor ``transformers`` is imported; a model is read by PEFT's names for things.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import stat
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...adapters.adapter import Adapter, AdapterConfig
from ...adapters.dora import check_no_dora
from ...adapters.names import AROUND, Spelling, in_peft
from ...adapters.style import Style
from ...adapters.whole import NEW_HEADS, WITH_HEAD, parameter
from ...errors import AdapterError
from ...storage import json_file, pickle_file
from ...storage.garbage import uncollected
from ...storage.input_file import InputFile, Refuse
from ...storage.lazy import LazyTensor, MemoryTensor
from ...storage.safetensors_file import SafetensorsFile
from .. import foreign
from .assemble import assemble
from .config import ranks, read_config, scalings
from .parameters import BASE, Wrapped, in_config

__all__ = ["CONFIG", "PICKLE", "WEIGHTS", "from_model", "load_folder", "unwrapped"]

STYLE = Style("peft")
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
Scaling = Callable[[str, int], float]


@uncollected()
def load_folder(folder: Path, name: str) -> Adapter:
    """The adapter in a folder, or in the only subfolder that has one (as PEFT saves adapters that
    are not called "default"). Config and header are read and checked; factors stay on disk.

    Raises AdapterError for whatever cannot be merged exactly.
    """
    folder = _find(folder, name)
    refuse = functools.partial(AdapterError, name, None)
    config_file = InputFile(folder / CONFIG, refuse)
    raw = json_file.read_object(config_file, json_file.CONFIG_BYTES)
    config = read_config(raw, name)
    tensors, weights = _weights(folder, refuse)
    targets = config.target_parameters
    wrappers = in_config(name, targets, ranks(raw, name)) if targets else None
    scaling = _scalings(raw, name, tensors)
    found = assemble(name, config, tensors, scaling, (config_file, weights), wrappers)
    return dataclasses.replace(found, style=STYLE)


def _weights(folder: Path, refuse: Refuse) -> tuple[Mapping[str, LazyTensor], InputFile]:
    """The tensors and their file: of safetensors on disk, of a pickle, where there is no other, in
    memory."""
    if os.path.isfile(folder / WEIGHTS):
        file = SafetensorsFile(folder / WEIGHTS, refuse)
        return file.tensors(), file.input
    if os.path.isfile(folder / PICKLE):
        pickled = InputFile(folder / PICKLE, refuse)
        return pickle_file.load(pickled), pickled
    told = foreign.of_folder(folder) or (f"has no {WEIGHTS}", "download or save it again")
    raise refuse(*told)


def from_model(peft_model: Any, adapter_name: str = "default", name: str | None = None) -> Adapter:
    """An adapter of a live model, with the scaling its layers have now; whether it is merged into
    the base weights makes no difference. Factors share the model's memory and stay on its device.

    ``name`` is what messages call the adapter (its own name if not given). Raises AdapterError for
    whatever cannot be merged exactly, as for a saved adapter.
    """
    name = name or adapter_name
    configs = getattr(unwrapped(peft_model), "peft_config", None)
    if not isinstance(configs, Mapping) or adapter_name not in configs:
        problem = "is not an adapter of this model"
        known = ", ".join(map(repr, configs)) if isinstance(configs, Mapping) else "none"
        raise AdapterError(name, None, problem, f"pass the name of one of its adapters ({known})")
    raw = _plain_config(configs[adapter_name].to_dict(), name)
    config = read_config(raw, name)
    of_adapter = re.compile(
        rf".+\.(?:lora_\w+|modules_to_save|trainable_tokens_delta)\.{re.escape(adapter_name)}"
        r"(?:\..+)?"
    )
    tensors: dict[str, LazyTensor] = {}
    for key, tensor in peft_model.state_dict().items():
        is_before = key.endswith(".token_adapter.base_layer.weight") and not tensor.is_meta
        if not of_adapter.fullmatch(key) and not is_before:
            continue
        if tensor.is_meta:
            problem = f"{key!r} has no values yet (meta device)"
            raise AdapterError(name, None, problem, "load the adapter's weights first")
        if hasattr(tensor, "full_tensor"):
            problem = f"{key!r} is a shard (DTensor)"
            raise AdapterError(name, None, problem, "gather the full state, or save and load it")
        tensors[key] = MemoryTensor(tensor)
    spell = Spelling(tensors)
    scaling = {
        spell(path): layer_scaling[adapter_name]
        for path, module in peft_model.named_modules(remove_duplicate=False)
        # Attention layers have a float of the same name.
        if isinstance(layer_scaling := getattr(module, "scaling", None), dict)
        and adapter_name in layer_scaling
    }
    bare = dict(_wrapped(peft_model, adapter_name, spell))
    path_of = {wrapped.parameter: path for path, wrapped in bare.items()}
    found = assemble(
        name,
        config,
        tensors,
        lambda module, rank: float(scaling[path_of.get(module, module)]),
        wrappers=lambda rows: bare,
    )
    check_no_dora(found)
    originals = {**found.originals, **_originals(peft_model, config, spell, found)}
    model = weakref.ref(unwrapped(peft_model))
    return dataclasses.replace(found, originals=originals, model=model, style=STYLE)


def _wrapped(peft_model: Any, adapter_name: str, spell: Spelling) -> Iterator[tuple[str, Wrapped]]:
    """The parameters that an adapter of a live model adapts, by the paths of their wrappers."""
    for path, module in peft_model.named_modules(remove_duplicate=False):
        parameter = getattr(module, "parameter_name", None)
        ranks = getattr(module, "r", None)
        if isinstance(parameter, str) and isinstance(ranks, dict) and adapter_name in ranks:
            owner, depth = spell(path), 0
            while owner.endswith(BASE):
                owner, depth = owner.removesuffix(BASE), depth + 1
            yield spell(path), Wrapped(f"{owner}.{parameter}", ranks[adapter_name], depth)


def _originals(
    peft_model: Any, config: AdapterConfig, spell: Spelling, adapter: Adapter
) -> dict[str, LazyTensor]:
    """What the model has in place of the tensors that an adapter saves whole, by name, but for the
    heads that it has only for its task."""
    saved = {parameter(key) for key in adapter.carried}
    heads = NEW_HEADS if config.task_type in WITH_HEAD else ()
    found: dict[str, LazyTensor] = {}
    for key, tensor in peft_model.state_dict().items() if saved else ():
        module, original, rest = key.partition(".original_module.")
        path = spell(f"{module}.{rest}")
        if original and path in saved and not module.endswith(heads):
            found[path] = MemoryTensor(tensor)
    return found


def unwrapped(model: Any) -> Any:
    """The PeftModel (or model with adapters) in what `torch.compile`, DistributedDataParallel and
    FSDP made of it; the model itself where nothing is around it."""
    inner = model
    while inner is not None and not _has_adapters(inner):
        parts = getattr(inner, "__dict__", {}).get("_modules", {})
        inner = next((parts[name] for name in AROUND if name in parts), None)
    return model if inner is None else inner


def _has_adapters(model: Any) -> bool:
    """Whether it has a `peft_config` itself: compiled models have all that is inside."""
    return hasattr(type(model), "peft_config") or "peft_config" in getattr(model, "__dict__", {})


def _scalings(raw: Mapping[str, Any], name: str, keys: Collection[str]) -> Scaling:
    """`scalings` for names without wrappers; AdapterError where the config's patterns say something
    else for a module than for its name with them, which is what PEFT matched."""
    of_config = scalings(raw, name)
    spell = Spelling(keys)
    paths = {key.partition(".lora_")[0] for key in keys} if spell.removed(keys) else set()
    in_model = {spell(path): in_peft(path) for path in paths}

    def scaling(module: str, rank: int) -> float:
        found = of_config(module, rank)
        with_wrappers = of_config(in_model.get(module, module), rank)
        if found != with_wrappers:
            problem = f"alpha_pattern means scaling {found} for it, but {with_wrappers} for "
            problem += repr(in_model[module])
            raise AdapterError(name, module, problem, "save it from the model without wrappers")
        return found

    return scaling


def _find(folder: Path, name: str) -> Path:
    try:
        mode = os.stat(folder).st_mode
        is_folder = stat.S_ISDIR(mode)
        if is_folder and (folder / CONFIG).is_file():
            return folder
        inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}") if path.is_file())
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL
        remedy = "check the path, or give an id on the Hugging Face Hub (owner/name)"
        raise AdapterError(name, None, "no such folder", remedy) from error
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise AdapterError(name, None, problem, "check the path") from error
    if not is_folder:
        refuse = functools.partial(AdapterError, name, None)
        told = foreign.of_file(folder, refuse) if stat.S_ISREG(mode) else None
        told = told or ("is a file", f"give the folder that holds {CONFIG}")
        raise AdapterError(name, None, *told)
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = ", ".join(path.name for path in inside)
        raise AdapterError(
            name, None, f"holds {len(inside)} adapters ({names})", "give one of them"
        )
    told = foreign.of_folder(folder) or (f"has no {CONFIG}", "give a folder saved by PEFT")
    raise AdapterError(name, None, *told)


def _plain_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a live config would be read as, had it been saved."""
    try:
        return json_file.parse(json.dumps(config, default=_plain).encode())
    except (json_file.BadJson, TypeError, RecursionError) as error:
        problem = f"its config cannot be written as JSON ({error})"
        raise AdapterError(name, None, problem, "correct the adapter's peft_config") from error


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
