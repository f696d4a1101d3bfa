"""What a file says of itself, and what a merge of several says.

Kept is what all inputs say alike, and of the base model what one says. What would be wrong of a
merge goes: hashes, the config with the scale that is in the factors now, the network's arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ...storage.marker import MARK, RECIPE

__all__ = ["CONFIGS", "base_model", "converted", "is_dylora", "merged", "theirs"]

CONFIGS = "lora_adapter_metadata"
"""diffusers' name for PEFT's configs."""

_BASE = "ss_base_model_version"
_OF_BASE = (_BASE, "ss_v2", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash")
_OF_BASE_PREFIXES = (
    *("modelspec.architecture", "modelspec.implementation", "modelspec.sai_model_spec"),
    *("modelspec.resolution", "modelspec.prediction_type"),
)
_HASHES = ("modelspec.hash_sha256",)
_STALE = (CONFIGS, *_HASHES, "ss_network_args", "ss_network_dropout")
_STALE_PREFIXES = ("sshs_",)
_DIM, _ALPHA, _MODULE = "ss_network_dim", "ss_network_alpha", "ss_network_module"


def theirs(metadata: Mapping[str, str]) -> dict[str, str]:
    """Without what domerge_fast writes."""
    return {k: v for k, v in metadata.items() if k not in (*MARK, RECIPE, "format")}


def base_model(metadata: Mapping[str, str]) -> str | None:
    """The base model by the name that kohya's tools have for its kind."""
    found = metadata.get(_BASE)
    return None if found in (None, "", "None") else found


def is_dylora(metadata: Mapping[str, str]) -> bool:
    """Whether LyCORIS made it as a DyLoRA, whose keys are those of a plain LoRA."""
    return re.search(r'"algo":\s*"dylora"', metadata.get("ss_network_args", "")) is not None


def merged(
    inputs: Sequence[Mapping[str, str]],
    modules: Sequence[tuple[int, float]],
    names: Sequence[str],
    others: bool = False,
) -> dict[str, str]:
    """Of a merge of files that say this. modules: ranks and scales of those that are factors;
    others: whether there is more. names: of the inputs."""
    found = {k: v for k, v in (inputs[0] if inputs else {}).items() if _stays(k, inputs)}
    for each in inputs:
        found |= {k: v for k, v in each.items() if k not in found and _is_of_base(k)}
    if any(_DIM in each or _MODULE in each for each in inputs):
        found |= _network(found, modules, others)
    if any(k.startswith("modelspec.") for k in found):
        found["modelspec.merged_from"] = ", ".join(names)
    return dict(sorted(found.items()))


def converted(
    inputs: Sequence[Mapping[str, str]], modules: Sequence[tuple[int, float]], others: bool = False
) -> dict[str, str]:
    """Of a file that said this, with its modules in other words: hashes and what is in the factors
    or alphas now go. modules, others: as of `merged`."""
    given = dict(inputs[0]) if inputs else {}
    gone = (CONFIGS, *_HASHES)
    found = {k: v for k, v in given.items() if k not in gone and not k.startswith(_STALE_PREFIXES)}
    if _DIM in given or _MODULE in given:
        found |= _network(found, modules, others)
    return dict(sorted(found.items()))


def _network(
    found: Mapping[str, str], modules: Sequence[tuple[int, float]], others: bool
) -> dict[str, str]:
    """What a file says of its network: kohya's, whatever made it; LyCORIS' where kohya's has not
    all that is in it."""
    module = found.get(_MODULE, "")
    plain = "networks.lora" if not module or module.startswith("lycoris") else module
    plain = "lycoris.kohya" if others else plain
    ranks = [rank for rank, _ in modules]
    alphas = [scale * rank for rank, scale in modules]
    return {_DIM: _one(ranks), _ALPHA: _one(alphas), _MODULE: plain}


def _one(values: Sequence[float]) -> str:
    return f"{values[0]:.9g}" if len(set(values)) == 1 else "Dynamic"


def _stays(key: str, inputs: Sequence[Mapping[str, str]]) -> bool:
    stale = key in _STALE or key.startswith(_STALE_PREFIXES)
    return not stale and all(each.get(key) == inputs[0][key] for each in inputs)


def _is_of_base(key: str) -> bool:
    return key in _OF_BASE or key.startswith(_OF_BASE_PREFIXES)
