"""The header of a GGUF file, read by hand, beside the package gguf; and what is damaged."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from domerge_fast.errors import DomergeError
from domerge_fast.storage.gguf_file import GgufFile


def test_our_reader_sees_what_gguf_s_own_does(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_bool("b", True)
    writer.add_uint64("n", 2**63)
    writer.add_float64("f", -1.5)
    writer.add_array("texts", ["a", "ü"])
    writer.add_array("numbers", [1, -2, 3])
    for k, shape in enumerate([(3,), (2, 5), (2, 3, 4)]):
        writer.add_tensor(f"t{k}", np.random.default_rng(k).random(shape, np.float32))
    writer.add_tensor("half", np.ones((2, 3), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, reader = GgufFile(tmp_path / "x.gguf", refuse), gguf.GGUFReader(tmp_path / "x.gguf")
    file.read_header()
    theirs = {k: x.contents() for k, x in reader.fields.items() if not k.startswith("GGUF.")}
    ours = {k: list(x) if isinstance(x, tuple) else x for k, x in file.metadata.items()}
    assert ours == theirs
    found = file.tensors()
    assert [*found] == [x.name for x in reader.tensors]
    for tensor in reader.tensors:
        x = found[tensor.name]
        assert torch.equal(x.read(), torch.tensor(np.array(tensor.data)))
        assert torch.equal(x.rows(1, 2), x.read()[1:2])


def refuse(problem: str, remedy: str) -> DomergeError:
    return DomergeError(f"{problem}; {remedy}")


def header(tensors: int = 0, pairs: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, pairs) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


DAMAGED = {
    "is no GGUF file": b"GGML" + bytes(40),
    "has the version 1,": header(version=1),
    "another order of bytes": struct.pack(">4sIQQ", b"GGUF", 3, 0, 0),
    "is truncated": header(0, 1),
    "more than it has room for": header(2**60),
    "too long to be real": header(0, 1, struct.pack("<Q", 2**62) + bytes(30)),
    "not UTF-8": header(0, 1, text(b"\xff") + struct.pack("<IB", 0, 1)),
    "says 'a' twice": header(0, 2, 2 * (text(b"a") + struct.pack("<IB", 0, 1))),
    "unknown type 99": header(0, 1, text(b"a") + struct.pack("<IQ", 99, 1)),
    "array of arrays": header(0, 1, text(b"a") + struct.pack("<IIQ", 9, 9, 1) + bytes(20)),
    "too long a one": header(0, 1, text(b"a") + struct.pack("<IIQ", 9, 4, 2**61) + bytes(20)),
    "the alignment 7": header(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 7)),
    "0 dimensions": header(1, 0, text(b"a") + struct.pack("<IIQ", 0, 0, 0)),
    "9 dimensions": header(1, 0, text(b"a") + struct.pack("<I", 9) + bytes(90)),
    "impossible shape": header(1, 0, text(b"a") + struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0)),
    "twice": header(2, 0, 2 * (text(b"a") + struct.pack("<IQIQ", 1, 1, 0, 0))),
    "not aligned": header(1, 0, text(b"a") + struct.pack("<IQIQ", 1, 1, 0, 3)).ljust(128, b"\0"),
    "alone has": header(1, 0, text(b"a") + struct.pack("<IQIQ", 1, 2**40, 0, 0)).ljust(128, b"\0"),
    "a gap": header(1, 0, text(b"a") + struct.pack("<IQIQ", 1, 1, 0, 32)).ljust(128, b"\0"),
    "promises 80": header(1, 0, text(b"a") + struct.pack("<IQIQ", 1, 20, 0, 0)).ljust(128, b"\0"),
    "bytes no tensor": header(1, 0, text(b"a") + struct.pack("<IQIQ", 1, 1, 0, 0)).ljust(
        999, b"\0"
    ),
}


@pytest.mark.parametrize("said", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(said, tmp_path):
    (tmp_path / "x.gguf").write_bytes(DAMAGED[said])
    with pytest.raises(DomergeError, match=said):
        read(tmp_path / "x.gguf")


def read(path: Path) -> None:
    file = GgufFile(path, refuse)
    file.read_header()
    file.tensors()
