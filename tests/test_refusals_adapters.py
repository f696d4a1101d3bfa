"""What cannot be merged exactly is refused in one line: adapter, module, what is wrong, remedy."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import peft
import pytest
import torch
from support.make import PREFIX, lora_tensors, random_factors, write_adapter, write_folder
from torch import nn

from domerge_fast.adapters import check_compatible
from domerge_fast.errors import AdapterError, DomergeError, OptionError, OutputError
from domerge_fast.formats import from_model, from_tensors, load
from domerge_fast.storage.safetensors_file import SafetensorsFile

Q, V = "layers.0.q_proj", "layers.0.v_proj"
SHAPES = {Q: (6, 8), V: (4, 8)}
A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "base"}


def tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Two good modules, with ``A`` or ``B`` of the first replaced, or left out for None."""
    result: dict[str, torch.Tensor | None] = dict(lora_tensors(random_factors(SHAPES, 4)))
    result |= {{"A": A, "B": B}[side]: tensor for side, tensor in changes.items()}
    return {key: tensor for key, tensor in result.items() if tensor is not None}


def check_line(error: Exception, adapter: str, module: str | None, *fragments: str) -> None:
    message = str(error)
    where = f"adapter {adapter!r}" + (f", module {module!r}" if module else "")
    assert message.startswith(f"{where}: ")
    assert len(message.splitlines()) == 1
    problem, _, remedy = message.removeprefix(f"{where}: ").partition("; ")
    assert problem
    assert remedy
    for fragment in fragments:
        assert fragment in message


