"""Tensors that adapters save whole: what a merge keeps of them, and the tokenizers beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.make import PREFIX, random_factors, write_adapter
from torch import Tensor

import domerge_fast as dm
from domerge_fast.cli.main import main
from domerge_fast.errors import AdapterError, DomergeError, OptionError
from domerge_fast.storage import lazy

Q = "model.layers.0.self_attn.q_proj"
EMBED, HEAD, SCORE = "model.embed_tokens.weight", "lm_head.weight", "score.weight"
COPY = "model.embed_tokens.base_layer.weight"
SAVED = ["embed_tokens", "lm_head", "score"]


def rand(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adapter(
    folder: Path, carried: Mapping[str, Tensor] | None = None, seed: int = 0, **config: Any
) -> Path:
    """LoRA on Q and, if `embedding` says so, on the embedding of 6 x 4."""
    shapes = {Q: (4, 4)} | ({"model.embed_tokens": (4, 6)} if config.pop("embedding", 0) else {})
    return write_adapter(
        folder,
        random_factors(shapes, 2, seed=seed),
        carried=carried,
        embeddings=["model.embed_tokens"],
        **{"modules_to_save": SAVED if carried else None} | config,
    )


def written(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What was saved whole, without PEFT's prefix, and the config."""
    tensors = load_file(folder / "adapter_model.safetensors")
    whole = {k.removeprefix(PREFIX): v for k, v in tensors.items() if ".lora_" not in k}
    return whole, json.loads((folder / "adapter_config.json").read_text())


def model(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A base model with these weights and that of Q."""
    folder.mkdir()
    config = {"tie_word_embeddings": False, "vocab_size": 6}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({f"{Q}.weight": rand(9, 4, 4), **tensors}, folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Adapters go by short names."""
    monkeypatch.chdir(tmp_path)


def merge(tmp_path: Path, *adapters: Path, **options: Any) -> tuple[dict[str, Tensor], dict, Any]:
    names = [adapter.relative_to(tmp_path) for adapter in adapters]
    merged = dm.merge(names, "linear", output=tmp_path / "out", overwrite=True, **options)
    notes = tuple(
        note for note in merged.report.notes if "vLLM" not in note and "SGLang" not in note
    )
    return *written(tmp_path / "out"), notes


def test_what_is_the_same_in_all_is_kept_bit_by_bit(tmp_path):
    same = {SCORE: torch.tensor([[float("nan"), -0.0]]), "score.seen": torch.tensor(3)}
    a, b = (adapter(tmp_path / name, same) for name in "ab")
    whole, config, notes = merge(tmp_path, a, b, weights=[2.0, -3.0])
    assert whole.keys() == same.keys()
    for key, tensor in same.items():
        assert torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (whole[key], tensor)))
    assert config["modules_to_save"] == SAVED
    assert notes == ()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.complex64])
def test_what_can_be_read_can_be_written(dtype, tmp_path):
    saved = {SCORE: torch.arange(6).view(2, 3).to(dtype)}
    whole, _, _ = merge(tmp_path, adapter(tmp_path / "a", saved))
    assert whole[SCORE].dtype == dtype
    assert torch.equal(whole[SCORE].view(torch.uint8), saved[SCORE].view(torch.uint8))


def test_signs_of_zero_make_a_difference(tmp_path):
    a, b = (adapter(tmp_path / n, {SCORE: torch.tensor([z])}) for n, z in (("a", 0.0), ("b", -0.0)))
    with pytest.raises(AdapterError, match=r"'score.weight', saved whole, differs from that of"):
        merge(tmp_path, a, b)


def test_of_the_same_in_two_dtypes_the_wider_is_kept(tmp_path):
    wide = {SCORE: rand(1, 3, 4)}
    narrow = {SCORE: wide[SCORE].bfloat16()}
    a, b = adapter(tmp_path / "a", narrow), adapter(tmp_path / "b", wide)
    whole, _, _ = merge(tmp_path, a, b)
    assert torch.equal(whole[SCORE], wide[SCORE])
    other = adapter(tmp_path / "c", {SCORE: wide[SCORE].half()})
    with pytest.raises(AdapterError, match="differs"):
        merge(tmp_path, a, other)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("weight", [1.0, 0.5, -1.0])
