"""What is installed here, which backends run, and why one does not."""

from __future__ import annotations

import os
import platform

import torch

from .api import versions
from .backends import registry


def examine() -> dict[str, str]:
    """Labels and findings, in the order to show them."""
    found = dict(versions())
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["threads"] = str(torch.get_num_threads())
    for name, status in registry.backends().items():
        verdict = "ok" if status.available else f"off: {status.why_not}"
        found[f"backend {name}"] = f"{verdict} ({status.summary})"
    forced = os.environ.get(registry.ENVIRONMENT)
    if forced:
        found[f"{registry.ENVIRONMENT} is set"] = forced
    return found | _extension() | {"torch CUDA": _torch_cuda()}


def _extension() -> dict[str, str]:
    if registry.TABLE["cpu"].why_not():
        return {}
    from . import _C

    found = {"instruction set": _C.isa()}
    cuda = _C.cuda_info()
    if cuda is None:
        found["CUDA kernels"] = "off: built without nvcc; install the CUDA toolkit and reinstall"
    else:
        reason = cuda["error"] or f"{cuda['devices']} device(s)"
        found["CUDA kernels"] = f"built for {cuda['archs']}, no op uses them yet; {reason}"
    return found


def _torch_cuda() -> str:
    if torch.version.cuda is None:
        return "off: this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "off: torch sees no CUDA device or driver"
    return f"{torch.cuda.device_count()} device(s), {torch.cuda.get_device_name()}"
