"""What a merge costs on many workers: from shapes and headers, and the page that shows it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from domerge_fast.cli import main as cli
from domerge_fast.costs import UNIT_BYTES, Shape, Workers, costs

ROOT = Path(__file__).parent.parent


def test_a_module_is_counted_by_hand():
    shape = Shape(8, 10, (2, 3))
    assert shape.read == 5 * 18 * 2
    assert shape.written == 5 * 18 * 2
    grams_and_products = 3 * 25 * 18
    assert shape.flops(steps=2) == grams_and_products + 2 * 125 * 10 + (6 + 12) * 10
    wide = Shape(8, 10, (1,) * 9)
    assert wide.written == 8 * 18 * 2
    assert wide.flops(steps=2) == (2 + 8) * 9 * 64 + 3 * 81 * 10 + 729 * 10 + 9 * 2 * 10


def test_costs_add_up_and_a_base_is_read_and_written_instead_of_factors():
    modules = [Shape(64, 32, (4, 4), count=3), Shape(16, 16, (8,))]
    found = costs(modules, None)
    assert (found.modules, found.units, found.seconds) == (4, 1, None)
    assert found.read == found.written == 3 * 8 * 96 * 2 + 8 * 32 * 2
    based = costs(modules, None, into_base=True)
    dense = 2 * (3 * 64 * 32 + 256)
    assert (based.read, based.written) == (found.read + dense, dense)
    assert based.flops == found.flops + 2 * (3 * 64 * 32 * 8 + 256 * 8)


def test_workers_take_the_longest_unit_that_is_left():
    """Five units of one size on four workers end when two are done, one by one."""
    shape = Shape(UNIT_BYTES // 4, UNIT_BYTES // 4, (1,))  # a unit each
    workers = Workers(4, 1e30, 4e9, 4e9)
    found = costs([shape] * 5, workers)
    assert found.units == 5
    assert found.seconds == pytest.approx(2 * (found.read + found.written) / 5 / 1e9)
    assert found.transfer == pytest.approx((found.read + found.written) / 4e9)
    one = costs([shape] * 5, Workers(1, 1e30, 1e9, 1e9))
    assert one.seconds == pytest.approx((found.read + found.written) / 1e9)


def test_where_arithmetic_takes_longer_it_counts():
    modules = [Shape(512, 512, (64,) * 4)] * 3
    found = costs(modules, Workers(1, 1e9, 1e12, 1e12))
    assert found.seconds == found.compute == pytest.approx(found.flops / 1e9)


def test_too_many_adapters_are_read_in_batches_by_one_worker():
    """By hand: 20,000 adapters of rank 8 in 1024 x 512 take more than 2 GiB at once."""
    shape = Shape(1024, 512, (8,) * 20_000)
    rank, sides = 160_000, (1024, 512)
    found = costs([shape], Workers(4, 1e12, 4e9, 4e9), steps=3)
    assert found.streamed
    assert found.read == (3 + 2) * rank * sum(sides) * 2
    assert found.written == 512 * sum(sides) * 2
    squares = sum(6 * rank * d**2 + 9 * d**3 for d in sides)
    assert found.flops == 3 * squares + 2 * rank * 1024 * 512
    assert found.compute == pytest.approx(found.flops / 1e12)
    assert found.seconds == pytest.approx(max(found.compute, found.transfer))
    assert found.transfer == pytest.approx((found.read + found.written) / 1e9)
    assert found.memory < 2 << 30
    assert not costs([Shape(1024, 512, (8,) * 200)], None).streamed
    # More than 2 GiB at once, and a hundred times as much as d x d matrices.
    assert not costs([Shape(53248, 16384, (16,) * 200)], None).streamed


def adapter(folder: Path, rank: int) -> str:
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{name}A.weight": torch.ones(rank, 12), f"{name}B.weight": torch.ones(20, rank)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    config["base_model_name_or_path"] = "some/base"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def test_the_command_reads_headers(tmp_path, capsys):
    folders = [adapter(tmp_path / str(rank), rank) for rank in (2, 4)]
    line = ["plan", *folders, "--workers", "2"]
    assert cli.main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["adapters"], found["modules"], found["workers"]) == (2, 1, 2)
    assert found["read"] == found["written"] == 6 * 32 * 4
    assert found["seconds"] is None
    assert cli.main([*line, "--flops", "1e12", "--read", "1e9", "--write", "1e9"]) == 0
    shown = capsys.readouterr().out
    assert "in 1 units" in shown
    assert "computing" in shown


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workers", "0"], "workers"),
        (["--steps", "0"], "steps"),
        (["--flops", "1e12"], "--read, --write"),
        (["--flops", "-1", "--read", "1", "--write", "1"], "is no rate"),
        (["--flops", "nan", "--read", "1", "--write", "1"], "is no rate"),
    ],
)
def test_wrong_rates_are_refused(flags, said, tmp_path, capsys):
    assert cli.main(["plan", adapter(tmp_path / "a", 2), *flags]) == 2
    assert said in capsys.readouterr().err


def test_the_page_shows_what_the_costs_are():
    """If not: python benchmarks/scale.py"""
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    scale = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scale)
    text = scale.PAGE.read_text("utf-8")
    assert scale.page(text) == text