def test_what_one_adapter_saves_is_its_own(order, weight, tmp_path):
    a = adapter(tmp_path / "a")
    b = adapter(tmp_path / "b", {EMBED: rand(1, 6, 4)}, modules_to_save=["embed_tokens"])
    whole, config, notes = merge(tmp_path, *[a, b][::order], weights=[1.0, weight][::order])
    assert whole.keys() == {EMBED}
    assert torch.equal(whole[EMBED], rand(1, 6, 4))
    assert config["modules_to_save"] == ["embed_tokens"]
    assert notes == (f"saved whole as in adapter {1 + (order > 0)} (b): {EMBED}",)
    assert notes[0] in (tmp_path / "out/README.md").read_text()


def test_an_adapter_of_weight_zero_owns_nothing(tmp_path):
    a, b = (adapter(tmp_path / n, {SCORE: rand(k, 3, 4)}) for k, n in enumerate("ab"))
    whole, _, _ = merge(tmp_path, a, b, weights=[0.0, 1.0])
    assert torch.equal(whole[SCORE], rand(1, 3, 4))
    c = adapter(tmp_path / "c")
    whole, config, _ = merge(tmp_path, a, c, weights=[0.0, 1.0])
    assert whole == {}
    assert config["modules_to_save"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -2.0, 0.25]])
def test_changes_are_added_to_the_base_s(weights, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(lazy.in_step, "__defaults__", (32,))  # rows come in several pieces
    base = model(tmp_path / "base", {EMBED: rand(0, 6, 4), "model.norm.weight": rand(5, 4)})
    tuned = [rand(0, 6, 4) + 0.1 * rand(k, 6, 4) for k in (1, 2)]
    a, b = (adapter(tmp_path / n, {EMBED: w.to(dtype)}) for n, w in zip("ab", tuned))
    c = adapter(tmp_path / "c")
    whole, _, notes = merge(tmp_path, a, b, c, weights=weights, base=base, scale=3.0)
    terms = [w * (x.to(dtype).float() - rand(0, 6, 4)) for w, x in zip(weights, tuned)]
    expected = rand(0, 6, 4) + terms[0] + terms[1]  # λ is for factors
    assert whole[EMBED].dtype == dtype
    assert torch.equal(whole[EMBED], expected.to(dtype))
    assert notes == (f"the changes of tensors that adapters save whole were added up: {EMBED}",)


def test_without_the_base_they_are_refused_with_the_remedies(tmp_path):
    a, b = (adapter(tmp_path / n, {EMBED: rand(k, 6, 4)}) for k, n in enumerate("ab"))
    with pytest.raises(AdapterError) as caught:
        merge(tmp_path, a, b)
    line = str(caught.value)
    assert line.startswith("adapter 'b': 'model.embed_tokens.weight', saved whole, differs")
    for part in ("adapter 'a'", "give the base", "--base", "from:NAME", "'drop'", "--whole"):
        assert part in line
    assert not (tmp_path / "out").exists()


def test_a_head_that_the_base_has_not_is_refused_with_it_too(tmp_path):
    base = model(tmp_path / "base", {EMBED: rand(0, 6, 4)})
    a, b = (adapter(tmp_path / n, {SCORE: rand(k, 3, 4)}) for k, n in enumerate("ab"))
    with pytest.raises(AdapterError, match="not at hand; say whole='from:NAME' to take one"):
        merge(tmp_path, a, b, base=base)
    base = model(tmp_path / "with head", {EMBED: rand(0, 6, 4), SCORE: rand(5, 3, 4)})
    whole, _, _ = merge(tmp_path, a, b, base=base)
    torch.testing.assert_close(whole[SCORE], rand(0, 3, 4) + rand(1, 3, 4) - rand(5, 3, 4))


def test_the_wrong_base_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    save_file({EMBED: rand(0, 6, 4)}, tmp_path / "base/model.safetensors")
    a, b = (adapter(tmp_path / n, {EMBED: rand(k, 6, 4)}) for k, n in enumerate("ab"))
    with pytest.raises(OptionError, match="q_proj"):
        merge(tmp_path, a, b, base=tmp_path / "base")


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        (rand(1, 6, 4), rand(2, 8, 4), "vocabulary was resized differently"),
        (rand(1, 8, 4), rand(2, 8, 4), r"it was \[6, 4\] before training, now \[8, 4\]"),
        (torch.ones(6, 4).int(), torch.zeros(6, 4).int(), "int32, which cannot be added up"),
        (torch.full((6, 4), 6e4).half(), torch.full((6, 4), 6e4).half() - 64, "not finite in"),
    ],
)
def test_what_cannot_be_added_up_is_refused(one, other, reason, tmp_path):
    base = model(tmp_path / "base", {EMBED: rand(0, 6, 4)})
    a, b = adapter(tmp_path / "a", {EMBED: one}), adapter(tmp_path / "b", {EMBED: other})
    with pytest.raises(DomergeError, match=reason):
        merge(tmp_path, a, b, base=base)
    assert not (tmp_path / "out").exists()
    whole, _, _ = merge(tmp_path, a, b, whole="from:b")
    assert torch.equal(whole[EMBED], other)


