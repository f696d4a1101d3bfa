"""What is asked of a merge, checked once."""

from .checks import check_scale, check_weights
from .input import Input
from .recipe import AUTO, DETAILS, DTYPES, FULL, NONE, NORMS, REPORTS, SVC, Recipe
from .rule import Rule, all_options
from .text import CARD, parse, plain_of

__all__ = [
    "AUTO",
    "CARD",
    "DETAILS",
    "DTYPES",
    "FULL",
    "NONE",
    "NORMS",
    "REPORTS",
    "SVC",
    "Input",
    "Recipe",
    "Rule",
    "all_options",
    "check_scale",
    "check_weights",
    "parse",
    "plain_of",
]
