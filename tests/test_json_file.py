"""Files from outside: JSON is read strictly and within bounds, headers as the format has them."""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from support.make import random_factors, write_adapter
from support.timing import least

import domerge_fast as dm
from domerge_fast.errors import MOST, AdapterError, DomergeError, OptionError, OutputError
from domerge_fast.formats import load
from domerge_fast.sessions.disk import STATE
from domerge_fast.sessions.sequential import Sequential
from domerge_fast.storage import json_file
from domerge_fast.storage.safetensors_file import SafetensorsFile

DEEP = b"[" * 100_000
BAD = {
    "nothing": (b"", "Expecting value"),
    "byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "UTF-16": ("{}".encode("utf-16"), "not UTF-8"),
    "UTF-16 without a mark": ('{"a": 1}'.encode("utf-16-le"), "Expecting"),
    "UTF-32": ('{"a": 1}'.encode("utf-32-be"), "Expecting"),
    "Latin-1": (b'{"a": "\xe9"}', "not UTF-8"),
    "NaN": (b'{"a": NaN}', "NaN is no number"),
    "Infinity": (b'{"a": [-Infinity]}', "-Infinity is no number"),
    "a number that is infinite": (b'{"a": 1e999}', "too large for a number"),
    "too many digits": (b'{"a": ' + b"9" * 10_000 + b"}", "digits"),
    "twice": (b'{"a": 1, "a": 1}', "occurs twice"),
    "twice inside": (b'{"a": {"b": 1, "b": 2}}', "occurs twice"),
    "half a pair": (rb'{"a": "\ud83d"}', "half of a surrogate pair"),
    "half a pair in a key": (rb'{"\uDE00": 1}', "half of a surrogate pair"),
    "control character": (b'{"a": "\n"}', "Invalid control character"),
    "trailing": (b"{} x", "Extra data"),
    "deep": (DEEP, "nested deeper"),
    "deep and closed": (DEEP + b"]" * len(DEEP), "nested deeper"),
    "deep objects": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested deeper"),
    "deep behind a text": (rb'["\"[", "\\",' + DEEP, "nested deeper"),
    "unbalanced": (b"]" * 100_000, "nested deeper"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_strict_json_is_refused(case):
    data, fragment = BAD[case]
    with pytest.raises(json_file.BadJson, match=fragment):
        json_file.parse(data)


def test_depth_does_not_depend_on_the_recursion_limit():
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)
    try:
        with pytest.raises(json_file.BadJson, match="nested deeper"):
            json_file.parse(DEEP + b"]" * len(DEEP))
    finally:
        sys.setrecursionlimit(limit)


GOOD = [
    {},
    {"a": [1, -2.5, 1e-300, True, None, 'é😀\\"[{'], "b": {"[": "]]]]", "": -0.0}},
    ["\\", "\\\\", '"', "[" * 500, "\\" * 500],
    json.loads("[" * 90 + "]" * 90),
    [[]] * 1000,
    10**300,
]


@pytest.mark.parametrize("ascii", [True, False])
def test_strict_json_is_read(ascii):
    for value in GOOD:
        assert json_file.parse(json.dumps(value, ensure_ascii=ascii).encode()) == value


SPARSE = 1 << 40


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_of_a_terabyte_is_refused_by_its_size(name, tmp_path):
    folder = write_adapter(tmp_path, random_factors({"q": (4, 6)}, 2))
    os.truncate(folder / name, SPARSE)

    def seconds() -> float:
        started = time.process_time()
        with pytest.raises(AdapterError, match=rf"{SPARSE} bytes|bytes no tensor owns"):
            load(folder)
        return time.process_time() - started

    assert least(seconds, 1) <= 1


def config(folder: Path, text: bytes) -> str:
    (folder / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdapterError) as caught:
        load(folder)
    return str(caught.value)


def base(folder: Path, text: bytes) -> str:
    (folder / "model").mkdir(exist_ok=True)
    save_file({"q.weight": torch.ones(4, 6)}, folder / "model/model.safetensors")
    (folder / "model/config.json").write_bytes(text)
    with pytest.raises(OptionError) as caught:
        dm.merge([folder], form="model", base=folder / "model", output=folder / "out")
    return str(caught.value)


def index(folder: Path, text: bytes) -> str:
    (folder / "sharded").mkdir(exist_ok=True)
    (folder / "sharded/config.json").write_text("{}")
    (folder / "sharded/model.safetensors.index.json").write_bytes(text)
    with pytest.raises(OptionError) as caught:
        dm.merge([folder], form="model", base=folder / "sharded", output=folder / "out")
    return str(caught.value)


def state(folder: Path, text: bytes) -> str:
    Sequential.start(folder / "state", overwrite=True, force=True)
    (folder / "state" / STATE).write_bytes(text)
    with pytest.raises(OptionError) as caught:
        Sequential.open(folder / "state")
    return str(caught.value)


@pytest.mark.parametrize("reader", [config, base, index, state])
def test_every_file_goes_through_it(reader, tmp_path):
    folder = write_adapter(tmp_path, random_factors({"q": (4, 6)}, 2))
    for data, fragment in BAD.values():
        message = reader(folder, data)
        assert "is not valid JSON" in message
        assert len(message) <= MOST
        assert len(message.splitlines()) == 1
        assert fragment in message
        write_adapter(tmp_path, random_factors({"q": (4, 6)}, 2))
    assert "is not a JSON object" in reader(folder, b"[1]")


@pytest.mark.parametrize("text", ["[]", "1", '"x"', "null", "{}", '{"tie_word_embeddings": null}'])
def test_text_config_may_be_anything(text, tmp_path):
    folder = write_adapter(tmp_path, random_factors({"q": (4, 6)}, 2))
    (folder / "model").mkdir()
    save_file({"q.weight": torch.ones(4, 6)}, folder / "model/model.safetensors")
    (folder / "model/config.json").write_text(f'{{"text_config": {text}}}')
    dm.merge([folder], form="model", base=folder / "model", output=tmp_path / "out")
    assert "tie_word_embeddings='yes'" in base(folder, b'{"tie_word_embeddings": "yes"}')


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def accepts(path: Path) -> bool:
    try:
        tensors = SafetensorsFile(path, lambda *line: DomergeError("; ".join(line))).tensors()
    except DomergeError:
        return False
    return all(x.read() is not None for x in tensors.values())


def library_accepts(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return all(file.get_tensor(key) is not None for key in file.keys())  # noqa: SIM118
    except (SafetensorError, TypeError, RuntimeError, ValueError, OverflowError):
        return False


def tensors() -> dict[str, torch.Tensor]:
    kinds = torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8
    return {f"t.{i}": torch.ones(i + 1, 3).to(dtype) for i, dtype in enumerate(kinds)}


ODD = [
    None,
    True,
    "",
    "x",
    -1,
    0,
    1.5,
    2**31,
    2**63,
    2**64,
    10**30,
    [],
    {},
    [[]],
    "F32",
    "f32",
    -0.0,
]
TEXTS = [
    "NaN",
    "-0",
    "1e0",
    "1.0",
    "01",
    "+1",
    "0x1",
    "1e999",
    '"\\ud800"',
    "'a'",
    "{}",
    "[0]",
    "//",
]


def odd_shape(header: dict[str, Any], key: str, rng: random.Random) -> None:
    sizes = [0, 1, 3, 2**31, 2**62, 2**63 - 1, 2**63, 2**64]
    header[key]["shape"] = [rng.choice(sizes) for _ in range(rng.randint(0, 4))]
    if 0 in header[key]["shape"]:
        begin = header[key]["data_offsets"][0]
        header[key]["data_offsets"] = [begin, begin]


def mutant(header: dict[str, Any], rng: random.Random) -> bytes:
    """The header with something changed, as bytes."""
    key = rng.choice([k for k in header if k != "__metadata__"])
    entry, text = header[key], None
    kind = rng.randrange(12)
    if kind == 0:
        entry[rng.choice(list(entry))] = rng.choice(ODD)
    elif kind == 1:
        entry[rng.choice(["shape", "data_offsets"])][0] = rng.choice(ODD)
    elif kind == 2:
        entry["data_offsets"] = [x + rng.choice([-1, 0, 1, 8]) for x in entry["data_offsets"]]
    elif kind == 3:
        header["__metadata__"] = rng.choice([*ODD, {"a": 1}, {"a": None}, {"a": "b"}, {"a": ["b"]}])
    elif kind == 4:
        del entry[rng.choice(list(entry))]
    elif kind == 5:
        odd_shape(header, key, rng)
    elif kind == 6:
        header[rng.choice(["", "é", "new", "\0"])] = rng.choice([*ODD, entry])
    elif kind == 7:
        entry["extra"] = rng.choice([*ODD, json.loads("[" * 60 + "]" * 60)])
    elif kind == 8:
        text = json.dumps(header).replace("3", rng.choice(TEXTS), 1)
    elif kind == 9:
        lead, tail = (rng.choice(["", " ", "\n", "\0", "\ufeff", "x", "{}"]) for _ in range(2))
        text = lead + json.dumps(header) + tail
    elif kind == 10:
        codec = rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1"])
        header["é"] = header.pop(key)
        return json.dumps(header, ensure_ascii=False).encode(codec)
    else:
        data = bytearray(json.dumps(header).encode())
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.choice([*b'{}[]",:0 9-\\\0', rng.randrange(256)])
        return bytes(data)
    return (json.dumps(header) if text is None else text).encode()


def test_no_header_is_accepted_that_the_library_refuses(tmp_path):
    path, rng = tmp_path / "x.safetensors", random.Random(0)
    save_file(tensors(), path, metadata={"format": "pt"})
    header, data = header_of(path)
    verdicts = []
    for _ in range(3000):
        write(path, changed := mutant(json.loads(json.dumps(header)), rng), data)
        verdicts.append((accepts(path), library_accepts(path)))
        assert verdicts[-1] != (True, False), changed
    assert verdicts.count((True, True)) > 100
    assert verdicts.count((False, False)) > 1000


def test_whatever_the_library_writes_is_accepted(tmp_path):
    path = tmp_path / "x.safetensors"
    for metadata in (None, {}, {"format": "pt", "é": "😀\n"}):
        found = tensors() | {
            "none": torch.ones(0, 7),
            "scalar": torch.tensor(2.0),
            "é\n": torch.ones(1),
        }
        save_file(found, path, metadata=metadata)
        read = SafetensorsFile(path, lambda *line: DomergeError("; ".join(line))).tensors()
        assert all(torch.equal(read[key].read(), x) for key, x in found.items())
    save_file({}, path)
    assert accepts(path)


BAD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, -5, 2**63, 10**400, 0.0, 1.5, -0.1, 1e300, -1e300, "", "x", "1",
    "int8", "float32", "float64", [], [1], [None], [[]], ["x"], {}, {"a": 1}, {"a": None}, [{}],
    [{"adapter": "a"}], "\n", "é", "x" * 1000, [1e9], {"": ""}, -2**63, 1e-300, 3, 0.5, 7.0,
]  # fmt: skip
STATED = ("nan", "inf", "-inf")


def fitting(field: str, value: Any) -> bool:
    """Whether a value of a field of the state, or of its step, is one."""
    number = type(value) in (int, float) and abs(value) <= sys.float_info.max
    return {
        "format": value == 1 and type(value) is int,
        "alpha": number and 0 <= value <= 1,
        "rank": value is None or (number and value >= 1 and value == int(value)),
        "base_model": value is None or isinstance(value, str),
        "dtype": value in ("float32", "float16", "bfloat16"),
        "norm": number and value >= 0,
        "config": False,  # none of the values is PEFT's
        "steps": False,
        "versions": isinstance(value, dict),
        "steps[0].adapter": isinstance(value, str) and value != "",
        "steps[0].weight": number and value != 0,
        "steps[0].norm": number and value >= 0,
        "steps[0].energy_kept": number and 0 <= value <= 1,
        "steps[0].notes": value in ([], ["x"]),
        "whole": value in ("auto", "drop"),
    }[field]


FIELDS = [
    *("format", "alpha", "rank", "base_model", "dtype", "norm", "config", "steps", "versions"),
    "whole",
    *(f"steps[0].{name}" for name in ("adapter", "weight", "norm", "energy_kept", "notes")),
]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sequential")
    one = write_adapter(folder / "one", random_factors({"q": (4, 6)}, 2))
    growing = Sequential.start(folder / "state")
    growing.add(one)
    return folder


@pytest.mark.parametrize("field", FIELDS)
def test_a_state_with_a_wrong_value_is_refused(field, started):
    path = started / "state" / STATE
    good = path.read_text()
    try:
        for value in BAD_VALUES:
            plain = json.loads(good)
            where, name = (plain, field) if "." not in field else (plain["steps"][0], field[9:])
            where[name] = value
            path.write_text(json.dumps(plain))
            check_state(started, field, fits=fitting(field, value))
        for word in ("NaN", "Infinity", "-Infinity", "1e999"):
            where[name] = "*"
            path.write_text(json.dumps(plain).replace('"*"', word))
            check_state(started, field, fits=False)
        del where[name]
        path.write_text(json.dumps(plain))
        check_state(started, field, fits=False)
    finally:
        path.write_text(good)


def refusal(use: Callable[[], object]) -> str | None:
    """What is said of it, in one line; None if nothing is."""
    try:
        use()
    except DomergeError as error:
        return str(error)
    return None


def check_state(folder: Path, field: str, *, fits: bool) -> None:
    """By whatever uses the state first. Values that fit may be refused, too, where they cannot be
    of this sum."""
    message = refusal(lambda: Sequential.open(folder / "state").merged())
    assert fits or message
    if message:
        assert len(message) <= MOST
        assert len(message.splitlines()) == 1
    if message and not fits:
        assert field.rpartition(".")[2] in message or field == "config" or "number" in message
        assert "state'" in message


CONFIG_FIELDS = {
    "base_model_name_or_path": str,
    "revision": str,
    "task_type": str,
    "peft_version": str,
    "fan_in_fan_out": bool,
    "use_rslora": bool,
    "auto_mapping": dict,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "layer_replication": list,
    "modules_to_save": list,
    "r": int,
}


@pytest.mark.parametrize("field", CONFIG_FIELDS)
def test_a_config_with_a_wrong_value_is_refused(field, tmp_path):
    factors = random_factors({"q": (4, 6)}, 2)
    for value in BAD_VALUES:
        folder = write_adapter(tmp_path / "a", factors, **{field: value})
        if message := refusal(lambda folder=folder: load(folder)):
            assert field in message or "rank" in message
            assert len(message) <= MOST
            continue
        assert value is None or type(value) is CONFIG_FIELDS[field]
        dm.merge([folder], output=tmp_path / "out", overwrite=True)
        json_file.parse((tmp_path / "out/adapter_config.json").read_bytes())


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"layers_pattern": "layers"}, "layers_pattern without layers_to_transform"),
        ({"layers_pattern": ["layers"]}, "layers_pattern without layers_to_transform"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, "beside a regular expression"),
        ({"layer_replication": [[0, 1], [2]]}, "layer_replication"),
        ({"layer_replication": [[0, 1.5]]}, "layer_replication"),
        ({"layer_replication": [[0, True]]}, "layer_replication"),
        ({"layers_to_transform": [0, "1"]}, "layers_to_transform"),
        ({"layers_to_transform": True}, "layers_to_transform"),
        ({"target_modules": ["q", 1]}, "target_modules"),
        ({"exclude_modules": [None]}, "exclude_modules"),
        ({"auto_mapping": {"a": [1]}}, "auto_mapping"),
        ({"use_rslora": []}, "use_rslora"),
        ({"rank_pattern": []}, "rank_pattern"),
        ({"alpha_pattern": ""}, "alpha_pattern"),
        ({"init_lora_weights": 1}, "init_lora_weights"),
    ],
)
def test_what_peft_would_not_take(changes, fragment, tmp_path):
    with pytest.raises(AdapterError, match=fragment):
        load(write_adapter(tmp_path, random_factors({"q": (4, 6)}, 2), **changes))


