"""Ways to damage a file: by bytes, by the fields of its JSON, by its safetensors header, by what
stands at its path. Each is a function of a path and a random generator that says what it did."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

Damage = Callable[[Path, Random], str]

STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 0.5, -2.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "16", "NaN", "q_proj", "../../etc"),
    *("\x00", "a\nb", "\ud800", "\U0001f600", "`|<b>*", "x" * 5000, "(a+)+$", "(.*)*X", "[", "\\"),
    *([], [[]], [None], ["q_proj"], [0], [[0, 1]], [1.5], {}, {"q_proj": 4}, {"(.*)*X": 4}),
    *({"a": {"b": 1}}, {"": 1}, [[0, float("inf")]], "LORA", "LOHA", "gaussian", "pissa"),
)
"""Values for a field that was meant to hold something else."""


def bytes_of(path: Path, random: Random) -> str:
    """Flip, cut, append, repeat or blank bytes anywhere."""
    data = bytearray(path.read_bytes())
    at = random.randrange(len(data) or 1)
    count = random.choice((1, 2, 8, 64, 1000))
    kind = random.choice(("flip", "cut", "append", "insert", "drop", "blank", "ones"))
    if kind == "flip":
        for _ in range(count):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "append":
        data += random.randbytes(count)
    elif kind == "insert":
        data[at:at] = random.randbytes(count)
    elif kind == "drop":
        del data[at : at + count]
    else:
        fill = b"\0" if kind == "blank" else b"\xff"
        data[at : at + count] = fill * len(data[at : at + count])
    path.write_bytes(data)
    return f"{kind} {count} bytes at {at}"


def place_of(path: Path, random: Random) -> str:
    """Something else at the path: nothing, a folder, a link to itself, a fifo, a huge hole."""
    kind = random.choice(("nothing", "folder", "loop", "fifo", "hole", "empty", "device"))
    if kind == "hole":
        os.truncate(path, 1 << 40)
        return kind
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    return kind


def text_of(path: Path, random: Random) -> str:
    """The same JSON in another encoding, or no JSON."""
    text = path.read_bytes().decode()
    kind, data = random.choice(
        (
            ("utf-16", text.encode("utf-16")),
            ("utf-32", text.encode("utf-32-le")),
            ("byte order mark", b"\xef\xbb\xbf" + text.encode()),
            ("latin-1", b'{"\xe9": 1,' + text.encode()[1:]),
            ("deep list", b"[" * 100_000 + b"]" * 100_000),
            ("deep object", b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
            ("huge number", text.encode().replace(b"{", b'{"r": 1' + b"0" * 5000 + b",", 1)),
            ("key twice", text.encode().replace(b"{", b'{"r": 3,', 1)),
            ("comment", b"// a comment\n" + text.encode()),
            ("trailing", text.encode() + b"{}"),
            ("a list", b"[" + text.encode() + b"]"),
            ("a number", b"17"),
            ("NUL", text.encode() + b"\0"),
        )
    )
    path.write_bytes(data)
    return kind


def field_of(path: Path, random: Random) -> str:
    """A strange value in a field, at any depth, or a field too many or too few."""
    whole = json.loads(path.read_text())
    holder: Any = whole
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = random.choice(keys)
        value = holder[key]
        if isinstance(value, (dict, list)) and value and random.random() < 0.7:
            holder = value
            continue
        break
    did = random.choice(("set", "set", "set", "remove", "add", "rename"))
    strange = random.choice(STRANGE)
    if did == "set":
        holder[key] = strange
    elif did == "remove":
        del holder[key]
    elif isinstance(holder, list):
        holder.append(strange)
    elif did == "add":
        key = random.choice((*FIELDS, "something_new", "\udc80", "x" * 3000))
        holder[key] = strange
    else:
        holder[f"{key}{random.choice(('_', ' ', 'é', '.'))}"] = holder.pop(key)
    path.write_text(json.dumps(whole))
    return f"{did} {str(key)[:40]!r} {str(strange)[:40]!r}"


FIELDS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
    *("bias", "init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform"),
    *("modules_to_save", "target_modules", "exclude_modules", "fan_in_fan_out", "auto_mapping"),
    *("trainable_token_indices", "target_parameters", "revision", "text_config", "vocab_size"),
    *("tie_word_embeddings", "format", "steps", "norm", "alpha", "rank", "dtype", "config"),
)


def header_of(path: Path, random: Random) -> str:
    """A safetensors header that says something else; the data stays."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    keys = [key for key in header if key != "__metadata__"]
    key = random.choice(keys)
    entry = header[key]
    kind = random.choice(tuple(HEADERS))
    raw = HEADERS[kind](header, key, entry, random)
    if raw is None:
        raw = json.dumps(header, ensure_ascii=random.random() < 0.5).encode(errors="surrogatepass")
    claimed = len(raw)
    if random.random() < 0.05:
        claimed = random.choice((0, 1, 2**62, 2**64 - 1, len(raw) - 1, len(raw) + 1, 10**8))
    path.write_bytes(claimed.to_bytes(8, "little") + raw + body)
    return f"{kind} of {key[-40:]!r}"


