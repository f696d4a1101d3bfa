"""Damaged files: every case is refused in one line, or merged to what its files say."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import torch

from . import mutate
from .forks import Tally, each
from .inputs import (
    CONFIG,
    FILE,
    OF_GGUF,
    OF_MLX,
    STATE,
    SUM,
    WEIGHTS,
    adapter,
    base_model,
    copy,
    experts,
    gguf_adapter,
    lora_file,
    mlx_adapter,
)
from .judge import (
    Ending,
    adapter_problem,
    differs,
    file_updates,
    fingerprint,
    hidden,
    remove,
    run,
    strict_json,
    tensors,
    total,
    updates,
    updates_of_experts,
    updates_of_gguf,
    updates_of_mlx,
)

KINDS = {
    **{"weights": 0.2, "config": 0.15, "base": 0.15, "state": 0.1},
    **{"file": 0.1, "mlx": 0.1, "gguf": 0.1, "experts": 0.1},
}
LARGEST = 1e3
"""Of a weight, for updates beside it to be seen in float32."""
METHODS = (
    *([["linear"]] * 6),
    *(["do"], ["svd", "--rank", "2"], ["ties", "--density", "0.5"], ["iso_c"], ["tsvm"]),
    *(["knots"], ["slerp"], ["linear", "--dtype", "float16"], ["dare", "--seed", "1"], ["wudi"]),
)


def attack(folder: Path, seed: int, count: int) -> Tally:
    """`count` damaged files, a kind in turn by its share of them."""
    good = folder / "good"
    adapter(good / "a", 4, 1)
    adapter(good / "b", 2, 2)
    lora_file(good / "file a", 4, 1)
    lora_file(good / "file b", 2, 2)
    base_model(good / "base")
    mlx_adapter(good / "mlx")
    gguf_adapter(good / "gguf")
    experts(good / "experts", 4, 1)
    experts(good / "other experts", 2, 2)
    for arguments in (["start", good / "state"], ["add", good / "state", good / "a"]):
        if (ending := run("sequential", *arguments)).code:
            raise RuntimeError(f"a good input is refused: {ending.err}")
    names = [f"{kind} {k}" for kind, share in KINDS.items() for k in range(int(share * count))]
    tally = Tally()
    work = folder / "work"

    def judge(number: int) -> str:
        random = Random(f"{seed} {names[number]}")
        for path in [*work.glob("*"), *work.glob(".*")]:
            remove(path)
        work.mkdir(exist_ok=True)
        kind = names[number].split()[0]
        did, ending = CASES[kind](good, work, random)
        _unlock(work)
        return f"!{did}: {ending[1:]}" if ending.startswith("!") else ending

    for case, ending in each(names, judge):
        tally.add(f"seed {seed}, {case}", ending)
    return tally


def _adapter(
    good: Path,
    work: Path,
    random: Random,
    damage: mutate.Damage,
    name: str,
    kind: str = "a",
    read: Callable[[Path], dict[str, torch.Tensor] | None] = updates,
) -> tuple:
    """A merge of a damaged adapter with a good one of PEFT's. read: what the damaged one says."""
    a, b, out = copy(good / kind, work / kind), good / "b", work / "out"
    did = damage(a / name, random)
    method = random.choice(METHODS)
    before = _fingerprint(a, b)
    given = ["--format", "peft", "--base-model", "someone/base"] if kind != "a" else []
    ending = run("merge", a, b, "-o", out, "-q", "--method", *method, *given)
    did = f"{damage.__name__} {did}, {method[0]}"
    if ended := _unless_written(work, before, (a, b), out, ending):
        return did, ended
    if method == ["linear"]:
        inputs = [read(_place(a) if kind == "a" else a), updates(b)]
        if None in inputs:
            return did, "merged"
        problem = differs(updates(out) or {}, total([x for x in inputs if x is not None]))
        return did, f"!{problem}" if problem else "merged to what the files say"
    return did, "merged"


def _weights(good: Path, work: Path, random: Random) -> tuple[str, str]:
    return _adapter(good, work, random, random.choice(mutate.SAFETENSORS), WEIGHTS)


def _config(good: Path, work: Path, random: Random) -> tuple[str, str]:
    return _adapter(good, work, random, random.choice(mutate.JSON), CONFIG)


def _file(good: Path, work: Path, random: Random) -> tuple[str, str]:
    a, b, out = copy(good / "file a", work / "a"), good / "file b", work / "out.safetensors"
    damage = random.choice(mutate.SAFETENSORS)
    did = f"{damage.__name__} {damage(a / FILE, random)}"
    before = _fingerprint(a, b)
    ending = run("merge", a / FILE, b / FILE, "-o", out, "-q", "--method", "linear")
    if problem := _after(work, before, a, b):
        return did, f"!{problem}"
    if not out.exists():
        return did, _as_refusal(ending.refusal())
    if ending.code or ending.err:
        return did, f"!wrote an output, exit code {ending.code}: {ending.err[:300]}"
    problem = differs(file_updates(out), total([file_updates(x / FILE) for x in (a, b)]))
    return did, f"!{problem}" if problem else "merged to what the files say"


def _mlx(good: Path, work: Path, random: Random) -> tuple[str, str]:
    name = random.choice((OF_MLX, OF_MLX, CONFIG))
    damage = random.choice(mutate.JSON if name == CONFIG else mutate.SAFETENSORS[:-1])
    return _adapter(good, work, random, damage, name, "mlx", updates_of_mlx)


def _gguf(good: Path, work: Path, random: Random) -> tuple[str, str]:
    damage = random.choice(mutate.GGUF)
    return _adapter(good, work, random, damage, OF_GGUF, "gguf", updates_of_gguf)


