"""Whether merges of real adapters have the same bytes as at another commit, for changes that must
not change any.

    python tests/same_outputs.py COMMIT       # builds it in a folder of its own, and compares

All methods, the options that change how they are computed, every form, dtype and backend that runs
here, of the trained adapters of tests/data. Both sides run on this machine, one after the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DIGITS = HERE / "data" / "digits"
DO = (
    {"decouple": False},
    {"orthogonalize": False},
    {"penalty": "norm"},
    {"sides": "A"},
    {"renormalize": True},
    {"directions": "tsvm"},
    {"directions": "linear", "power": 0.5},
    {"steps": 3},
)
STEPS = (
    {"pre": ["equalize"]},
    {"pre": ["orthogonalize", "canonicalize"]},
    {"pre": ["smooth"]},
    {"pre": ["pico"]},
    {"post": ["svc"]},
    {"post": ["norm_match"]},
    {"post": ["subspace_boost"]},
)
CUTS: tuple[dict[str, Any], ...] = ({"rank": 8}, {"energy": 0.9}, {"rank": 8, "scale": 0.7})


def requests() -> Iterator[tuple[str, dict[str, Any]]]:
    """(method, options) of every merge."""
    import domerge_fast as dm

    for method in dm.list_methods():
        pair = {"count": 2} if method == "slerp" else {}
        yield method, pair
        yield method, {**pair, "scale": 0.7, "weights": [1.0, -0.5]}
        yield method, {**pair, "form": "deltas"}
    yield from (("do", {**x}) for x in DO)
    yield from (("tsvm", {"power": x}) for x in (0.0, 0.25, 0.5))
    for method in ("do", "tsvm", "linear", "ties"):
        yield from ((method, {**x}) for x in (*STEPS, *CUTS))
        yield method, {"dtype": "float32"}
        yield method, {"output": True}
        for backend in ("torch", "reference"):
            yield method, {"backend": backend, "count": 3}


def digest(method: str, options: dict[str, Any]) -> str:
    """Of all tensors of one merge, or of its refusal."""
    import domerge_fast as dm

    given = dict(options)
    folders = sorted(path.parent for path in DIGITS.glob("*/adapter_config.json"))
    adapters = folders[: given.pop("count", 8)]
    if weights := given.get("weights"):
        given["weights"] = [weights[k % 2] for k in range(len(adapters))]
    found = hashlib.sha256()
    with tempfile.TemporaryDirectory() as place:
        if given.pop("output", False):
            given["output"] = Path(place) / "merged"
        try:
            merged = dm.merge(adapters, method, **given)
        except dm.DomergeError as error:
            return f"refused: {error}"
        if "output" in given:
            for file in ("adapter_model.safetensors", "adapter_config.json"):
                found.update((given["output"] / file).read_bytes())
        dense = given.get("form") == "deltas"
        for name in merged.names:
            for x in (merged.delta(name),) if dense else merged.factors(name):
                found.update(repr((name, x.dtype, x.shape)).encode())
                found.update(x.contiguous().view(-1).float().numpy().tobytes())
    return found.hexdigest()


def digests(package: Path) -> dict[str, str]:
    """Of every request, by the package in this folder."""
    environment = os.environ | {"PYTHONPATH": os.fspath(package)}
    code = [sys.executable, os.fspath(Path(__file__)), "--digests", os.fspath(package)]
    found = subprocess.run(code, env=environment, stdout=subprocess.PIPE, check=True)
    result: dict[str, str] = json.loads(found.stdout)
    return result


def print_digests(package: str) -> None:
    import domerge_fast as dm

    assert Path(dm.__file__).parent.parent == Path(package), dm.__file__
    print(
        json.dumps(
            {f"{method} {options}": digest(method, options) for method, options in requests()}
        )
    )


def main() -> None:
    if sys.argv[1] == "--digests":
        return print_digests(sys.argv[2])
    with tempfile.TemporaryDirectory() as place:
        other = Path(place) / "other"
        git = ["git", "-C", os.fspath(HERE)]
        subprocess.run([*git, "worktree", "add", "--detach", "-f", other, sys.argv[1]], check=True)
        try:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            quiet = {"env": os.environ | {"DOMERGE_CUDA": "0"}, "capture_output": True}
            subprocess.run(build, cwd=other, check=True, **quiet)
            before, after = digests(other), digests(HERE.parent)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", other], check=True)
    after = {**dict.fromkeys(before, "gone"), **after}
    differ = [name for name in before if before[name] != after[name]]
    refused = [name for name in after if after[name].startswith("refused")]
    for name in differ:
        print(f"{name}: {before[name][:60]} -> {after[name][:60]}")
    print(f"{len(before)} merges, {len(refused)} of them refused: {len(differ)} differ")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
