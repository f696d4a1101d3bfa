"""Merges by several processes, on one machine or many, as torchrun starts them (docs/scale.md)."""

from .merge import merge as merge
from .merge import run as run

__all__ = ["merge", "run"]
