"""domerge-fast doctor: what is installed here, which backends run, and why one does not."""

from __future__ import annotations

import argparse

from . import shared, streams

__all__ = ["COMMAND"]


def run(args: argparse.Namespace) -> int:
    from .examine import examine

    found = examine()
    shared.show(args, found, lambda: streams.table(list(found.items())))
    return 0


SUMMARY = "show versions and backends, and why one is off"
COMMAND = shared.Command("doctor", SUMMARY, shared.add_json, run)