# Config changes, the module named, and what the message must say.
CONFIGS = {
    "not lora": ({"peft_type": "LOHA"}, None, ["'LOHA'", "only LORA"]),
    "no type": ({"peft_type": None}, None, ["peft_type", "only LORA"]),
    "dora": ({"use_dora": True}, None, ["DoRA", "stores no lora_magnitude_vector"]),
    "lora bias": ({"lora_bias": True}, None, ["lora_bias", "stores no bias on B"]),
    "bias": ({"bias": "lora_only"}, None, ["'lora_only'", "bias='none'"]),
    "parameters": ({"target_parameters": "w"}, None, ["target_parameters", "list of names"]),
    "tokens": ({"trainable_token_indices": [0]}, None, ["trainable_token_indices"]),
    "alora": ({"alora_invocation_tokens": [1]}, None, ["aLoRA"]),
    "qalora": ({"use_qalora": True}, None, ["QALoRA"]),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, None, ["BD-LoRA"]),
    "arrow": ({"arrow_config": {"top_k": 3}}, None, ["Arrow", "merge the adapters"]),
    "kasa": ({"kasa_config": {"beta": 1}}, None, ["KaSA", "base weights"]),
    "velora": ({"velora_config": {"scale": 1}}, None, ["VeLoRA", "null"]),
    "monteclora": ({"monteclora_config": {"a": 1}}, None, ["MonteCLoRA"]),
    "megatron": ({"megatron_config": {"a": 1}}, None, ["Megatron", "megatron_config"]),
    "tied": ({"ensure_weight_tying": True}, None, ["ensure_weight_tying"]),
    "pissa": ({"init_lora_weights": "pissa"}, None, ["path_initial_model_for_weight_conversion"]),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_4"}, None, ["changes the base weights"]),
    "olora": ({"init_lora_weights": "OLoRA"}, None, ["path_initial_model_for_weight_conversion"]),
    "corda": ({"init_lora_weights": "corda"}, None, ["path_initial_model_for_weight_conversion"]),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, None, ["changes the base weights"]),
    "loftq": ({"init_lora_weights": "loftq"}, None, ["quantized", "set init_lora_weights to true"]),
    "unknown init": (
        {"init_lora_weights": "magic"},
        None,
        ["'magic' is unknown", "set it to true"],
    ),
    "unknown field": ({"use_magic": 1}, None, ["'use_magic'", "null"]),
    "unknown list": ({"enable_lora": [True]}, None, ["'enable_lora'", "null"]),
    "rank": ({"r": 8}, Q, ["rank 4", "says 8", "rank_pattern"]),
    "rank pattern": ({"rank_pattern": {"v_proj": 2}}, V, ["rank 4", "says 2"]),
    "zero r": ({"r": 0}, None, ["r is '0'", "positive"]),
    "r text": ({"r": "4"}, None, ["positive whole number"]),
    "nan alpha": ({"lora_alpha": float("nan")}, None, ["NaN is no number"]),
    "inf alpha": ({"alpha_pattern": {"q": float("inf")}}, None, ["Infinity is no number"]),
    "huge alpha": ({"lora_alpha": 10**400}, None, ["lora_alpha", "finite number"]),
    "huge pattern": ({"alpha_pattern": {"q": 10**400}}, None, ["alpha_pattern", "finite"]),
    "alpha text": ({"lora_alpha": "8"}, None, ["lora_alpha", "finite number"]),
    "alpha zero": ({"lora_alpha": 0}, Q, ["scaling 0", "lora_alpha", "leave the adapter out"]),
    "alpha pattern zero": ({"alpha_pattern": {"v_proj": 0.0}}, V, ["scaling 0", "alpha_pattern"]),
    "alpha below floats": ({"lora_alpha": 1e-323}, Q, ["scaling 0", "lora_alpha"]),
    "alpha bool": ({"lora_alpha": True}, None, ["lora_alpha", "finite number"]),
    "bad regex": ({"alpha_pattern": {"q(": 1}}, None, ["'q('", "not closed"]),
    "pattern list": ({"rank_pattern": [1]}, None, ["rank_pattern", "object"]),
    "rslora text": ({"use_rslora": "yes"}, None, ["use_rslora", "true or false"]),
    "targets": ({"target_modules": 3}, None, ["target_modules", "list of names"]),
    "saved": ({"modules_to_save": [3]}, None, ["modules_to_save", "list of names"]),
    "base": ({"base_model_name_or_path": 3}, None, ["base_model_name_or_path", "name or a path"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case, tmp_path):
    changes, module, fragments = CONFIGS[case]
    folder = write_folder(tmp_path, tensors(), CONFIG | changes)
    with pytest.raises(AdapterError) as caught:
        load(folder, name="mine")
    check_line(caught.value, "mine", module, *fragments)


def half(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, 0.5).to(dtype)


PLAIN = f"{PREFIX}{Q}"
TENSORS = {
    "A without B": (tensors(B=None), Q, ["factor A but no B", "save_pretrained"]),
    "B without A": (tensors(A=None), Q, ["factor B but no A", "save_pretrained"]),
    "ranks": (tensors(B=half(6, 3)), Q, ["different rank", "A [4, 8], B [6, 3]"]),
    "rank zero": (tensors(A=half(0, 8), B=half(6, 0)), Q, ["empty factor", "ZeRO-3"]),
    "sharded": (tensors(A=half(0)), Q, ["A [0]", "ZeRO-3"]),
    "no inputs": (tensors(A=half(4, 0)), Q, ["empty factor"]),
    "layers": (tensors(A=half(4, 8, 3)), Q, ["different layers", "A [4, 8, 3], B [6, 4]"]),
    "kernel on B": (tensors(A=half(4, 8, 3), B=half(6, 4, 3)), Q, ["different layers"]),
    "6-d": (tensors(A=half(4, 8, 1, 1, 1, 1), B=half(6, 4, 1, 1, 1, 1)), Q, ["no known layer"]),
    "groups": (tensors(A=half(4, 8, 3, 3), B=half(6, 2, 1, 1)), Q, ["2 groups", "leave grouped"]),
    "float64": (tensors(A=half(4, 8, dtype=torch.float64)), Q, ["A is float64", "cast"]),
    "int8": (tensors(B=torch.ones(6, 4, dtype=torch.int8)), Q, ["B is int8", "dequantize"]),
    "fp8": (tensors(A=half(4, 8, dtype=torch.float8_e4m3fn)), Q, ["A is float8", "dequantize"]),
    "bool": (tensors(A=half(4, 8, dtype=torch.bool)), Q, ["A is bool"]),
    "magnitude": (
        tensors() | {f"{PLAIN}.lora_magnitude_vector": half(6)},
        Q,
        ["DoRA", "its config does not say so"],
    ),
    "B.bias": (tensors() | {f"{PLAIN}.lora_B.bias": half(6)}, Q, ["bias on B", "lora_bias"]),
    "diag": (tensors() | {f"{PLAIN}.lora_diag": half(4)}, Q, ["unknown tensor", "lora_diag"]),
    "adapter name": (
        tensors() | {f"{PLAIN}.lora_A.default.weight": half(4, 8)},
        Q,
        ["factor A twice", "lora_A.default.weight'", "lora_A.weight'", "save_pretrained"],
    ),
    "two adapters": (
        {k.replace(".weight", ".one.weight"): t for k, t in tensors().items() if ".q_proj." in k}
        | {k.replace(".weight", ".two.weight"): t for k, t in tensors().items() if ".v_proj." in k},
        None,
        ["holds adapters 'one' and 'two'", f"{Q}.lora_A.one.weight'", "folder of its own"],
    ),
    "bias of a named B": (tensors() | {f"{PLAIN}.lora_B.default.bias": half(6)}, Q, ["bias on B"]),
    "wrapped twice": (
        tensors() | {f"{PREFIX}_orig_mod.{Q}.lora_A.weight": half(4, 8)},
        Q,
        ["factor A twice", f"'{PREFIX}_orig_mod.{Q}.lora_A.weight'", f"'{A}'"],
    ),
    "unknown": (tensors() | {f"{PREFIX}x.weight": half(4)}, None, ["unknown tensor 'x.weight'"]),
    "base bias": (tensors() | {f"{PLAIN}.bias": half(6)}, None, [f"'{Q}.bias'"]),
    "twice": (tensors() | {f"{Q}.lora_A.weight": half(4, 8)}, Q, ["factor A twice"]),
    "carried twice": (
        tensors() | {"lm_head.weight": half(2), f"{PREFIX}lm_head.weight": half(2)},
        None,
        ["'lm_head.weight' twice, as", f"'{PREFIX}lm_head.weight' and 'lm_head.weight'"],
    ),
    "carried twice, named": (
        tensors()
        | {f"{PREFIX}lm_head.weight": half(2)}
        | {f"{PREFIX}lm_head.modules_to_save.default.weight": half(2)},
        None,
        ["'lm_head.weight' twice", "lm_head.modules_to_save.default.weight'"],
    ),
    "carried empty": (
        tensors() | {f"{PREFIX}lm_head.weight": half(0)},
        None,
        ["'lm_head.weight'", "empty", "shape [0]", "ZeRO-3"],
    ),
    "carried without rows": (
        tensors() | {f"{PREFIX}embed_tokens.weight": half(0, 8)},
        None,
        ["'embed_tokens.weight'", "empty", "[0, 8]"],
    ),
    "embedding mixed": (
        tensors(B=None) | {f"{PLAIN}.lora_embedding_B": half(6, 4)},
        Q,
        ["mixes", "lora_embedding_B"],
    ),
    "embedding conv": (
        {f"{PREFIX}e.lora_embedding_A": half(4, 8, 3), f"{PREFIX}e.lora_embedding_B": half(6, 4)},
        "e",
        ["different layers"],
    ),
    "nested": (
        lora_tensors(random_factors({"attn.base_layer.out_proj": (6, 8)}, 4)),
        "attn.base_layer.out_proj",
        ["MultiheadAttention", "target_parameters"],
    ),
    "no factors": ({f"{PREFIX}lm_head.weight": half(2)}, None, ["no LoRA factors", "leave it out"]),
    "nothing": ({}, None, ["no LoRA factors"]),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case, tmp_path):
    content, module, fragments = TENSORS[case]
    folder = write_folder(tmp_path, content, CONFIG)
    with pytest.raises(AdapterError) as caught:
        load(folder, name="mine")
    check_line(caught.value, "mine", module, *fragments)


def edit_header(folder: Path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))


