"""Compiles the C++ part for aarch64 on another machine, and runs tests of it under emulation.

    python tools/aarch64.py FOLDER tests/test_cpu_kernels.py -k gram

On Debian, with the packages g++-aarch64-linux-gnu and qemu-user. Into FOLDER go Debian's Python for
arm64, torch and pytest for it, and the extension; what is there is not fetched again. Emulated, an
import of torch takes half a minute, and tests ten to fifty times as long as they do natively.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
# The newest whose aarch64 build on PyPI needs no CUDA, and what it and the tests import.
PACKAGES = [
    "torch==2.10.0",
    "filelock",
    "typing-extensions",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
]
PACKAGES += ["markupsafe", "fsspec", "numpy", "pyyaml", "tqdm", "safetensors"]
PACKAGES += ["pytest", "pluggy", "iniconfig", "packaging", "pygments"]
APT = """APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
Acquire::Languages "none";
Dir::State::lists "{0}/lists";
Dir::State::status "{0}/status";
Dir::Cache "{0}/cache";
"""


def setup() -> ModuleType:
    """setup.py as a module; importing it builds nothing."""
    spec = importlib.util.spec_from_file_location("domerge_setup", ROOT / "setup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def compile_objects(folder: Path, include: Sequence[str]) -> list[str]:
    """The objects of `domerge_fast._C`, compiled into `folder`; warnings are errors."""
    import pybind11

    build = setup()
    flags = [*build.CPP_FLAGS, "-Wall", "-Werror", "-fPIC"]
    flags += [f"-I{path}" for path in (pybind11.get_include(), *include)]
    objects = []
    for source, own in build.cpp_sources("aarch64").items():
        objects.append(str(folder / f"{Path(source).stem}.o"))
        command = [COMPILER, *flags, *own, "-c", source, "-o", objects[-1]]
        subprocess.run(command, cwd=ROOT, check=True)
    return objects


def fetch_python(folder: Path) -> Path:
    """Debian's Python for arm64, unpacked below `folder`; returns its program."""
    root, apt = folder / "root", folder / "apt"
    if not root.exists():
        for part in ("lists/partial", "cache/archives/partial"):
            (apt / part).mkdir(parents=True, exist_ok=True)
        (apt / "status").touch()
        (apt / "apt.conf").write_text(APT.format(apt), encoding="utf-8")
        environment = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}
        wanted = ["python3-minimal", "python3", "libpython3-dev", "libstdc++6", "libgomp1"]
        install = ["apt-get", "install", "-y", "--no-install-recommends", "--download-only"]
        for command in (["apt-get", "update"], [*install, *wanted]):
            subprocess.run(command, env=environment, check=True)
        for package in sorted((apt / "cache/archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
    return (root / "usr/bin/python3").resolve()


def fetch_packages(folder: Path, version: str) -> Path:
    """torch and pytest for aarch64, below `folder`; `version` is that of Python, as "3.11"."""
    packages = folder / "packages"
    if not packages.exists():
        tags = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile"]
        command += [f"--platform={tag}" for tag in tags]
        command += ["--only-binary=:all:", f"--python-version={version}", "--target", str(packages)]
        subprocess.run([*command, *PACKAGES], check=True)
    return packages


def build(folder: Path, python: Path) -> Path:
    """The package with an extension for aarch64, and its tests; returns the folder they are in."""
    version, tree = python.name, folder / "tree"
    tree.mkdir(exist_ok=True)
    headers = folder / "root/usr/include"
    objects = compile_objects(tree, [str(headers / version), str(headers)])
    tag = f"cpython-{version.removeprefix('python').replace('.', '')}-aarch64-linux-gnu"
    package = tree / "domerge_fast"
    package.mkdir(exist_ok=True)
    for entry in (ROOT / "domerge_fast").iterdir():
        if entry.suffix != ".so" and not (package / entry.name).exists():
            (package / entry.name).symlink_to(entry)
    for name in ("tests", "pyproject.toml"):
        if not (tree / name).exists():
            (tree / name).symlink_to(ROOT / name)
    target = package / f"_C.{tag}.so"
    subprocess.run([COMPILER, "-shared", *objects, "-pthread", "-o", str(target)], check=True)
    return tree


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where everything goes")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of pytest")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = fetch_python(folder)
    packages = fetch_packages(folder, python.name.removeprefix("python"))
    tree = build(folder, python)
    command = [EMULATOR, "-L", str(folder / "root"), str(python), "-m", "pytest"]
    command += ["-q", "-p", "no:cacheprovider", *args.arguments]
    print(shlex.join(command), flush=True)
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    return subprocess.run(command, cwd=tree, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