def test_drop_leaves_them_out(tmp_path):
    a = adapter(tmp_path / "a", {EMBED: rand(1, 6, 4), SCORE: rand(1, 3, 4)}, task_type="SEQ_CLS")
    b = adapter(tmp_path / "b", {EMBED: rand(2, 6, 4)}, task_type="SEQ_CLS")
    whole, config, notes = merge(tmp_path, a, b, whole="drop")
    assert whole == {}
    assert config["modules_to_save"] is None
    assert config["task_type"] is None  # PEFT would look for the head
    assert notes[0] == f"left out, saved whole by the adapters: {EMBED}, {SCORE}"
    assert "no task_type" in notes[1]
    assert '"whole": "drop"' in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("name", ["b", "2"])
def test_from_takes_one_adapter_s(name, tmp_path):
    a = adapter(tmp_path / "a", {EMBED: rand(1, 6, 4), HEAD: rand(1, 6, 4)})
    b = adapter(tmp_path / "b", {EMBED: rand(2, 6, 4)}, modules_to_save=["embed_tokens"])
    whole, config, notes = merge(tmp_path, a, b, whole=f"from:{name}")
    assert whole.keys() == {EMBED}
    assert torch.equal(whole[EMBED], rand(2, 6, 4))
    assert config["modules_to_save"] == ["embed_tokens"]
    assert notes == (f"saved whole as in adapter 2 (b): {EMBED}",)
    assert '"whole": "from:2"' in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("whole", "line"),
    [
        ("from:c", r"option 'whole': no adapter is called 'c'; .*use one of: "),
        ("from:3", "no adapter is called '3'"),
        ("from:a", "a' saves no tensor whole; name another adapter, or say 'drop'"),
        ("from:", "'from:' is not known; say 'auto', 'drop' or 'from:NAME'"),
        ("keep", "'keep' is not known; say 'auto', 'drop' or 'from:NAME'"),
        (None, "None is not known"),
    ],
)
def test_a_policy_that_does_not_exist_is_refused(whole, line, tmp_path):
    a, b = adapter(tmp_path / "a"), adapter(tmp_path / "b", {SCORE: rand(1, 3, 4)})
    with pytest.raises(OptionError, match=line):
        merge(tmp_path, a, b, whole=whole)


def test_a_module_that_is_lora_in_another_adapter_is_refused(tmp_path):
    a = adapter(tmp_path / "a", embedding=True)
    b = adapter(tmp_path / "b", {EMBED: rand(1, 6, 4)})
    for order in ([a, b], [b, a]):
        with pytest.raises(AdapterError, match=r"'model.embed_tokens': is LoRA here, but adapter"):
            merge(tmp_path, *order)
    whole, _, _ = merge(tmp_path, a, b, weights=[0.0, 1.0])
    assert whole.keys() == {EMBED}
    whole, config, _ = merge(tmp_path, a, b, whole="drop")
    assert whole == {}
    assert config["modules_to_save"] is None


@pytest.mark.parametrize("copies", [1, 2])
def test_copies_of_the_base_s_own_weight_never_block(copies, tmp_path):
    folders = [
        adapter(tmp_path / "a", {COPY: rand(0, 6, 4)}, embedding=True, modules_to_save=None),
        adapter(tmp_path / "b", {COPY: rand(0, 6, 4)} if copies == 2 else {}, embedding=True),
        adapter(tmp_path / "c", {EMBED: rand(0, 6, 4)}),  # saved along, and never trained
        adapter(tmp_path / "d"),
    ]
    whole, config, _ = merge(tmp_path, *folders)
    assert whole.keys() == {COPY}
    assert torch.equal(whole[COPY], rand(0, 6, 4))
    assert not config["modules_to_save"] or "embed_tokens" not in config["modules_to_save"]


