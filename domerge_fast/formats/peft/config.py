"""PEFT's ``adapter_config.json``: which fields change the weights, and what each module's
rank and scaling are.

Every field of ``peft.LoraConfig`` 0.21 is either kept in AdapterConfig, has no effect on a trained
adapter's weights, or is refused; a field we do not know is refused unless it is switched off.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from ...adapters.adapter import AdapterConfig
from ...errors import AdapterError
from ..foreign import of_config
from .beside import INDICES, check_indices
from .patterns import BadPattern, Patterns

__all__ = ["ranks", "read_config", "scalings"]

_CHECKED = {
    "peft_type",
    "bias",
    "init_lora_weights",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",  # these two are told by the tensors
    "use_dora",
    INDICES,
}
_HARMLESS = {
    "inference_mode",
    "lora_dropout",
    "runtime_config",
    "loftq_config",  # these four matter only with the matching init_lora_weights
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",  # only with megatron_config
    "qalora_group_size",  # only with use_qalora
}
_KEPT = {f.name: f.type for f in fields(AdapterConfig) if f.name != "raw"}
_RETRAIN = "leave this adapter out or train it as a plain LoRA"
_REFUSED = {
    "alora_invocation_tokens": ("is an aLoRA, active on some tokens only", _RETRAIN),
    "use_qalora": ("is a QALoRA, its inputs are pooled", _RETRAIN),
    "use_bdlora": ("is a block-diagonal BD-LoRA", _RETRAIN),
    "arrow_config": ("is an Arrow router", "merge the adapters it routes between instead"),
    "kasa_config": ("is a KaSA, which changes the base weights", _RETRAIN),
    "velora_config": ("is a VeLoRA", "set velora_config to null in adapter_config.json"),
    "monteclora_config": ("is a MonteCLoRA, which samples its weights", _RETRAIN),
    "megatron_config": ("is written for Megatron layers", "save it without megatron_config"),
    "ensure_weight_tying": ("ties adapters to each other (ensure_weight_tying)", _RETRAIN),
}
_TASKS = (
    *("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
)
_UNCHANGED_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_CONVERTIBLE = re.compile(r"pissa|corda|olora|lora_ga")


def read_config(raw: Mapping[str, Any], adapter: str) -> AdapterConfig:
    """The config of a plain LoRA; AdapterError if it is anything else."""
    if told := of_config(raw):
        raise AdapterError(adapter, None, *told)
    if raw.get("peft_type") != "LORA":
        problem = f"peft_type is {raw.get('peft_type')!r}"
        raise AdapterError(adapter, None, problem, "only LORA adapters can be merged")
    if raw.get("bias", "none") not in ("none", None):
        problem = f"trains biases of the base model (bias={raw['bias']!r})"
        raise AdapterError(adapter, None, problem, "train it with bias='none'")
    for key, value in raw.items():
        if key in _REFUSED and value:
            raise AdapterError(adapter, None, *_REFUSED[key])
    check_indices(raw.get(INDICES), adapter)
    _check_init(raw.get("init_lora_weights", True), adapter)
    for key, value in raw.items():
        known = key in _CHECKED or key in _HARMLESS or key in _REFUSED or key in _KEPT
        if not known and value:
            problem = f"unknown field {key!r} ({str(value)[:60]}) in adapter_config.json"
            remedy = f"set {key!r} to null if it does not change the weights"
            raise AdapterError(adapter, None, problem, remedy)
    for key in _KEPT:
        _check_shape(key, raw.get(key), adapter)
    _check_selection(raw, adapter)
    kept = {key: raw[key] for key in _KEPT if raw.get(key) is not None}
    return AdapterConfig(**kept, raw=raw)


def ranks(raw: Mapping[str, Any], adapter: str) -> Callable[[str], int]:
    """A function from a module to the rank that the config says for it."""
    return _patterns(raw, "rank_pattern", "r", _is_rank, "a positive whole number", adapter)


def scalings(raw: Mapping[str, Any], adapter: str) -> Callable[[str, int], float]:
    """A function (module, rank of its factors) -> scaling, as ``peft.LoraLayer`` computes it.

    alpha / r, or alpha / sqrt(r) with ``use_rslora``; r and alpha from the first pattern that
    matches the module. It raises AdapterError if the factors' rank is not the config's.
    """
    rank_of = ranks(raw, adapter)
    alphas = _patterns(raw, "alpha_pattern", "lora_alpha", _is_finite, "a finite number", adapter)
    use_rslora = raw.get("use_rslora")
    if use_rslora is not None and not isinstance(use_rslora, bool):
        raise _wrong_value("use_rslora", use_rslora, "true or false", adapter)

    def scaling(module: str, rank: int) -> float:
        expected = rank_of(module)
        if rank != expected:
            problem = f"its factors have rank {rank}, the config says {expected}"
            remedy = "correct r or rank_pattern in adapter_config.json"
            if rank % expected == 0 and not raw.get("target_parameters"):
                remedy += f", or name the parameter that has {rank // expected} experts of rank "
                remedy += f"{expected} in target_parameters"
            raise AdapterError(adapter, module, problem, remedy)
        return float(alphas(module) / (math.sqrt(rank) if use_rslora else rank))

    return scaling


def _patterns(
    raw: Mapping[str, Any],
    field: str,
    default_field: str,
    valid: Callable[[Any], bool],
    expected: str,
    adapter: str,
) -> Callable[[str], Any]:
    """PEFT's ``get_pattern_key``: the first pattern that matches a dotted tail of the name."""
    default = raw.get(default_field, 8)
    if not valid(default):
        raise _wrong_value(default_field, default, expected, adapter)
    pattern = {} if raw.get(field) is None else raw[field]
    if not isinstance(pattern, dict):
        raise _wrong_value(field, pattern, "an object of module patterns", adapter)
    for key, value in pattern.items():
        if not valid(value):
            raise _wrong_value(f"{field}[{key!r}]", value, expected, adapter)
    values = list(pattern.values())

    def bad(error: BadPattern) -> AdapterError:
        problem = f"{field} has {error.key!r}, which {error}"
        remedy = "name the modules in full in adapter_config.json"
        return AdapterError(adapter, None, problem, remedy)

    try:
        patterns = Patterns(list(pattern))
    except BadPattern as error:
        raise bad(error) from error

    def resolve(module: str) -> Any:
        if not pattern:
            return default
        try:
            first = patterns.first(module)
        except BadPattern as error:
            raise bad(error) from error
        return pattern.get(module, default) if first is None else values[first]

    return resolve


