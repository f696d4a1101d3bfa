"""A written adapter has one rank, and every reader's rule gives every module the same update."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.close import distance
from support.make import PREFIX, Factors, random_factors, write_adapter
from support.merges import at_one
from torch import Tensor

import domerge_fast as dm
from domerge_fast.cli import main as cli
from domerge_fast.formats.peft import write as peft
from domerge_fast.formats.peft.config import scalings
from domerge_fast.methods import TABLE

SHAPES = {"layers.0.q": (24, 40), "layers.0.down": (30, 26), "layers.1.q": (24, 40)}


def mixed_factors(rank: int, seed: int) -> Factors:
    """A linear layer, an embedding and two convolutions."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "net.fc": ((30,), (20, rank)),
        "net.emb": ((50,), (16, rank)),
        "net.conv": ((6, 3, 2), (18, rank, 1, 1)),
        "net.line": ((5, 3), (17, rank, 1)),
    }
    return {
        name: (torch.randn(rank, *a, generator=generator), torch.randn(*b, generator=generator))
        for name, (a, b) in shapes.items()
    }


def uneven(folder: Path) -> list[Path]:
    """Adapters of ranks 3 and 5, of which the second lacks a module."""
    partial = {name: shape for name, shape in SHAPES.items() if "down" not in name}
    return [
        write_adapter(folder / "a", random_factors(SHAPES, 3, seed=1)),
        write_adapter(folder / "b", random_factors(partial, 5, seed=2), lora_alpha=10),
    ]


def mixed(folder: Path) -> list[Path]:
    """The same with an embedding and convolutions."""
    both = [mixed_factors(rank, rank) for rank in (3, 4)]
    del both[1]["net.conv"], both[1]["net.fc"]
    return [
        write_adapter(folder / name, factors, embeddings=["net.emb"])
        for name, factors in zip("ab", both)
    ]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def stored(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors [R, n] and [m, R] as they stand in the file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        for end in (".lora_A.weight", ".lora_embedding_A"):
            if key.endswith(end):
                b = tensors[key.removesuffix(end) + end.replace("A", "B")]
                name = key.removeprefix(PREFIX).removesuffix(end)
                found[name] = a.flatten(1), b.flatten(1)
    return found


def updates(folder: Path) -> dict[str, dict[str, Tensor]]:
    """ΔW of every module by the rules that readers scale by."""
    config, factors = config_of(folder), stored(folder)
    by_pattern = scalings(config, "x")
    alpha = config["lora_alpha"]
    rules = {
        "alpha / r": lambda name, rank: alpha / config["r"],
        "alpha / own rank": lambda name, rank: alpha / rank,
        "PEFT": by_pattern,
    }
    return {
        rule: {name: scale(name, len(a)) * b @ a for name, (a, b) in factors.items()}
        for rule, scale in rules.items()
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "weights": [1.0, -0.5]},
    "do": {"method": "do"},
    "rank": {"method": "do", "rank": 4},
    "svd": {"method": "svd"},
    "ties": {"method": "ties", "rank": 7},
    "lego": {"method": "lego", "clusters": 4},
    "after": {"method": "linear", "post": ["subspace_boost", "norm_match"]},
}


@pytest.mark.parametrize("make", [uneven, mixed])
@pytest.mark.parametrize("options", OPTIONS)
def test_all_readers_give_a_module_one_update(options, make, tmp_path):
    merged = at_one(make(tmp_path), output=tmp_path / "out", **OPTIONS[options])
    config = config_of(tmp_path / "out")
    assert {len(a) for a, _ in stored(tmp_path / "out").values()} == {config["r"]}
    assert config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    assert config["target_modules"] == sorted(merged.names)
    for found in updates(tmp_path / "out").values():
        assert found.keys() == set(merged.names)
        for name in merged.names:
            assert torch.equal(found[name], merged.delta(name))


def test_the_rank_is_the_largest_that_a_module_needs(tmp_path):
    adapters = uneven(tmp_path)
    for options, rank in (
        ({"method": "linear"}, 8),
        ({"method": "linear", "rank": 4}, 4),
        ({"method": "svd"}, 5),
        ({"method": "lego"}, 5),
        ({"method": "knots", "inner": "lego", "clusters": 2}, 2),
        ({"method": "ties", "rank": 1000}, 26),
        ({"method": "breadcrumbs"}, 5),
    ):
        merged = at_one(adapters, output=tmp_path / "out", overwrite=True, **options)
        assert config_of(tmp_path / "out")["r"] == rank, options
        in_memory = at_one(adapters, **options)
        for name in merged.names:
            assert len(in_memory.factors(name)[0]) == in_memory.report[name].rank
            assert all(map(torch.equal, in_memory.factors(name), merged.factors(name)))
    assert in_memory.report["layers.0.down"].rank == 5
    exact = at_one(adapters, "linear")
    assert [exact.report[name].rank for name in sorted(SHAPES)] == [3, 8, 8]