def weights(change):
    """Apply a function to the bytes of the weights file."""

    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return apply


def only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def two_inside(folder: Path) -> None:
    config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").unlink()
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(config)


def config_text(text: bytes):
    return lambda folder: (folder / "adapter_config.json").write_bytes(text)


FIRST = {Q: (torch.ones(4, 8), torch.ones(6, 4))}  # A at bytes [0, 128), B at [128, 224)
FILES = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), ["no adapter_config.json"]),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        ["has no adapter_model.safetensors", "download"],
    ),
    "pickle": (only_pickle, ["adapter_model.bin is damaged", "safetensors"]),
    "two inside": (two_inside, ["2 adapters (one, two)", "give one"]),
    "config is a list": (config_text(b"[]"), ["not a JSON object"]),
    "config is cut": (config_text(b'{"r": '), ["not valid JSON", "again"]),
    "config is binary": (config_text(b"\xff\xfe\x00"), ["not valid JSON", "again"]),
    "empty": (weights(lambda data: b""), ["truncated", "download"]),
    "cut in the header": (weights(lambda data: data[:40]), ["truncated"]),
    "cut in the data": (weights(lambda data: data[:-1]), ["promises 224 bytes of data, 223 exist"]),
    "too long": (weights(lambda data: data + b"xx"), ["2 bytes no tensor owns"]),
    "git-lfs": (
        weights(lambda data: b"version https://git-lfs.github.com/spec/v1\n"),
        ["git-lfs pointer", "git lfs pull"],
    ),
    "zip": (weights(lambda data: b"PK\x03\x04" + data), ["no safetensors file"]),
    "header is no JSON": (weights(lambda data: data.replace(b"{", b"[", 1)), ["corrupt header"]),
    "header is a list": (
        weights(lambda data: (2).to_bytes(8, "little") + b"[]"),
        ["not a JSON object"],
    ),
    "key twice": (
        lambda f: edit_header(f, b"q_proj.lora_B.weight", b"q_proj.lora_A.weight"),
        ["a key occurs twice"],
    ),
    "unknown dtype": (lambda f: edit_header(f, b'"F32"', b'"F4x"'), ["unknown dtype 'F4x'"]),
    "dtype is no text": (lambda f: edit_header(f, b'"F32"', b"[   ]"), ["unknown dtype []"]),
    "negative size": (lambda f: edit_header(f, b"[4,8]", b"[-48]"), ["impossible shape"]),
    "size is no number": (lambda f: edit_header(f, b"[4,8]", b'"4,8"'), ["impossible shape"]),
    "shape and bytes": (lambda f: edit_header(f, b"[4,8]", b"[4,9]"), ["128 bytes", "needs 144"]),
    "hole": (lambda f: edit_header(f, b"[128,224]", b"[129,225]"), ["gap or an overlap"]),
    "overlap": (lambda f: edit_header(f, b"[128,224]", b"[ 64,160]"), ["gap or an overlap"]),
    "no shape": (lambda f: edit_header(f, b'"shape"', b'"shaqe"'), ["lora_A.weight' wrongly"]),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case, tmp_path):
    spoil, fragments = FILES[case]
    folder = write_adapter(tmp_path, FIRST)
    load(folder)
    spoil(folder)
    with pytest.raises(AdapterError) as caught:
        load(folder, name="mine")
    check_line(caught.value, "mine", None, *fragments)


