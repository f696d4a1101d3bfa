"""Set-up shared by all tests."""

from __future__ import annotations

import torch

# Threads only wait for each other on matrices this small; tests of threading ask for their own.
torch.set_num_threads(1)