def test_copies_that_do_not_fit_are_refused_with_the_reason(tmp_path):
    a = adapter(tmp_path / "a", {COPY: rand(0, 6, 4)}, embedding=True)
    b = adapter(tmp_path / "b", {COPY: rand(1, 8, 4)}, embedding=True)
    with pytest.raises(AdapterError, match="the vocabulary was resized differently; say whole="):
        merge(tmp_path, a, b)
    with pytest.raises(AdapterError, match=r"'model.embed_tokens': saves its weight as \[8, 4\]"):
        merge(tmp_path, b)


def test_a_copy_is_what_changes_are_measured_from(tmp_path):
    a = adapter(tmp_path / "a", {COPY: rand(0, 6, 4)}, embedding=True)
    b, c = (adapter(tmp_path / n, {EMBED: rand(k, 6, 4)}) for k, n in enumerate("bc", 1))
    whole, _, _ = merge(tmp_path, a, b, c, weights=[0.0, 0.5, 2.0])
    x, y, z = (rand(k, 6, 4) for k in range(3))
    torch.testing.assert_close(whole[EMBED], x + 0.5 * (y - x) + 2.0 * (z - x))


def test_a_merge_in_memory_saves_the_same(tmp_path):
    base = model(tmp_path / "base", {EMBED: rand(0, 6, 4)})
    a, b = (adapter(tmp_path / n, {EMBED: rand(k, 6, 4)}) for k, n in enumerate("ab", 1))
    dm.merge([a, b], base=base).save(tmp_path / "saved")
    dm.merge([a, b], base=base, output=tmp_path / "out")
    assert torch.equal(written(tmp_path / "saved")[0][EMBED], written(tmp_path / "out")[0][EMBED])


def test_inspect_does_not_mind(tmp_path):
    a = adapter(tmp_path / "a", embedding=True)
    b, c = (adapter(tmp_path / n, {EMBED: rand(k, 6, 4)}) for k, n in enumerate("bc"))
    assert len(dm.inspect([a, b, c]).cosine) == 3


def test_deltas_are_measured_from_the_base(tmp_path):
    base = model(tmp_path / "base", {EMBED: rand(0, 6, 4), HEAD: rand(5, 6, 4)})
    a = adapter(tmp_path / "a", {EMBED: rand(1, 6, 4), HEAD: rand(3, 6, 4)})
    b = adapter(tmp_path / "b", {EMBED: rand(2, 6, 4)})
    out = tmp_path / "out"
    dm.merge([a, b], "linear", weights=[0.5, 2.0], form="deltas", base=base, output=out)
    found = load_file(out / "deltas.safetensors")
    assert found.keys() == {f"{Q}.weight", EMBED, HEAD}
    x, y, z = (rand(k, 6, 4) for k in range(3))
    torch.testing.assert_close(found[EMBED], 0.5 * (y - x) + 2.0 * (z - x))
    torch.testing.assert_close(found[HEAD], rand(3, 6, 4) - rand(5, 6, 4))
    with pytest.raises(DomergeError, match="is no update; give the base model"):
        dm.merge([a], form="deltas", output=tmp_path / "none")


def tokenizer(folder: Path, **files: Any) -> None:
    """Files of a tokenizer; values that are no text are written as JSON."""
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name.replace("__", ".")).write_text(text)


FAST = {"tokenizer__json": {"vocab": ["a"]}, "tokenizer_config__json": {"padding_side": "left"}}


def tokenizer_files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {
        *("README.md", "adapter_config.json", "adapter_model.safetensors")
    }


def test_tokenizer_files_that_agree_travel(tmp_path):
    a, b, c = (adapter(tmp_path / name) for name in "abc")
    tokenizer(a, **FAST, chat_template__jinja="{{ x }}", other__txt="x")
    tokenizer(b, tokenizer__json='{"vocab":\n["a"]}')
    tokenizer(b, tokenizer_config__json={"padding_side": "left", "name_or_path": "/home/b"})
    _, _, notes = merge(tmp_path, a, b, c)
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert tokenizer_files(tmp_path / "out") == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (a / name).read_bytes()
    assert notes == ()
    merge(tmp_path, c)  # replaces the folder with its tokenizer
    assert tokenizer_files(tmp_path / "out") == set()