def _rename(header: dict, key: str, entry: dict, random: Random) -> None:
    new = random.choice(
        (
            key.replace("lora_A", "lora_B"),
            key.replace("lora_", "lora_magnitude_"),
            key.replace(".weight", ".default.weight"),
            key.replace("base_model.model.", ""),
            key.replace("base_model.model.", "base_model.model.base_model.model."),
            key.replace("base_model.model.", "base_model.model._orig_mod."),
            key.replace("layers.0", "layers.1"),
            key.replace("layers.0", "layers.7"),
            key.replace("model.layers", "model.language_model.layers"),
            key.replace("q_proj", "../../x"),
            key.replace("lora_down", "lora_up"),
            key.replace("lora_down", "lora_A"),
            key.replace("lora_up.weight", "dora_scale"),
            key.replace("alpha", "diff"),
            key.replace("lora_unet_", "unet."),
            key + ".bias",
            *("", "x", "x" * 100_000, "\ud800", "a\nb", "/etc/passwd", "lora_A.weight"),
        )
    )
    header[new] = header.pop(key)


def _field(header: dict, key: str, entry: dict, random: Random) -> None:
    header[key][random.choice(("dtype", "shape", "data_offsets"))] = random.choice(STRANGE)


def _dtype(header: dict, key: str, entry: dict, random: Random) -> None:
    entry["dtype"] = random.choice(
        ("F16", "BF16", "F64", "I32", "U32", "F8_E4M3", "F8_E5M2", "BOOL", "F4", "f32", "C64")
    )


def _shape(header: dict, key: str, entry: dict, random: Random) -> None:
    m, n = (*entry["shape"], 1, 1)[:2]
    entry["shape"] = random.choice(
        (
            [n, m],
            [m * n],
            [m, n, 1],
            [m, n, 1, 1],
            [1] * 70 + [m, n],
            [m, n + 1],
            [-m, -n],
            [2**63, 0],
            [0, n],
            [0],
            [],
            [m * 1.0, n],
            [m, True],
            [2**32, 2**32],
        )
    )


def _offsets(header: dict, key: str, entry: dict, random: Random) -> None:
    begin, end = entry["data_offsets"]
    entry["data_offsets"] = random.choice(
        (
            [begin + 4, end + 4],
            [begin, end - 4],
            [end, begin],
            [-4, end],
            [begin, 2**64],
            [begin],
            [begin, end, end],
            [0, end - begin],
            [begin * 1.0, end],
        )
    )


def _swap(header: dict, key: str, entry: dict, random: Random) -> None:
    other = random.choice([k for k in header if k not in (key, "__metadata__")])
    header[key], header[other] = header[other], header[key]


def _remove(header: dict, key: str, entry: dict, random: Random) -> None:
    del header[key]


def _add(header: dict, key: str, entry: dict, random: Random) -> None:
    end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    name = random.choice(("base_model.model.lm_head.weight", "x", "model.embed_tokens.weight"))
    shape = random.choice(([0], [0, 4], [2**63, 0], [1], [4, 0]))
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end]}


