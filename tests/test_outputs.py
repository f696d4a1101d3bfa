"""The output appears whole or not at all, whatever happens, and inputs stay as they are."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.files import PAGE, load_bytes, locked_folder, small_disk, state, unchanged
from support.make import PAIR, PREFIX, random_factors, write_adapter, write_pair
from support.merges import at_one
from support.processes import forked

import domerge_fast as dm
from domerge_fast import AdapterError, DomergeError, OutputError
from domerge_fast.cli import main as cli
from domerge_fast.engine import reader
from domerge_fast.formats.peft.write import FILES
from domerge_fast.storage import folder as output_folder
from domerge_fast.storage.stream import SafetensorsWriter

CONFIG, WEIGHTS, CARD = FILES
LAST = "layers.3.q_proj"


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return write_pair(tmp_path)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module is a group of its own, as large modules are."""
    monkeypatch.setattr(reader, "GROUP_BYTES", 1)


def spoil_last(adapter: Path, value: float = float("nan")) -> None:
    """Put a value into the last module, which is merged when the others are written."""
    factors = random_factors(PAIR, 12, seed=1)
    factors[LAST][0][1, 2] = value
    write_adapter(adapter, factors)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"energy": 0.7},
        {"rank": 2, "dtype": "bfloat16"},
        {"method": "linear", "weights": [1.0, -0.5], "dtype": "float16"},
        {"method": "svd"},
    ],
    ids=str,
)
def test_streamed_and_saved_are_the_same_bytes(options, pair, small_groups, tmp_path):
    with unchanged(pair[0]), unchanged(pair[1]):
        merged = at_one(pair, **options)
        merged.save(tmp_path / "saved")
        streamed = at_one(pair, output=tmp_path / "streamed", **options)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "saved", "streamed"]
    assert sorted(os.listdir(tmp_path / "saved")) == sorted(FILES)
    for name in (CONFIG, WEIGHTS):
        written = (tmp_path / "saved" / name).read_bytes()
        assert written == (tmp_path / "streamed" / name).read_bytes()
    assert merged.names == streamed.names == tuple(sorted(PAIR))
    for name in merged.names:
        assert all(map(torch.equal, merged.factors(name), streamed.factors(name)))
        assert torch.equal(merged.delta(name), streamed.delta(name))


def test_a_streamed_merge_is_read_back_and_can_be_saved_elsewhere(pair, tmp_path):
    merged = at_one(pair, output=tmp_path / "out")
    shutil.rmtree(pair[1])
    merged.save(tmp_path / "copy")
    merged.save(tmp_path / "out", overwrite=True)
    assert load_bytes(tmp_path / "copy") == load_bytes(tmp_path / "out")
    with pytest.raises(dm.OptionError, match=r"'layers.0.q_pro'.*did you mean 'layers.0.q_proj'"):
        merged.factors("layers.0.q_pro")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_file_is_well_formed(dtype, tmp_path):
    folder = write_adapter(tmp_path / "a", random_factors(PAIR, 9, dtype=dtype))
    at_one([folder, folder], rank=1, output=tmp_path / "out")
    data = load_bytes(tmp_path / "out")
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = data[8 : 8 + length]
    assert header.startswith(b"{")
    assert header.endswith(b" ")
    table = json.loads(header)
    assert table.pop("__metadata__") == {"format": "pt", "domerge_fast": dm.__version__}
    position = 0
    for entry in table.values():
        assert entry["data_offsets"][0] == position
        position = entry["data_offsets"][1]
    assert len(data) == 8 + length + position
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert stored.keys() == table.keys()
    assert all(1 in tensor.shape and tensor.dtype == dtype for tensor in stored.values())


def test_the_writer_makes_files_that_safetensors_reads(tmp_path):
    tensors = {
        "half": torch.randn(3, 5).half(),
        "turned": torch.randn(7, 4).T,
        'quoted "näme"\n': torch.arange(6).reshape(2, 3),
        "number": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "bf16": torch.randn(5).bfloat16(),
    }
    largest = {k: (t.dtype, tuple(99 * size for size in t.shape)) for k, t in tensors.items()}
    with SafetensorsWriter(tmp_path / "file", largest) as writer:
        for key, tensor in tensors.items():
            writer.add(key, tensor)
    stored = load_file(tmp_path / "file")
    assert stored.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert stored[key].dtype == tensor.dtype
        assert torch.equal(stored[key], tensor)