@pytest.mark.parametrize("given", [{"ragged": True}, {"energy": 0.8}], ids=str)
def test_ragged_adapters_have_own_ranks_and_the_largest_is_stated(given, tmp_path):
    adapters = uneven(tmp_path)
    merged = at_one(adapters, "linear", output=tmp_path / "out", **given)
    ranks = {name: report.rank for name, report in merged.report.modules.items()}
    assert len(set(ranks.values())) > 1
    assert {name: len(a) for name, (a, _) in stored(tmp_path / "out").items()} == ranks
    config = config_of(tmp_path / "out")
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    for name, update in updates(tmp_path / "out")["PEFT"].items():
        assert torch.equal(update, merged.delta(name))
    assert merged.report.recipe.ragged is True
    ragged = [note for note in merged.report.notes if note.startswith("ranks from ")]
    assert all(x in ragged[0] for x in ("SGLang", "llama.cpp", "TensorRT-LLM"))
    assert "vLLM" not in ragged[0]
    at_one(adapters, "linear", **given).save(tmp_path / "saved")
    assert config_of(tmp_path / "saved") == config


@pytest.mark.parametrize("method", TABLE)
def test_a_merge_of_padded_adapters_is_that_of_ragged_ones(method, tmp_path):
    adapters = uneven(tmp_path)
    for ragged in (False, True):
        out = tmp_path / str(ragged)
        at_one(adapters, "linear", output=out, ragged=ragged)
    third = tmp_path / "c"
    ranks = {"layers.0.q": 8, "layers.0.down": 3, "layers.1.q": 8}
    parts = {name: random_factors({name: SHAPES[name]}, rank) for name, rank in ranks.items()}
    third_factors = {name: part[name] for name, part in parts.items()}
    write_adapter(third, third_factors, r=8, lora_alpha=8, rank_pattern={"down": 3})
    padded, own = (at_one([tmp_path / str(r), third], method) for r in (False, True))
    for name in own.names:
        assert all(map(torch.equal, padded.factors(name), own.factors(name)))


# More rows than a module has rank


@pytest.mark.parametrize("method", ["linear", "do", "slerp", "multislerp", "lego"])
def test_a_module_has_no_more_rows_than_its_update_can_have_rank(method, tmp_path):
    shapes = {"thin": (40, 12), "flat": (12, 40), "large": (50, 60)}
    adapters = [
        write_adapter(tmp_path / name, random_factors(shapes, 9, seed=k))
        for k, name in enumerate("ab")
    ]
    options = {"clusters": 18} if method == "lego" else {}
    wide = at_one(adapters, method, form="deltas", **options)
    merged = at_one(adapters, method, output=tmp_path / "out", **options)
    assert {n: r.rank for n, r in merged.report.modules.items()} == {
        "flat": 12,
        "large": 18,
        "thin": 12,
    }
    assert {r.energy_kept for r in merged.report.modules.values()} == {1.0}
    assert not any(label == "energy kept" for label, _ in merged.report.summary())
    for name in merged.names:
        assert distance(merged.delta(name).double(), wide.delta(name).double()) < 1e-6
    low = at_one(adapters, method, dtype="bfloat16", **options)
    for name in low.names:
        assert {x.dtype for x in low.factors(name)} == {torch.bfloat16}
        assert distance(low.delta(name).double(), wide.delta(name).double()) < 2**-7


def test_a_rank_beyond_the_adapters_leaves_room_for_the_header(tmp_path):
    """Dense results may have any rank up to min(m, n), also in the file's header."""
    shapes = {f"layers.{k}.q": (130, 140) for k in range(40)}
    adapters = [
        write_adapter(tmp_path / name, random_factors(shapes, 2, seed=k))
        for k, name in enumerate("ab")
    ]
    merged = at_one(adapters, "ties", rank=128, output=tmp_path / "out")
    found = stored(tmp_path / "out")
    assert {len(a) for a, _ in found.values()} == {128}
    for name in merged.names:
        assert torch.equal(found[name][1] @ found[name][0], merged.delta(name))


# What servers must be told


def test_target_modules_is_a_list_unless_an_outermost_module_ends_anothers_name(tmp_path):
    names = {"lm_head": (9, 8), "layers.0.q": (8, 8)}
    for part, ambiguous in ((names, False), (names | {"draft.lm_head": (9, 8)}, True)):
        factors = random_factors(part, 2)
        merged = at_one([dm.from_tensors(factors)], output=tmp_path / str(ambiguous))
        targets = config_of(tmp_path / str(ambiguous))["target_modules"]
        assert isinstance(targets, str) == ambiguous
        said = [note for note in merged.report.notes if "target_modules" in note]
        assert len(said) == ambiguous
        assert all("SGLang" in note for note in said)