def _metadata(header: dict, key: str, entry: dict, random: Random) -> None:
    header["__metadata__"] = random.choice(
        ({}, None, [], "pt", {"format": 1}, {"format": None}, {"format": "np"}, {"a": "b" * 9999})
    )


def _twice(header: dict, key: str, entry: dict, random: Random) -> bytes:
    text = json.dumps(header)
    return f"{text[:-1]}, {json.dumps(key)}: {json.dumps(entry)}}}".encode()


def _encoded(header: dict, key: str, entry: dict, random: Random) -> bytes:
    return json.dumps(header).encode(random.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-be")))


def _padded(header: dict, key: str, entry: dict, random: Random) -> bytes:
    text = json.dumps(header).encode()
    return random.choice(
        (text + b" " * 13, b" " + text, text + b"\0" * 8, text + b"x", b"\n" + text)
    )


def _deep(header: dict, key: str, entry: dict, random: Random) -> bytes:
    return b"[" * 100_000 + b"]" * 100_000


HEADERS: dict[str, Callable[[dict, str, dict, Random], bytes | None]] = {
    "rename": _rename,
    "field": _field,
    "dtype": _dtype,
    "shape": _shape,
    "offsets": _offsets,
    "swap": _swap,
    "remove": _remove,
    "add": _add,
    "metadata": _metadata,
    "twice": _twice,
    "encoding": _encoded,
    "padding": _padded,
    "depth": _deep,
}


def values_of(path: Path, random: Random) -> str:
    """Numbers that no training gives: NaN, infinities, zeros, subnormal and huge ones."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    word, kind = random.choice(
        (
            (b"\x00\x00\xc0\x7f", "NaN"),
            (b"\x00\x00\x80\x7f", "Inf"),
            (b"\x00\x00\x80\xff", "-Inf"),
            (b"\x01\x00\x00\x00", "subnormal"),
            (b"\xff\xff\x7f\x7f", "largest"),
            (b"\x00\x00\x00\x00", "zero"),
            (b"\xec\x78\xad\x60", "1e20"),
        )
    )
    count = (len(data) - start) // 4
    some = random.choice((1, 3, count // 10, count))
    for at in random.sample(range(count), max(1, min(some, count))):
        data[start + 4 * at : start + 4 * at + 4] = word
    path.write_bytes(data)
    return f"{some} times {kind}"


def folder_of(path: Path, random: Random) -> str:
    """The folder itself: read as a file, nested, without a config, with a pickle beside."""
    folder = path.parent
    kind = random.choice(("nested", "two inside", "pickle", "file", "gone"))
    if kind == "gone":
        shutil.rmtree(folder)
    elif kind == "file":
        shutil.rmtree(folder)
        folder.write_text("not a folder")
    elif kind == "pickle":
        path.rename(folder / "adapter_model.bin")
    else:
        for name in ("one", "two")[: 1 + (kind == "two inside")]:
            (folder / name).mkdir()
            for file in [x for x in folder.iterdir() if x.is_file()]:
                shutil.copy(file, folder / name)
        for file in [x for x in folder.iterdir() if x.is_file()]:
            file.unlink()
    return kind


def words_of(path: Path, random: Random) -> str:
    """A number where another one, or a part of a text, stood in the first bytes."""
    data = bytearray(path.read_bytes())
    size = random.choice((1, 4, 8))
    at = random.randrange(min(900, len(data)) - size)
    word = random.choice((0, 1, 2, 3, 8, 9, 12, 31, 64, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1))
    data[at : at + size] = (word % 256**size).to_bytes(size, "little")
    path.write_bytes(data)
    return f"{word} in {size} bytes at {at}"


JSON: tuple[Damage, ...] = (field_of, field_of, field_of, field_of, text_of, bytes_of, place_of)
SAFETENSORS: tuple[Damage, ...] = (
    *(header_of, header_of, header_of, header_of, values_of, values_of, bytes_of, bytes_of),
    *(place_of, folder_of),
)
GGUF: tuple[Damage, ...] = (words_of, words_of, words_of, words_of, bytes_of, bytes_of, place_of)
