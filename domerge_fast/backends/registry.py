"""Which backends there are, which can run here, and why not.

A backend is a module with one function an op (`OPS`), all with the same signatures. One asked
for by name that cannot run is an error; only "auto" chooses, by op and dtype, the one with the
strongest evidence (evidence.py).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from types import ModuleType

import torch

from .. import options
from ..errors import OptionError
from ..registry import Registry, usable
from .evidence import ranked

__all__ = [
    "AUTO",
    "DTYPES",
    "ENVIRONMENT",
    "OPS",
    "TABLE",
    "Backend",
    "BackendStatus",
    "backends",
    "by_op",
    "check_environment",
    "choose",
    "choose_all",
    "cuda_extension",
    "load",
    "torch_cuda_missing",
]

OPS = (
    "gram",
    "block_gram",
    "block_products",
    "orthogonalize",
    "orthogonalize_factors",
    "apply",
    "apply_decouple",
    "truncate",
    "largest",
    "block_largest",
    "entry_counts",
    "entry_sums",
    "entry_merge",
)
OF_MADE = ("block_products", "orthogonalize", "truncate", "largest")
"""Ops on what others have made, in float32. All else reads factors."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of what ops read."""
AUTO = "auto"
ENVIRONMENT = "DOMERGE_BACKEND"
INSTRUCTIONS = "DOMERGE_CPU_ISA"


@dataclass(frozen=True)
class Backend:
    """A row of the table. module: the full name of the one that has the ops, imported when the
    backend first runs. devices: gives torch device types, empty for any."""

    name: str
    summary: str
    module: str
    devices: Callable[[], tuple[str, ...]]
    why_not: Callable[[], str | None] = usable


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine, and if not, why and what to do."""

    name: str
    summary: str
    devices: tuple[str, ...]
    why_not: str | None

    @property
    def available(self) -> bool:
        return self.why_not is None


def _anywhere() -> tuple[str, ...]:
    return ()


def _cpu() -> tuple[str, ...]:
    return ("cpu",)


def _extension_missing() -> str | None:
    try:
        _imported("domerge_fast._C")
    except ImportError as error:
        return f"the C++ extension does not import ({error}); reinstall with `pip install .`"
    return None


def cuda_extension() -> ModuleType | str:
    """The extension with the CUDA kernels, or why there is none."""
    try:
        return importlib.import_module("domerge_fast._cuda")
    except ModuleNotFoundError:
        first = "" if shutil.which("nvcc") else "put nvcc of a CUDA toolkit on PATH, then "
        return f"built without it; {first}reinstall with `DOMERGE_CUDA=1 pip install .`"
    except ImportError as error:
        return f"the CUDA extension does not import ({error}); reinstall with `pip install .`"


def _cuda_devices() -> tuple[str, ...]:
    """A GPU; the CPU for kernels that the tests compile with a C++ compiler."""
    extension = cuda_extension()
    on_host = not isinstance(extension, str) and extension.ON_HOST
    return ("cpu",) if on_host else ("cuda",)


def _cuda_missing() -> str | None:
    extension = cuda_extension()
    if isinstance(extension, str):
        return extension
    if extension.ON_HOST:
        return None
    return extension.info()["error"] or torch_cuda_missing()


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_devices() -> tuple[str, ...]:
    return ("cpu",) if _interpreted() else ("cuda",)


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton`"
    return None if _interpreted() else torch_cuda_missing()


def torch_cuda_missing() -> str | None:
    """Why torch can use no GPU here."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device or driver"
    return None


TABLE = Registry(
    "backend",
    Backend,
    (
        Backend(
            "cpu",
            "C++ kernels, vectorised and threaded",
            f"{__package__}.cpu",
            _cpu,
            _extension_missing,
        ),
        Backend(
            "cuda",
            "CUDA C++ kernels, all modules in one launch",
            f"{__package__}.gpu.cuda",
            _cuda_devices,
            _cuda_missing,
        ),
        Backend(
            "triton",
            "Triton kernels, all modules in one launch",
            f"{__package__}.gpu.triton",
            _triton_devices,
            _triton_missing,
        ),
        Backend("torch", "factor space in plain PyTorch", f"{__package__}.torch", _anywhere),
        Backend(
            "reference",
            "literal and dense in float64: the oracle",
            f"{__package__}.reference",
            _anywhere,
        ),
    ),
)