def test_the_writer_never_writes_a_header_over_the_data(tmp_path):
    writer = SafetensorsWriter(tmp_path / "file", {"a": (torch.float32, (2, 3))})
    writer.add("a", torch.ones(2, 3))
    writer.add("a" * 20, torch.ones(2, 3))
    with pytest.raises(AssertionError, match="more tensors were added"):
        writer.__exit__(None, None, None)


def test_what_adapters_save_whole_is_carried_bit_by_bit(tmp_path):
    carried = {
        "score.weight": torch.tensor([[0.5, float("nan"), -0.0]]),
        "score.num_batches_tracked": torch.tensor(7),
        "score.flag": torch.tensor([True]),
        "score.bias": torch.randn(3).bfloat16(),
    }
    folders = [
        write_adapter(
            tmp_path / name,
            random_factors({"q": (5, 3)}, 1, seed=i, dtype=torch.bfloat16),
            carried=carried,
            modules_to_save=["score"],
        )
        for i, name in enumerate("ab")
    ]
    merged = at_one(folders, output=tmp_path / "streamed")
    merged.save(tmp_path / "saved")
    at_one(folders).save(tmp_path / "in memory")
    assert load_bytes(tmp_path / "streamed") == load_bytes(tmp_path / "saved")
    assert load_bytes(tmp_path / "streamed") == load_bytes(tmp_path / "in memory")
    stored = load_file(tmp_path / "streamed" / WEIGHTS)
    for key, tensor in carried.items():
        found = stored.pop(PREFIX + key)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert torch.equal(
            found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )
    assert set(stored) == {f"{PREFIX}q.lora_A.weight", f"{PREFIX}q.lora_B.weight"}
    assert json.loads((tmp_path / "streamed" / CONFIG).read_text())["modules_to_save"] == ["score"]


def test_the_card_says_how_to_repeat_the_merge(pair, tmp_path, monkeypatch):
    given = {"method": "do", "weights": [2.0, -1.0], "scale": 0.5, "gamma": 0.7, "energy": 0.8}
    at_one(pair, output=tmp_path / "out", **given)
    card = (tmp_path / "out" / CARD).read_text()
    assert card.startswith('---\nbase_model: "base"\n')
    recipe = json.loads(card.partition("```json\n")[2].partition("```")[0])
    assert {key: recipe[key] for key in given} == given
    assert [adapter["name"] for adapter in recipe["adapters"]] == [folder.name for folder in pair]
    found = dm.Recipe.read(tmp_path / "out" / CARD, pair[0].parent)
    dm.run(found, output=tmp_path / "again")
    assert load_bytes(tmp_path / "again") == load_bytes(tmp_path / "out")
    found = dm.inspect(pair)
    for value in (found.rows[0][1], found.columns[0][1], found.cosine[0][1]):
        assert f"| {value:.3f} |" in card


@pytest.mark.parametrize(("mask", "expected"), [(0o022, (0o755, 0o644)), (0o077, (0o700, 0o600))])
def test_modes_follow_the_umask(mask, expected, pair, tmp_path):
    before = os.umask(mask)
    try:
        at_one(pair, output=tmp_path / "out")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == expected[0]
    for name in FILES:
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == expected[1]


def test_an_existing_output_is_replaced_only_when_asked(pair, tmp_path):
    out = tmp_path / "out"
    at_one(pair, output=out)
    merged = at_one(pair, scale=2.0)
    with unchanged(tmp_path):
        for write in (lambda: at_one(pair, output=out), lambda: merged.save(out)):
            with pytest.raises(OutputError, match=r"'.*out': exists already; .*--overwrite"):
                write()
    (out / CARD).unlink()
    at_one(pair, scale=2.0, output=out, overwrite=True)
    assert sorted(os.listdir(out)) == sorted(FILES)
    merged.save(tmp_path / "saved")
    assert load_bytes(out) == load_bytes(tmp_path / "saved")
    at_one(pair).save(out, overwrite=True)
    assert load_bytes(out) != load_bytes(tmp_path / "saved")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "out", "saved"]


