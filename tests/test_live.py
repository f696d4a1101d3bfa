"""Prepared merges on live models: what they compute is what the merged model computes, and detached
models are what they were."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from support.close import assert_close
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import domerge_fast as dm

KAPPA = [0.9, 0.4, 0.6]
METHODS = ["linear", "tsvm", "pico", "do", "iso_c", "svd", "lego"]
TARGETS = ("q_proj", "v_proj", "down_proj")


def base(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def adapters(count: int = 3, seed: int = 0, ranks: tuple[int, ...] = (4, 3, 2)) -> list[dm.Adapter]:
    """The last lacks a module."""
    g = torch.Generator().manual_seed(seed)
    model, found = base(), []
    for k in range(count):
        factors = {
            name: (
                torch.randn(ranks[k], x.in_features, generator=g) / 6,
                torch.randn(x.out_features, ranks[k], generator=g) / 3,
            )
            for name, x in model.named_modules()
            if isinstance(x, nn.Linear) and name.endswith(TARGETS)
        }
        if k == count - 1 and count > 1:
            del factors["model.layers.1.self_attn.v_proj"]
        found.append(dm.from_tensors(factors, name=f"a{k}"))
    return found


def tokens(batch: int = 2) -> Tensor:
    return torch.randint(0, 50, (batch, 7), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch).logits


def with_deltas(model: nn.Module, merge: dm.Merged) -> nn.Module:
    """The model with ΔW in its weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name in merge.names:
            weight = model.get_submodule(name).weight
            weight += merge.delta(name).to(weight.dtype)
    return model


def parts(model: nn.Module) -> dict[str, object]:
    """All that an adapter might change."""
    found: dict[str, object] = {
        n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()
    }
    for name, x in model.named_modules():
        hooks = len(x._forward_hooks) + len(x._forward_pre_hooks)
        own = type(x), x.training, hooks, id(x), getattr(x, "active_adapters", None)
        found[f"module {name}"] = (*own, getattr(x, "disable_adapters", None), sorted(vars(x)))
    return found


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[n][0], other[n][0]) and one[n][1] == other[n][1]
        if isinstance(one[n][0], Tensor)
        else one[n] == other[n]
        for n in one
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_live_model_computes_what_the_merged_model_does(method, in_place):
    model, sources, batch = base(), adapters(), tokens()
    p = dm.prepare(sources, method)
    before, plain = parts(model), logits(model, batch)
    live = p.attach(model, in_place=in_place)
    assert torch.equal(logits(model, batch), plain)
    for kappa in (torch.tensor(KAPPA), torch.rand(len(p.modules), 3) + 0.1):
        live.set(kappa)
        expected = logits(with_deltas(base(), p.merge(kappa)), batch)
        assert_close(logits(model, batch) - plain, expected - plain, 1e-5)
    live.set(KAPPA)
    merged = dm.merge(sources, method, weights=KAPPA, scale=1.0)
    expected = logits(with_deltas(base(), merged), batch)
    assert_close(logits(model, batch) - plain, expected - plain, 1e-5)
    live.detach()
    live.detach()
    assert same(before, parts(model))
    assert torch.equal(logits(model, batch), plain)
    with pytest.raises(dm.OptionError, match="detached"):
        live.set(KAPPA)


@pytest.mark.parametrize("method", METHODS)
def test_candidates_in_one_batch_are_each_what_one_is(method):
    model, batch = base(), tokens(2)
    p = dm.prepare(adapters(), method)
    kappas = torch.rand(3, len(p.modules), 3, generator=torch.Generator().manual_seed(3)) + 0.1
    with p.attach(model) as live:
        alone = []
        for kappa in kappas:
            live.set(kappa)
            alone.append(logits(model, batch))
        live.candidates(kappas)
        found = logits(model, batch.repeat(3, 1)).split(2)
        for one, other in zip(found, alone):
            assert_close(one, other, 1e-6)
        live.candidates(kappas, ids=[2, 0, 2])
        found = logits(model, batch[:1].repeat(3, 1))
        for row, k in zip(found, (2, 0, 2)):
            assert_close(row, alone[k][0], 1e-6)
        live.set(kappas[1])
        assert_close(logits(model, batch), alone[1], 1e-6)


@pytest.mark.parametrize("method", ["linear", "tsvm", "do", "iso_c"])
def test_gradients_are_those_of_the_dense_model(method):
    model, batch = base(torch.float64), tokens()
    p = dm.prepare(adapters(), method)
    of_live = torch.tensor(KAPPA, dtype=torch.float64, requires_grad=True)
    with p.attach(model) as live:
        live.set(of_live)
        one = entropy(logits(model, batch))
        one.backward()
        live.candidates(torch.stack([of_live, 2 * of_live]))
        assert_close(entropy(logits(model, batch.repeat(2, 1))[:2]).detach(), one.detach(), 1e-9)
    assert all(x.grad is None for x in model.parameters() if not x.requires_grad)
    of_dense = torch.tensor(KAPPA, dtype=torch.float64, requires_grad=True)
    found = p.merge(of_dense, dtype="float64")
    weights = {f"{n}.weight": model.get_submodule(n).weight + found.delta(n) for n in p.modules}
    other = entropy(torch.func.functional_call(model, weights, (batch,)).logits)
    other.backward()
    assert_close(one.detach(), other.detach(), 1e-9)
    assert_close(of_live.grad, of_dense.grad, 1e-7)


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def test_nothing_is_copied_where_dtype_and_device_are_the_same():
    p, model = dm.prepare(adapters(), "linear"), base()
    before = {n: sum(x.numel() for x in m.parameters()) for n, m in model.named_modules()}
    with p.attach(model):
        for name in p.modules:
            layer = model.get_submodule(name)
            a, b = layer.lora_A["merged"].weight, layer.lora_B["merged"].weight
            m, n = p.shapes[name]
            assert a.data_ptr() == p.bases[name][0].data_ptr()
            own = sum(x.numel() for x in layer.parameters()) - before[name]
            assert own == a.numel() + b.numel() == p.ranks[name] * (m + n)
            assert not a.requires_grad
            assert not b.requires_grad


