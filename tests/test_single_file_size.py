"""What a merge of files of an SDXL model takes: all its modules, convolutions among them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.modules import modules
from support.timing import least

MODULES = modules("kohya-sdxl-c3lier")
CONVOLUTIONS = ("in_layers_2", "out_layers_3", "_op", "_conv")
SECONDS, BYTES = 8.0, 500 << 20
"""Of one core, and of memory, of the whole process: Python and torch take 1.7 s and 220 MiB."""

COMMAND = """
import json, sys, time
from domerge_fast.cli.main import main
code = main(sys.argv[1:])
with open("/proc/self/status") as file:
    most = next(line for line in file if line.startswith("VmHWM:"))
print(json.dumps([code, time.process_time(), int(most.split()[1]) << 10]))
"""


def write(path: Path, rank: int, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (m, n) in MODULES.items():
        kernel = (3, 3) if name.endswith(CONVOLUTIONS) else ()
        a = torch.randn(rank, n, *kernel, generator=generator)
        b = torch.randn(m, rank, *[1] * len(kernel), generator=generator)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = a.half(), b.half()
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2).half()
    save_file(tensors, path)
    return path


@pytest.mark.slow
def test_a_merge_of_sdxl_s_size_takes_seconds_and_little_memory(tmp_path):
    files = [write(tmp_path / "one.safetensors", 16, 1), write(tmp_path / "two.safetensors", 32, 2)]
    out = tmp_path / "out.safetensors"
    asked = ["merge", *map(str, files), "-o", str(out), "--force", "--method", "linear"]

    def merge() -> float:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *asked], check=True, capture_output=True, text=True
        )
        code, seconds, nbytes = json.loads(done.stdout.splitlines()[-1])
        assert code == 0
        assert out.stat().st_size > sum(file.stat().st_size for file in files) * 0.99
        assert nbytes < BYTES, f"{nbytes >> 20} MiB"
        return seconds

    assert least(merge, SECONDS) <= SECONDS