def check_environment() -> None:
    """OptionError where a variable of the environment asks for what there is not."""
    name = os.environ.get(ENVIRONMENT)
    if name and name not in TABLE:
        options.choose(ENVIRONMENT, name, [AUTO, *TABLE])
    wanted = os.environ.get(INSTRUCTIONS)
    if wanted and not _extension_missing():
        known = importlib.import_module("domerge_fast._C").isas()
        if wanted not in known:
            remedy = f"use one of: {', '.join(known)}; or unset it"
            raise OptionError(INSTRUCTIONS, f"{wanted!r} cannot run here", remedy)


def backends() -> dict[str, BackendStatus]:
    """Every backend by name, with the reason where it cannot run here."""
    return {
        name: BackendStatus(name, row.summary, row.devices(), row.why_not())
        for name, row in TABLE.items()
    }


def choose(
    name: str, device_type: str, op: str | None = None, dtype: torch.dtype | None = None
) -> str:
    """The name of the backend to use on a device: of what can run there, "auto" takes the one with
    the strongest evidence for an op on a dtype. For no op in particular, it is the one that all ops
    take, or "auto" where they differ. A name may also be what `choose_all` gives, with one for
    every op.

    Raises OptionError for an unknown name, or for one that cannot run here.
    """
    row = TABLE.own.get(name)
    if row and _can_run(row, device_type):  # at once, as every op asks
        if name == "cpu":  # whose kernels are chosen by the environment
            check_environment()
        return name
    check_environment()
    name = name if name != AUTO else os.environ.get(ENVIRONMENT) or AUTO
    if name == AUTO:
        pairs = product(OPS, DTYPES) if op is None else [(op, dtype or torch.float32)]
        orders = {ranked(device_type, *pair) for pair in pairs}
        found = {next(x for x in order if _can_run(TABLE[x], device_type)) for order in orders}
        return found.pop() if len(found) == 1 else AUTO
    if isinstance(name, str) and (each := by_op(name)):
        taken = {x: choose(y, device_type, x, dtype) for x, y in each.items() if op in (None, x)}
        return taken[op] if op else name
    if name in TABLE and not _runs_on(TABLE[name], device_type):
        where = " or ".join(TABLE[name].devices())
        raise OptionError(
            "backend", f"{name!r} runs on {where}, not on {device_type}", "use 'torch' there"
        )
    return TABLE.choose("backend", name, besides=[AUTO]).name


def choose_all(device_type: str, dtype: torch.dtype) -> str:
    """What "auto" takes for a merge of adapters of a dtype: the backend that all ops take, or where
    they differ that of every op, in words: "gram=cpu block_gram=cpu apply=torch .."."""
    dtypes = {op: torch.float32 if op in OF_MADE else dtype for op in OPS}
    found = {op: choose(AUTO, device_type, op, of) for op, of in dtypes.items()}
    names = {*found.values()}
    return names.pop() if len(names) == 1 else " ".join(f"{op}={x}" for op, x in found.items())


@functools.cache
def by_op(name: str) -> Mapping[str, str]:
    """The backend of every op in words of `choose_all`; empty for another name. OptionError for
    words that are not one for every op."""
    if "=" not in name:
        return {}
    pairs = [word.partition("=") for word in name.split()]
    found = {op: backend for op, _, backend in pairs}
    if len(pairs) > len(found) or found.keys() != {*OPS}:
        remedy = f"say one word OP=BACKEND for each of {', '.join(OPS)}; or one name for all"
        raise OptionError("backend", f"{name!r} does not say one for every op", remedy)
    return found


def _can_run(row: Backend, device_type: str) -> bool:
    return _runs_on(row, device_type) and not row.why_not()


def _runs_on(row: Backend, device_type: str) -> bool:
    devices = row.devices()
    return not devices or device_type in devices


def load(name: str) -> ModuleType:
    """The module that implements a backend named by `choose`."""
    return _imported(TABLE[name].module)


def _imported(name: str) -> ModuleType:
    # Asked for with every op, of which importlib takes longer to answer.
    return sys.modules.get(name) or importlib.import_module(name)
