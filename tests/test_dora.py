"""DoRA adapters with the base model, against PEFT's own merge_and_unload."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.close import assert_close, distance
from support.trained import trained
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import domerge_fast as dm
from domerge_fast import AdapterError
from domerge_fast.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=20,
            tie_word_embeddings=False,
        )
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 5, (3, 2)), nn.Conv2d(5, 7, 1)])
        self.line = nn.Conv1d(4, 6, 3)

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        save_file(self.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))


CASES = {
    "linear": (llama, {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "rslora": (llama, {"target_modules": ["up_proj", "v_proj"], "use_rslora": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "turned": (gpt2, {"target_modules": ["c_attn", "c_fc"]}),
    "convolutions": (Convolutions, {"target_modules": ["0", "1", "line"]}),
}


DORA = {"use_dora": True}


def merged_by_peft(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model).double(), folder)
    return loaded.double().merge_and_unload().state_dict()


@pytest.fixture
def case(request, tmp_path):
    make, settings = CASES[request.param]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    folders = [trained(model, k, tmp_path / str(k), **DORA | settings) for k in (1, 2)]
    before = {key: x.double() for key, x in model.state_dict().items()}
    after = [merged_by_peft(model, folder) for folder in folders]
    deltas = [{key: x[key] - before[key] for key in before} for x in after]
    return model, folders, deltas, tmp_path


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_model_is_what_peft_merges(case):
    model, folders, deltas, tmp_path = case
    given = {"form": "model", "base": tmp_path / "base"}
    report = dm.merge(folders[:1], "linear", output=tmp_path / "one", **given).report
    assert any("are DoRA: their updates of the base's weights" in note for note in report.notes)
    found = load_file(tmp_path / "one" / "model.safetensors")
    for key, before in model.state_dict().items():
        if key in found:
            assert_close(found[key].double(), before.double() + deltas[0][key], 1e-6)
    dm.merge(folders, "linear", weights=[0.5, -2], output=tmp_path / "two", **given)
    found = load_file(tmp_path / "two" / "model.safetensors")
    for key, before in model.state_dict().items():
        if key in found:
            wanted = before.double() + 0.5 * deltas[0][key] - 2 * deltas[1][key]
            assert_close(found[key].double(), wanted, 1e-6)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_deltas_are_what_peft_merges(case):
    _, folders, deltas, tmp_path = case
    given = {"form": "deltas", "base": tmp_path / "base", "output": tmp_path / "out"}
    dm.merge(folders, "linear", **given)
    found = load_file(tmp_path / "out" / "deltas.safetensors")
    assert found
    for key, x in found.items():
        assert_close(x.double(), deltas[0][key] + deltas[1][key], 1e-5)


@pytest.mark.parametrize("case", ["linear"], indirect=True)
def test_methods_entry_by_entry_take_it(case):
    _, folders, deltas, tmp_path = case
    given = {"form": "deltas", "base": tmp_path / "base", "scale": 1.0, "backend": "torch"}
    merged = dm.merge(folders, "magnitude_prune", density=0.5, **given)
    name = "model.layers.0.self_attn.k_proj"
    wanted = torch.zeros(())
    for x in (x[f"{name}.weight"] for x in deltas):
        least = x.abs().flatten().sort(descending=True).values[x.numel() // 2 - 1]
        wanted = wanted + torch.where(x.abs() >= least, x, 0.0)
    assert distance(merged.delta(name).double(), wanted) < 1e-4


@pytest.mark.parametrize("case", ["linear"], indirect=True)
def test_an_adapter_is_their_cut_to_a_rank(case):
    _, folders, deltas, tmp_path = case
    given = {"base": tmp_path / "base", "output": tmp_path / "out", "rank": 4}
    report = dm.merge(folders, "linear", **given).report
    name = "model.layers.0.self_attn.q_proj"
    whole = deltas[0][f"{name}.weight"] + deltas[1][f"{name}.weight"]
    u, s, v = torch.linalg.svd(whole)
    found = dm.load(tmp_path / "out").factors(name)
    assert_close((found[1] @ found[0]).double(), u[:, :4] @ s[:4].diag() @ v[:4], 1e-4)
    kept = report[name].energy_kept
    assert kept == pytest.approx(float(s[:4].square().sum() / s.square().sum()), rel=1e-4)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is False


@pytest.mark.parametrize("case", ["linear"], indirect=True)
def test_one_is_merged_with_plain_adapters(case):
    model, folders, deltas, tmp_path = case
    target = ["q_proj", "k_proj", "down_proj"]
    plain = trained(model, 5, tmp_path / "plain", use_dora=False, target_modules=target)
    given = {"base": tmp_path / "base", "form": "deltas", "output": tmp_path / "out"}
    dm.merge([plain, folders[0]], "linear", **given)
    key = "model.layers.0.mlp.down_proj.weight"
    of_plain = merged_by_peft(model, plain)[key] - model.state_dict()[key].double()
    found = load_file(tmp_path / "out" / "deltas.safetensors")[key]
    assert_close(found.double(), of_plain + deltas[0][key], 1e-5)


@pytest.mark.parametrize("case", ["linear"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "is a DoRA, whose updates depend on the weights of the base model; merge it with"),
        (["--base", "base"], "is a DoRA, whose updates have full rank; give a rank or an energy"),
        (["--base", "other", "--rank", "4"], "the base has"),
    ],
)
def test_what_cannot_be_done_is_refused(case, arguments, said, monkeypatch, capsys):
    _, _, _, tmp_path = case
    monkeypatch.chdir(tmp_path)
    tensors = load_file("base/model.safetensors")
    (tmp_path / "other").mkdir()
    wide = {key: torch.cat([x, x]) if "down" in key else x for key, x in tensors.items()}
    save_file(wide, "other/model.safetensors")
    (tmp_path / "other" / "config.json").write_bytes((tmp_path / "base/config.json").read_bytes())
    assert main(["merge", "1", "2", "-o", "out", "--method", "linear", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["linear"], indirect=True)
def test_elsewhere_it_is_refused(case):
    _, folders, _, tmp_path = case
    for refused in (
        lambda: dm.inspect(folders),
        lambda: dm.convert(folders[0], tmp_path / "out", format="peft"),
        lambda: dm.Sequential.start(tmp_path / "state").add(folders[0]),
    ):
        with pytest.raises(AdapterError, match="is a DoRA, whose updates depend on the weights"):
            refused()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, c: t.pop(next(k for k in t if "magnitude" in k)), "factors without them"),
        (lambda t, c: c.update(use_dora=False), "its config does not say so"),
        (
            lambda t, c: [t.pop(k) for k in list(t) if "magnitude" in k],
            "stores no lora_magnitude_vector",
        ),
        (
            lambda t, c: t.update({next(k for k in t if "magnitude" in k): torch.ones(3)}),
            "has magnitudes of float32 [3]",
        ),
    ],
)
@pytest.mark.parametrize("case", ["linear"], indirect=True)
def test_damaged_ones_are_refused(case, change, said):
    _, folders, _, _ = case
    file, config = folders[0] / "adapter_model.safetensors", folders[0] / "adapter_config.json"
    tensors, raw = load_file(file), json.loads(config.read_text())
    change(tensors, raw)
    save_file(tensors, file)
    config.write_text(json.dumps(raw))
    with pytest.raises(AdapterError) as caught:
        dm.load(folders[0])
    assert said in str(caught.value)
