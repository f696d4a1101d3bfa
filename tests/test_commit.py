"""A fault at every step of putting an output in its place leaves the old or the new one, whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from io import FileIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.files import load_bytes, small_disk, state, unchanged
from support.make import random_factors, write_adapter, write_pair
from support.processes import forked

import domerge_fast as dm
from domerge_fast import OptionError, OutputError, OutputWarning, Sequential
from domerge_fast.cli import main as cli
from domerge_fast.cli.shared import Command
from domerge_fast.formats.model import write as model_output
from domerge_fast.storage import flush, stream, workplace
from domerge_fast.storage import folder as output_folder
from domerge_fast.storage.folder import whole_output
from domerge_fast.storage.replacing import Replacing

NAMES = ("one", "two")
STEPS = ("mkdir", "open", "fsync", "replace", "unlink", "rmdir", "listdir")
"""Of os: all that changes names or flushes. `_exchange` and flock are added to them."""

Step = tuple[str, str]


def write(target: Path, text: str, **replacing: bool) -> None:
    chosen = {"overwrite": True, "force": False, "file": is_file(target)} | replacing
    with whole_output(target, Replacing(**chosen, names=NAMES, is_ours=lambda _: True)) as fresh:
        for path in [fresh] if is_file(target) else [fresh / name for name in NAMES]:
            path.write_text(text)


def is_file(target: Path) -> bool:
    """Whether the output there is one file, not a folder."""
    return target.suffix == ".one"


def content(target: Path) -> str | None:
    """The text of a whole output; None if there is none."""
    if not target.exists():
        return None
    if is_file(target):
        return target.read_text()
    assert sorted(os.listdir(target)) == sorted(NAMES)
    one, two = ((target / name).read_text() for name in NAMES)
    assert one == two
    return one


@contextlib.contextmanager
def watched(meet: Callable[[int, Step, Callable[[], Any]], Any]) -> Iterator[None]:
    """Every step goes through meet(its number, (function, path), what does it)."""
    count = 0
    paths: dict[int, str] = {}

    def through(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            shown = paths.get(args[0], "") if isinstance(args[0], int) else str(args[0])

            def act() -> Any:
                result = function(*args, **kwargs)
                if name == "open":
                    paths[result] = shown
                return result

            return meet(count, (name, shown), act)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, through(name, getattr(os, name)))
        patch.setattr(fcntl, "flock", through("flock", fcntl.flock))
        patch.setattr(output_folder, "_exchange", through("exchange", output_folder._exchange))
        yield


KINDS = ("absent", "existing", "existing, renamed")


@pytest.fixture(params=[*KINDS, *(f"{kind}, one file" for kind in KINDS)])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target in a folder of its own, with an old output or without one; on a file system that
    exchanges names, or on one that does not."""
    target = tmp_path / ("place/out.one" if "one file" in request.param else "place/out")
    target.parent.mkdir()
    if "absent" not in request.param:
        write(target, "old")
    if "renamed" in request.param:
        monkeypatch.setattr(output_folder, "_exchange", lambda one, other: False)
    return target


def steps_of(target: Path) -> list[Step]:
    """What writing "new" does; the target is as before afterwards."""
    seen: list[Step] = []

    def note(number: int, step: Step, act: Callable[[], Any]) -> Any:
        seen.append(step)
        return act()

    before = content(target)
    with watched(note):
        write(target, "new")
    assert content(target) == "new"
    restore(target, before)
    return seen


def restore(target: Path, before: str | None) -> None:
    if before is None and is_file(target):
        target.unlink()
    elif before is None:
        for name in NAMES:
            (target / name).unlink()
        target.rmdir()
    else:
        write(target, before)


def hidden(target: Path) -> Path:
    return workplace.Workplace(target).folder


def left_beside(target: Path) -> list[str]:
    return [name for name in os.listdir(target.parent) if name != target.name]


def check_next_run(target: Path) -> None:
    """Whatever was left is gone after it."""
    write(target, "next")
    assert content(target) == "next"
    assert not left_beside(target)


