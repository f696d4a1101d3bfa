"""Writes adapter_model.safetensors beside every adapter_model.bin, which domerge_fast refuses.

    python benchmarks/knots/convert.py adapters/*

The pickle is read with weights_only, so that nothing in it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file


def convert(folder: Path) -> None:
    pickled = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    tensors = {name: tensor.clone().contiguous() for name, tensor in pickled.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def main(folders: Sequence[str]) -> int:
    """0, or 2 after one line for the first folder without such a file."""
    for folder in map(Path, folders):
        try:
            convert(folder)
        except OSError as error:
            print(f"convert.py: {folder}: {error.strerror}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
