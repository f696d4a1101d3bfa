"""A base model's weights are found by their last names and shapes, one weight for one module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.make import random_factors, write_adapter

import domerge_fast as dm
from domerge_fast.errors import OptionError
from domerge_fast.formats.model.base_names import Renaming
from domerge_fast.formats.model.checkpoint import Checkpoint, open_checkpoint

Shapes = Mapping[str, tuple[int, int]]
TAILS = {"self_attn.q_proj": (6, 8), "mlp.up_proj": (9, 8)}


def layers(stem: str, more: int = 0, tails: Shapes = TAILS) -> dict[str, tuple[int, int]]:
    """Modules with their shapes [m, n]; more: of both."""
    return {
        f"{stem}.{i}.{tail}": (m + more, n + more)
        for i in range(2)
        for tail, (m, n) in tails.items()
    }


def base(folder: Path, *modules: Shapes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    tensors = {f"{k}.weight": torch.zeros(shape) for some in modules for k, shape in some.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def opened(tmp_path: Path, *modules: Shapes) -> Checkpoint:
    return open_checkpoint(base(tmp_path / "base", *modules))


def found(shapes: Shapes, checkpoint: Checkpoint) -> list[str]:
    rename = Renaming({f"{k}.weight": [shape] for k, shape in shapes.items()}, checkpoint)
    return [rename(f"{name}.weight").removesuffix(".weight") for name in shapes]


STEMS = {
    "alike": ("model.layers", "model.layers"),
    "backbone of causal": ("layers", "model.layers"),
    "causal of backbone": ("model.layers", "layers"),
    "language model inside": ("model.language_model.layers", "language_model.model.layers"),
    "text of the Hub": ("model.language_model.layers", "model.layers"),
    "GPT-2": ("h", "transformer.h"),
    "any outer name": ("encoder.layer", "my_encoder.encoder.layer"),
    "T5": ("transformer.encoder.block", "encoder.block"),
    "in DDP": ("model.layers", "module.model.layers"),
}


@pytest.mark.parametrize("case", STEMS)
def test_a_list_of_layers_is_found_under_another_name(case, tmp_path):
    own, files = STEMS[case]
    checkpoint = opened(tmp_path, layers(files), layers("other.blocks"))
    assert found(layers(own), checkpoint) == list(layers(files))


def test_text_vision_and_head_are_found_each_by_itself(tmp_path):
    own = {
        **layers("model.language_model.layers"),
        **layers("model.visual.blocks", 1),
        "model.language_model.embed_tokens": (30, 8),
        "model.visual.merger": (8, 9),
        "lm_head": (30, 8),
    }
    for name, text, vision, head in (
        ("LLaVA", "language_model.model", "visual", "language_model.lm_head"),
        ("Qwen", "model", "visual", "lm_head"),
        ("new", "model.language_model", "model.visual", "lm_head"),
    ):
        files = {
            **layers(f"{text}.layers"),
            **layers(f"{vision}.blocks", 1),
            f"{text}.embed_tokens": (30, 8),
            f"{vision}.merger": (8, 9),
            head: (30, 8),
        }
        (tmp_path / name).mkdir()
        assert found(own, opened(tmp_path / name, files)) == list(files)


def test_towers_of_the_same_names_are_told_apart_by_shapes(tmp_path):
    checkpoint = opened(tmp_path, layers("text.layers"), layers("vision.layers", 1))
    assert found(layers("layers"), checkpoint) == list(layers("text.layers"))
    assert found(layers("layers", 1), checkpoint) == list(layers("vision.layers"))


def test_names_that_may_mean_two_weights_are_refused(tmp_path):
    checkpoint = opened(tmp_path, layers("text.layers"), layers("vision.layers"))
    with pytest.raises(
        OptionError, match=r"more than one name \('text\.layers\.' and 'vision\.lay"
    ):
        found(layers("layers"), checkpoint)


@pytest.mark.parametrize("text", ["text_model", "language_model"])
def test_no_tower_is_taken_because_its_name_is_more_alike(text, tmp_path):
    own = layers("encoder.layers")
    towers = layers(f"{text}.encoder.layers"), layers("vision_model.encoder.layers")
    names = rf"'{text}\.encoder\.layers\.' and 'vision_model\.enc"
    with pytest.raises(OptionError, match=rf"more than one name \({names}"):
        written(tmp_path, own, {**towers[0], **towers[1]})
    assert not (tmp_path / "out").exists()
    (tmp_path / "other").mkdir()
    larger = layers("vision_model.encoder.layers", 1)
    assert found(own, opened(tmp_path / "other", towers[0], larger)) == list(towers[0])


def test_a_part_of_another_name_is_not_taken_for_it(tmp_path):
    checkpoint = opened(tmp_path, layers("encoder.block"), layers("model.vision.layers"))
    own = {**layers("decoder.block"), **layers("model.layers")}
    assert found(own, checkpoint) == list(own)


def test_what_is_not_adapted_follows_what_is(tmp_path):
    checkpoint = opened(tmp_path, layers("layers"), {"norm": (8, 8), "score": (2, 8)})
    rename = Renaming({f"{name}.weight": () for name in layers("model.layers")}, checkpoint)
    assert rename("model.norm.weight") == "norm.weight"
    assert rename("score.weight") == "score.weight"
    assert rename("model.nothing.weight") == "model.nothing.weight"


def written(tmp_path: Path, own: Shapes, files: Shapes) -> Path:
    factors = random_factors(own, 2)
    adapter = dm.from_tensors(factors, base_model="base")
    folder = base(tmp_path / "base", files)
    dm.merge([adapter], "linear", form="model", base=folder, output=tmp_path / "out")
    return tmp_path / "out"


def test_every_update_lands_in_its_weight(tmp_path):
    own = {**layers("model.language_model.layers"), **layers("model.visual.blocks", 1)}
    files = {**layers("language_model.model.layers"), **layers("visual.blocks", 1)}
    stored = load_file(written(tmp_path, own, files) / "model.safetensors")
    for (name, (a, b)), key in zip(random_factors(own, 2).items(), files):
        assert name.rpartition(".")[2] == key.rpartition(".")[2]
        torch.testing.assert_close(stored[f"{key}.weight"], b @ a, rtol=1e-5, atol=1e-5)


def test_two_modules_of_one_weight_are_refused(tmp_path):
    own = {**layers("model.layers"), **layers("layers")}
    with pytest.raises(
        OptionError, match=r"one weight 'model\.layers\.0\S+' for modules 'l\S+' and '"
    ):
        written(tmp_path, own, layers("model.layers"))
    assert not (tmp_path / "out").exists()


def test_a_miss_shows_the_nearest_key(tmp_path):
    own = layers("model.layers", tails={"mlp.gate_proj": (9, 8)})
    with pytest.raises(
        OptionError, match=r"has no 'm\S+gate_proj\.weight' for .* nearest is 'model\."
    ):
        written(tmp_path, own, layers("model.layers", tails={"mlp.gated_proj": (9, 8)}))


def twice(tmp_path: Path, tied: bool | None, differs: bool = False) -> tuple[Path, Path, Path]:
    """A base that stores its embedding once more, as a head of a name that is not known, and
    adapters with LoRA on that head and with the head saved whole."""
    weight = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    tensors = {f"{k}.weight": torch.zeros(m, n) for k, (m, n) in layers("encoder.layer").items()}
    tensors |= {"embeddings.word_embeddings.weight": weight, "cls.decoder.weight": weight + differs}
    folder = tmp_path / "base"
    folder.mkdir()
    config = {} if tied is None else {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps({"vocab_size": 30} | config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    adapted = random_factors({"cls.decoder": (30, 8)}, 2)
    lora = write_adapter(tmp_path / "lora", adapted)
    q = random_factors({"encoder.layer.0.self_attn.q_proj": (6, 8)}, 2)
    carried = {"cls.decoder.weight": weight + 1}
    whole = write_adapter(tmp_path / "whole", q, carried=carried, modules_to_save=["decoder"])
    return folder, lora, whole


@pytest.mark.parametrize("tied", [True, None])
@pytest.mark.parametrize("which", [0, 1])
def test_a_weight_that_loading_may_tie_to_its_twin_is_refused(which, tied, tmp_path):
    folder, *adapters = twice(tmp_path, tied)
    names = r"'cls\.decoder\.weight', which the adapters change, to 'embeddings\."
    out = tmp_path / "out"
    with pytest.raises(OptionError, match=f"may tie {names}"):
        dm.merge([adapters[which]], "linear", form="model", base=folder, output=out)
    assert not out.exists()


@pytest.mark.parametrize(("tied", "differs"), [(False, False), (True, True), (None, True)])
def test_a_weight_that_nothing_ties_is_changed_alone(tied, differs, tmp_path):
    folder, lora, _ = twice(tmp_path, tied, differs)
    dm.merge([lora], "linear", form="model", base=folder, output=tmp_path / "out")
    before, after = (load_file(x / "model.safetensors") for x in (folder, tmp_path / "out"))
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == ["cls.decoder.weight"]


def test_what_was_before_training_is_found_beside_a_tower_of_another_size(tmp_path):
    own = layers("encoder.layers")
    towers = {**layers("text_model.encoder.layers"), **layers("vision_model.encoder.layers", 1)}
    folder = base(tmp_path / "base", {**towers, "text_model.head": (2, 8)})
    adapters = [
        write_adapter(
            tmp_path / str(k),
            random_factors(own, 2, seed=k),
            carried={"head.weight": torch.full((2, 8), float(k))},
            modules_to_save=["head"],
        )
        for k in (1, 2)
    ]
    found = dm.merge(adapters, "linear", base=folder).target.carried
    assert torch.equal(found["base_model.model.head.weight"].read(), torch.full((2, 8), 3.0))
