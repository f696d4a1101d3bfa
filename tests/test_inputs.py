"""Inputs are read as they were when they were opened, or refused in one line."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.make import random_factors, write_adapter
from support.merges import at_one

import domerge_fast as dm
from domerge_fast.backends import layout
from domerge_fast.engine import group, reader
from domerge_fast.errors import AdapterError, DomergeError, OptionError
from domerge_fast.formats import load
from domerge_fast.methods.steps import POST, PRE
from domerge_fast.sessions.sequential import Sequential
from domerge_fast.storage import buffers, input_file
from domerge_fast.storage.gguf_file import GgufFile
from domerge_fast.storage.input_file import InputFile
from domerge_fast.storage.pickle_file import load as load_pickle
from domerge_fast.storage.safetensors_file import SafetensorsFile, read_group

NAMES = [f"layers.{i}.q_proj" for i in range(6)]
SHAPES = dict.fromkeys(NAMES, (24, 32))
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / f"in{i}", random_factors(SHAPES, 4, seed=i)) for i in (0, 1)]


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """One module a group."""
    monkeypatch.setattr(reader, "GROUP_BYTES", 1)


def after_groups(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Calls it whenever a group's factors were read and looked at."""
    counted = group._counted

    def acting(*arguments: Any) -> Any:
        found = counted(*arguments)
        act()
        return found

    monkeypatch.setattr(group, "_counted", acting)


def other(folder: Path) -> bytes:
    """Bytes of another adapter of the same size."""
    made = write_adapter(folder.parent / "other", random_factors(SHAPES, 4, seed=9))
    return (made / WEIGHTS).read_bytes()


