"""A causal language model of transformers and batches of a text, for those who have no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DomergeError, OptionError

__all__ = ["continued", "loaded", "passages", "place"]


def place(device: str) -> str:
    """Where a model goes for a device as `merge` takes it: "auto" is a GPU where there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def loaded(folder: str, device: str = "cpu") -> tuple[torch.nn.Module, Any]:
    """The model, ready to be run, and its tokenizer. DomergeError without transformers, OptionError
    for what it does not load."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise DomergeError(f"{__name__} needs transformers ({error}); install it") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    except (OSError, ValueError, KeyError) as error:
        problem = f"transformers does not load {folder!r} ({' '.join(str(error).split())[:120]})"
        raise OptionError(
            "model", problem, "give a folder with a causal model and tokenizer"
        ) from error
    return model.eval().to(device), tokenizer


@torch.no_grad()
def continued(
    model: Any, tokenizer: Any, prompt: str, most: int, check: Callable[[], None] = lambda: None
) -> str:
    """What the model writes after a prompt: the likeliest token each time, up to `most` of them, or
    its end. check: is called before every token; an error that it raises stops it. OptionError for
    a prompt without tokens, and one that leaves the model no room for `most` more."""
    encoded = tokenizer(prompt, return_tensors="pt")
    given = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    count = given["input_ids"].shape[1]
    if not count:
        raise OptionError("prompt", "has no tokens", "give more text")
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and count + most > room:
        problem = f"has {count} tokens, and the model takes {room} with the {most} to be written"
        raise OptionError("prompt", problem, "give less text, or let fewer be written")

    def stops(ids: Tensor, *_: Any, **__: Any) -> Tensor:
        check()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    check()
    own = (x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id) if x is not None)
    written = model.generate(
        **given,
        max_new_tokens=most,
        do_sample=False,
        num_beams=1,
        pad_token_id=next(own, 0),
        stopping_criteria=[stops],
    )
    return str(tokenizer.decode(written[0, count:], skip_special_tokens=True))


def passages(
    files: Sequence[str], tokenizer: Any, length: int, most: int
) -> Mapping[str, list[dict[str, Tensor]]]:
    """By name of the file, up to `most` passages of `length` tokens, evenly spread over the text,
    one a batch. OptionError for files that cannot be read or are shorter than two tokens."""
    found: dict[str, list[dict[str, Tensor]]] = {}
    for name in files:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            problem = f"{name!r} cannot be read ({' '.join(str(error).split())})"
            raise OptionError("text", problem, "give a text file in UTF-8") from error
        ids = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
        whole = [*ids.split(length)]
        parts = [part for part in whole if len(part) == length] or whole[:1]
        if len(ids) < 2:
            raise OptionError("text", f"{name!r} has no two tokens", "give more text")
        step = max(1, len(parts) // most)
        if name in found:
            raise OptionError("text", f"{name!r} is given twice", "give it once")
        found[name] = [{"input_ids": part[None]} for part in parts[::step][:most]]
    return found
