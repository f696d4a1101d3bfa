"""benchmarks/knots on stand-ins: a tiny CLIP and a tiny Llama, tasks with known answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from support.make import random_factors, write_adapter
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import domerge_fast as dm

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "knots"))
import data
import knots
import knots_sets as sets
import prompts

SIDE = 32
ATTENTION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
KINDS = ["texture", "pattern", "thing", "object"]
WORDS = ["<e>", "a", "photo", "of", *KINDS, "the", "it", "rains", "snows", "not"]
TIMES = (0.0, 1.0, 1.5, 2.0)
"""How often the adapter's update is added, for every class of an image."""
IMAGES = 4


def tokenizer(folder: Path, **given: str) -> None:
    """Words are tokens, and <e> ends them. Without a padding token, as Llama's, unless given."""
    plain = Tokenizer(models.WordLevel({w: k for k, w in enumerate(WORDS)}, unk_token="the"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing("$A <e>", "$A $B", [("<e>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<e>", **given)
    fast.save_pretrained(folder)


def adapter(model: nn.Module, folder: Path, seed: int, size: float, **given: str) -> None:
    """Random factors on the model's attention, saved by PEFT; the model is left as it was."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=r".*(q_proj|v_proj)", **given)
    adapted = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=size)
    adapted.save_pretrained(folder)
    adapted.unload()


def clip(folder: Path) -> CLIPModel:
    torch.manual_seed(0)
    vision = dict(ATTENTION, image_size=SIDE, patch_size=16)
    text = dict(ATTENTION, vocab_size=len(WORDS), bos_token_id=0, eos_token_id=0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    model.save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(folder)
    tokenizer(folder, pad_token="<e>")
    return model


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@torch.no_grad()
def features(folder: Path, images: list[Image.Image], times: float) -> Tensor:
    """[images, d] of length 1, by PEFT, with the update of adapters/dtd added this often."""
    model = CLIPModel.from_pretrained(folder / "base").eval()
    vision = PeftModel.from_pretrained(model.vision_model, folder / "adapters" / "dtd")
    for module in vision.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = times
    pixels = CLIPImageProcessor.from_pretrained(folder / "base")(images, return_tensors="pt")
    found = model.visual_projection(vision(**pixels).pooler_output)
    return nn.functional.normalize(found)


def class_of(image: int, times: float) -> int:
    return TIMES.index(times) * IMAGES + image


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    """Two tasks with one and the same adapter. There is a class for every image and number of times
    that the update is added, and its head is the image's feature then. Every image is of the class
    of once, but the last for testing: of twice.
    """
    folder = tmp_path_factory.mktemp("vision")
    model = clip(folder / "base")
    (folder / "heads").mkdir()
    for task in ("dtd", "eurosat"):
        adapter(model.vision_model, folder / "adapters" / task, seed=1, size=0.5)
        images = [picture(seed) for seed in range(IMAGES)]
        rows = torch.cat([features(folder, images, times) for times in TIMES])
        torch.save(100 * rows, folder / "heads" / f"{task}_head.pt")
        last = class_of(IMAGES - 1, 2.0)
        for k, image in enumerate(images):
            test = last if k == IMAGES - 1 else class_of(k, 1.0)
            parts = [("train", class_of(k, times)) for times in TIMES]
            for part, label in (*parts, ("val", class_of(k, 1.0)), ("test", test)):
                path = folder / "data" / task / part / f"{label:02d}" / "image.png"
                path.parent.mkdir(parents=True)
                image.save(path)
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    paths = {f"--{part}": str(folder / part) for part in ("adapters", "data", "base")}
    return [name, *(word for pair in paths.items() for word in pair), "--device", "cpu", *more]


def call(folder: Path, *more: str, name: str = "vit-b-32") -> int:
    return knots.main(arguments(folder, name, *more))


def table(capsys) -> dict[str, list[str]]:
    """What was printed: the cells after the first, by it."""
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {first: rest for first, *rest in cells}


TWO = ("--tasks", "dtd", "eurosat")


def test_accuracies_normalized_ones_and_the_scale_are_those_of_the_construction(vision, capsys):
    """The sum of two equal updates is each of them twice. At scale 1 only the last test images are
    right, where one adapter alone has all others; at 0.5 the sum is one adapter."""
    heads = ("--heads", str(vision / "heads"))
    assert call(vision, *TWO, *heads, "--methods", "linear") == 0
    found = table(capsys)
    assert found["test accuracy, %"] == ["scale", "dtd", "eurosat", "average"]
    assert found["base"][1:] == ["0.00"] * 3
    assert found["each adapter on its own task (measured)"][1:] == ["75.00"] * 3
    assert found["`linear`"] == ["1", *["25.00"] * 3]
    assert found["`linear`, normalized"] == ["1", *["33.33"] * 3]

    grid = ("--scales", "0.25:1:0.25")
    assert call(vision, *TWO, *heads, *grid, "--methods", "linear", 'svd {"rank": 4}') == 0
    found = table(capsys)
    for method in ("linear", 'svd {"rank": 4}'):
        assert found[f"`{method}`"] == ["0.5", *["75.00"] * 3]
        assert found[f"`{method}`, normalized"] == ["0.5", *["100.00"] * 3]


def test_a_method_has_its_own_scale_unless_scales_are_searched(vision, capsys):
    given = ("--heads", str(vision / "heads"), "--own", "published")
    assert call(vision, *TWO, *given, "--methods", 'linear {"scale": 0.5}', "tsvm") == 0
    found = table(capsys)
    assert found['`linear {"scale": 0.5}`'] == ["0.5", *["75.00"] * 3]
    adapters = [vision / "adapters" / task for task in ("dtd", "eurosat")]
    scale = dm.merge(adapters, "tsvm", base_model="base").report.scale
    assert scale != 1
    assert found["`tsvm`"][0] == f"{scale:g}"
    bench = knots.Evaluation(knots.parsed(arguments(vision, "vit-b-32", *TWO, *given)))
    ours, _ = bench.merge(bench.adapters, "tsvm", 1.0)
    at_one = dm.merge(adapters, "tsvm", scale=1.0, base_model="base", form="deltas")
    assert all(torch.equal(ours[name], at_one.delta(name)) for name in at_one.names)


def test_the_published_accuracies_divide_where_they_are_asked_for(vision, capsys):
    given = ("--heads", str(vision / "heads"), "--own", "published", "--methods", "linear")
    assert call(vision, *TWO, *given) == 0
    normalized = table(capsys)["`linear`, normalized"]
    assert normalized == ["1", "42.88", "25.25", "34.07"]  # 25 / 0.583, 25 / 0.99, their mean


@torch.no_grad()
def test_zero_shot_heads_are_means_of_the_directions_of_prompts(vision):
    """Class "05" of DTD, one prompt at a time."""
    given = arguments(vision, "vit-b-32", "--tasks", "dtd", "--own", "published")
    head = knots.Evaluation(knots.parsed(given)).heads["dtd"]
    model = CLIPModel.from_pretrained(vision / "base").eval()
    words = PreTrainedTokenizerFast.from_pretrained(vision / "base")
    ends = [
        f"{a} 05 {kind}."
        for a in ("a", "the")
        for kind in ["texture", "pattern", "thing", "object"]
    ]
    tokens = [words(f"a photo of {end}", return_tensors="pt") for end in ends]
    found = [model.text_projection(model.text_model(**t).pooler_output) for t in tokens]
    expected = nn.functional.normalize(nn.functional.normalize(torch.cat(found)).mean(0), dim=0)
    assert head.shape == (len(TIMES) * IMAGES, 16)
    assert (head[5] - expected).norm() < 1e-5


# Llama, with a head for each task


PAIRS = [("it rains", "it snows"), ("it rains not", "rains it not the snows"), ("snows", "it")]


@pytest.fixture(scope="module")
def nli(tmp_path_factory) -> Path:
    """Three tasks of the three kinds: three classes, two of them, and labels in words."""
    folder = tmp_path_factory.mktemp("nli")
    torch.manual_seed(0)
    config = LlamaConfig(**ATTENTION, vocab_size=len(WORDS), num_labels=3, eos_token_id=0)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder / "base")
    tokenizer(folder / "base")
    for seed, task in enumerate(("snli", "rte", "scitail")):
        torch.manual_seed(seed)
        nn.init.normal_(model.score.weight)
        adapter(model, folder / "adapters" / task, seed, size=0.5, task_type="SEQ_CLS")
    rows = {
        "snli": {"validation": [0, 1, 2], "test": [0, 1, 2, -1]},
        "rte": {"validation": [0, 1, 0, 1, 1, 0]},
        "scitail": {"validation": ["entails", "neutral"], "test": ["neutral", "entails", "-"]},
    }
    for task, parts in rows.items():
        (folder / "data" / task).mkdir(parents=True)
        names = sets.NLI[task].columns
        for part, labels in parts.items():
            lines = [
                json.dumps(dict(zip((*names, "label"), (*PAIRS[k % 3], label))))
                for k, label in enumerate(labels)
            ]
            (folder / "data" / task / f"{part}.jsonl").write_text("\n".join(lines))
    return folder


@torch.no_grad()
def classes(folder: Path, task: str, updates: dict[str, Tensor]) -> list[int]:
    """The class of every pair, one at a time, by the base with these updates and the task's head,
    among those that the task has."""
    model = LlamaForSequenceClassification.from_pretrained(folder / "base").eval()
    saved = load_file(folder / "adapters" / task / "adapter_model.safetensors")
    for name, update in updates.items():
        model.get_submodule(name).weight += update
    model.score.weight.copy_(saved["base_model.model.score.weight"])
    words = PreTrainedTokenizerFast.from_pretrained(folder / "base")
    allowed = {"snli": [0, 1, 2], "rte": [0, 2], "scitail": [0, 1]}[task]
    found = []
    for first, second in PAIRS:
        ids = words(first, second, return_tensors="pt")["input_ids"]
        hidden = model.model(ids).last_hidden_state[0, -1]
        found.append(max(allowed, key=lambda k: float(model.score(hidden)[k])))
    return found


def update(folder: Path, task: str) -> dict[str, Tensor]:
    tensors = load_file(folder / "adapters" / task / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    return {
        name.removeprefix("base_model.model."): tensors[f"{name}.lora_B.weight"]
        @ tensors[f"{name}.lora_A.weight"]
        for name in names
    }


def test_nli_is_scored_as_pair_by_pair_with_every_task_s_own_head(nli, capsys):
    """The three tasks of a sum: labels left out and renamed, classes masked, pairs padded, half of
    RTE's validation split held out by seed 42."""
    tasks = ["snli", "rte", "scitail"]
    single = {task: update(nli, task) for task in tasks}
    summed = {name: sum(single[task][name] for task in tasks) for name in single["rte"]}
    drawn = datasets.Dataset.from_dict({"k": list(range(6))}).train_test_split(0.5, seed=42)
    pairs = {"snli": [0, 1, 2], "rte": [k % 3 for k in drawn["train"]["k"]], "scitail": [0, 1]}
    labels = {
        "snli": [0, 1, 2],
        "rte": [(0, 2, 0, 2, 2, 0)[k] for k in drawn["train"]["k"]],
        "scitail": [1, 0],
    }

    def accuracy(task: str, updates: dict[str, Tensor]) -> float:
        found = classes(nli, task, updates)
        right = [found[k] == label for k, label in zip(pairs[task], labels[task], strict=True)]
        return 100 * sum(right) / len(right)

    given = arguments(nli, "llama3-8b", "--tasks", *tasks, "--own", "published")
    bench = knots.Evaluation(knots.parsed(given))
    for updates in ({}, summed):
        expected = {task: accuracy(task, updates) for task in tasks}
        assert bench.accuracies(updates, 1.0, "test") == expected
    deltas, _ = bench.merge(bench.adapters, "linear")
    assert bench.accuracies(deltas, 1.0, "test") == expected
    assert bench.measured() == {task: accuracy(task, single[task]) for task in tasks}


# Splits, names, the search


def test_the_five_lists_of_test_images_are_the_published_ones():
    """Their first entries, as in dataset/shuffled_idxs of the authors' repository."""
    first = {
        "stanford_cars": [674, 6476, 4288],
        "gtsrb": [7031, 1287, 236],
        "mnist": [7249, 2682, 8484],
        "sun397": [12836, 4749, 16448],
        "svhn": [25714, 9001, 17129],
    }
    assert {task: sets.order(task)[:3].tolist() for task in sets.TESTS} == first


def test_a_fifth_of_the_shuffled_test_images_is_for_validation():
    rows = datasets.Dataset.from_dict({"k": list(range(8041))})
    parts = data.divide("stanford_cars", sets.VISION["stanford_cars"], {"test": rows})
    assert parts["validation"]["k"][:2] == [674, 6476]
    assert (len(parts["validation"]), len(parts["test"])) == (1608, 6433)
    assert set(parts["validation"]["k"]) | set(parts["test"]["k"]) == set(range(8041))


def test_mnli_s_last_rows_are_for_validation():
    rows = datasets.Dataset.from_dict({"k": list(range(9815))})
    parts = data.divide("mnli", sets.NLI["mnli"], {"validation": rows})
    assert parts["test"]["k"] == list(range(7852))
    assert parts["validation"]["k"] == list(range(7852, 9815))


def test_half_of_rte_s_rows_drawn_by_seed_42_are_for_validation():
    rows = datasets.Dataset.from_dict({"k": list(range(277))})
    parts = data.divide("rte", sets.NLI["rte"], {"validation": rows})
    drawn = np.random.default_rng(42).permutation(277).tolist()
    assert (parts["validation"]["k"], parts["test"]["k"]) == (drawn[:139], drawn[139:])


def test_class_names_of_every_kind():
    assert prompts.class_names("svhn", ["x"] * 3) == ["0", "1", "2"]
    for labels in (["SeaLake", "AnnualCrop"], ["sea_lake", "Annual Crop"]):
        assert prompts.class_names("eurosat", labels) == ["lake or sea", "annual crop land"]
    names = ["abbey", "apartment building outdoor"]
    assert prompts.class_names("sun397", ["a_abbey", "a_apartment_building_outdoor"]) == names
    assert prompts.class_names("resisc45", ["sea_ice"]) == ["sea ice"]
    signs = prompts.class_names("gtsrb", [])
    assert len(set(signs)) == 43
    assert [signs[k] for k in (0, 14, 25)] == [
        "red and white circle 20 kph speed limit",
        "stop",
        "red and white triangle with person digging / construction / road work warning",
    ]
    assert prompts.class_names("eurosat", ["Forest", "Moon"]) == ["forest", None]


@pytest.mark.parametrize(
    ("scores", "patience", "best", "tried"),
    [
        ([1, 3, 2, 1, 9], 2, 1, 4),  # stops before the 9
        ([1, 3, 2, 1, 9], 3, 4, 5),
        ([1, 3, 2, 4, 3, 2], 2, 3, 6),  # a new best starts the count again
        ([5, 5, 4], 1, 1, 3),  # of equals the last
    ],
)
def test_the_search_stops_after_so_many_below_the_best(scores, patience, best, tried):
    seen = []
    found = knots.search(lambda k: seen.append(k) or scores[k], range(len(scores)), patience)
    assert (found, len(seen)) == (best, tried)


def test_a_grid_has_both_its_ends():
    assert knots.scales("0.1:1.0:0.1") == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert knots.scales("0.1:0.9:0.2") == [0.1, 0.3, 0.5, 0.7, 0.9]


# What is refused


def no_adapter(folder: Path) -> list[str]:
    return ["--adapters", str(folder / "data")]


def no_data(folder: Path) -> list[str]:
    return ["--data", str(folder / "heads")]


def no_base(folder: Path) -> list[str]:
    return ["--base", str(folder / "nowhere")]


def no_heads(folder: Path) -> list[str]:
    return ["--heads", str(folder / "data")]


def foreign_adapter(folder: Path) -> list[str]:
    """Of Llama's modules, which CLIP does not have."""
    source = folder / "foreign"
    for task in ("dtd", "eurosat"):
        config = LlamaConfig(**ATTENTION, vocab_size=len(WORDS))
        adapter(LlamaForSequenceClassification(config), source / task, seed=0, size=1.0)
    return ["--adapters", str(source)]


def says(*words: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["--heads", str(folder / "heads"), *words]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (no_adapter, "adapter 'dtd'"),
        (no_data, "has no 'dtd'"),
        (no_base, "nowhere"),
        (no_heads, "dtd_head.pt"),
        (foreign_adapter, "'model.layers.0.self_attn.q_proj'"),
        (says("--methods", "dont"), "dont"),
        (says("--methods", "ties density=1"), "no JSON object"),
        (says("--methods", "ties [1]"), "no JSON object"),
        (says("--methods", 'ties {"densty": 1}'), "densty"),
        (says("--scales", "1:0:0.1"), "START:STOP:STEP"),
        (says("--scales", "1:2:0"), "START:STOP:STEP"),
        (says("--scales", "1"), "START:STOP:STEP"),
    ],
)
def test_what_cannot_be_scored_is_one_line_and_2(vision, capfd, change, told):
    assert call(vision, *TWO, "--own", "published", *change(vision)) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("knots.py: ")
    assert told in line


def test_a_set_that_is_not_whole_is_refused():
    rows = datasets.Dataset.from_dict({"k": [1, 2]})
    with pytest.raises(dm.OptionError, match=r"'mnist' has 2 rows in 'test', and the set 10000"):
        data.divide("mnist", sets.VISION["mnist"], {"test": rows})


def test_data_without_a_split_are_refused(tmp_path):
    (tmp_path / "sick").mkdir()
    (tmp_path / "sick" / "test.jsonl").write_text('{"sentence_A": "", "label": 0}')
    with pytest.raises(dm.OptionError, match=r"'sick' has no split 'validation'"):
        data.load("sick", sets.NLI["sick"], tmp_path)


def test_an_adapter_without_a_head_is_refused(nli, tmp_path):
    given = arguments(nli, "llama3-8b", "--tasks", "snli", "--own", "published")
    write_adapter(
        tmp_path / "snli", random_factors({"model.layers.0.self_attn.q_proj": (32, 32)}, 4)
    )
    args = knots.parsed([*given, "--adapters", str(tmp_path)])
    with pytest.raises(dm.AdapterError, match=r"'snli': has saved no head \(score\)"):
        knots.Evaluation(args)


def test_a_library_that_is_not_installed_is_named(vision, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert call(vision, *TWO) == 2
    line = "knots.py: datasets is not installed; pip install datasets"
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_tasks_of_another_set_are_refused(vision, capsys):
    with pytest.raises(SystemExit, match="2"):
        call(vision, "--tasks", "snli")
    assert "vit-b-32 has no task 'snli'" in capsys.readouterr().err
