"""Starts for other kinds of models: layers stored as [in, out], two masks, experts, halves."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.tasks import Small, batches, small
from torch import Tensor, nn

import domerge_fast as dm
from domerge_fast import DomergeError


def tokens(seed: int, *shape: int, most: int = 60) -> Tensor:
    return torch.randint(2, most, shape, generator=torch.Generator().manual_seed(seed))


def loaded(model: nn.Module, folder) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)


def test_layers_of_gpt2_are_adapted_as_peft_does(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=60,
        n_positions=16,
        n_embd=24,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    given = {"a": [tokens(0, 3, 9)], "b": [tokens(1, 3, 9)]}
    made = dm.osrm_init(
        model,
        given,
        task="a",
        target_modules=["c_attn", "mlp.c_proj"],
        rank=4,
        output=tmp_path / "o",
    )
    assert {name.rpartition("h.0.")[2]: x.n for name, x in made.modules.items()} == {
        "attn.c_attn": 24,
        "mlp.c_proj": 96,
    }
    assert json.loads((tmp_path / "o" / "adapter_config.json").read_text())["fan_in_fan_out"]
    before = model(tokens(2, 2, 7)).logits
    ready = loaded(model, tmp_path / "o")
    torch.testing.assert_close(ready(tokens(2, 2, 7)).logits, before)
    ready(tokens(2, 2, 7)).logits.square().sum().backward()
    assert all(x.grad is not None for x in ready.parameters() if x.requires_grad)


def test_encoders_and_decoders_have_masks_of_their_own(tmp_path):
    """The cross-attention's keys are given what the encoder's mask is of."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=60, decoder_start_token_id=0, **sizes)
    model = transformers.T5ForConditionalGeneration(config)
    names = ["SelfAttention.q", "EncDecAttention.q", "EncDecAttention.k"]
    texts = [(tokens(k, 1, 4 + k), tokens(9 + k, 1, 6 - k)) for k in range(3)]
    plain = [{"input_ids": a, "decoder_input_ids": b} for a, b in texts]

    def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        width = max(x.shape[1] for x in rows)
        pads = [(0, width - x.shape[1]) for x in rows]
        ids = [nn.functional.pad(x, pad) for x, pad in zip(rows, pads)]
        masks = [nn.functional.pad(torch.ones_like(x), pad) for x, pad in zip(rows, pads)]
        return torch.cat(ids), torch.cat(masks)

    (ids, mask), (own_ids, own_mask) = (padded([pair[k] for pair in texts]) for k in range(2))
    assert mask.shape == own_mask.shape  # which of both it is cannot be told by the shape
    together = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": own_ids}
    together["decoder_attention_mask"] = own_mask
    with pytest.raises(DomergeError, match="are padding cannot be told"):
        dm.osrm_features(model, {"b": [together]}, target_modules=names)
    wider = {k: nn.functional.pad(x, (0, 2)) for k, x in together.items() if "decoder" not in k}
    found = dm.osrm_features(model, {"b": [{**together, **wider}]}, target_modules=names)
    expected = dm.osrm_features(model, {"b": plain}, target_modules=names)
    assert len(found) == 4
    for name, c in found.items():
        torch.testing.assert_close(c, expected[name], atol=1e-5, rtol=0)


def test_experts_that_no_token_reaches_are_counted(tmp_path):
    torch.manual_seed(0)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(60, 16)
            self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids).flatten(0, 1)
            where = input_ids.flatten() % 3  # the last expert has no token
            for k, expert in enumerate(self.experts):
                if (own := where == k).any():
                    x = x.masked_scatter(own[:, None], expert(x[own]))
            return x

    given = {"a": [tokens(0, 4, 9)], "b": [tokens(1, 4, 9)]}
    call = {"task": "a", "rank": 2, "output": tmp_path / "o"}
    with pytest.raises(DomergeError, match=r"no token of task 'a' reaches 1 layers, as experts.3"):
        dm.osrm_init(Routed(), given, target_modules=r"experts\.\d", **call)
    made = dm.osrm_init(Routed(), given, target_modules=r"experts\.[012]", **call)
    counts = torch.bincount(given["b"][0].flatten() % 3)
    assert made.tokens == {"b": int(counts.min())}


def test_a_model_in_halves_is_summed_in_float32(tmp_path):
    model = small()
    whole = dm.osrm_features(model, batches(), target_modules=["q_proj"])
    halves = dm.osrm_features(model.bfloat16(), batches(), target_modules=["q_proj"])
    for name, c in halves.items():
        assert c.dtype == torch.float32
        assert (c - whole[name]).norm() < 0.02 * whole[name].norm()
    made = dm.osrm_init(
        model, batches(), task="a", target_modules=["q_proj"], rank=4, output=tmp_path / "o"
    )
    tensors = load_file(made.path / "adapter_model.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.float32}


def test_inputs_that_are_not_the_layer_s_are_refused(tmp_path):
    """As those of a layer of which a device has a part."""
    model = Small()
    model.layers[0].down.in_features = 16
    with pytest.raises(DomergeError, match=r"layers.0.down.*not sharded"):
        dm.osrm_features(model, batches(), target_modules=["down"])


def test_batches_may_be_what_a_tokenizer_returns():
    model = small()
    ids = batches()["a"][0]
    given = transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    found = dm.osrm_features(model, {"a": [given]}, target_modules=["q_proj"])
    plain = dm.osrm_features(model, {"a": iter([ids])}, target_modules=["q_proj"])
    assert all(c.equal(plain[name]) for name, c in found.items())