def test_what_is_flushed_before_what(place):
    steps = steps_of(place)
    new = str(hidden(place) / "new")
    files = [f"{new}/{name}" for name in ([place.name] if is_file(place) else NAMES)]
    fresh = files[0] if is_file(place) else new
    fsyncs = [k for k, (name, path) in enumerate(steps) if name == "fsync"]
    moves = [
        k
        for k, (name, path) in enumerate(steps)
        if (name, path) in (("exchange", fresh), ("replace", fresh))
    ]
    before = {steps[k][1] for k in fsyncs if k < moves[0]}
    assert before >= {*files, new}
    last = max(fsyncs.index(k) for k in fsyncs if steps[k][1] in files)
    assert steps[fsyncs[last + 1]][1] == new
    removed = [
        k for k, (name, path) in enumerate(steps) if name == "unlink" and "/lock" not in path
    ]
    after = [steps[k][1] for k in fsyncs if k > moves[-1]]
    assert after == [str(place.parent), str(hidden(place))]
    at_once = is_file(place) and ("replace", fresh) in steps  # over the old one, which is gone
    assert len(removed) == (len(files) if content(place) and not at_once else 0)
    assert all(k > fsyncs[-1] for k in removed)


def test_folders_that_are_made_on_the_way_are_flushed_too(tmp_path):
    target = tmp_path / "new/deeper/out"
    seen = []

    def note(number: int, step: Step, act: Callable[[], Any]) -> Any:
        seen.append(step)
        return act()

    with watched(note):
        write(target, "new")
    moved = next(k for k, (name, _) in enumerate(seen) if name == "replace")
    flushed = {path for name, path in seen[:moved] if name == "fsync"}
    assert {str(tmp_path), str(tmp_path / "new"), str(target.parent)} <= flushed


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "from then on"])
def test_a_full_disk_at_any_step(for_ever, place):
    before = content(place)
    for k in range(1, len(steps_of(place)) + 1):

        def fail(number: int, step: Step, act: Callable[[], Any], k: int = k) -> Any:
            if number == k or (for_ever and number > k):
                raise OSError(errno.ENOSPC, "No space left on device")
            return act()

        with warnings.catch_warnings(record=True) as caught, watched(fail):
            warnings.simplefilter("always")
            try:
                write(place, "new")
                error = ""
            except OutputError as refusal:
                error = str(refusal)
        left = left_beside(place)
        told = " ".join([error, *(str(warning.message) for warning in caught)])
        if error:
            torn = content(place) is None and before is not None
            assert content(place) == before or (torn and "what was there is in" in error)
            assert "was written" not in told
            assert bool(left) == ("left in" in told or torn)
            assert ("nothing was kept" in error) <= (not left)
        else:
            assert content(place) == "new"
            assert bool(left) == ("was written, but" in told)
        assert all(name in told for name in left)
        check_next_run(place)
        restore(place, before)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_at_any_step(when, place):
    before = content(place)
    for k in range(1, len(steps_of(place)) + 1):

        def interrupt(number: int, step: Step, act: Callable[[], Any], k: int = k) -> Any:
            try:
                return act() if number != k or when == "after" else None
            finally:
                if number == k:
                    raise KeyboardInterrupt

        output_folder.last_written = None
        with watched(interrupt), pytest.raises(KeyboardInterrupt):
            write(place, "new")
        written = output_folder.last_written is not None
        assert content(place) == ("new" if written else before)
        assert not left_beside(place)
        check_next_run(place)
        restore(place, before)


def write_until_killed(target: Path, k: int, renames: bool, pipe: Connection) -> None:
    def kill(number: int, step: Step, act: Callable[[], Any]) -> Any:
        if number == k:
            os.kill(os.getpid(), signal.SIGKILL)
        return act()

    if renames:
        output_folder._exchange = lambda one, other: False
    with watched(kill):
        write(target, "new")


def test_a_kill_before_any_step_that_changes_something(place):
    before, renames = content(place), output_folder._exchange.__name__ == "<lambda>"
    found = set()
    for k, (name, _) in enumerate(steps_of(place), 1):
        if name in ("open", "fsync", "listdir"):
            continue
        process, _ = forked(write_until_killed, place, k, renames)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if content(place) is None and before is not None:
            output_folder.recover(place)  # between two renames
            assert content(place) == before
        found.add(content(place))
        assert found <= {before, "new"}
        check_next_run(place)
        restore(place, before)
    assert found == {before, "new"}