def test_an_empty_folder_is_filled_and_missing_parents_are_made(pair, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    at_one(pair, output=tmp_path / "empty")
    at_one(pair, output=str(tmp_path / "new/deeper/out"))
    monkeypatch.chdir(tmp_path)
    at_one(["a", "b"], output="relative")
    at_one(["a", "b"]).save("other/relative")
    for name in ("empty", "new/deeper/out", "relative", "other/relative"):
        assert sorted(os.listdir(tmp_path / name)) == sorted(FILES)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "empty", "new", "other", "relative"]


def test_a_link_stays_and_what_it_points_to_is_replaced(pair, tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk/real")
    for scale in (1.0, 2.0):
        at_one(pair, scale=scale, output=link, overwrite=True)
        assert link.readlink() == tmp_path / "disk/real"
        expected = at_one(pair, scale=scale, output=tmp_path / "expected", overwrite=True)
        assert load_bytes(tmp_path / "disk/real") == load_bytes(expected.path)
    assert os.listdir(tmp_path / "disk") == ["real"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "disk", "expected", "out"]


def test_folders_with_other_files_are_never_replaced(pair, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("model.safetensors", "notes.txt"):
        (out / name).write_text("mine")
    with unchanged(tmp_path):
        for overwrite in (False, True):
            message = r"other files \(model.safetensors, notes.txt\); give another folder"
            with pytest.raises(OutputError, match=message):
                at_one(pair, output=out, overwrite=overwrite)
            with pytest.raises(OutputError, match=message):
                at_one(pair).save(out, overwrite=overwrite)


def test_an_input_is_never_replaced(pair, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(pair[1])
    monkeypatch.chdir(pair[0])
    merged = at_one(pair)
    with unchanged(tmp_path):
        for out in (pair[0], tmp_path / "link", "../b", ".", tmp_path / "a/../b"):
            message = "is one of the adapters to merge; give another folder"
            with pytest.raises(OutputError, match=message):
                at_one(pair, output=out, overwrite=True)
            with pytest.raises(OutputError, match=message):
                merged.save(out, overwrite=True)


IMPOSSIBLE = {
    "a file": ("a/adapter_config.json", "is a file; give a folder that does not exist yet"),
    "below a file": ("a/adapter_config.json/x/out", "cannot be written (Not a directory)"),
    "not a real disk": ("/proc/none/out", "cannot be written (No such file or directory)"),
    "too long": ("x" * 300, "cannot be written (File name too long)"),
    "no name at all": ("a\0b", "is no path (it holds characters that no name can have); give"),
    "half a character": (
        "a\ud800b",
        "is no path (it holds characters that no name can have); give",
    ),
    "a link to itself": ("loop", "cannot be written"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_places_are_refused(case, pair, tmp_path):
    name, fragment = IMPOSSIBLE[case]
    (tmp_path / "loop").symlink_to("loop")
    with unchanged(tmp_path):
        for write in (
            lambda: at_one(pair, output=tmp_path / name),
            lambda: at_one(pair).save(tmp_path / name, overwrite=True),
        ):
            with pytest.raises(OutputError) as caught:
                write()
            assert fragment in str(caught.value)
            assert len(str(caught.value).splitlines()) == 1


def test_no_right_to_write():
    with locked_folder(0o555) as (adapters, locked):
        for out in (locked / "out", locked / "new/out"):
            with pytest.raises(OutputError, match=r"Permission denied\); nothing was kept; choose"):
                at_one(adapters, output=out)
        assert os.listdir(locked) == []


def test_no_right_to_look():
    with locked_folder(0o000) as (adapters, locked):
        for out in (locked / "out", locked):
            with pytest.raises(OutputError, match="Permission denied"):
                at_one(adapters, output=out, overwrite=True)


def pages(folder: Path) -> int:
    return sum(-(-path.stat().st_size // PAGE) for path in folder.iterdir())


def test_a_full_disk_at_any_point_leaves_nothing(pair, small_groups, tmp_path):
    at_one(pair, output=tmp_path / "roomy")
    needed = pages(tmp_path / "roomy")
    assert needed > 10
    for room in (1, 2, needed // 2, needed - 4, needed - 3, needed - 2, needed - 1):
        with small_disk(tmp_path / "disk", f"size={room * PAGE}") as disk:
            with pytest.raises(OutputError) as caught:
                at_one(pair, output=disk / "new/out")
            assert "(No space left on device); nothing was kept; make room" in str(caught.value)
            assert os.listdir(disk) == []
    with small_disk(tmp_path / "disk", f"size={needed * PAGE}") as disk:
        at_one(pair, output=disk / "out")
        with unchanged(disk), pytest.raises(OutputError, match="No space left"):
            at_one(pair, output=disk / "out", scale=2.0, overwrite=True)
        assert load_bytes(disk / "out") == load_bytes(tmp_path / "roomy")


def test_a_disk_without_room_for_one_more_file_leaves_nothing(pair, tmp_path):
    for inodes in range(1, 7):  # the disk's own folder, the hidden one, its lock, ours, three files
        with small_disk(tmp_path / "disk", f"nr_inodes={inodes}") as disk:
            with pytest.raises(OutputError, match="No space left on device"):
                at_one(pair, output=disk / "out")
            assert os.listdir(disk) == []
    with small_disk(tmp_path / "disk", "nr_inodes=7") as disk:
        at_one(pair, output=disk / "out")


def merge_with_little_room(adapters: list[Path], out: Path, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, PAGE))
    try:
        at_one(adapters, output=out)
    except OutputError as error:
        pipe.send(str(error))


def test_a_file_that_may_not_grow_leaves_nothing(pair, tmp_path):
    with unchanged(tmp_path):
        process, pipe = forked(merge_with_little_room, pair, tmp_path / "out")
        assert "cannot be written (File too large); nothing was kept" in pipe.recv()
        process.join()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_in_the_middle_leaves_nothing(overwrite, pair, small_groups, tmp_path):
    out = tmp_path / "new/out"
    if overwrite:
        at_one(pair, output=out)
    spoil_last(pair[0])
    seen = []
    with unchanged(tmp_path), pytest.raises(AdapterError, match=f"a', module '{LAST}': NaN"):
        at_one(
            pair,
            output=out,
            overwrite=overwrite,
            progress=lambda done, _: seen.append(sizes_of_partial(out)),
        )
    assert any(size > 0 for size in seen)


def sizes_of_partial(out: Path) -> int:
    return sum(path.stat().st_size for path in out.parent.glob(f".domerge_fast-*/new/{WEIGHTS}"))


def test_an_error_of_the_caller_leaves_nothing(pair, small_groups, tmp_path):
    def stop(done: int, total: int) -> None:
        assert total == len(PAIR)
        if done == 3:
            raise RuntimeError("enough")

    with unchanged(tmp_path), pytest.raises(RuntimeError, match=r"^enough$"):
        at_one(pair, output=tmp_path / "out", progress=stop)


def merge_until_told(
    adapters: list[Path], out: Path, moment: str, through_cli: bool, pipe: Connection
) -> None:
    """Merge with overwrite, and report and wait at a moment; exits as the command line does."""
    reader.GROUP_BYTES = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it

    def wait(*_: object, **__: object) -> None:
        pipe.send(sizes_of_partial(out))
        time.sleep(60)

    def progress(done: int, total: int) -> None:
        if moment == "merging" and done == total - 2:
            wait()

    if moment == "before the swap":
        output_folder._swap = wait
    if moment == "after the swap":
        output_folder.Writing.finish = wait
    if not through_cli:
        at_one(adapters, output=out, overwrite=True, scale=2.0, progress=progress)
        return
    cli.shared.shows_progress = lambda args: progress
    sys.stdout = sys.stderr = open(out.parent.parent / "printed", "w")  # noqa: SIM115
    sys.exit(cli.main(["merge", *map(str, adapters), "-o", str(out), "--overwrite"]))


@pytest.mark.parametrize("existing", [False, True], ids=["absent", "existing"])
@pytest.mark.parametrize("moment", ["merging", "before the swap"])
def test_a_kill_leaves_the_old_state(moment, existing, pair, tmp_path):
    out = tmp_path / "place/out"
    out.parent.mkdir()
    if existing:
        at_one(pair, output=out)
    with unchanged(pair[0]), unchanged(pair[1]):
        before = state(out)
        process, pipe = forked(merge_until_told, pair, out, moment, False)
        assert pipe.recv() > 0
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert state(out) == before
    assert out.exists() == existing
    left = [name for name in os.listdir(out.parent) if name != "out"]
    assert len(left) == 1
    assert left[0].startswith(".domerge_fast-")
    at_one(pair, output=out, overwrite=True)
    assert sorted(os.listdir(out)) == sorted(FILES)
    assert os.listdir(out.parent) == ["out"]


def test_a_kill_after_the_swap_leaves_the_new_state(pair, tmp_path):
    out = tmp_path / "place/out"
    at_one(pair, output=out)
    expected = at_one(pair, scale=2.0, output=tmp_path / "expected")
    process, pipe = forked(merge_until_told, pair, out, "after the swap", False)
    pipe.recv()
    process.kill()
    process.join()
    assert sorted(os.listdir(out)) == sorted(FILES)
    assert load_bytes(out) == load_bytes(expected.path)
    at_one(pair, output=out, overwrite=True)
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("existing", [False, True], ids=["absent", "existing"])
@pytest.mark.parametrize("moment", ["merging", "before the swap"])
@pytest.mark.parametrize(
    ("number", "through_cli"),
    [
        (signal.SIGINT, False),
        (signal.SIGINT, True),
        (signal.SIGTERM, True),
        (signal.SIGHUP, True),
    ],
    ids=["Ctrl-C", *(f"{name} on the command line" for name in ("Ctrl-C", "SIGTERM", "SIGHUP"))],
)
def test_an_interrupt_leaves_nothing(number, through_cli, moment, existing, pair, tmp_path):
    out = tmp_path / "place/out"
    out.parent.mkdir()
    if existing:
        at_one(pair, output=out)
    before = state(tmp_path)
    process, pipe = forked(merge_until_told, pair, out, moment, through_cli)
    assert pipe.recv() > 0
    os.kill(process.pid, number)
    process.join()
    if through_cli:
        assert process.exitcode == 130
        printed = tmp_path / "printed"
        assert printed.read_text() == "domerge-fast: interrupted; nothing was written\n"
        printed.unlink()
    assert process.exitcode != 0
    assert state(tmp_path) == before


def test_there_is_an_output_at_every_moment_of_replacing_it(pair, tmp_path):
    out = tmp_path / "out"
    versions = []
    for scale in (1.0, 2.0):
        merged = at_one(pair, scale=scale)
        merged.save(out, overwrite=True)
        versions.append((merged, load_bytes(out)))
    seen, done = set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(load_bytes(out))

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        for turn in range(40):
            versions[turn % 2][0].save(out, overwrite=True)
        done.set()
        reading.result()
    assert seen == {data for _, data in versions}


def test_without_an_exchange_of_names_the_old_output_is_put_back(pair, tmp_path, monkeypatch):
    out = tmp_path / "out"
    at_one(pair, output=out)
    monkeypatch.setattr(output_folder, "_exchange", lambda one, other: False)
    replace = os.replace

    def fail_to_place(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_to_place)
    with unchanged(tmp_path), pytest.raises(OutputError, match="Permission denied"):
        at_one(pair, scale=2.0, output=out, overwrite=True)
    monkeypatch.setattr(os, "replace", replace)
    expected = at_one(pair, scale=2.0, output=out, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "out"]
    expected.save(tmp_path / "expected")
    assert load_bytes(tmp_path / "expected") == load_bytes(out)


def test_adapters_that_change_under_a_merge_are_noticed(pair, small_groups, tmp_path):
    adapters = [dm.load(folder) for folder in pair]
    write_adapter(pair[1], random_factors(PAIR, 3, seed=5))
    with unchanged(tmp_path), pytest.raises(DomergeError, match="changed since it was loaded"):
        at_one(adapters, output=tmp_path / "out")


def test_files_that_appear_during_the_merge_are_not_replaced(tmp_path):
    adapter = dm.from_tensors({"x": (torch.randn(2, 5), torch.randn(4, 2))})
    out = tmp_path / "out"

    def somebody_else_writes(done: int, total: int) -> None:
        out.mkdir()
        (out / "precious.txt").write_text("mine")

    with pytest.raises(dm.OutputError, match="holds other files"):
        at_one([adapter], output=out, progress=somebody_else_writes)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "precious.txt"]