def test_paths(tmp_path):
    with pytest.raises(AdapterError) as caught:
        load(tmp_path / "none")
    check_line(caught.value, str(tmp_path / "none"), None, "no such folder", "Hub")
    file = write_adapter(tmp_path, FIRST) / "adapter_model.safetensors"
    with pytest.raises(AdapterError) as caught:
        load(file)
    check_line(caught.value, str(file), None, "is a file", "give the folder")


def test_a_file_that_changes_after_loading(tmp_path):
    adapter = load(write_adapter(tmp_path, FIRST), name="mine")
    write_adapter(tmp_path, random_factors(SHAPES, 2))
    with pytest.raises(AdapterError) as caught:
        adapter.factors(Q)
    check_line(caught.value, "mine", None, "changed since", "start again")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError) as caught:
        adapter.factors(Q)
    check_line(caught.value, "mine", None, "cannot be read", "check the file")


def test_names_with_line_breaks_stay_on_one_line(tmp_path):
    spoiled = tensors() | {f"{PREFIX}a\nb.lora_A.weight": half(4, 8)}
    with pytest.raises(AdapterError) as caught:
        load(write_folder(tmp_path, spoiled, CONFIG), name="my\nadapter")
    check_line(caught.value, "my\nadapter", "a\nb", "unknown tensor")


def pair(tmp_path, first=None, second=None, **configs):
    """Adapters 'one' and 'two'; keyword values are config fields, given as (one, two)."""
    adapters = []
    for i, (name, parts) in enumerate((("one", first), ("two", second))):
        factors, carried = parts or (random_factors(SHAPES, 4), None)
        config = {key: values[i] for key, values in configs.items()}
        folder = write_adapter(tmp_path / name, factors, carried=carried, **config)
        adapters.append(load(folder, name=name))
    return adapters