# One at a time


def write_slowly(target: Path, text: str, pipe: Connection) -> None:
    with whole_output(target, Replacing(True, False, NAMES, lambda _: True)) as fresh:
        pipe.send("there")
        time.sleep(0.3)
        for name in NAMES:
            (fresh / name).write_text(text)


def test_the_second_waits_for_the_first(tmp_path):
    process, pipe = forked(write_slowly, tmp_path / "out", "first")
    assert pipe.recv() == "there"
    write(tmp_path / "out", "second")
    process.join()
    assert process.exitcode == 0
    assert content(tmp_path / "out") == "second"
    assert os.listdir(tmp_path) == ["out"]


def test_the_second_does_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(workplace, "WAIT_SECONDS", 0.1)
    process, pipe = forked(write_slowly, tmp_path / "out", "first")
    assert pipe.recv() == "there"
    message = r"another process, which holds the lock '.domerge_fast-[0-9a-f]{16}/lock' beside it"
    with pytest.raises(OutputError, match=message):
        write(tmp_path / "out", "second")
    process.join()
    assert content(tmp_path / "out") == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_the_second_without_overwrite_comes_too_late(tmp_path):
    process, pipe = forked(write_slowly, tmp_path / "out", "first")
    assert pipe.recv() == "there"
    with pytest.raises(OutputError, match="exists already"):
        write(tmp_path / "out", "second", overwrite=False)
    process.join()
    assert content(tmp_path / "out") == "first"


def test_others_beside_it_do_not_wait(tmp_path):
    process, pipe = forked(write_slowly, tmp_path / "out", "first")
    assert pipe.recv() == "there"
    write(tmp_path / "other", "second")
    assert process.is_alive()
    process.join()
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def add_slowly(folder: Path, adapter: Path, pipe: Connection) -> None:
    swap = output_folder._swap

    def slow(fresh: Path, target: Path) -> None:
        time.sleep(0.3)
        swap(fresh, target)

    output_folder._swap = slow
    Sequential.open(folder).add(adapter)


def test_two_who_add_at_once_are_both_in(tmp_path):
    inputs = write_pair(tmp_path)
    Sequential.start(tmp_path / "state")
    running = [forked(add_slowly, tmp_path / "state", adapter)[0] for adapter in inputs]
    for process in running:
        process.join()
        assert process.exitcode == 0
    steps = Sequential.open(tmp_path / "state").state.steps
    assert {step.adapter for step in steps} == {str(adapter) for adapter in inputs}
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "state"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(number, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    message = rf"cannot lock files \({os.strerror(number)}\); choose another place"
    with unchanged(tmp_path), pytest.raises(OutputError, match=message):
        write(tmp_path / "new/out", "text")


# The hidden folder


@pytest.mark.parametrize("length", [1, 240, 255])
def test_names_of_any_length(length, tmp_path):
    target = tmp_path / ("x" * length)
    write(target, "old")
    write(target, "new")
    assert content(target) == "new"
    assert os.listdir(tmp_path) == [target.name]
    assert len(hidden(target).name) == 30


def test_names_of_any_bytes(tmp_path):
    target = tmp_path / os.fsdecode(b"\xff\xfe \n'")
    write(target, "new")
    assert content(target) == "new"


def test_modes_and_groups_are_those_of_a_plain_folder(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o2775)
    (tmp_path / "shared/plain").mkdir()
    write(tmp_path / "shared/out", "new")
    plain, out = ((tmp_path / "shared" / name).stat() for name in ("plain", "out"))
    assert (out.st_mode, out.st_gid) == (plain.st_mode, plain.st_gid)
    assert out.st_mode & stat.S_ISGID


def test_what_is_no_work_of_ours_is_not_swept(tmp_path):
    inner = hidden(tmp_path / "out") / "new/precious"
    inner.mkdir(parents=True)
    (inner / "text").write_text("mine")
    message = "beside it was left by a run that was stopped, and cannot be removed"
    with pytest.raises(OutputError, match=message):
        write(tmp_path / "out", "new")
    assert (inner / "text").read_text() == "mine"
    assert os.listdir(tmp_path) == [hidden(tmp_path / "out").name]


@pytest.mark.parametrize("kind", ["link", "theirs"])
def test_a_hidden_folder_of_others_is_not_used(kind, tmp_path):
    """In a folder that all may write to, somebody could swap what is written meanwhile."""
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o1777)
    folder = hidden(place / "out")
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with unchanged(tmp_path), pytest.raises(OutputError, match="beside it is somebody else's"):
        write(place / "out", "new")


