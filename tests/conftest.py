"""Set-up shared by all tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator

import pytest

# Some versions of torch are deterministic on a GPU only with it; it is read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from support import perturb

# So that assertions in helpers say as much as those in tests.
pytest.register_assert_rewrite("support.close", "support.files")

# Threads only wait for each other on matrices this small; tests of threading ask for their own.
torch.set_num_threads(1)

if os.environ.get(perturb.ENVIRONMENT) == "1":
    perturb.install()

# The CUDA kernels compiled for the host, in place of an installed extension.
if "DOMERGE_TEST_CUDA" in os.environ:
    spec = importlib.util.spec_from_file_location(
        "domerge_fast._cuda", os.environ["DOMERGE_TEST_CUDA"]
    )
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])


def pytest_report_header() -> str | None:
    perturbed = os.environ.get(perturb.ENVIRONMENT) == "1"
    return "every matrix product of torch is perturbed in its last bit" if perturbed else None


@pytest.fixture
def nan_poison() -> Iterator[None]:
    """Fresh tensors hold NaN, so that what an op forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads torch and the kernels take, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