def _check_init(init: Any, adapter: str) -> None:
    known = init is None or isinstance(init, (bool, str))
    if known and (init.lower() if isinstance(init, str) else init) in _UNCHANGED_BASE:
        return
    problem = f"init_lora_weights={init!r}"
    if init == "loftq":
        problem += " replaces the base weights by quantized ones"
        remedy = "use the LoftQ base model and set init_lora_weights to true in adapter_config.json"
    elif isinstance(init, str) and _CONVERTIBLE.match(init.lower()):
        problem += " changes the base weights"
        remedy = "save it with PEFT's path_initial_model_for_weight_conversion"
    else:
        problem += " is unknown"
        remedy = "set it to true in adapter_config.json if the base weights were not changed"
    raise AdapterError(adapter, None, problem, remedy)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_names(value: Any) -> bool:
    return _is_text(value) or _are_names(value)


def _is_number(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_numbers(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, list) and all(map(_is_number, value)))


def _is_ranges(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in value
    )


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(x is None or _is_text(x) for x in value.values())


_SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base_model_name_or_path": (_is_text, "a name or a path"),
    "revision": (_is_text, "a revision name"),
    "task_type": (lambda value: value in _TASKS, "a task type that PEFT knows"),
    "target_modules": (_is_names, "a list of names or a regular expression"),
    "exclude_modules": (_is_names, "a list of names or a regular expression"),
    "target_parameters": (_are_names, "a list of names"),
    "layers_to_transform": (_is_numbers, "layer numbers"),
    "layers_pattern": (_is_names, "names of layer lists"),
    "layer_replication": (_is_ranges, "a list of layer ranges [start, end]"),
    "fan_in_fan_out": (lambda value: isinstance(value, bool), "true or false"),
    "modules_to_save": (_are_names, "a list of names"),
    "auto_mapping": (_is_mapping, "an object of names"),
    "peft_version": (_is_text, "a version"),
}


def _check_shape(field: str, value: Any, adapter: str) -> None:
    fits, expected = _SHAPES[field]
    if value is not None and not fits(value):
        raise _wrong_value(field, value, expected, adapter)


def _check_selection(raw: Mapping[str, Any], adapter: str) -> None:
    """What PEFT would not take: it is written on."""
    pattern, layers = raw.get("layers_pattern"), raw.get("layers_to_transform")
    remedy = "correct adapter_config.json: PEFT refuses it, too"
    if pattern and layers is None:
        problem = "has layers_pattern without layers_to_transform"
        raise AdapterError(adapter, None, problem, remedy)
    if isinstance(raw.get("target_modules"), str) and not pattern is layers is None:
        problem = "has layers_to_transform or layers_pattern beside a regular expression"
        raise AdapterError(adapter, None, f"{problem} in target_modules", remedy)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_finite(value: Any) -> bool:
    # Not math.isfinite: it takes no whole number beyond the largest float.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _wrong_value(field: str, value: Any, expected: str, adapter: str) -> AdapterError:
    problem = f"{field} is {str(value)[:60]!r}, not {expected}"
    return AdapterError(adapter, None, problem, "correct adapter_config.json")