def test_addresses_stay_in_place():
    p, model = dm.prepare(adapters(), "do"), base()
    with p.attach(model, in_place=True) as live:
        name = p.modules[0]
        weight = model.get_submodule(name).lora_A["merged"].weight
        address = weight.data_ptr()
        live.set(KAPPA)
        assert model.get_submodule(name).lora_A["merged"].weight.data_ptr() == address
        assert p.bases[name][0].data_ptr() != address
        with pytest.raises(dm.OptionError, match="in place"):
            live.candidates(torch.ones(2, len(p.modules), 3))
        with pytest.raises(dm.OptionError, match="in place"):
            live.set(torch.ones(3, requires_grad=True))


def with_adapters(model: nn.Module, **config: object) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        given = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | config
        model = peft.get_peft_model(model, peft.LoraConfig(**given), adapter_name="one")
        model.add_adapter("two", peft.LoraConfig(**given))
    return model.eval()


@pytest.mark.parametrize("method", ["tsvm", "do"])
def test_a_model_with_adapters_has_the_merge_alone_and_then_its_own_again(method):
    model, batch = with_adapters(base()), tokens()
    model.set_adapter("two")
    p, own = dm.prepare(adapters(), method), logits(model, batch)
    before = parts(model)
    plain = logits(base(), batch)
    with p.attach(model, "live") as live:
        assert torch.equal(logits(model, batch), plain)
        live.set(KAPPA)
        expected = logits(with_deltas(base(), p.merge(KAPPA)), batch)
        assert_close(logits(model, batch) - plain, expected - plain, 1e-5)
        with pytest.raises(dm.OptionError, match="already"):
            p.attach(model, "live")
    assert same(before, parts(model))
    assert torch.equal(logits(model, batch), own)
    assert [*model.peft_config] == ["one", "two"]
    assert model.active_adapters == ["two"]


def test_two_merges_take_turns_on_a_model():
    model, batch = base(), tokens()
    p, q = dm.prepare(adapters(), "tsvm"), dm.prepare(adapters(seed=4), "linear")
    before = parts(model)
    one = p.attach(model, "one")
    one.set(KAPPA)
    first = logits(model, batch)
    two = q.attach(model, "two")
    two.set(KAPPA)
    assert not torch.equal(logits(model, batch), first)
    two.detach()
    assert torch.equal(logits(model, batch), first)
    one.detach()
    assert same(before, parts(model))


def test_half_precision_is_close():
    model, batch = base(torch.bfloat16), tokens()
    for method in ("tsvm", "do", "iso_c"):
        p = dm.prepare(adapters(), method)
        expected = logits(with_deltas(base(), p.merge(KAPPA)), batch)
        with p.attach(model) as live:
            live.set(KAPPA)
            assert (
                live.injected.layers[p.modules[0]].lora_A["merged"].weight.dtype == torch.bfloat16
            )
            assert_close(logits(model, batch).float(), expected, 0.03)


def refused(p: dm.Prepared, model: nn.Module, words: str, **given: object) -> None:
    before = parts(model)
    with pytest.raises(dm.DomergeError, match=words) as error:
        p.attach(model, **given)
    assert "\n" not in str(error.value)
    assert same(before, parts(model))


def test_what_cannot_be_attached_is_refused_and_the_model_stays():
    p = dm.prepare(adapters(), "tsvm")
    model = with_adapters(base())
    model.merge_adapter(["one"])
    refused(p, model, "merged into")
    training = base()
    training.model.layers[0].mlp = nn.Sequential(training.model.layers[0].mlp, nn.Dropout(0.1))
    refused(p, training.train(), "no module|drops activations")
    dropping = with_adapters(base(), lora_dropout=0.1)
    refused(p, dropping.train(), "drops activations")
    refused(p, base().model, "no module")
    refused(p, base(), "name of a module", adapter="a.b")
    refused(p, base(), "dtype", dtype="int8")
    refused(dm.prepare(adapters(), "ties"), base(), "no factors that stay")
    name = "model.embed_tokens"
    of_embedding = dm.from_tensors(
        {name: (torch.ones(2, 50), torch.ones(32, 2))}, embeddings=[name], name="e"
    )
    refused(dm.prepare([of_embedding], "linear"), base(), "no linear layer")
    with pytest.raises(dm.OptionError, match="LoRA adapters"):
        p.attach("model")


def test_other_batches_are_refused_when_the_model_runs():
    p, model = dm.prepare(adapters(), "linear"), base()
    with p.attach(model) as live:
        live.candidates(torch.ones(3, len(p.modules), 3))
        with pytest.raises(dm.OptionError, match="equal shares"):
            logits(model, tokens(4))
        live.candidates(torch.ones(3, len(p.modules), 3), ids=[0, 1])
        with pytest.raises(dm.OptionError, match="samples"):
            logits(model, tokens(4))
        with pytest.raises(dm.OptionError, match="from 0 to 2"):
            live.candidates(torch.ones(3, len(p.modules), 3), ids=[0, 3])
        with pytest.raises(dm.OptionError, match="candidates"):
            live.set(torch.ones(3, len(p.modules), 3))
