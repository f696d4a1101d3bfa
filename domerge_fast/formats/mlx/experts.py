"""The experts of a layer, which MLX has in one module: `lora_a` [E, r, n] and `lora_b` [E, m, r] of
a SwitchLinear are A and B as they are, one expert after the other.

Here every expert is a module, called as in the files of transformers' models: part x of expert e is
`P.experts.e.x` for MLX's `P.switch_mlp.x`, with Mixtral's names in a `block_sparse_moe`. Where MLX
calls the experts otherwise (gpt-oss, Llama 4), transformers' files have them in other forms: these
are refused.
"""

from __future__ import annotations

import re

__all__ = ["SWITCH", "modules_of", "place_of"]

SWITCH = "switch_mlp"
_EXPERT = re.compile(r"(.+)\.experts\.(0|[1-9]\d*)\.([^.]+)")
_MIXTRAL = ".block_sparse_moe"
_TO_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_FROM_MIXTRAL = {name: own for own, name in _TO_MIXTRAL.items()}


def modules_of(path: str, count: int) -> list[str] | None:
    """The modules of so many experts in a module of MLX; None where it is not called so."""
    outer, _, part = path.rpartition(".")
    owner, _, last = outer.rpartition(".")
    if last != SWITCH or not owner:
        return None
    if owner.endswith(_MIXTRAL):
        part = _TO_MIXTRAL.get(part, part)
    return [f"{owner}.experts.{e}.{part}" for e in range(count)]


def place_of(name: str) -> tuple[str, int] | None:
    """The module of MLX that has an expert's part, and which of its matrices that is; None for what
    is no expert."""
    found = _EXPERT.fullmatch(name)
    if found is None:
        return None
    owner, number, part = found.groups()
    if owner.endswith(_MIXTRAL):
        part = _FROM_MIXTRAL.get(part, part)
    return f"{owner}.{SWITCH}.{part}", int(number)
