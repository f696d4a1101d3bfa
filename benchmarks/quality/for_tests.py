"""Writes tests/data/digits: the eight adapters of the first training on digits, in bfloat16.

python benchmarks/quality/for_tests.py    # trains them where benchmarks/data has none
"""

from __future__ import annotations

import json
from pathlib import Path

import digits
import torch
from safetensors.torch import load_file, save_file
from sets import DATA

TARGET = Path(__file__).parents[2] / "tests" / "data" / "digits"
BASE = "digits-base"


def main() -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    for adapter in digits.adapters(DATA, seed=0):
        _shrink(adapter.path, TARGET / adapter.path.name)
    config = (digits.base(DATA) / "config.json").read_text()
    (TARGET / BASE).mkdir(exist_ok=True)
    (TARGET / BASE / "config.json").write_text(config)


def _shrink(source: Path, target: Path) -> None:
    """The PEFT folder with factors in bfloat16 and without the path of this machine's base."""
    target.mkdir(parents=True, exist_ok=True)
    factors = load_file(source / "adapter_model.safetensors")
    rounded = {key: factor.to(torch.bfloat16) for key, factor in factors.items()}
    save_file(rounded, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = BASE
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
