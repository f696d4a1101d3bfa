"""What things are called in PEFT, mergekit and papers, and what that is here.

A word of theirs can be near to a name of ours that means something else ("dare_linear" is no
"linear"), so these come before any guess by spelling.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ALWAYS", "METHODS", "OPTIONS", "TABLES", "Meanings", "plain"]

Meanings = Mapping[str, tuple[str | None, str]]
"""A word -> the name here, or None, and a remark."""

METHODS: Meanings = {
    # PEFT
    "dare_linear": ("dare", ""),
    "dare_linear_svd": ("dare", "with a rank"),
    "dare_svd": ("dare", "with a rank"),
    "dare_ties_svd": ("dare_ties", "with a rank"),
    "magnitude_prune_svd": ("magnitude_prune", "with a rank"),
    "ties_svd": ("ties", "with a rank"),
    # mergekit
    "arcee_fusion": (None, "nothing here fuses by importance"),
    "breadcrumbs_ties": (None, "'breadcrumbs' here elects no signs"),
    "della_linear": (None, "'della' here elects signs"),
    "karcher": (None, "'multislerp' does not iterate"),
    "model_stock": (None, "nothing here chooses weights by angles"),
    "nearswap": (None, "nothing here interpolates entry by entry"),
    "nuslerp": ("slerp", ""),
    "passthrough": (None, "'linear' keeps one adapter as it is"),
    "sce": (None, "nothing here selects by variance"),
    "task_arithmetic": ("linear", ""),
    # papers and plain words
    "add": ("linear", ""),
    "average": ("linear", "with weights that add up to 1"),
    "compress_then_merge": ("ctm", ""),
    "concat": ("cat", ""),
    "dcmerge": ("dc_merge", ""),
    "doge_ta": ("doge", ""),
    "domerging": ("do", ""),
    "iso": ("iso_c", ""),
    "knots_ties": ("knots", "with inner 'ties'"),
    "lora_lego": ("lego", ""),
    "mean": ("linear", "with weights that add up to 1"),
    "robustmerge": ("robust", ""),
    "subspace_boosting": ("subspace_boost", ""),
    "sum": ("linear", ""),
    "ta": ("linear", ""),
    "tsv": ("tsvm", ""),
    "weighted_sum": ("linear", ""),
}

DTYPES: Meanings = {
    "bf16": ("bfloat16", ""),
    "fp16": ("float16", ""),
    "fp32": ("float32", ""),
    "half": ("float16", ""),
}

OPTIONS: Meanings = {
    "adapter_weights": ("weights", ""),
    "combination_type": ("method", ""),
    "cuda": ("device", ""),
    "engine": ("runtime", ""),
    "for": ("runtime", ""),
    "for_": ("runtime", ""),
    "gamma": ("outliers", ""),  # of mergekit's breadcrumbs; ours of that name is another method's
    "int8_mask": (None, "nothing here needs it"),
    "k": ("rank", ""),
    "lambda": ("scale", ""),
    "lambda_": ("scale", ""),
    "lora_r": ("rank", ""),
    "max_rank": ("rank", ""),
    "merge_method": ("method", ""),
    "models": ("adapters", ""),
    "normalize": ("weights", "as they are to be used: give some that add up to 1"),
    "out": ("output", ""),
    "out_dtype": ("dtype", ""),
    "out_path": ("output", ""),
    "output_dir": ("output", ""),
    "output_path": ("output", ""),
    "r": ("rank", ""),
    "random_seed": ("seed", ""),
    "save_path": ("output", ""),
    "sign_method": ("majority_sign_method", ""),
    "svd_rank": ("rank", ""),
    "serve_with": ("runtime", ""),
    "t": ("weights", "of both, which add up to 1"),
    "target": ("runtime", ""),
    "top_k": ("density", "the share to keep"),
    "topk": ("density", "the share to keep"),
    "weight": ("weights", "one an adapter"),
}

TABLES: Mapping[str, Meanings] = {
    "combination_type": METHODS,
    "directions": METHODS,
    "dtype": DTYPES,
    "inner": METHODS,
    "method": METHODS,
}
"""By the option whose value the word is."""

ALWAYS = frozenset(
    (
        *("adapters", "device", "dtype", "method", "output", "rank", "runtime", "scale"),
        "weights",
    )
)
"""Arguments of every merge, beside a method's own options."""


def plain(word: str) -> str:
    """A word without what spellings differ in."""
    return word.lower().lstrip("-").replace("-", "_").replace(" ", "_")
