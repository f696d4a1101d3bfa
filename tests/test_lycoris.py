"""LoHa and LoKr files: what is read is what LyCORIS itself computes with them, and merges of them
are sums of that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lycoris import create_lycoris
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import save_file
from support.close import assert_close
from support.single_file import tensors_of
from torch import Tensor, nn
from torch.nn import functional

import domerge_fast as dm
from domerge_fast.api import estimate
from domerge_fast.errors import AdapterError, DomergeError, OptionError
from domerge_fast.storage.safetensors_file import SafetensorsFile

KINDS = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}
LAYERS = ("linear", "conv1", "conv3", "conv1d")
NAME = "lycoris_x"


def layer_of(name: str) -> nn.Module:
    layers = {
        "linear": lambda: nn.Linear(24, 32),
        "conv1": lambda: nn.Conv2d(24, 32, 1),
        "conv3": lambda: nn.Conv2d(24, 32, 3, padding=1),
        "conv1d": lambda: nn.Conv1d(24, 32, 3, padding=1),
    }
    return layers[name]().double()


def trained(kind: str, layer: nn.Module, seed: int = 0, **options: object) -> nn.Module:
    """A module of LyCORIS around a layer, with random values that float32 holds, in float64."""
    torch.manual_seed(seed)
    given = {"lora_dim": 2, "alpha": 3.0} | options
    made = KINDS[kind](NAME, layer, **given)
    for key, x in made.named_parameters():
        if not key.startswith("org_module"):
            x.data = 0.5 * torch.randn_like(x).float()
    return made.double().requires_grad_(False)


def saved(made: nn.Module, path: Path, name: str = NAME) -> Path:
    """Its file. The scalar of LyCORIS is in one of the tensors there."""
    state = {f"{name}.{k}": x.float().contiguous() for k, x in made.custom_state_dict().items()}
    save_file(state, path)
    return path


def update(adapter: dm.Adapter, name: str = NAME) -> Tensor:
    a, b = adapter.factors(name)
    return adapter.modules[name].scaling * b.double() @ a.double()


def applied(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    weight = weight.reshape(layer.weight.shape)
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight)
    convolve = functional.conv1d if isinstance(layer, nn.Conv1d) else functional.conv2d
    return convolve(x, weight, padding=layer.padding)


def weight_of(made: nn.Module) -> Tensor:
    """ΔW by LyCORIS, in float64 and the weight's shape."""
    if isinstance(made, LoConModule):
        return (made.make_weight() * made.scale).double()
    return made.get_weight(made.shape).double()