def test_a_live_config_that_is_no_json_is_refused():
    config = SimpleNamespace(to_dict=lambda: {"r": math.nan})
    with pytest.raises(AdapterError, match=r"cannot be written as JSON \(NaN is no number"):
        dm.from_model(SimpleNamespace(peft_config={"default": config}))


LONG = ["x" * 5000, "/very/long/path" * 400, "word " * 2000, "a\nb\0\x1b[31m\u202e\udce9" * 200]


@pytest.mark.parametrize("long", LONG, ids=["word", "path", "words", "control"])
def test_a_message_is_one_printable_line_of_300_characters(long):
    for error in (
        AdapterError(long, long, "is wrong", "mend it"),
        AdapterError("a", "m", f"stores {long!r} wrongly", "mend it"),
        AdapterError("a", "m", "is wrong", long),
        OptionError(long, long, long),
        OutputError(long, "exists", "give another"),
        DomergeError(f"module {long!r}: is wrong; mend it"),
        DomergeError(long),
    ):
        text = str(error)
        assert len(text) <= MOST
        assert text.isprintable()
        assert "…" in text
        text.encode()
    assert str(AdapterError(long, None, "is wrong", "mend it")).endswith("is wrong; mend it")
    assert "is wrong; mend it" in str(DomergeError(f"module {'x' * 5000!r}: is wrong; mend it"))


def test_short_messages_stay_as_they_are():
    assert str(AdapterError("a b", "m", "is wrong", "mend it")) == (
        "adapter 'a b', module 'm': is wrong; mend it"
    )