@pytest.mark.parametrize(
    "other",
    [
        {"tokenizer_config__json": {"padding_side": "right"}},
        {"tokenizer__json": {"vocab": ["b"]}},
        {"tokenizer__json": "{"},
    ],
)
def test_of_tokenizers_that_differ_none_is_written(other, tmp_path):
    a, b = (adapter(tmp_path / name) for name in "ab")
    tokenizer(a, **FAST)
    tokenizer(b, **FAST | other)
    name = next(iter(other)).replace("__", ".")
    _, _, notes = merge(tmp_path, a, b)
    assert tokenizer_files(tmp_path / "out") == set()
    assert notes == (f"no tokenizer is written, the adapters' {name} differ",)
    _, _, notes = merge(tmp_path, a, b, weights=[1.0, 0.0])
    assert tokenizer_files(tmp_path / "out") == {"tokenizer.json", "tokenizer_config.json"}


def test_vocabularies_of_several_files_are_compared_as_a_whole(tmp_path):
    a, b = (adapter(tmp_path / name) for name in "ab")
    slow = {"vocab__json": {"a": 0}, "merges__txt": ""}
    tokenizer(a, **slow)
    tokenizer(b, **slow, added_tokens__json={"<new>": 1})
    _, _, notes = merge(tmp_path, a, b)
    assert notes == ("no tokenizer is written, the adapters' added_tokens.json differ",)


def test_rows_for_other_tokens_are_refused(tmp_path):
    a, b = (adapter(tmp_path / n, {EMBED: rand(0, 6, 4)}) for n in "ab")
    tokenizer(a, **FAST)
    tokenizer(b, **FAST | {"tokenizer__json": {"vocab": ["b"]}})
    message = r"b': its tokenizer.json is not that of adapter .*a', and 'model.embed_tokens.weight'"
    with pytest.raises(AdapterError, match=message):
        merge(tmp_path, a, b)
    merge(tmp_path, a, b, whole="from:b")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (b / "tokenizer.json").read_bytes()
    merge(tmp_path, a, b, whole="drop")
    assert tokenizer_files(tmp_path / "out") == set()


def test_what_peft_saves_of_a_wrapper_is_the_tensor_and_what_it_was(tmp_path):
    """As PEFT writes an embedding that was resized and is in modules_to_save."""
    stem = EMBED.removesuffix("weight")

    def wrapped(new: Tensor, old: Tensor) -> dict[str, Tensor]:
        parts = {f"{stem}modules_to_save.weight": new, f"{stem}original_module.weight": old.clone()}
        return {EMBED: new.clone(), **parts}

    x, y, z = (rand(k, 6, 4) for k in range(3))
    a, b = (adapter(tmp_path / n, wrapped(t, x)) for n, t in (("a", y), ("b", z)))
    whole, _, _ = merge(tmp_path, a)
    assert whole.keys() == {EMBED}
    assert torch.equal(whole[EMBED], y)
    whole, _, _ = merge(tmp_path, a, b, weights=[0.5, 2.0])
    torch.testing.assert_close(whole[EMBED], x + 0.5 * (y - x) + 2.0 * (z - x))
    other = adapter(tmp_path / "c", wrapped(z, z))
    with pytest.raises(DomergeError, match="was not the same in all of them before training"):
        merge(tmp_path, a, other)
    base = model(tmp_path / "base", {EMBED: rand(3, 6, 4)})
    whole, _, _ = merge(tmp_path, a, other, base=base)
    torch.testing.assert_close(whole[EMBED], y + z - rand(3, 6, 4))


def grown(tmp_path: Path, *adapters: Path, whole: str = "auto") -> tuple[dict[str, Tensor], dict]:
    """Adapters added one by one."""
    growing = dm.Sequential.start(tmp_path / "state", whole=whole, overwrite=True)
    for folder in adapters:
        growing.add(folder.relative_to(tmp_path))
    dm.Sequential.open(tmp_path / "state").save(tmp_path / "grown", overwrite=True)
    return written(tmp_path / "grown")


