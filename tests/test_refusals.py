"""Bad input through the API and the command line: one line that says what to do, nothing written.

What loading an adapter refuses by itself is tested case by case in test_refusals_adapters.py.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import locked_folder, small_disk, unchanged
from support.make import PREFIX, lora_tensors, random_factors, write_adapter, write_folder

import domerge_fast as dm
from domerge_fast import AdapterError, DomergeError, OptionError, OutputError
from domerge_fast.adapters.plan import Plan
from domerge_fast.backends import registry
from domerge_fast.cli import main as cli
from domerge_fast.engine import group, reader
from domerge_fast.methods.base import grams

Q, V = "layers.0.q_proj", "layers.1.v_proj"
SHAPES = {Q: (6, 8), V: (5, 8)}
SPOILT = {"one": 0, "two": 1}


@pytest.fixture(autouse=True)
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Adapters "one" and "two" in the current folder; modules are merged and written one by one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reader, "GROUP_BYTES", 1)
    for name in SPOILT:
        make(name)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def make(name: str, carried: Mapping[str, torch.Tensor] | None = None, **config: Any) -> None:
    write_adapter(Path(name), factors(name), carried=carried, **config)


def factors(name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return random_factors(SHAPES, 3, seed=SPOILT[name])


Spoil = Callable[[], object]


def configured(**config: Any) -> Spoil:
    """Adapter "two" with these fields in its config."""
    return lambda: make("two", **config)


def valued(module: str, value: float, side: int = 0) -> Spoil:
    """Adapter "two" with a value in lora_A (side 0) or lora_B of a module."""

    def spoil() -> None:
        changed = factors("two")
        changed[module][side][2, 1] = value
        write_adapter(Path("two"), changed)

    return spoil


def shrunk(module: str, size: float) -> Spoil:
    """Adapter "two" with lora_B of a module made that small."""

    def spoil() -> None:
        changed = factors("two")
        a, b = changed[module]
        write_adapter(Path("two"), {**changed, module: (a, size * b)})

    return spoil


def stored(change: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> Spoil:
    """Adapter "two" with changed tensors in its file."""

    def spoil() -> None:
        tensors = lora_tensors(factors("two"))
        change(tensors)
        fields = {"peft_type": "LORA", "r": 3, "base_model_name_or_path": "base"}
        write_folder(Path("two"), tensors, fields | config)

    return spoil


def replaced(key: str, shape_or_tensor: Any) -> Spoil:
    tensor = shape_or_tensor if torch.is_tensor(shape_or_tensor) else torch.ones(shape_or_tensor)
    return stored(lambda tensors: tensors.update({PREFIX + key: tensor}))


def truncated() -> None:
    file = Path("two/adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])


def pickled() -> None:
    Path("two/adapter_model.safetensors").unlink()
    torch.save([torch.ones(3)], "two/adapter_model.bin")


def nothing() -> None:
    """Both adapters stay good."""


def existing() -> None:
    dm.merge(["one"], output="out")


def foreign() -> None:
    existing()
    Path("out/optimizer.pt").write_text("mine")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is done to the adapters, what is asked for, and what the one line must say."""

    spoil: Spoil
    error: type[DomergeError]
    fragments: tuple[str, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def adapter(spoil: Spoil, *fragments: str, module: str | None = None) -> Case:
    where = "adapter 'two'" + (f", module {module!r}" if module else "") + ": "
    return Case(spoil, AdapterError, (where, *fragments))


def option(options: Mapping[str, Any], *fragments: str) -> Case:
    return Case(nothing, OptionError, fragments, options)


def output(spoil: Spoil, options: Mapping[str, Any], *fragments: str) -> Case:
    return Case(spoil, OutputError, ("output '", *fragments), options)


SCORE = {"score.weight": torch.ones(2, 8)}
CASES = {
    "truncated file": adapter(truncated, "is truncated", "download or save the adapter again"),
    "no folder": Case(
        lambda: Path("two").rename("three"),
        AdapterError,
        ("adapter 'two': no such folder", "check the path"),
    ),
    "missing config": adapter(
        lambda: Path("two/adapter_config.json").unlink(), "no adapter_config.json", "saved by PEFT"
    ),
    "broken config": adapter(
        lambda: Path("two/adapter_config.json").write_text('{"r": 3,'),
        "adapter_config.json is not valid JSON",
        "download",
    ),
    "missing weights": adapter(
        lambda: Path("two/adapter_model.safetensors").unlink(),
        "has no adapter_model.safetensors",
        "save it again",
    ),
    "pickle": adapter(pickled, "adapter_model.bin holds a list", "as safetensors"),
    "float64": adapter(
        replaced(f"{Q}.lora_A.weight", torch.ones(3, 8).double()),
        "A is float64",
        "cast the adapter to float32",
        module=Q,
    ),
    "int8": adapter(
        replaced(f"{V}.lora_B.weight", torch.ones(5, 3, dtype=torch.int8)),
        "B is int8",
        "dequantize",
        module=V,
    ),
    "NaN in the first module": adapter(
        valued(Q, float("nan")), "NaN in lora_A", "leave it out", module=Q
    ),
    "NaN in the last module": adapter(
        valued(V, float("nan"), 1), "NaN in lora_B", "download it again", module=V
    ),
    "Inf": adapter(
        valued(V, -float("inf")), "an infinite value in lora_A", "leave it out", module=V
    ),
    "too far apart": adapter(
        shrunk(V, 1e-35), "are 2^", "smaller than the module's largest", "like sizes", module=V
    ),
    "alpha beyond floats": adapter(
        lambda: make("two", lora_alpha=1e300), "update is of size 2^", "correct its alpha", module=Q
    ),
    "ranks of A and B": adapter(
        replaced(f"{Q}.lora_B.weight", (6, 4)), "different rank (A [3, 8], B [6, 4])", module=Q
    ),
    "rank in the config": adapter(
        configured(r=4), "have rank 3, the config says 4", "r or rank_pattern", module=Q
    ),
    "another layer": adapter(
        lambda: write_adapter(Path("two"), random_factors({Q: (6, 9)}, 3)),
        "linear of 6 outputs and 9 inputs, adapter 'one' a linear of 6 outputs and 8 inputs",
        "merge adapters of one base model",
        module=Q,
    ),
    "another base model": adapter(
        configured(base_model_name_or_path="other"),
        "base model is 'other', that of adapter 'one' is 'base'",
        "base_model=...",
    ),
    "another revision": Case(
        lambda: (make("one", revision="v1"), make("two", revision="v2")),
        AdapterError,
        ("adapter 'two': its base model revision is 'v2'", "'v1'"),
    ),
    "DoRA": adapter(configured(use_dora=True), "is a DoRA", "save the adapter again"),
    "DoRA's magnitudes": adapter(
        replaced(f"{V}.lora_magnitude_vector", (5,)),
        "is a DoRA",
        "its config does not say so",
        module=V,
    ),
    "lora_bias": adapter(configured(lora_bias=True), "lora_bias", "stores no bias on B"),
    "bias on B": adapter(replaced(f"{Q}.lora_B.bias", (6,)), "bias on B", module=Q),
    "trained biases": adapter(configured(bias="all"), "bias='all'", "train it with bias='none'"),
    "not LoRA": adapter(configured(peft_type="IA3"), "peft_type is 'IA3'", "only LORA"),
    "changed base": adapter(configured(init_lora_weights="pissa"), "'pissa' changes the base"),
    "unknown tensor": adapter(
        replaced("layers.0.mystery", (4,)), "unknown tensor 'layers.0.mystery'", "save_pretrained"
    ),
    "unknown field": adapter(configured(use_warp=9), "unknown field 'use_warp' (9)", "to null"),
    "A without B": adapter(
        stored(lambda tensors: tensors.pop(f"{PREFIX}{V}.lora_B.weight")),
        "factor A but no B",
        module=V,
    ),
    "no modules": adapter(
        stored(
            lambda tensors: (tensors.clear(), tensors.update({"lm_head.weight": torch.ones(2, 8)}))
        ),
        "has no LoRA factors",
        "leave it out",
    ),
    "modules_to_save that differ": Case(
        lambda: (
            [
                make(
                    name, {"score.weight": torch.full((2, 8), float(i))}, modules_to_save=["score"]
                )
                for i, name in enumerate(SPOILT)
            ]
        ),
        AdapterError,
        ("adapter 'two': 'score.weight', saved whole, differs", "whole='from:NAME'", "'drop'"),
    ),
    "float16 overflow": Case(
        lambda: valued(V, 1e12, 1)(),
        DomergeError,
        (f"module '{V}': the merged update does not fit in float16", "dtype='float32'"),
        {"method": "linear", "dtype": "float16", "weights": [1.0, 3.0]},
    ),
    "float16 overflow when truncated": Case(
        lambda: valued(V, 1e14, 1)(),
        DomergeError,
        (f"module '{V}': the merged update does not fit in float16", "dtype='float32'"),
        {"method": "svd", "dtype": "float16"},
    ),
    "float16 underflow": Case(
        nothing,
        DomergeError,
        ("the merged update is too small for float16", "dtype='float32', or use a larger scale"),
        {"method": "linear", "dtype": "float16", "scale": 1e-20},
    ),
    "bfloat16 underflow": Case(
        nothing,
        DomergeError,
        ("the merged update is too small for bfloat16", "dtype='float32', or use a larger scale"),
        {"method": "do", "dtype": "bfloat16", "scale": 1e-90},
    ),
    "float32 underflow": Case(
        nothing,
        DomergeError,
        ("the merged update is too small for float32", "use a larger scale or weights"),
        {"method": "svd", "scale": 1e-100},
    ),
    "weights beyond factors": option(
        {"method": "linear", "weights": [1e308, 1e308]},
        "option 'weights': 1e+308 is beyond what float32 factors hold; give weights nearer to 1",
    ),
    "float32 overflow before it is truncated": Case(
        lambda: valued(V, 1e14, 1)(),
        DomergeError,
        (f"module '{V}': the merged update does not fit in float32", "use a smaller scale"),
        {"method": "svd", "scale": 1e70},
    ),
    "float32 overflow before a step": Case(
        lambda: valued(V, 1e14, 1)(),
        DomergeError,
        (f"module '{V}': the merged update does not fit in float32", "use a smaller scale"),
        {"method": "ties", "density": 1.0, "scale": 1e70, "post": ["subspace_boost"]},
    ),
    "method": option({"method": "linaer"}, "'linaer' is not known; did you mean 'linear'?"),
    "method of PEFT": option(
        {"method": "dare_svd"}, "not known; it is 'dare' here with a rank; use"
    ),
    "option of another method": option(
        {"method": "linear", "gamma": 2.0}, "option 'gamma': method 'linear' has no such option"
    ),
    "word": option(
        {"method": "do", "penalty": "square"}, "option 'penalty'", "did you mean 'squared'?"
    ),
    "side": option(
        {"method": "do", "sides": "C"}, "option 'sides': 'C' is not known; use one of: both, A, B"
    ),
    "negative gamma": option(
        {"method": "do", "gamma": -1.0}, "option 'gamma': -1.0 is too small; use at least 0"
    ),
    "NaN tol": option(
        {"method": "do", "tol": float("nan")}, "option 'tol': nan is not a finite number"
    ),
    "negative steps": option({"method": "do", "steps": -1}, "option 'steps': -1 is too small"),
    "rank 0": option({"rank": 0}, "option 'rank': 0 is too small; use at least 1"),
    "energy 2": option({"energy": 2.0}, "option 'energy': 2.0 is not a share; give one in (0, 1]"),
    "energy 0": option({"energy": 0.0}, "option 'energy': 0.0 is not a share"),
    "infinite scale": option({"scale": float("inf")}, "option 'scale': inf is not a finite number"),
    "zero weights": option({"weights": [0.0, -0.0]}, "option 'weights': all are zero; give"),
    "too few weights": option({"weights": [1.0]}, "1 weights for 2 adapters; give one number"),
    "too many weights": option({"weights": [1.0, 2.0, 3.0]}, "3 weights for 2 adapters"),
    "NaN weight": option({"weights": [1.0, float("nan")]}, "'weights': nan is not a finite number"),
    "backend": option({"backend": "torhc"}, "'torhc' is not known; did you mean 'torch'?"),
    "device": option({"device": "gpu"}, "torch cannot use 'gpu' here; use 'cpu', or 'cuda:0'"),
    "device without values": option({"device": "meta"}, "torch cannot use 'meta' here"),
    "dtype": option({"dtype": "bfloat"}, "'bfloat' is not known; did you mean 'bfloat16'?"),
    "existing output": output(existing, {}, "exists already; give another folder, or say over"),
    "other files": output(foreign, {"overwrite": True}, "other files (optimizer.pt); give another"),
    "output is an input": output(
        nothing, {"output": "one", "overwrite": True}, "is one of the adapters to merge"
    ),
    "output is a file": output(
        nothing, {"output": "one/adapter_config.json"}, "is a file; give a folder"
    ),
    "output below a file": output(
        nothing,
        {"output": "one/adapter_config.json/out"},
        "cannot be written (Not a directory); nothing was kept",
    ),
}


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a merge by the API and by the command line; both must refuse it with the same line."""

    def run(error: type[DomergeError], adapters: list[str] | None = None, **options: Any) -> str:
        adapters = adapters or ["one", "two"]
        options = {"output": "out", **options}
        with unchanged(tmp_path), pytest.raises(DomergeError) as caught:
            dm.merge(adapters, **options)
        assert type(caught.value) is error
        with unchanged(tmp_path):
            assert cli.main(["merge", *adapters, *flags(options)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err == f"domerge-fast: error: {caught.value}\n"
        assert len(printed.err.splitlines()) == 1
        problem, _, remedy = str(caught.value).rpartition("; ")
        assert problem
        assert remedy
        return str(caught.value)

    return run


def flags(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        yield f"--{name.replace('_', '-')}"
        if value is not True:
            yield from map(str, value if isinstance(value, list) else [value])


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused(case, refused):
    expected = CASES[case]
    expected.spoil()
    message = refused(expected.error, **expected.options)
    for fragment in expected.fragments:
        assert fragment in message


def test_all_of_these_start_from_adapters_that_merge():
    dm.merge(["one", "two"], output="out")
    assert cli.main(["merge", "one", "two", "-o", "out", "--overwrite", "--quiet"]) == 0


def test_a_mistyped_option_is_refused(tmp_path, capsys):
    with unchanged(tmp_path):
        with pytest.raises(OptionError) as caught:
            dm.merge(["one", "two"], "do", output="out", gama=2.0)
        assert str(caught.value).startswith(
            "option 'gama': method 'do' has no such option; did you mean 'gamma'? use one of: "
        )
        assert cli.main(["merge", "one", "two", "-o", "out", "--gama", "2"]) == 2
        assert "'--gama' is not understood, did you mean '--gamma'?" in capsys.readouterr().err


def test_a_backend_that_cannot_run_is_refused_not_replaced(refused, monkeypatch):
    broken = dataclasses.replace(registry.TABLE["cpu"], why_not=lambda: "it is not built")
    monkeypatch.setitem(registry.TABLE.own, "cpu", broken)
    assert "option 'backend': 'cpu' cannot be used here; it is not built" in refused(
        OptionError, backend="cpu"
    )
    monkeypatch.setenv(registry.ENVIRONMENT, "cpu")
    assert "'cpu' cannot be used here; it is not built" in refused(OptionError)
    monkeypatch.setenv(registry.ENVIRONMENT, "gpu")
    assert "'gpu' is not known; did you mean 'cpu'?" in refused(OptionError)


def test_a_full_disk_is_refused(refused, tmp_path):
    with small_disk(tmp_path / "disk", f"size={os.sysconf('SC_PAGE_SIZE')}"):
        message = refused(OutputError, output="disk/out")
    assert "disk/out': cannot be written (No space left on device); nothing was kept" in message
    assert message.endswith("; make room or choose another place")


def test_no_right_to_write_is_refused(capsys, monkeypatch):
    with locked_folder(0o555) as (pair, locked):
        with pytest.raises(OutputError) as caught:
            dm.merge(pair, output=locked / "out")
        assert cli.main(["merge", *map(str, pair), "-o", str(locked / "out")]) == 2
        assert os.listdir(locked) == []
    assert capsys.readouterr().err == f"domerge-fast: error: {caught.value}\n"
    assert "/locked/out': cannot be written (Permission denied); nothing was" in str(caught.value)


@pytest.mark.parametrize("method", ["do", "linear", "svd"])
@pytest.mark.parametrize("count", [2, 66], ids=["compared", "too many to compare"])
def test_no_method_lets_a_nan_through(count, method, refused):
    names = ["one"] * (count - 1) + ["two"]
    valued(V, float("nan"), 1)()
    message = refused(AdapterError, names, method=method)
    assert message.startswith(f"adapter 'two', module '{V}': NaN in lora_B; ")


def test_an_overflow_beside_the_diagonal_alone_is_no_factors_fault():
    plan = Plan.make([dm.load(name) for name in SPOILT], [1.0, 1.0])
    stacks = [plan.stack(name) for name in plan.names]
    grams_a, grams_b = grams(stacks, [True, True], "torch")
    grams_b[1][0, -1] = float("inf")
    alone = [group._Part(*row) for row in zip(stacks, [None, None], zip(grams_a, grams_b))]
    assert not any(group._unusual(alone, group._batches(alone)))
    own = [{0: (a.diagonal(), b.diagonal())} for a, b in zip(grams_a, grams_b)]
    parts = [part for x, row in zip(alone, own) for part in x.split(row)]
    group._check_finite(plan, parts)
    stacks[1].b.blocks[1][0, 0] = float("inf")
    grams_b[1][-1, -1] = float("inf")
    assert [*map(list, group._unusual(alone, group._batches(alone)))] == [[], [0]]
    with pytest.raises(AdapterError, match=f"'two', module '{V}': an infinite value in lora_B"):
        group._check_finite(plan, parts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inspect_refuses_what_it_cannot_measure(value, capsys):
    valued(V, value)()
    with pytest.raises(AdapterError, match=f"^adapter 'two', module '{V}': "):
        dm.inspect(["one", "two"])
    assert cli.main(["inspect", "one", "two"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"domerge-fast: error: adapter 'two', module '{V}': ")


TYPES = {
    "one adapter": ({"adapters": "one"}, "option 'adapters': is one adapter, not a list"),
    "one path": ({"adapters": Path("one")}, "put it in a list: [adapter]"),
    "half a rank": ({"rank": 2.5}, "option 'rank': 2.5 is not a whole number"),
    "rank True": ({"rank": True}, "option 'rank': True is not a whole number"),
    "rank as text": ({"rank": "2"}, "option 'rank': '2' is not a whole number"),
    "energy as text": ({"energy": "0.9"}, "option 'energy': '0.9' is not a finite number"),
    "gamma as text": ({"method": "do", "gamma": "1"}, "option 'gamma': '1' is not a finite number"),
    "half a step": ({"method": "do", "steps": 0.5}, "option 'steps': 0.5 is not a whole number"),
    "a number for a switch": (
        {"method": "do", "decouple": 0},
        "option 'decouple': 0 is not True or False",
    ),
    "no weight": ({"weights": [1, None]}, "option 'weights': None is not a finite number"),
    "scale True": ({"scale": True}, "option 'scale': True is not a finite number"),
    "a torch dtype": ({"dtype": torch.int8}, "option 'dtype': torch.int8 is not known"),
    "a method's number": ({"method": 3}, "option 'method': 3 is not known"),
}


@pytest.mark.parametrize("case", TYPES)
def test_options_of_the_wrong_type_are_refused(case, tmp_path):
    options, fragment = TYPES[case]
    with unchanged(tmp_path), pytest.raises(OptionError) as caught:
        dm.merge(**{"adapters": ["one", "two"], "output": "out", **options})
    assert fragment in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_nothing_to_merge_is_refused():
    for function in (dm.merge, dm.inspect):
        with pytest.raises(DomergeError, match=r"^no adapters given; give at least one$"):
            function([])


def test_stating_the_base_model_allows_what_was_refused():
    make("two", base_model_name_or_path="/models/base")
    merged = dm.merge(["one", "two"], base_model="base", output="out")
    assert merged.target.config["base_model_name_or_path"] == "base"
    assert cli.main(["merge", "one", "two", "-o", "again", "-q", "--base-model", "base"]) == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("weights", 3, "'3' is no list of numbers"),
        ("weights", "11", "'11' is no list of numbers"),
        ("weights", iter([1.0, 2.0]), "2 weights for 1 adapters"),
        ("output", 3, "'3' is no folder"),
        ("output", b"out", "is no folder"),
        ("overwrite", "no", "'no' is not True or False"),
        ("force", 1, "1 is not True or False"),
    ],
)
def test_arguments_of_another_type(option, value, message, tmp_path):
    """What is true in Python, but says no, replaces nothing."""
    adapter = dm.from_tensors({"x": (torch.ones(1, 3), torch.ones(2, 1))})
    given = {"output": tmp_path / "out"} | {option: value}
    with pytest.raises(dm.OptionError, match=message):
        dm.merge([adapter], **given)
    if option != "weights":
        with pytest.raises(dm.OptionError, match=message):
            dm.merge([adapter]).save(**given)
        given["folder"] = given.pop("output")
        with pytest.raises(dm.OptionError, match=message):
            dm.Sequential.start(**given)
    assert not (tmp_path / "out").exists()
