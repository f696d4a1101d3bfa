"""What files call the parts of experts that transformers 5 has in one parameter.

Older versions had a linear layer for each part of each expert: the rows of gate_up_proj are those
of gate_proj, then those of up_proj.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["FAMILIES", "ways"]

FAMILIES = (
    {
        "gate_up_proj": ("gate_proj", "up_proj"),
        "down_proj": ("down_proj",),
        "up_proj": ("up_proj",),
    },
    {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
)
"""The parts by parameter, as Qwen3-MoE and DeepSeek have them, and as Mixtral has."""

_OWNERS = {".mlp.experts": ".block_sparse_moe.experts"}
"""What files call the owner of the experts where that is not its name in the model (Mixtral)."""


def ways(parameter: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The owner of the parts of a parameter, and their names, in the order of its rows: all that
    files may have."""
    owner, _, last = parameter.rpartition(".")
    owners = [owner]
    owners += [owner.removesuffix(o) + n for o, n in _OWNERS.items() if owner.endswith(o)]
    for family in FAMILIES:
        if last in family:
            yield from ((owner, family[last]) for owner in owners)