def test_one_by_one_what_differs_is_refused_unless_the_start_chose(tmp_path):
    a, b = (adapter(tmp_path / n, {EMBED: rand(k, 6, 4)}) for k, n in enumerate("ab"))
    c = adapter(tmp_path / "c")
    same = adapter(tmp_path / "d", {EMBED: rand(0, 6, 4)})
    whole, config = grown(tmp_path, c, a, same, c)
    assert torch.equal(whole[EMBED], rand(0, 6, 4))
    assert config["modules_to_save"] == SAVED
    message = r"^adapter 'b': 'model.embed_tokens.weight', saved whole, differs.*; start again with"
    with pytest.raises(AdapterError, match=message):
        grown(tmp_path, a, b)
    whole, config = grown(tmp_path, a, b, whole="drop")
    assert whole == {}
    assert config["modules_to_save"] is None
    for name, seed in (("b", 1), ("3", 1), ("a", 0), ("2", 0)):
        whole, config = grown(tmp_path, c, a, b, c, whole=f"from:{name}")
        assert torch.equal(whole[EMBED], rand(seed, 6, 4))
        assert config["modules_to_save"] == SAVED
    assert grown(tmp_path, c, a, whole="from:b")[0] == {}
    with pytest.raises(OptionError, match="c' saves no tensor whole"):
        grown(tmp_path, a, c, whole="from:c")
    with pytest.raises(AdapterError, match=r"'model.embed_tokens': is LoRA here, but adapter"):
        grown(tmp_path, a, adapter(tmp_path / "e", embedding=True), whole="from:a")
    with pytest.raises(OptionError, match="say 'auto', 'drop' or 'from:NAME'"):
        grown(tmp_path, a, whole="none")


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("name", ["same", "2"])
def test_one_by_one_a_name_stands_for_one_adapter(name, at_once, tmp_path):
    one, other = ("2", "same") if name == "2" else ("same", "same")
    a = adapter(tmp_path / "x" / one, {EMBED: rand(0, 6, 4)})
    b = adapter(tmp_path / "y" / other, {EMBED: rand(1, 6, 4)})
    growing = dm.Sequential.start(tmp_path / "state", whole=f"from:{name}")
    if not at_once:
        growing.add(a)
    with pytest.raises(OptionError, match=f"two adapters are called '{name}'; start again"):
        growing.add_all([a, b] if at_once else [b])
    assert len(dm.Sequential.open(tmp_path / "state").state.steps) == (not at_once)


def test_one_by_one_a_name_that_was_never_added_is_told(tmp_path):
    a = adapter(tmp_path / "a", {EMBED: rand(0, 6, 4)})
    growing = dm.Sequential.start(tmp_path / "state", whole="from:b")
    growing.add(a)
    note = "nothing that adapters save whole is kept: none that was added is called 'b'"
    assert note in growing.merged().report.notes
    growing.add(adapter(tmp_path / "b", {EMBED: rand(1, 6, 4)}))
    assert note not in growing.merged().report.notes


def test_what_is_lora_and_saved_whole_is_no_one_update(tmp_path):
    factors = random_factors({Q: (4, 4)}, 2)
    both = write_adapter(
        tmp_path / "a",
        factors,
        carried={f"{Q}.weight": rand(1, 4, 4)},
        modules_to_save=["q_proj"],
    )
    base = model(tmp_path / "base", {})
    with pytest.raises(DomergeError, match="is saved whole by the adapters, and is LoRA in one"):
        dm.merge([both], "linear", form="deltas", base=base, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    dm.merge([both], "linear", form="model", base=base, output=tmp_path / "model")
    a, b = factors[Q]
    found = load_file(tmp_path / "model/model.safetensors")[f"{Q}.weight"]
    torch.testing.assert_close(found, rand(1, 4, 4) + b @ a)


@pytest.mark.parametrize("head", ["score", "classifier"])
def test_heads_of_two_classifiers(head, tmp_path, capsys):
    for k, name in enumerate("ab"):
        carried = {f"{head}.weight": rand(k, 3, 4), f"{head}.bias": rand(k, 3)}
        saved = {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}
        adapter(tmp_path / name, carried, **saved)
    assert main(["merge", "a", "b", "-o", "out"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"domerge-fast: error: adapter 'b': '{head}.bias', saved whole, differs")
    assert "--whole" in line
    assert main(["merge", "a", "b", "-o", "out", "--whole", "from:a"]) == 0
    assert "saved whole as in adapter 1 (a)" in " ".join(capsys.readouterr().out.split())
    whole, config = written(tmp_path / "out")
    assert torch.equal(whole[f"{head}.weight"], rand(0, 3, 4))
    assert (config["modules_to_save"], config["task_type"]) == (["classifier", "score"], "SEQ_CLS")
    for action in (["start", "state", "--whole", "from:b"], ["add", "state", "a", "b"]):
        assert main(["sequential", *action]) == 0
    assert main(["sequential", "save", "state", "-o", "grown"]) == 0
    assert torch.equal(written(tmp_path / "grown")[0][f"{head}.weight"], rand(1, 3, 4))