def test_a_torn_state_is_put_back_on_opening(tmp_path):
    target = tmp_path / "state"
    Sequential.start(target, alpha=0.25)
    folder = hidden(target)
    folder.mkdir(0o700)
    target.rename(folder / "old")
    (folder / "new").mkdir()
    assert Sequential.open(target).state.alpha == 0.25
    assert os.listdir(tmp_path) == ["state"]


# After the commit


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old outputs cannot be removed."""
    unlink = os.unlink

    def fail(path: Any, *args: Any, **kwargs: Any) -> None:
        if "/new/" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", fail)


LEFT = r"was written, but what was there before is left in '.domerge_fast-[0-9a-f]{16}' beside it"


def test_an_old_output_that_cannot_be_removed_is_told(tmp_path, stuck, monkeypatch):
    inputs = write_pair(tmp_path)
    dm.merge(inputs, output=tmp_path / "out")
    with pytest.warns(OutputWarning, match=LEFT):
        dm.merge(inputs, output=tmp_path / "out", scale=2.0, overwrite=True)
    dm.merge(inputs, output=tmp_path / "expected", scale=2.0)
    assert load_bytes(tmp_path / "out") == load_bytes(tmp_path / "expected")
    monkeypatch.undo()
    dm.merge(inputs, output=tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "expected", "out"]


def test_the_command_line_tells_it_in_one_line(tmp_path, stuck, capsys):
    a, b = map(str, write_pair(tmp_path))
    assert cli.main(["sequential", "start", str(tmp_path / "state")]) == 0
    assert cli.main(["sequential", "add", str(tmp_path / "state"), a, b]) == 0
    told = capsys.readouterr().err
    assert told.startswith("domerge-fast: warning: output")
    assert told.count("\n") == 1
    assert len(Sequential.open(tmp_path / "state").state.steps) == 2


def test_an_old_output_that_cannot_be_looked_at_after_the_swap(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    swap, exists = output_folder._swap, Path.exists

    def fail(path: Path) -> bool:
        raise OSError(errno.EMFILE, "Too many open files")

    def swapped(fresh: Path, target: Path) -> None:
        swap(fresh, target)
        monkeypatch.setattr(Path, "exists", fail)

    monkeypatch.setattr(output_folder, "_swap", swapped)
    with pytest.warns(OutputWarning, match="was written, but .* cannot be removed"):
        write(tmp_path / "out", "new")
    monkeypatch.setattr(Path, "exists", exists)
    assert content(tmp_path / "out") == "new"
    assert content(hidden(tmp_path / "out") / "new") == "old"


def test_a_folder_that_cannot_be_flushed_after_the_swap(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    swap, sync = output_folder._swap, output_folder._sync

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def swapped(fresh: Path, target: Path) -> None:
        swap(fresh, target)
        monkeypatch.setattr(output_folder, "_sync", fail)

    monkeypatch.setattr(output_folder, "_swap", swapped)
    with pytest.warns(OutputWarning, match=LEFT):
        write(tmp_path / "out", "new")
    assert content(tmp_path / "out") == "new"
    assert content(hidden(tmp_path / "out") / "new") == "old"
    monkeypatch.setattr(output_folder, "_sync", sync)
    monkeypatch.setattr(output_folder, "_swap", swap)
    check_next_run(tmp_path / "out")


def test_what_others_put_there_at_the_last_moment_is_kept(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    swap = output_folder._swap

    def meanwhile(fresh: Path, target: Path) -> None:
        (target / "precious").write_text("mine")
        swap(fresh, target)

    monkeypatch.setattr(output_folder, "_swap", meanwhile)
    with pytest.warns(OutputWarning, match="what was there had changed: it is now 'replaced-"):
        write(tmp_path / "out", "new")
    assert content(tmp_path / "out") == "new"
    (kept,) = left_beside(tmp_path / "out")
    assert (tmp_path / kept / "precious").read_text() == "mine"


def test_an_old_output_that_cannot_be_looked_at_is_left_where_it_is(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    scan = os.scandir

    def fail(folder: Any) -> Any:
        if str(folder).endswith("/new"):
            raise OSError(errno.EIO, "Input/output error")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.warns(OutputWarning, match=LEFT + r".*\(Input/output error\)"):
        write(tmp_path / "out", "new")
    monkeypatch.undo()
    check_next_run(tmp_path / "out")


def test_an_interrupt_after_the_commit_says_so(tmp_path, monkeypatch, capsys):
    inputs = [str(folder) for folder in write_pair(tmp_path)]

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("domerge_fast.cli.streams.table", interrupt)
    assert cli.main(["merge", *inputs, "-o", str(tmp_path / "out")]) == cli.INTERRUPTED
    expected = f"domerge-fast: interrupted; {str(tmp_path / 'out')!r} was written\n"
    assert capsys.readouterr().err == expected
    monkeypatch.setattr("domerge_fast.api.run", interrupt)
    assert cli.main(["merge", *inputs, "-o", str(tmp_path / "out")]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "domerge-fast: interrupted; nothing was written\n"


@pytest.mark.parametrize("usual", [signal.SIG_IGN, signal.SIG_DFL], ids=["nohup", "usual"])
def test_a_hangup_that_is_ignored_stays_ignored(usual, monkeypatch, capsys):
    def hang_up(args: object) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    row = Command("doctor", "", lambda parser: None, hang_up)
    monkeypatch.setitem(cli.COMMANDS.own, "doctor", row)
    before = signal.signal(signal.SIGHUP, usual)
    try:
        ignored = usual == signal.SIG_IGN
        assert cli.main(["doctor"]) == (0 if ignored else cli.INTERRUPTED)
    finally:
        signal.signal(signal.SIGHUP, before)


# What may be replaced


def deltas(inputs: list[Path], out: Path, **replacing: bool) -> None:
    dm.merge(inputs, output=out, form="deltas", **replacing)


def adapter(inputs: list[Path], out: Path, **replacing: bool) -> None:
    dm.merge(inputs, output=out, **replacing)


def saved_adapter(inputs: list[Path], out: Path, **replacing: bool) -> None:
    dm.merge(inputs).save(out, **replacing)


def saved_deltas(inputs: list[Path], out: Path, **replacing: bool) -> None:
    dm.merge(inputs, form="deltas").save(out, **replacing)


def model(inputs: list[Path], out: Path, **replacing: bool) -> None:
    base = inputs[0].parent / "base"
    if not base.exists():
        base.mkdir()
        (base / "config.json").write_text('{"tie_word_embeddings": false}')
        weights = {f"{name}.weight": torch.ones(40, 48) for name in ("x", "y")}
        save_file(weights, base / "model.safetensors", {"format": "pt"})
    dm.merge(inputs, output=out, form="model", base=base, **replacing)


def started(inputs: list[Path], out: Path, **replacing: bool) -> None:
    Sequential.start(out, **replacing)


def grown(inputs: list[Path], out: Path, **replacing: bool) -> None:
    Sequential.start(out, **replacing).add_all(inputs)


def saved_state(inputs: list[Path], out: Path, **replacing: bool) -> None:
    folder = inputs[0].parent / "growing"
    if not folder.exists():
        Sequential.start(folder).add_all(inputs)
    Sequential.open(folder).save(out, **replacing)


FORMS = [adapter, saved_adapter, deltas, saved_deltas, model, started, grown, saved_state]


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    shapes = {"x": (40, 48), "y": (40, 48)}
    return [
        write_adapter(tmp_path / name, random_factors(shapes, 3, seed=k))
        for k, name in enumerate("ab")
    ]


def disown(out: Path) -> None:
    """Write the same files as another program would: trained further, say."""
    for path in out.glob("*.safetensors"):
        save_file(load_file(path), path, {"format": "pt"})
    for path in out.glob("session.json"):
        path.write_text("{}")


@pytest.mark.parametrize("form", FORMS)
def test_ours_is_replaced_with_overwrite_and_theirs_with_force(form, inputs, tmp_path):
    out = tmp_path / "out"
    form(inputs, out)
    with unchanged(tmp_path), pytest.raises(OutputError, match="exists already"):
        form(inputs, out)
    form(inputs, out, overwrite=True)
    form(inputs, out, force=True)
    disown(out)
    message = r"files that domerge_fast did not write; give another folder, or say force \(--force"
    with unchanged(tmp_path), pytest.raises(OutputError, match=message):
        form(inputs, out, overwrite=True)
    with unchanged(tmp_path), pytest.raises(OutputError, match="exists already"):
        form(inputs, out)
    form(inputs, out, force=True)
    form(inputs, out, overwrite=True)
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".", "replaced"))]


def put_folder(path: Path) -> None:
    path.mkdir()
    (path / "text").write_text("mine")


KINDS = {
    "folder": put_folder,
    "link": lambda path: path.symlink_to("/etc/hostname"),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_only_regular_files_are_replaced(form, kind, inputs, tmp_path):
    out = tmp_path / "out"
    form(inputs, out)
    name = "session.json" if form in (started, grown) else "README.md"
    (out / name).unlink()
    KINDS[kind](out / name)
    (out / "link").symlink_to("/etc/hostname")
    (out / "link").unlink()
    for how in ({"overwrite": True}, {"force": True}, {"overwrite": True, "force": True}):
        with unchanged(tmp_path), pytest.raises(OutputError, match=f"other files \\({name}\\)"):
            form(inputs, out, **how)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "x" * 256, "y/" * 2100 + "z"], ids=len)
@pytest.mark.parametrize("form", FORMS)
def test_places_that_cannot_be_named(form, name, inputs, tmp_path):
    with pytest.raises(OutputError) as caught:
        form(inputs, tmp_path / name)
    assert len(str(caught.value)) <= 300
    assert str(caught.value).isprintable()
    with pytest.raises((OutputError, OptionError)) as caught:
        Sequential.open(tmp_path / name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("form", FORMS)
def test_files_of_other_names_are_never_replaced(form, inputs, tmp_path):
    out = tmp_path / "out"
    form(inputs, out)
    (out / "optimizer.pt").write_text("theirs")
    with unchanged(tmp_path), pytest.raises(OutputError, match=r"other files \(optimizer.pt\)"):
        form(inputs, out, force=True)


def test_a_damaged_or_unmarked_file_among_ours_is_not_ours(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("domerge_fast.formats.deltas.SHARD_BYTES", 40 * 48 * 4)
    out = tmp_path / "out"
    deltas(inputs, out)
    first, last = sorted(out.glob("deltas-*.safetensors"))
    whole = last.read_bytes()
    for data in (b"", whole[:7], whole[:20], b"\xff" * 8, whole[:8] + b"[" * 999):
        last.write_bytes(data)
        with unchanged(tmp_path), pytest.raises(OutputError, match="did not write"):
            deltas(inputs, out, overwrite=True)
    last.write_bytes(whole)
    save_file(load_file(first), first, {"format": "pt"})
    with unchanged(tmp_path), pytest.raises(OutputError, match="did not write"):
        deltas(inputs, out, overwrite=True)
    first.unlink()
    last.unlink()
    with unchanged(tmp_path), pytest.raises(OutputError, match="did not write"):
        deltas(inputs, out, overwrite=True)


def test_inputs_are_not_replaced_under_any_name(inputs, tmp_path):
    adapter(inputs, tmp_path / "made")
    model(inputs, tmp_path / "made model")
    again = [tmp_path / "made", inputs[1]]
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in os.listdir(tmp_path / "made"):
        os.link(tmp_path / "made" / name, linked / name)
    around = tmp_path / "around"
    around.mkdir()
    (around / "one").symlink_to(tmp_path / "made")
    inner = write_adapter(around / "two", random_factors({"x": (40, 48)}, 2))
    for out, used, problem in (
        (linked, again, "holds one of the adapters to merge, or a file of it"),
        (around, [inner], "holds one of the adapters to merge, or a file of it"),
        (around / "one", again, "is one of the adapters to merge"),
    ):
        for form in (adapter, deltas):
            with unchanged(tmp_path), pytest.raises(OutputError, match=problem):
                form(used, out, force=True)
    weights = tmp_path / "base/model.safetensors"
    (tmp_path / "made model/model.safetensors").unlink()
    os.link(weights, tmp_path / "made model/model.safetensors")
    with unchanged(tmp_path), pytest.raises(OutputError, match="holds the base model's folder"):
        model(inputs, tmp_path / "made model", force=True)
    with unchanged(tmp_path), pytest.raises(OutputError, match="holds the base model's folder"):
        model(inputs, tmp_path, force=True)


def test_inputs_are_not_replaced_where_they_are_mounted_again(tmp_path):
    with small_disk(tmp_path / "disk", "size=9m") as disk:
        made = write_pair(disk)
        (disk / "again").mkdir()
        if os.system(f"mount --bind {made[0]} {disk / 'again'}"):
            pytest.skip("needs the right to mount a folder again")
        try:
            with unchanged(disk), pytest.raises(OutputError, match="is one of the adapters"):
                dm.merge(made, output=disk / "again", force=True)
        finally:
            os.system(f"umount {disk / 'again'}")


# Several at once


def test_several_are_added_in_one_commit(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("domerge_fast.engine.reader.GROUP_BYTES", 1)
    one = Sequential.start(tmp_path / "one")
    steps = [one.add(folder, weight) for folder, weight in zip(inputs, (1.0, -0.5))]
    swaps = []
    swap = output_folder._swap
    monkeypatch.setattr(output_folder, "_swap", lambda *x: (swaps.append(x), swap(*x)))
    both = Sequential.start(tmp_path / "both")
    assert both.add_all(inputs, [1.0, -0.5]) == steps
    assert len(swaps) == 2
    assert both.state == one.state == Sequential.open(tmp_path / "both").state
    for name in ("session.json", "session.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "both" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "both")) == ["session.json", "session.safetensors"]


def test_none_is_added_if_one_is_bad(inputs, tmp_path, capsys):
    growing = Sequential.start(tmp_path / "state")
    growing.add(inputs[0])
    factors = random_factors({"x": (40, 48)}, 2)
    factors["x"][0][0, 0] = float("nan")
    spoiled = write_adapter(tmp_path / "spoiled", factors)
    wide = write_adapter(tmp_path / "wide", random_factors({"x": (40, 49)}, 2))
    for bad in (spoiled, wide, tmp_path / "missing"):
        with unchanged(tmp_path):
            assert cli.main(
                ["sequential", "add", str(tmp_path / "state"), str(inputs[1]), str(bad)]
            )
            assert bad.name in capsys.readouterr().err
    assert len(growing.state.steps) == 1
    for given, weights in ((inputs, [1.0]), (inputs, [1.0, 0.0]), ([], None), (inputs[1], None)):
        with unchanged(tmp_path), pytest.raises(OptionError):
            growing.add_all(given, weights)


# The system calls below it


class Half(FileIO):
    """Every write takes half of what it is given."""

    def write(self, data: Any) -> int:
        return super().write(memoryview(data)[: max(1, len(data) // 2)])


@pytest.mark.parametrize("form", [adapter, deltas, model, grown])
def test_short_writes_make_the_same_bytes(form, inputs, tmp_path, monkeypatch):
    form(inputs, tmp_path / "expected")
    monkeypatch.setattr(stream, "FileIO", Half)
    monkeypatch.setattr(model_output, "FileIO", Half)
    form(inputs, tmp_path / "out")
    found, expected = state(tmp_path / "out"), state(tmp_path / "expected")
    for name in ("README.md",):  # holds the time it took
        assert (found.pop(name, None) is None) == (expected.pop(name, None) is None)
    assert found == expected


def test_the_disk_begins_before_the_end(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(flush, "STEP_BYTES", 1000)
    begin = flush.begin_flush
    monkeypatch.setattr(flush, "begin_flush", lambda file: begun.append((file.tell(), begin(file))))
    with FileIO(tmp_path / "file", "w") as file:
        for size in (400, 400, 400, 5000, 100):
            stream.write(file, b"x" * size)
    assert [end for end, _ in begun] == [1200, 6200]
    if sys.platform == "linux":
        assert all(done for _, done in begun)
    assert (tmp_path / "file").stat().st_size == 6300
