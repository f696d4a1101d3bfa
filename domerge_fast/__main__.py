"""`python -m domerge_fast` is `domerge-fast`."""

from __future__ import annotations

import sys

from .cli.main import main

sys.exit(main())
