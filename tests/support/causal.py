"""A tiny causal model of words, with its tokenizer, in a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["WORDS", "causal"]

WORDS = [f"w{k}" for k in range(30)]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


def causal(folder: Path) -> LlamaForCausalLM:
    """The model, as it is saved in the folder."""
    vocabulary = {word: k for k, word in enumerate(["<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(vocabulary), num_attention_heads=2, num_key_value_heads=2, **SIZES
        )
        model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model