GOOD = random_factors(SHAPES, 4)
PAIRS = {
    "base": ({"base_model_name_or_path": ("a", "b")}, "two", None, ["'b'", "'one' is 'a'"]),
    "revision": ({"revision": ("v1", "v2")}, "two", None, ["revision is 'v2'", "base_model=..."]),
    "replication": (
        {"layer_replication": (None, [[0, 1]])},
        "two",
        None,
        ["layer_replication is [[0, 1]]", "is None"],
    ),
    "shape": (
        {"second": (random_factors({Q: (7, 8)}, 4), None)},
        "two",
        Q,
        ["linear of 7 outputs and 8 inputs", "'one' a linear of 6", "one base model"],
    ),
    "kind": (
        {"second": ({Q: (half(4, 2, 4), half(6, 4, 1))}, None)},
        "two",
        Q,
        ["conv1d of 6 outputs and 2x4 inputs", "'one' a linear"],
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_adapters_that_do_not_fit(case, tmp_path):
    changes, blamed, module, fragments = PAIRS[case]
    adapters = pair(tmp_path, **changes)
    with pytest.raises(AdapterError) as caught:
        check_compatible(adapters)
    check_line(caught.value, blamed, module, *fragments)


def test_no_adapters():
    with pytest.raises(DomergeError, match=r"^no adapters given; give at least one$"):
        check_compatible([])


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)
        self.attn = nn.MultiheadAttention(8, 2)


LIVE = {
    "bias": ({"target_modules": ["fc"], "bias": "all"}, None, "bias='all'"),
    "pissa": ({"target_modules": ["fc"], "init_lora_weights": "pissa"}, None, "base weights"),
    "attention": ({"target_modules": ["attn"]}, "attn.base_layer.out_proj", "MultiheadAttention"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", LIVE)
def test_live_adapters_are_refused_like_saved_ones(case, tmp_path):
    options, module, fragment = LIVE[case]
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(r=2, **options))
    with pytest.raises(AdapterError) as caught:
        from_model(model, name="mine")
    check_line(caught.value, "mine", module, fragment)
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError) as saved:
        load(tmp_path, name="mine")
    assert str(saved.value) == str(caught.value)


def test_live_models_without_the_adapter():
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(r=2, target_modules=["fc"]))
    with pytest.raises(AdapterError) as caught:
        from_model(model, "other")
    check_line(caught.value, "other", None, "not an adapter of this model", "('default')")
    with pytest.raises(AdapterError) as caught:
        from_model(Tiny())
    check_line(caught.value, "default", None, "not an adapter of this model", "(none)")
    with pytest.raises(AdapterError) as caught:
        from_model(model.to("meta"))
    check_line(caught.value, "default", None, "meta device", "load the adapter's weights")


def test_plain_tensors():
    a, b = half(4, 8), half(6, 4)
    for factors, scaling, fragments in (
        ({"q": (a, b.double())}, 1.0, ["B is float64", "float32"]),
        ({"q": (a, b.T)}, 1.0, ["different rank"]),
        ({"q": (a, b)}, float("inf"), ["scaling inf", "finite"]),
        ({"q": (a, b)}, {"v": 1.0}, ["scaling None", "finite"]),
        ({"q": (a, b)}, 0.0, ["scaling 0", "not 0"]),
        ({"q": (a, b)}, {"q": 0}, ["scaling 0", "not 0"]),
        ({"q": (a, b.to("meta"))}, 1.0, ["different devices"]),
        ({"q": (a,)}, 1.0, ["no two tensors", "A [r, n]"]),
        ({"q": a}, 1.0, ["no two tensors", "A [r, n]"]),
        ({"q": (4, 5)}, 1.0, ["no two tensors", "A [r, n]"]),
    ):
        with pytest.raises(AdapterError) as caught:
            from_tensors(factors, scaling, name="mine")
        check_line(caught.value, "mine", "q", *fragments)
    with pytest.raises(AdapterError, match="no LoRA factors"):
        from_tensors({})
    with pytest.raises(AdapterError, match="type list, no mapping of modules"):
        from_tensors([a, b])


def test_a_live_scaling_of_zero(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False)
    model = peft.get_peft_model(Tiny(), config)
    model.base_model.model.fc.set_scale("default", 0.0)
    with pytest.raises(AdapterError) as caught:
        from_model(model, name="mine")
    check_line(caught.value, "mine", "fc", "scaling 0", "alpha", "leave the adapter out")


def test_errors_survive_being_sent_between_processes():
    for error in (
        AdapterError("a", "m", "is wrong", "mend it"),
        OptionError("gamma", "is negative", "give a number above 0"),
        OutputError("out/", "exists", "say overwrite=True"),
        DomergeError("no adapters given; give at least one"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
    assert str(OutputError("out/", "is\nfull", "x")) == "output 'out/': is full; x"


def test_no_case_reads_the_data(tmp_path, monkeypatch):
    folder = write_adapter(tmp_path, FIRST)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr(SafetensorsFile, "read", refuse)
    monkeypatch.setattr(SafetensorsFile, "read_parts", refuse)
    load(folder)