def _unless_written(
    work: Path, before: str, inputs: Sequence[Path], out: Path, ending: Ending
) -> str | None:
    """What a merge ended in; None for an adapter that was written without a word, and is whole."""
    if problem := _after(work, before, *inputs):
        return f"!{problem}"
    if not out.exists():
        return _as_refusal(ending.refusal())
    if ending.code or ending.err:
        return f"!wrote an output, exit code {ending.code}: {ending.err[:300]}"
    problem = adapter_problem(out)
    return f"!{problem}" if problem else None


def _experts(good: Path, work: Path, random: Random) -> tuple[str, str]:
    a, b, out = copy(good / "experts", work / "a"), good / "other experts", work / "out"
    name = random.choice((WEIGHTS, CONFIG))
    damage = random.choice(mutate.JSON if name == CONFIG else mutate.SAFETENSORS)
    did = f"{name}: {damage.__name__} {damage(a / name, random)}"
    before = _fingerprint(a, b)
    ending = run("merge", a, b, "-o", out, "-q", "--method", "linear")
    if ended := _unless_written(work, before, (a, b), out, ending):
        return did, ended
    inputs = [updates_of_experts(_place(a)), updates_of_experts(b), updates_of_experts(out)]
    if None in inputs:
        return did, "merged"
    *parts, got = [x for x in inputs if x is not None]
    problem = differs(got, total(parts))
    return did, f"!{problem}" if problem else "merged to what the files say"


def _base(good: Path, work: Path, random: Random) -> tuple[str, str]:
    a, b, out = good / "a", good / "b", work / "out"
    base = copy(good / "base", work / "base")
    name = random.choice(sorted(x.name for x in base.iterdir()))
    pool = mutate.SAFETENSORS[:-1] if name.endswith(".safetensors") else mutate.JSON
    damage = random.choice(pool)
    if name == "tokenizer.json" and damage is mutate.field_of:
        damage = mutate.place_of
    did = f"{name}: {damage.__name__} {damage(base / name, random)}"
    before = _fingerprint(base, a, b)
    ending = run(
        *("merge", a, b, "-o", out, "-q", "--method", "linear", "--form", "model", "--base", base)
    )
    if problem := _after(work, before, base, a, b):
        return did, f"!{problem}"
    if not out.exists():
        return did, _as_refusal(ending.refusal())
    if ending.code or ending.err:
        return did, f"!wrote an output, exit code {ending.code}: {ending.err[:300]}"
    return did, _model(base, out, total([updates(a) or {}, updates(b) or {}]))


def _model(base: Path, out: Path, wanted: dict[str, torch.Tensor]) -> str:
    """How a case ended that wrote a model: it should be the base with these updates added."""
    strict_json(out / "config.json")
    shards = sorted(x.name for x in out.glob("*.safetensors"))
    w0 = tensors(*[base / name for name in shards if (base / name).exists()])
    w = tensors(*[out / name for name in shards])
    if w.keys() != w0.keys():
        return f"!tensors {sorted(w.keys() ^ w0.keys())[:3]} on one side only"
    changed = {
        key.removesuffix(".weight"): new.double() - w0[key].double()
        for key, new in w.items()
        if not torch.equal(w0[key].view(torch.uint8), new.view(torch.uint8))
    }
    if not all(bool(torch.isfinite(x).all()) for x in changed.values()):
        return "!a changed weight is not finite"
    largest = max((float(x.double().abs().max()) for x in w0.values() if x.numel()), default=0.0)
    if largest > LARGEST:
        return "merged"
    problem = differs(changed, wanted)
    return f"!{problem}" if problem else "merged to what the files say"


def _state(good: Path, work: Path, random: Random) -> tuple[str, str]:
    state, b, out = copy(good / "state", work / "state"), good / "b", work / "out"
    name = random.choice((STATE, STATE, SUM))
    damage = random.choice(mutate.SAFETENSORS[:-1] if name == SUM else mutate.JSON)
    did = f"{name}: {damage.__name__} {damage(state / name, random)}"
    before = _fingerprint(state, b)
    ending = run("sequential", "add", state, b)
    if hidden(work):
        return did, f"!left {hidden(work)}"
    if ending.code:
        if _fingerprint(state, b) != before:
            return did, "!refused, but the state changed"
        return did, _as_refusal(ending.refusal())
    ending = run("sequential", "save", state, "-o", out)
    if ending.code or ending.err:
        return did, f"!was added to, but cannot be saved: {ending.err[:300]}"
    problem = adapter_problem(out)
    return did, f"!{problem}" if problem else "added to and saved"


CASES: dict[str, Callable[[Path, Path, Random], tuple[str, str]]] = {
    "weights": _weights,
    "config": _config,
    "base": _base,
    "state": _state,
    "file": _file,
    "mlx": _mlx,
    "gguf": _gguf,
    "experts": _experts,
}


def _as_refusal(problem: str | None) -> str:
    return f"!{problem}" if problem else "refused"


def _after(work: Path, before: str, *inputs: Path) -> str | None:
    """What a command did that no command may."""
    if left := hidden(work):
        return f"left {left}"
    if _fingerprint(*inputs) != before:
        return "changed an input"
    return None


def _fingerprint(*paths: Path) -> str:
    return fingerprint(*[path for path in paths if path.exists()])


def _place(folder: Path) -> Path:
    """Where the adapter is: in the folder, or in the only one inside."""
    return folder if (folder / CONFIG).exists() else next(folder.glob(f"*/{CONFIG}")).parent


def _unlock(work: Path) -> None:
    for path in work.rglob("*"):
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) & 0o700 == 0:
            os.chmod(path, 0o700)