def as_trained(made: nn.Module, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Inputs, and what LyCORIS' forward adds to the layer's outputs."""
    sizes = (5,) * (layer.weight.ndim - 2)
    x = torch.randn(3, 24, *sizes, dtype=torch.float64)
    before = layer(x)
    made.apply_to()
    return x, (layer(x) - before).detach()


OPTIONS = {
    "loha": ("loha", {}),
    "loha, tucker": ("loha", {"use_tucker": True}),
    "loha, rs": ("loha", {"rs_lora": True}),
    "loha, scalar": ("loha", {"use_scalar": True}),
    "loha of full rank": ("loha", {"lora_dim": 5, "use_tucker": True}),
    "lokr": ("lokr", {"factor": 4}),
    "lokr, tucker": ("lokr", {"factor": 4, "use_tucker": True}),
    "lokr, rs": ("lokr", {"factor": 4, "rs_lora": True}),
    "lokr, scalar": ("lokr", {"factor": 4, "use_scalar": True}),
    "lokr, tucker of rank 1": ("lokr", {"factor": 4, "use_tucker": True, "lora_dim": 1}),
    "lokr, both": ("lokr", {"factor": 16, "decompose_both": True, "use_tucker": True}),
    "lokr, one": ("lokr", {"factor": 2}),
    "lokr, unbalanced": ("lokr", {"factor": 8, "unbalanced_factorization": True}),
    "lokr, whole": ("lokr", {"factor": 4, "full_matrix": True}),
    "lokr of full rank": ("lokr", {"factor": 16, "lora_dim": 7, "decompose_both": True}),
    "locon, tucker": ("locon", {"use_tucker": True}),
    "locon, scalar": ("locon", {"use_scalar": True, "rs_lora": True}),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("case", OPTIONS)
def test_an_update_is_what_lycoris_adds(case, layer, tmp_path):
    kind, options = OPTIONS[case]
    around = layer_of(layer)
    made = trained(kind, around, **options)
    adapter = dm.load(saved(made, tmp_path / "x.safetensors"))
    x, added = as_trained(made, around)
    assert_close(applied(around, update(adapter), x), added, 2e-7)
    assert adapter.modules[NAME].rank <= min(32, around.weight[0].numel())


@pytest.mark.parametrize(
    ("case", "rank"),
    [("loha", 4), ("loha of full rank", 24), ("lokr", 8), ("lokr, both", 4), ("lokr, whole", 24)],
)
def test_the_rank_is_that_of_the_exact_factors(case, rank, tmp_path):
    kind, options = OPTIONS[case]
    path = saved(trained(kind, layer_of("linear"), **options), tmp_path / "x.safetensors")
    assert dm.load(path).modules[NAME].rank == rank


@pytest.mark.parametrize(
    ("name", "width", "inputs"),
    [
        ("lora_unet_down_blocks_1_resnets_0_conv1", 72, (8, 3, 3)),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", 72, (8, 3, 3)),
        ("lora_unet_input_blocks_3_0_op", 72, (8, 3, 3)),
        ("lycoris_output_blocks_5_0_out_layers_3", 72, (8, 3, 3)),
        ("unet.mid_block.resnets.1.conv2", 72, (8, 3, 3)),
        ("diffusion_model.input_blocks.0.0", 36, (4, 3, 3)),
        ("lora_unet_conv_out", 72, (8, 3, 3)),
        ("lora_unet_conv_out", 71, (71,)),
        ("lora_unet_down_blocks_1_resnets_0_conv_shortcut", 72, (72,)),
        ("lora_unet_input_blocks_4_1_proj_in", 72, (72,)),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 72, (72,)),
        ("lora_unet_input_blocks_4_0_emb_layers_1", 72, (72,)),
    ],
)
def test_a_u_net_s_convolutions_get_their_kernels(name, width, inputs, tmp_path):
    """Where a file has them in the second dimension; LyCORIS has them there."""
    tensors = {f"{name}.hada_w{k}_a": torch.randn(6, 2) for k in (1, 2)}
    tensors |= {f"{name}.hada_w{k}_b": torch.randn(2, width) for k in (1, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    dm.merge([tmp_path / "x.safetensors"], "linear", output=tmp_path / "out.safetensors")
    merged = dm.load(tmp_path / "out.safetensors")
    assert merged.modules[name].a_shape[1:] == inputs
    wide = {key: x.double() for key, x in tensors.items()}
    one, two = (wide[f"{name}.hada_w{k}_a"] @ wide[f"{name}.hada_w{k}_b"] for k in (1, 2))
    assert_close(update(merged, name), one * two)


def test_a_lokr_of_whole_matrices_has_no_scale(tmp_path):
    """What trainers write as its alpha is no scale, and may be any number."""
    tensors = {f"{NAME}.lokr_w1": torch.ones(2, 3), f"{NAME}.lokr_w2": torch.ones(4, 5)}
    found = []
    for alpha in (0.0, 1e10, float("inf")):
        save_file(tensors | {f"{NAME}.alpha": torch.tensor(alpha)}, tmp_path / "x.safetensors")
        adapter = dm.load(tmp_path / "x.safetensors")
        found.append(adapter.modules[NAME].scaling)
        assert not any("alpha" in note for note in adapter.notes)
    assert found == [1.0] * 3


class Net(nn.Module):
    """Every kind of layer that LyCORIS adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(64, 96)
        self.conv1 = nn.Conv2d(64, 96, 1)
        self.conv3 = nn.Conv2d(64, 96, 3)
        self.norm = nn.LayerNorm(64)


def network(**options: object) -> dict[str, Tensor]:
    """What LyCORIS saves of an adapter of it, with random values."""
    torch.manual_seed(1)
    made = create_lycoris(
        Net(), 1.0, linear_dim=4, linear_alpha=2, conv_dim=4, conv_alpha=2, **options
    )
    made.apply_to()
    random = {k: torch.randn(x.shape) for k, x in made.state_dict().items()}
    return {k: torch.tensor(2.0) if k.endswith("alpha") else x for k, x in random.items()}


READ = {
    "locon": {"algo": "locon"},
    "locon, rs": {"algo": "locon", "rs_lora": True},
    "locon, tucker": {"algo": "locon", "use_tucker": True},
    "loha": {"algo": "loha"},
    "loha, tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr, both": {"algo": "lokr", "factor": 16, "decompose_both": True},
    "lokr, full": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr, tucker": {"algo": "lokr", "factor": 4, "use_tucker": True},
}


@pytest.mark.parametrize("case", READ)
def test_every_key_of_a_network_is_read(case, tmp_path):
    tensors = network(**READ[case])
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = dm.load(tmp_path / "x.safetensors")
    assert {*adapter.modules} == {key.partition(".")[0] for key in tensors}
    assert len(adapter.modules) == 3


REFUSED = {
    "glora": ({"algo": "glora"}, "is a LyCORIS GLoRA, by its tensor 'lycoris_conv1.a1.weight'"),
    "oft": ({"algo": "diag-oft"}, "is an OFT or BOFT, by its tensor 'lycoris_conv1.oft_blocks'"),
    "dylora": ({"algo": "dylora"}, "module 'lycoris_conv3': has B in two dimensions"),
}


OTHERS = {
    "T-LoRA": ("x.q_layer.weight", "is a LyCORIS T-LoRA"),
    "IA3": ("x.on_input", "is an IA3"),
    "BOFT": ("x.rescale", "is an OFT or BOFT"),
    "sets": ("x.set_weight", "sets weights or sizes of layers"),
    "sizes": ("x.reshape_weight", "sets weights or sizes of layers"),
    "bias": ("x.lora_B.bias", "sets weights or sizes of layers"),
    "embedding": ("bundle_emb.word.string_to_param", "has trained embeddings in it"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_others_are_known_by_any_of_their_keys(case, tmp_path):
    """By the first that tells, not by the first that nobody knows."""
    key, said = OTHERS[case]
    tensors = {"x.alpha": torch.ones(()), "x.a_weight": torch.ones(2), key: torch.ones(2)}
    save_file(tensors, tmp_path / "x.safetensors")
    message = refusal(tmp_path / "x.safetensors")
    assert f"{said}" in message
    assert f"by its tensor {key!r}; " in message


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_sum_of_products_is_refused(case, tmp_path):
    options, said = REFUSED[case]
    save_file(network(**options), tmp_path / "x.safetensors")
    assert said in refusal(tmp_path / "x.safetensors")


def refusal(path: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        dm.load(path, name="mine")
    return str(caught.value)


# Merges


def four(folder: Path, layer: str) -> tuple[list[Path], list[Tensor]]:
    """Files of four kinds of adapters of one layer, and the update of each by LyCORIS (of the
    plain LoRA by its definition), in float64."""
    files, updates = [], []
    for k, case in enumerate(("loha, tucker", "lokr, tucker", "locon, tucker", "lokr, whole")):
        kind, options = OPTIONS[case]
        made = trained(kind, layer_of(layer), seed=k, **options)
        files.append(saved(made, folder / f"{k}.safetensors"))
        updates.append(weight_of(made))
    shape = layer_of(layer).weight.shape
    a, b = torch.randn(3, *shape[1:]), torch.randn(32, 3, *[1] * (len(shape) - 2))
    tensors = {f"{NAME}.lora_down.weight": a, f"{NAME}.lora_up.weight": b}
    save_file(tensors, folder / "plain.safetensors")
    plain = (b.flatten(1).double() @ a.flatten(1).double()).reshape(shape)
    return [*files, folder / "plain.safetensors"], [*updates, plain]


@pytest.mark.parametrize("layer", ["linear", "conv3"])
def test_all_kinds_are_merged_as_one(layer, tmp_path):
    files, updates = four(tmp_path, layer)
    weights = [1.0, -0.5, 0.25, 2.0, 1.5]
    out = tmp_path / "out.safetensors"
    merged = dm.merge(files, "linear", weights=weights, output=out)
    wanted = sum(w * x for w, x in zip(weights, updates)).flatten(1)
    assert_close(merged.delta(NAME).double(), wanted, 1e-6)
    [(key, found)] = tensors_of(out).items()
    assert key == f"{NAME}.diff"
    assert found.shape == layer_of(layer).weight.shape
    assert_close(found.flatten(1), wanted, 1e-6)
    plain = dm.merge(files[:3], "linear", weights=weights[:3], output=tmp_path / "thin.safetensors")
    wanted = sum(w * x for w, x in zip(weights[:3], updates[:3])).flatten(1)
    found = tensors_of(tmp_path / "thin.safetensors")
    assert set(found) == {f"{NAME}.{x}" for x in ("lora_down.weight", "lora_up.weight", "alpha")}
    a, b = (found[f"{NAME}.lora_{side}.weight"].double() for side in ("down", "up"))
    assert a.shape[1:] == layer_of(layer).weight.shape[1:]
    assert_close(b.flatten(1) @ a.flatten(1), wanted, 1e-6)
    assert_close(plain.delta(NAME).double(), wanted, 1e-6)


@pytest.mark.parametrize("method", ["tsvm", "ties", "svd"])
def test_methods_see_the_updates(method, tmp_path):
    """A LoHa and a LoKr are merged as plain LoRAs of the same updates are."""
    files, updates = four(tmp_path, "linear")
    plain = []
    for k, x in enumerate(updates[:3]):
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        rank = dm.load(files[k]).modules[NAME].rank
        a, b = (v[:rank]).float(), (u[:, :rank] * s[:rank]).float()
        plain.append(dm.from_tensors({NAME: (a, b)}))
    found = [dm.merge(x, method, rank=3).delta(NAME) for x in (files[:3], plain)]
    assert_close(*found, 1e-4)


def test_a_lokr_of_full_rank_is_cut(tmp_path):
    kind, options = OPTIONS["lokr, whole"]
    made = trained(kind, layer_of("linear"), **options)
    path = saved(made, tmp_path / "x.safetensors")
    merged = dm.merge([path], "linear", rank=4, output=tmp_path / "out.safetensors")
    u, s, v = torch.linalg.svd(weight_of(made))
    assert_close(merged.delta(NAME).double(), (u[:, :4] * s[:4]) @ v[:4], 1e-5)
    assert len(tensors_of(tmp_path / "out.safetensors")[f"{NAME}.lora_down.weight"]) == 4


def test_nothing_is_computed_before_a_merge(tmp_path, monkeypatch):
    files, _ = four(tmp_path, "conv3")
    monkeypatch.setattr(SafetensorsFile, "read", None)
    loaded = [dm.load(path) for path in files[:4]]
    with pytest.raises(TypeError):
        loaded[0].factors(NAME)
    for adapter in loaded:
        module = adapter.modules[NAME]
        assert adapter.nbytes == 4 * module.rank * (module.m + module.n)


# Updates that are stored whole


def full(path: Path, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A file of LyCORIS' `full`, with biases left out, and a LoRA of one more module."""
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "lycoris_lin.diff": torch.randn(32, 24, generator=g),
        "lycoris_conv3.diff": torch.randn(12, 8, 3, 3, generator=g),
        "lycoris_other.lora_down.weight": torch.randn(2, 24, generator=g),
        "lycoris_other.lora_up.weight": torch.randn(32, 2, generator=g),
    }
    tensors = {key: x.to(dtype) for key, x in tensors.items()}
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_that_are_stored_whole_are_summed_as_such(dtype, tmp_path):
    one, two = (full(tmp_path / f"{k}.safetensors", k, dtype) for k in (1, 2))
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    out = tmp_path / "out.safetensors"
    merged = dm.merge(files, "linear", weights=[0.3, 2.0], output=out)
    found = tensors_of(out)
    assert {key for key in found if "other" not in key} == {key for key in one if "diff" in key}
    for key in ("lycoris_lin.diff", "lycoris_conv3.diff"):
        exact = 0.3 * one[key].double() + 2.0 * two[key].double()
        assert found[key].dtype == dtype
        assert found[key].shape == one[key].shape
        assert_close(found[key].double(), exact, torch.finfo(dtype).eps)
        assert_close(merged.delta(key.removesuffix(".diff")).double(), exact.flatten(1), 0.01)
    ranks = {name: module.rank for name, module in merged.report.modules.items()}
    assert ranks == {"lycoris_lin": 24, "lycoris_conv3": 12, "lycoris_other": 4}


def test_an_estimate_knows_whole_updates(tmp_path):
    tensors = full(tmp_path / "x.safetensors", 1)
    tensors["lycoris_lin.diff_b"] = torch.ones(32)
    save_file(tensors, tmp_path / "x.safetensors")
    found = estimate(dm.Recipe.make(method="linear"), [tmp_path / "x.safetensors"])
    alpha = 4
    assert found.written in (sum(x.nbytes for x in tensors.values()) + k * alpha for k in (0, 1))
    assert found.read >= sum(x.nbytes for key, x in tensors.items() if "diff_b" not in key)


def test_an_update_stays_what_it_is(tmp_path):
    tensors = full(tmp_path / "x.safetensors", 1, torch.float16)
    for out in (tmp_path / "merged.safetensors", tmp_path / "converted.safetensors"):
        if "merged" in out.name:
            dm.merge([tmp_path / "x.safetensors"], "linear", output=out)
        else:
            dm.convert(tmp_path / "x.safetensors", out, format="kohya")
        found = tensors_of(out)
        for key in ("lycoris_lin.diff", "lycoris_conv3.diff"):
            assert torch.equal(found[key], tensors[key])


@pytest.mark.parametrize("method", ["ties", "do", "tsvm", "linear"])
@pytest.mark.parametrize("rank", [None, 3])
def test_methods_take_whole_updates(method, rank, tmp_path):
    """As they take the same as factors, and are written as factors where they are cut."""
    one, two = (full(tmp_path / f"{k}.safetensors", k) for k in (1, 2))
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    out = tmp_path / "out.safetensors"
    plain = [
        dm.from_tensors({"lycoris_lin": (torch.eye(24), tensors["lycoris_lin.diff"])})
        for tensors in (one, two)
    ]
    merged = dm.merge(files, method, rank=rank, scale=1.0, output=out)
    wanted = dm.merge(plain, method, rank=rank or 24, scale=1.0)
    assert_close(merged.delta("lycoris_lin"), wanted.delta("lycoris_lin"), 1e-5)
    keys = {key.partition(".")[2] for key in tensors_of(out) if "lin" in key}
    as_factors = {"lora_down.weight", "lora_up.weight", "alpha"}
    assert keys == (as_factors if rank else {"diff"})


def test_a_format_without_whole_updates_gets_factors(tmp_path):
    diff = torch.randn(6, 8)
    save_file({"unet.x.diff": diff}, tmp_path / "x.safetensors")
    dm.merge([tmp_path / "x.safetensors"], "linear", output=tmp_path / "out.safetensors")
    found = tensors_of(tmp_path / "out.safetensors")
    assert {key: x.shape for key, x in found.items()} == {
        "unet.x.lora_A.weight": (6, 8),
        "unet.x.lora_B.weight": (6, 6),
    }
    assert torch.equal(found["unet.x.lora_B.weight"], torch.eye(6))
    assert torch.equal(found["unet.x.lora_A.weight"], diff)


def test_one_rank_for_all_is_that_of_factors(tmp_path):
    """Not that of updates which are stored whole."""
    tensors = {
        "diffusion_model.x.diff": torch.randn(16, 24),
        "diffusion_model.y.lora_A.weight": torch.randn(2, 24),
        "diffusion_model.y.lora_B.weight": torch.randn(16, 2),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    dm.merge([tmp_path / "x.safetensors"], "linear", output=tmp_path / "out.safetensors")
    found = tensors_of(tmp_path / "out.safetensors")
    assert {key: x.shape for key, x in found.items()} == {k: x.shape for k, x in tensors.items()}


# Biases and norms


CHANGED = {
    "norms of LyCORIS": {"algo": "locon", "train_norm": True},
    "whole layers": {"algo": "full"},
}


@pytest.mark.parametrize("case", CHANGED)
def test_biases_and_norms_are_summed(case, tmp_path):
    files, given = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"], []
    for seed, path in enumerate(files):
        tensors = network(**CHANGED[case])
        g = torch.Generator().manual_seed(seed)
        given.append({k: torch.randn(x.shape, generator=g) for k, x in tensors.items()})
        save_file(given[-1], path)
    out = tmp_path / "out.safetensors"
    dm.merge(files, "linear", weights=[0.3, -2.0], output=out)
    found = tensors_of(out)
    changed = [key for key in given[0] if key.rpartition(".")[2] not in LORA]
    assert {key for key in found if key.rpartition(".")[2] not in LORA} == {*changed}
    for key in changed:
        exact = 0.3 * given[0][key].double() - 2.0 * given[1][key].double()
        assert found[key].shape == exact.shape
        assert_close(found[key].double(), exact, 1e-7, name=key)
    again = dm.load(out)
    assert {*again.differences} == {*dm.load(files[0]).differences}
    with pytest.raises(AdapterError, match=r"which only a sum takes along; use 'linear'"):
        dm.merge(files, "ties")


LORA = ("weight", "alpha")


@pytest.mark.parametrize("way", ["merge", "convert"])
def test_a_lora_with_biases_stays_what_it_is(way, tmp_path):
    """As those of Wan that make it faster are."""
    tensors = {
        "diffusion_model.blocks.0.ffn.0.lora_down.weight": torch.randn(2, 24).half(),
        "diffusion_model.blocks.0.ffn.0.lora_up.weight": torch.randn(32, 2).half(),
        "diffusion_model.blocks.0.ffn.0.diff_b": torch.randn(32).half(),
        "diffusion_model.blocks.0.norm3.diff": torch.randn(24).half(),
        "diffusion_model.blocks.0.norm3.diff_b": torch.randn(24).half(),
        "diffusion_model.head.head.diff": torch.randn(16, 24).half(),
    }
    path, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, path)
    if way == "merge":
        dm.merge([path], "linear", output=out)
    else:
        dm.convert(path, out, runtime="comfyui")
    found = tensors_of(out)
    assert found.keys() == tensors.keys()
    for key, x in tensors.items():
        assert torch.equal(found[key], x), key


def test_biases_have_no_place_in_other_names_or_formats(tmp_path):
    tensors = {"unet.x.lora_A.weight": torch.randn(2, 8), "unet.x.lora_B.weight": torch.randn(6, 2)}
    path = tmp_path / "x.safetensors"
    save_file(tensors | {"unet.x.diff_b": torch.randn(6)}, path)
    with pytest.raises(OptionError, match=r"'diffusers' holds no such changes.*'unet.x.bias'"):
        dm.merge([path], "linear")
    with pytest.raises(AdapterError, match="with other names of modules, cannot take"):
        dm.merge([path], "linear", format="kohya")


CHANGES: dict[str, tuple[dict[str, Tensor], str]] = {
    "matrix": ({"x.diff_b": torch.ones(6, 1)}, "'x.diff_b' for its bias (shape [6, 1])"),
    "empty": ({"x.w_norm": torch.ones(0)}, "'x.w_norm' for its weight (shape [0])"),
    "twice": ({"x.w_norm": torch.ones(6), "x.diff": torch.ones(6)}, "(a second change of it)"),
    "integers": ({"x.b_norm": torch.ones(6, dtype=torch.int32)}, "'x.b_norm' is int32"),
    "number": ({"x.diff": torch.ones(())}, "has parts that do not fit (diff [])"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changes_that_are_no_vectors_are_refused(case, tmp_path):
    tensors, said = CHANGES[case]
    lora = {"y.lora_down.weight": torch.ones(2, 8), "y.lora_up.weight": torch.ones(6, 2)}
    save_file(lora | tensors, tmp_path / "x.safetensors")
    assert said in refusal(tmp_path / "x.safetensors")


def test_a_vector_and_a_matrix_are_of_two_models(tmp_path):
    lora = {"lora_x.lora_down.weight": torch.ones(2, 8), "lora_x.lora_up.weight": torch.ones(6, 2)}
    save_file(lora, tmp_path / "1.safetensors")
    other = {key.replace("_x", "_y"): x for key, x in lora.items()}
    save_file(other | {"lora_x.diff": torch.ones(6)}, tmp_path / "2.safetensors")
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    out = tmp_path / "out.safetensors"
    with pytest.raises(DomergeError, match=r"'lora_x.weight' is a vector in one adapter"):
        dm.merge(files, "linear", output=out)
    assert not out.exists()


# Refusals


def parts(kind: str) -> dict[str, Tensor]:
    shapes = {
        "loha": {
            "hada_w1_a": (6, 2),
            "hada_w1_b": (2, 8),
            "hada_w2_a": (6, 2),
            "hada_w2_b": (2, 8),
        },
        "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 4)},
    }
    return {part: torch.ones(shape) for part, shape in shapes[kind].items()}


DAMAGED: dict[str, tuple[str, dict[str, tuple[int, ...] | torch.dtype | None], str]] = {
    "no b": ("loha", {"hada_w2_b": None}, "has 'x.hada_w1_a', but no hada_w2_b"),
    "no t2": ("loha", {"hada_t1": (2, 2, 3, 3)}, "but no hada_t2"),
    "no w2": ("lokr", {"lokr_w2_a": None, "lokr_w2_b": None}, "has 'x.lokr_w1', but no lokr_w2"),
    "no w2_a": ("lokr", {"lokr_w2_a": None}, "has 'x.lokr_w1', but no lokr_w2_a"),
    "w1 twice": ("lokr", {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2)}, "parts that do not fit"),
    "middle": ("lokr", {"lokr_t2": (2, 3, 3, 3)}, "parts that do not fit"),
    "ranks": ("loha", {"hada_w1_b": (3, 8)}, "parts that do not fit (hada_w1_a [6, 2], "),
    "sizes": ("loha", {"hada_w2_b": (2, 9)}, "parts that do not fit"),
    "rows": ("loha", {"hada_w2_a": (5, 2)}, "parts that do not fit"),
    "empty": ("lokr", {"lokr_w1": (0, 2)}, "parts that do not fit"),
    "vector": ("lokr", {"lokr_w1": (4,)}, "parts that do not fit"),
    "scalar": ("lokr", {"lokr_w2_b": ()}, "parts that do not fit"),
    "kernel of w1": ("lokr", {"lokr_w1": (2, 2, 3, 3)}, "parts that do not fit"),
    "integers": ("lokr", {"lokr_w1": torch.int8}, "'x.lokr_w1' is int8; dequantize"),
    "float64": ("loha", {"hada_w1_a": torch.float64}, "'x.hada_w1_a' is float64; cast"),
    "LoRA too": (
        "loha",
        {"lora_down.weight": (2, 8), "lora_up.weight": (6, 2)},
        "'x.lora_down.weight' beside",
    ),
    "LoKr too": (
        "loha",
        {"lokr_w1": (2, 2)},
        "has 'x.lokr_w1' beside 'x.hada_w1_a': two spellings",
    ),
    "diff too": ("lokr", {"diff": (6, 8)}, "has 'x.lokr_w1' beside 'x.diff': two spellings"),
    "unknown": ("lokr", {"lokr_t1": (2, 2)}, "'x.lokr_t1', which is no part of a LoRA"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_does_not_fit_is_refused(case, tmp_path):
    kind, changes, said = DAMAGED[case]
    tensors = parts(kind)
    for part, change in changes.items():
        if change is None:
            del tensors[part]
        elif isinstance(change, torch.dtype):
            tensors[part] = tensors[part].to(change)
        else:
            tensors[part] = torch.ones(change)
    save_file({f"x.{part}": x for part, x in tensors.items()}, tmp_path / "x.safetensors")
    assert said in refusal(tmp_path / "x.safetensors")