def test_adapters_that_share_a_regular_expression_are_written_with_a_list(tmp_path):
    folders = [
        write_adapter(tmp_path / name, random_factors(SHAPES, 2), target_modules=r"layers\..*")
        for name in "ab"
    ]
    at_one(folders, output=tmp_path / "out")
    assert config_of(tmp_path / "out")["target_modules"] == sorted(SHAPES)


@pytest.mark.parametrize(
    ("rank", "told"),
    [
        (1, "--max-lora-rank 1"),
        (9, "--max-lora-rank 16"),
        (257, "--max-lora-rank 320"),
        (512, "--max-lora-rank 512"),
        (513, "vLLM 0.33 serves 512 at most; --rank 512 cuts it"),
    ],
)
def test_the_report_says_which_rank_vllm_has_to_allow(rank, told):
    factors = random_factors({"q": (600, 600)}, rank)
    merged = at_one([dm.from_tensors(factors)], "linear")
    assert merged.report.notes == (next(n for n in merged.report.notes if n.endswith(told)),)
    assert at_one([dm.from_tensors(factors)], "linear", form="deltas").report.notes == ()


def test_the_card_and_the_command_say_it_too(tmp_path, capsys):
    carried = {"score.weight": torch.zeros(2, 3), "score.bias": torch.zeros(2)}
    folder = write_adapter(
        tmp_path / "a",
        random_factors(SHAPES, 3),
        carried=carried,
        modules_to_save=["score"],
    )
    assert cli.main(["merge", str(folder), "-o", str(tmp_path / "out")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    card = (tmp_path / "out/README.md").read_text()
    for text in (printed, card):
        assert "vLLM's --max-lora-rank 8" in text
        assert "score.bias and 1 more (saved whole): SGLang" in re.sub(r"\\(?=[([])", "", text)
    flags = ["merge", *map(str, uneven(tmp_path)), "--method", "linear", "--ragged"]
    assert cli.main([*flags, "-o", str(tmp_path / "own")]) == 0
    assert "ranks from 3 to 8: SGLang" in " ".join(capsys.readouterr().out.split())
    assert config_of(tmp_path / "own")["rank_pattern"]


def test_ragged_is_for_adapters(tmp_path):
    adapters = uneven(tmp_path)
    with pytest.raises(dm.OptionError, match="'ragged': 'deltas' has no ranks"):
        at_one(adapters, form="deltas", ragged=True)
    with pytest.raises(dm.OptionError, match="'ragged': 1 is not True or False"):
        at_one(adapters, ragged=1)
    at_one(adapters, form="deltas", energy=0.9)


def test_a_sequential_merge_is_written_with_one_rank(tmp_path):
    adapters = uneven(tmp_path)
    state = dm.Sequential.start(tmp_path / "state")
    for adapter in adapters:
        state.add(adapter)
    merged = state.save(tmp_path / "out")
    sums = load_file(tmp_path / "state/session.safetensors")
    assert {len(x) for key, x in sums.items() if "lora_A" in key} == {3, 8}
    assert {len(a) for a, _ in stored(tmp_path / "out").values()} == {8}
    assert config_of(tmp_path / "out")["r"] == 8
    for name in merged.names:
        found = updates(tmp_path / "out")["alpha / r"][name]
        assert torch.equal(found, state.merged().delta(name))
    assert any("--max-lora-rank 8" in note for note in merged.report.notes)


def test_an_adapter_of_one_with_patterns_and_rslora_is_made_portable(tmp_path):
    factors = random_factors(SHAPES, 4)
    factors["layers.0.down"] = random_factors({"x": SHAPES["layers.0.down"]}, 2)["x"]
    folder = write_adapter(
        tmp_path / "a",
        factors,
        lora_alpha=16,
        use_rslora=True,
        rank_pattern={"down": 2},
        alpha_pattern={"layers.1.q": 3},
    )
    given = dm.load(folder)
    at_one([folder], output=tmp_path / "out")
    for found in updates(tmp_path / "out").values():
        for name, module in given.modules.items():
            a, b = given.factors(name)
            assert distance(found[name].double(), module.scaling * b.double() @ a.double()) < 1e-6


def test_a_method_that_breaks_its_word_is_caught(tmp_path):
    merged = at_one(uneven(tmp_path), "linear")
    folder = peft.PeftFolder(tmp_path / "out", merged.target, False)
    with pytest.raises(AssertionError, match="rank 9, more than was planned"), folder:
        folder.add("layers.0.q", torch.zeros(9, 40), torch.zeros(24, 9))
    assert not (tmp_path / "out").exists()
