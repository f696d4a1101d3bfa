"""What is installed here, which backends run, and why one does not."""

from __future__ import annotations

import os
import platform

import torch

from ..backends import registry
from ..job import versions
from ..registry import refused

__all__ = ["examine"]


def examine() -> dict[str, str]:
    """Labels and findings, in the order to show them; OptionError as in a merge for what the
    environment asks for in vain."""
    registry.check_environment()
    found = dict(versions())
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["threads"] = str(torch.get_num_threads())
    for name, status in registry.backends().items():
        verdict = "ok" if status.available else f"off: {status.why_not}"
        found[f"backend {name}"] = f"{verdict} ({status.summary})"
    forced = os.environ.get(registry.ENVIRONMENT)
    if forced:
        found[f"{registry.ENVIRONMENT} is set"] = forced
    found |= _instruction_set() | {"CUDA kernels": _cuda(), "torch CUDA": _torch_cuda()}
    return found | {label: f"off: {reason}" for label, reason in refused().items()}


def _instruction_set() -> dict[str, str]:
    if registry.TABLE["cpu"].why_not():
        return {}
    from .. import _C

    return {"instruction set": _C.isa()}


def _cuda() -> str:
    """What the CUDA extension is built for, and what it finds here."""
    extension = registry.cuda_extension()
    if isinstance(extension, str):
        return f"off: {extension}"
    info = extension.info()
    if extension.ON_HOST:
        return str(info["error"])
    return f"built for {info['archs']}; {info['error'] or str(info['devices']) + ' device(s)'}"


def _torch_cuda() -> str:
    reason = registry.torch_cuda_missing()
    if reason:
        return f"off: {reason}"
    return f"{torch.cuda.device_count()} device(s), {torch.cuda.get_device_name()}"
