"""Attacks on the command line: damaged inputs, failing system calls, kills, Ctrl-C, two writers.

`make attack` runs all of them and fails on any finding: an ending other than a whole output or one
line of refusal, an output that is torn or wrong, an input that was touched, a file left behind.
Every case is a function of the seed and its number alone.
"""

from __future__ import annotations

import torch

# Of every process that forks: the threads of OpenMP do not come along.
torch.set_num_threads(1)