def rewrite(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(other(folder))


def replace(folder: Path) -> None:
    (folder.parent / "new").write_bytes(other(folder))
    os.replace(folder.parent / "new", folder / WEIGHTS)


def keep_times(folder: Path) -> None:
    """Size and mtime stay, as `cp -p` and `rsync` leave them."""
    before = os.stat(folder / WEIGHTS)
    rewrite(folder)
    os.utime(folder / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_config(folder: Path) -> None:
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text.replace('"lora_alpha": 4', '"lora_alpha": 8'))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "rewritten": (rewrite, "changed since it was loaded"),
    "replaced": (replace, "changed since it was loaded"),
    "rewritten, times kept": (keep_times, "changed since it was loaded"),
    "shrunk": (lambda folder: os.truncate(folder / WEIGHTS, 900), "changed since it was loaded"),
    "grown": (lambda folder: os.truncate(folder / WEIGHTS, 10**6), "changed since it was loaded"),
    "gone": (lambda folder: (folder / WEIGHTS).unlink(), "changed since|cannot be read"),
    "config": (change_config, "adapter_config.json changed since it was loaded"),
}


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("method", ["do", "linear", "ties"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at", [1, len(NAMES)])
def test_an_input_that_changes_while_it_is_merged(change, method, at, pair, tmp_path, monkeypatch):
    spoil, fragment = CHANGES[change]
    calls = []

    def spoiling() -> None:
        calls.append(0)
        if len(calls) == at:
            spoil(pair[1])

    after_groups(monkeypatch, spoiling)
    with pytest.raises(AdapterError, match=fragment) as caught:
        at_one(pair, method, output=tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("change", ["shrunk", "rewritten"])
def test_factors_of_a_file_that_changes_while_they_are_read(change, pair, monkeypatch):
    adapter, fill = load(pair[0]), InputFile.fill

    def spoiling(self: InputFile, *arguments: Any) -> None:
        CHANGES[change][0](pair[0])
        fill(self, *arguments)

    monkeypatch.setattr(InputFile, "fill", spoiling)
    with pytest.raises(AdapterError, match="changed since it was loaded"):
        adapter.factors(NAMES[0])


@pytest.mark.parametrize("kind", [".safetensors", ".bin", ".gguf"])
def test_a_file_that_shrinks_while_it_is_opened(kind, tmp_path, monkeypatch):
    """What is left looks damaged in a way of its own for each format."""
    path = tmp_path / f"adapter_model{kind}"
    path.write_bytes(b"\xff" * 900)
    compare = InputFile._compare

    def spoiling(self: InputFile, found: os.stat_result) -> None:
        compare(self, found)
        os.truncate(path, 4)

    monkeypatch.setattr(InputFile, "_compare", spoiling)

    def refuse(problem: str, remedy: str) -> AdapterError:
        return AdapterError(path.name, None, problem, remedy)

    read: Callable[[], object] = {
        ".safetensors": lambda: SafetensorsFile(path, refuse).tensors(),
        ".bin": lambda: load_pickle(InputFile(path, refuse)),
        ".gguf": lambda: GgufFile(path, refuse).read_header(),
    }[kind]
    with pytest.raises(AdapterError, match="changed since it was loaded"):
        read()


def test_a_survey_of_an_input_that_changes(pair, monkeypatch):
    after_groups(monkeypatch, lambda: rewrite(pair[0]))
    with pytest.raises(AdapterError, match="changed since it was loaded"):
        dm.inspect(pair)


def test_factors_of_a_file_that_shrank(pair):
    adapter = load(pair[0])
    a, b = adapter.factors(NAMES[0])
    before = a.clone(), b.clone()
    os.truncate(pair[0] / WEIGHTS, 8)
    assert all(map(torch.equal, (a, b), before))
    with pytest.raises(AdapterError, match="changed since it was loaded"):
        adapter.factors(NAMES[0])


def test_a_running_sum_that_changes_is_noticed(pair, tmp_path, monkeypatch):
    growing = Sequential.start(tmp_path / "state")
    growing.add(pair[0])
    path = tmp_path / "state" / "session.safetensors"
    after_groups(monkeypatch, lambda: os.utime(path))
    state = (tmp_path / "state" / "session.json").read_bytes()
    with pytest.raises(AdapterError, match="changed since it was loaded"):
        growing.add(pair[1])
    assert (tmp_path / "state" / "session.json").read_bytes() == state


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOMEM, errno.ESTALE])
def test_a_read_that_fails(code, pair, tmp_path, monkeypatch):
    loaded = [load(folder) for folder in pair]

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(input_file.os, "preadv", fail)
    for merge in (
        lambda: loaded[0].factors(NAMES[0]),
        lambda: at_one(loaded),
        lambda: load(pair[0]),
    ):
        with pytest.raises(AdapterError, match=f"cannot be read .{os.strerror(code)}.; check"):
            merge()
    with pytest.raises(AdapterError):
        at_one(loaded, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_ends_under_the_reader(pair, monkeypatch):
    loaded = load(pair[0])
    monkeypatch.setattr(input_file.os, "preadv", lambda *_: 0)
    with pytest.raises(AdapterError, match="ends before its data does"):
        loaded.factors(NAMES[0])


@pytest.mark.parametrize("most", [1, 7, 100])
def test_reads_that_return_less_than_asked_for(most, pair, monkeypatch):
    whole = at_one(pair, "linear")
    read = os.preadv

    def short(file: int, parts: list[memoryview], start: int) -> int:
        joined, left = [], most
        for part in parts:
            joined.append(part[:left])
            left -= len(joined[-1])
        return read(file, [part for part in joined if part], start)

    monkeypatch.setattr(input_file.os, "preadv", short)
    monkeypatch.setattr(input_file, "_MOST_PARTS", 3)
    pieces = at_one(pair, "linear")
    for name in NAMES:
        assert all(map(torch.equal, pieces.factors(name), whole.factors(name)))


def test_too_many_open_files(pair, tmp_path, monkeypatch):
    loaded = [load(folder) for folder in pair]

    def fail(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(input_file.os, "open", fail)
    for merge in (lambda: at_one(loaded), lambda: load(pair[0])):
        with pytest.raises(AdapterError, match=r"cannot be read \(Too many open files\); check"):
            merge()


def test_a_library_needs_no_descriptor_for_each_adapter(tmp_path):
    factors = random_factors({"q": (4, 6)}, 2)
    folders = [write_adapter(tmp_path / f"{i}", factors) for i in range(40)]
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 16, limit[1]))
    try:
        merged = at_one(folders, "linear", output=tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    a, b = factors["q"]
    torch.testing.assert_close(merged.delta("q"), 40 * b @ a)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path)


SPECIAL = {"fifo": fifo, "folder": Path.mkdir, "loop": loop}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_what_is_no_file_is_refused_at_once(kind, name, pair):
    (pair[0] / name).unlink()
    SPECIAL[kind](pair[0] / name)
    with pytest.raises(AdapterError, match=f"has no {name}; "):
        load(pair[0])
    file = InputFile(pair[0] / name, lambda *line: DomergeError("; ".join(line)))
    with pytest.raises(DomergeError, match=r"is no regular file|cannot be read \(Too many levels"):
        file.read(100)


@pytest.mark.parametrize("path", ["x" * 5000, "x/" * 2500, "a\0b"], ids=["name", "path", "nul"])
def test_paths_that_cannot_be(path, pair):
    with pytest.raises(AdapterError) as caught:
        load(path)
    assert len(str(caught.value)) <= 300
    with pytest.raises(OptionError) as refused:
        at_one(pair, form="model", base=path, output=pair[0].parent / "out")
    assert len(str(refused.value)) <= 300


def test_a_folder_whose_name_is_no_utf8(pair, tmp_path):
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n"))
    os.rename(pair[0], strange)
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/out\xe9"))
    merged = at_one([strange, pair[1]], output=out)
    assert merged.report.adapters[0].endswith(r"caf\udce9\n")
    text = (out / "README.md").read_bytes().decode("utf-8")
    assert "udce9" in text
    again = at_one([out], "linear").delta(NAMES[0])
    torch.testing.assert_close(again, merged.delta(NAMES[0]))
    growing = Sequential.start(tmp_path / "state")
    growing.add(strange)
    assert Sequential.open(tmp_path / "state").state.steps[0].adapter == merged.report.adapters[0]


def test_a_text_that_no_file_can_hold_is_refused(pair):
    with pytest.raises(OptionError, match=r"'base_model': .* is no text"):
        at_one(pair, base_model="b\udce9")
    factors = random_factors({"q": (4, 6)}, 2)
    with pytest.raises(AdapterError, match="no file can hold"):
        dm.from_tensors({"q\udce9": factors["q"]})
    with pytest.raises(AdapterError, match="which is no name"):
        dm.from_tensors(factors, base_model="b\udce9")


def test_a_buffer_comes_back_when_the_last_tensor_is_gone(pair):
    adapter, pool = load(pair[0]), buffers.Buffers(1 << 20)
    wanted = [x for pair_of in adapter.stored.values() for x in pair_of]
    found = [buffers.as_tensor(x) for x in read_group(wanted, pool)]
    place = found[0].data_ptr()
    assert all(x.data_ptr() % buffers.ALIGNMENT == 0 for x in found)
    view = found[-1][1:, 1:]
    kept = view.clone()
    del found
    second = [buffers.as_tensor(x) for x in read_group(wanted, pool)]
    assert second[0].data_ptr() != place
    assert torch.equal(view, kept)
    del view, second
    assert len(pool._pieces._free) == 2
    for _ in range(3):
        read_group(wanted, pool)
    assert len(pool._pieces._free) == 2


def test_a_piece_is_used_again_for_what_fits_and_given_up_for_what_does_not():
    pool = buffers.Pieces()
    first, _ = pool.take(3 << 20)
    place, size = first.data_ptr(), len(first)
    assert size >= 3 << 20
    del first
    second, _ = pool.take(3 << 20)
    assert second.data_ptr() == place
    del second
    assert len(pool._free) == 1
    larger, _ = pool.take(size + 1)
    assert len(larger) > size
    assert not pool._free
    del larger
    tiny, _ = pool.take(1)
    assert len(tiny) == 1 << buffers.HUGE_BITS


METHODS = [name for name in dm.list_methods() if name not in ("slerp", "ctm")]
# Between two adapters; of a rank that may be more than it fills, with rows of zeros.
OPTIONS = {"robust": {"inner": "do"}, "iso_cts": {"rank": 4}}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory is spoilt the moment it is handed back; counts how often that was."""
    counted: list[int] = []
    hand_back = buffers.Pieces._hand_back

    def spoil(self: buffers.Pieces, memory) -> None:
        memory[:] = b"\xff" * len(memory)  # NaN in every dtype
        counted.append(len(memory))
        hand_back(self, memory)

    monkeypatch.setattr(buffers.Pieces, "_hand_back", spoil)
    monkeypatch.setattr(layout, "LARGE", 1)  # results of files lie in such memory, too
    return counted


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("method", METHODS)
def test_nothing_that_outlives_its_group_lies_in_a_buffer(method, poisoned, pair, tmp_path):
    inputs = {f"in{i}": random_factors(SHAPES, 4, seed=i) for i in (0, 1)}
    plain = [dm.from_tensors(x, name=name, base_model="base") for name, x in inputs.items()]
    expected = at_one(plain, method)
    kept = at_one(pair, method)
    at_one(pair, method, output=tmp_path / "out")
    written = load(tmp_path / "out")
    assert len(poisoned) >= 2 * len(NAMES)
    for name in NAMES:
        assert all(map(torch.equal, kept.factors(name), expected.factors(name)))
        assert all(map(torch.equal, written.factors(name), expected.factors(name)))


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("one", [True, False], ids=["one adapter", "two"])
@pytest.mark.parametrize(
    "options",
    [{"pre": [step], "method": "linear"} for step, row in PRE.items() if row.run]
    + [{"post": [step], "method": "do"} for step in ("svc", *POST)]
    + [{"method": "linear", "form": "deltas"}, {"method": "ties", "form": "deltas"}],
    ids=str,
)
def test_steps_and_dense_results_lie_in_no_buffer(options, one, poisoned, pair):
    sources = pair[: 1 if one else 2]
    plain = [
        dm.from_tensors(random_factors(SHAPES, 4, seed=i), base_model="base")
        for i in range(len(sources))
    ]
    expected, kept = at_one(plain, **options), at_one(sources, **options)
    assert poisoned
    for name in NAMES:
        assert torch.equal(kept.delta(name), expected.delta(name))


def base_folder(folder: Path) -> Path:
    folder.mkdir()
    weights = {f"{name}.weight": torch.ones(*SHAPES[name]) for name in NAMES}
    save_file(
        weights | {"norm.weight": torch.ones(3), "scalar": torch.tensor(2.0)},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text('{"tie_word_embeddings": false}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_base_that_changes_while_it_is_merged(name, pair, tmp_path, monkeypatch):
    base = base_folder(tmp_path / "base")
    after_groups(monkeypatch, lambda: os.utime(base / name))
    with pytest.raises(OptionError, match=f"{name} changed since it was loaded"):
        at_one(pair, form="model", base=base, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_is_copied_piece_by_piece(pair, tmp_path, monkeypatch):
    base = base_folder(tmp_path / "base")
    at_one(pair, form="model", base=base, output=tmp_path / "whole")
    monkeypatch.setattr("domerge_fast.storage.lazy.in_step.__defaults__", (64,))
    monkeypatch.setattr("domerge_fast.storage.lazy.pieces.__defaults__", (64,))
    monkeypatch.setattr("domerge_fast.formats.model.write.CHUNK_BYTES", 300)
    at_one(pair, form="model", base=base, output=tmp_path / "pieces")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "pieces"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_rows_are_read_alone(pair, monkeypatch):
    adapter = load(pair[0])
    a, _ = adapter.stored[NAMES[2]]
    whole, sizes = a.read(), []
    fill = InputFile.fill

    def counting(self: InputFile, file: int, runs) -> None:
        sizes.extend(len(part) for _, parts in runs for part in parts)
        fill(self, file, runs)

    monkeypatch.setattr(InputFile, "fill", counting)
    assert torch.equal(a.rows(1, 3), whole[1:3])
    assert sizes == [2 * 32 * 4]


def test_a_file_is_opened_once_for_a_group(pair, monkeypatch):
    loaded = [load(folder) for folder in pair]
    opened = []
    opening = InputFile.opened
    monkeypatch.setattr(InputFile, "opened", lambda self: (opened.append(self), opening(self))[1])
    calls, read = [], os.preadv
    monkeypatch.setattr(
        input_file.os, "preadv", lambda *arguments: (calls.append(0), read(*arguments))[1]
    )
    at_one(loaded, "linear")
    assert len(opened) == len(calls) == len(pair)


def test_adapters_of_files_are_merged_with_those_in_memory(pair):
    plain = [
        dm.from_tensors(random_factors(SHAPES, 4, seed=i), base_model="base", name=f"in{i}")
        for i in (0, 1)
    ]
    expected = at_one(plain)
    for mixed in ([pair[0], plain[1]], [plain[0], pair[1]]):
        found = at_one(mixed)
        for name in NAMES:
            assert all(map(torch.equal, found.factors(name), expected.factors(name)))
