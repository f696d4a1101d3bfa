"""Processes for tests that measure one, kill one, or let several meet."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import domerge_fast as dm


def forked(target: Callable[..., None], *args: Any) -> tuple[Any, Connection]:
    """A process that runs target(*args, pipe), and our end of the pipe.

    All come from one server that has imported torch already and runs nothing itself.
    """
    here = [str(Path(dm.__file__).parents[1]), str(Path(__file__).parents[1])]
    os.environ["PYTHONPATH"] = os.pathsep.join([*here, os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "safetensors.torch", "domerge_fast.api"])
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(*args, theirs))
    process.start()
    theirs.close()
    return process, ours
