"""What is built, with what, and what the build says when it cannot."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import aarch64  # noqa: E402

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")


@pytest.fixture(scope="module")
def build():
    return aarch64.setup()


@pytest.fixture
def fake_nvcc(tmp_path):
    """A function that writes an nvcc script which knows some architectures; returns its env."""

    def make(known: list[str], top: Path | None = None) -> dict[str, str]:
        listing = "\\n".join(f"compute_{arch}" for arch in known)
        script = tmp_path / "nvcc"
        script.write_text(
            "#!/bin/sh\n"
            f'[ "$1" = --list-gpu-arch ] && printf "{listing}\\n" && exit 0\n'
            f'[ "$1" = --dryrun ] && echo "#$ TOP={top or tmp_path}" >&2 && exit 0\n'
            'echo "nvcc: what is $1?" >&2; exit 3\n'
        )
        script.chmod(0o755)
        return {"PATH": f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"}

    return make


def test_without_nvcc_there_is_no_cuda(build, tmp_path):
    assert build.find_cuda({"PATH": str(tmp_path)}) is None


def test_cuda_asked_for_without_nvcc_fails(build, tmp_path):
    with pytest.raises(build.BuildError, match=r"DOMERGE_CUDA=1 but no nvcc is on PATH: install"):
        build.find_cuda({"PATH": str(tmp_path), "DOMERGE_CUDA": "1"})


def test_cuda_turned_off(build, fake_nvcc):
    assert build.find_cuda({**fake_nvcc(["80"]), "DOMERGE_CUDA": "0"}) is None


def test_other_values_are_refused(build):
    with pytest.raises(build.BuildError, match="DOMERGE_CUDA=yes: use 1"):
        build.find_cuda({"DOMERGE_CUDA": "yes"})


def test_nvcc_without_a_gpu_costs_nothing(build, fake_nvcc, monkeypatch, capsys):
    monkeypatch.setattr(build, "gpu_archs", set)
    assert build.find_cuda(fake_nvcc(["80", "90"])) is None
    assert "DOMERGE_CUDA=1 builds it anyway" in capsys.readouterr().out
    assert build.find_cuda({**fake_nvcc(["80", "90"]), "DOMERGE_CUDA_ARCHS": "90"}) is None
    asked = build.find_cuda({**fake_nvcc(["75", "80", "90"]), "DOMERGE_CUDA": "1"})
    assert asked.archs == ("80", "90")


@pytest.mark.parametrize(
    ("gpus", "archs"),
    [
        ({"90"}, ("90",)),
        ({"86"}, ("80",)),  # nvcc does not know it: code for its older relative runs there
        ({"120"}, ("90",)),  # nor this one: by PTX
        ({"80", "90"}, ("80", "90")),
        ({"75", "90"}, ("90",)),
        ({"75"}, None),
        (set(), None),
    ],
)
def test_cuda_is_built_for_the_gpus_that_are_here(gpus, archs, build, fake_nvcc, monkeypatch):
    monkeypatch.setattr(build, "gpu_archs", lambda: gpus)
    env = fake_nvcc(["75", "80", "90", "90a"])
    found = build.find_cuda(env)
    assert (found and found.archs) == archs
    if found:
        assert build.find_cuda({**env, "DOMERGE_CUDA_ARCHS": "80;90a"}).archs == ("80", "90a")
        assert build.find_cuda({**env, "DOMERGE_CUDA": "1"}).archs == ("80", "90")


FAKE_DRIVER = """
int cuInit(unsigned flags) { return FAILS; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGetAttribute(int* value, int which, int device) {
    *value = which == 75 ? 8 + device : which == 76 ? 0 : -1;
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no cc on PATH")
@pytest.mark.parametrize(("fails", "archs"), [(0, ["80", "90"]), (34, [])])
def test_gpus_are_those_of_the_driver(fails, archs, tmp_path):
    (tmp_path / "cuda.c").write_text(FAKE_DRIVER.replace("FAILS", str(fails)))
    command = ["cc", "-shared", "-fPIC", "cuda.c", "-o", "libcuda.so.1"]
    subprocess.run(command, cwd=tmp_path, check=True)
    code = "import json, setup; print(json.dumps(sorted(setup.gpu_archs())))"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert json.loads(done.stdout) == archs, done.stderr


def test_the_toolkit_is_where_nvcc_says(build, fake_nvcc, tmp_path):
    """The nvcc on PATH may be a wrapper far from the toolkit."""
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "lib64").mkdir()
    env = {**fake_nvcc(["80", "90"], toolkit / "bin" / ".."), "DOMERGE_CUDA": "1"}
    cuda = build.find_cuda(env)
    assert cuda.root == toolkit.resolve()
    with pytest.raises(build.BuildError, match=r"libcudart_static.a is not under"):
        cuda.library_dir()
    (toolkit / "lib64" / "libcudart_static.a").touch()
    assert cuda.library_dir() == toolkit.resolve() / "lib64"


def test_default_architectures_are_those_nvcc_knows(build, fake_nvcc):
    asked = {"DOMERGE_CUDA": "1"}
    assert build.find_cuda({**fake_nvcc(["75", "80", "90"]), **asked}).archs == ("80", "90")
    known = fake_nvcc(["80", "90", "100", "120"])
    assert build.find_cuda({**known, **asked}).archs == ("80", "90", "100")
    with pytest.raises(build.BuildError, match="set DOMERGE_CUDA_ARCHS"):
        build.find_cuda({**fake_nvcc(["50", "60"]), **asked})


def test_architectures_asked_for(build, fake_nvcc):
    env = {**fake_nvcc(["75", "80", "90"]), "DOMERGE_CUDA": "1"}
    cuda = build.find_cuda({**env, "DOMERGE_CUDA_ARCHS": "80; 90a"})
    assert cuda.archs == ("80", "90a")
    assert cuda.gencode() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    with pytest.raises(build.BuildError, match=r"'100', which .* does not know; it knows 75, 80"):
        build.find_cuda({**env, "DOMERGE_CUDA_ARCHS": "80;100"})
    with pytest.raises(build.BuildError, match=r"'75': the kernels need 80 or later"):
        build.find_cuda({**env, "DOMERGE_CUDA_ARCHS": "90;75"})


def test_a_failing_nvcc_is_quoted(build, fake_nvcc):
    cuda = build.find_cuda({**fake_nvcc(["80"]), "DOMERGE_CUDA": "1"})
    with pytest.raises(build.BuildError, match="nvcc: what is"):
        build.compile_cuda(cuda, build.cuda_sources()[0], Path(cuda.nvcc).parent)


def test_one_source_is_compiled_for_every_instruction_set(build):
    sources = build.cpp_sources("x86_64")
    assert "-mavx512f" in sources["csrc/cpu/kernels_avx512.cpp"]
    assert not {"-mavx512f"} & set(sources["csrc/cpu/kernels_avx2.cpp"])
    others = [flags for name, flags in sources.items() if "kernels_a" not in name]
    assert len(others) > 2
    assert not any(others)
    assert [n for n in build.cpp_sources("aarch64") if "kernels_" in n] == [
        "csrc/cpu/kernels_baseline.cpp"
    ]
    assert all((ROOT / name).exists() for name in [*sources, *build.cuda_sources()])


def test_the_source_distribution_holds_the_whole_repository(tmp_path):
    """Its tests too, which need the documents, benchmarks and examples."""
    copy, out = tmp_path / "copy", tmp_path / "out"
    patterns = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    # .git, and what setuptools writes into every source distribution.
    named = shutil.ignore_patterns(".git", "PKG-INFO", *(x.strip("/") for x in patterns))

    def ignored(folder: str, names: list[str]) -> set[str]:
        return named(folder, names) | {x for x in names if f"{folder}/{x}".endswith("marks/data")}

    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / "benchmarks/data").mkdir()
    (copy / "benchmarks/data/large").touch()
    expected = {str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file()}
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=tar", "-d", str(out)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (archive,) = out.iterdir()
    with tarfile.open(archive) as tar:
        found = {x.name.partition("/")[2] for x in tar.getmembers() if x.isfile()}
    made = {name for name in found if "egg-info" in name} | {"PKG-INFO", "setup.cfg"}
    assert expected - found == {"benchmarks/data/large"}
    assert found - expected <= made


def build_into(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    environment = {**os.environ, **env}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_build_fails_with_one_clear_line(tmp_path):
    done = build_into(tmp_path, DOMERGE_CUDA="1", PATH=str(tmp_path))
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("error: DOMERGE_CUDA=1 but no nvcc")


@pytest.mark.slow
@needs_nvcc
def test_cuda_objects_hold_code_for_the_architectures(build, tmp_path):
    cuda = build.find_cuda({**os.environ, "DOMERGE_CUDA": "1", "DOMERGE_CUDA_ARCHS": ""})
    source = tmp_path / "probe.cu"
    source.write_text("__global__ void probe(float* x) { x[threadIdx.x] *= 2; }\n")
    content = Path(build.compile_cuda(cuda, str(source), tmp_path)).read_bytes()
    for arch in cuda.archs:
        assert f"-arch sm_{arch} ".encode() in content


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a whole build in it: with CUDA where there is an nvcc, for one architecture;
    tests/test_machine_code.py compiles for all."""
    folder = tmp_path_factory.mktemp("build")
    done = build_into(folder, DOMERGE_CUDA="1" if NVCC else "0", DOMERGE_CUDA_ARCHS="80")
    assert done.returncode == 0, done.stderr
    return folder


def ask(folder: Path, module: str, expression: str):
    """What an extension built there answers, in a process of its own, without the package."""
    code = f"import json, {module}; print(json.dumps({module}.{expression}))"
    where = str(folder / "lib" / "domerge_fast")
    done = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_installed_extension_runs_without_torch():
    from domerge_fast import _C

    code = "import sys, _C; print(_C.isas()[-1], 'torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    where = Path(_C.__file__).parent
    found = subprocess.run(command, cwd=where, capture_output=True, text=True, check=True)
    assert found.stdout == "baseline False\n"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(aarch64.COMPILER) is None, reason=f"no {aarch64.COMPILER} on PATH")
def test_the_kernels_compile_for_aarch64(tmp_path):
    objects = aarch64.compile_objects(tmp_path, [sysconfig.get_path("include")])
    assert {Path(path).stem for path in objects} >= {"bindings", "kernels_baseline"}
    machine = {Path(path).read_bytes()[18:20] for path in objects}
    assert machine == {(183).to_bytes(2, "little")}  # EM_AARCH64


@pytest.mark.slow
def test_the_extension_runs_without_torch(built):
    assert ask(built, "_C", "isas()")[-1] == "baseline"
    assert any((built / "lib" / "domerge_fast").glob("_cuda*")) == (NVCC is not None)


@pytest.mark.slow
@needs_nvcc
def test_the_cuda_extension_runs_without_torch_and_without_a_driver(built):
    cuda = ask(built, "_cuda", "info()")
    assert cuda["archs"] == "80"
    assert cuda["runtime"] >= 12000
    assert (cuda["devices"] > 0) == (cuda["error"] == "")
    if cuda["driver"] == 0:
        assert cuda["error"] == "CUDA driver is missing"
    assert ask(built, "_cuda", "ON_HOST") is False


@pytest.mark.slow
@needs_nvcc
def test_without_a_device_the_cuda_build_merges_on_the_cpu_and_doctor_says_why(built, tmp_path):
    package = tmp_path / "domerge_fast"
    shutil.copytree(ROOT / "domerge_fast", package, ignore=shutil.ignore_patterns("*.so"))
    for library in (built / "lib" / "domerge_fast").glob("*.so"):
        shutil.copy(library, package)
    code = (
        "import torch, domerge_fast as dm, json;"
        "from domerge_fast.cli import examine;"
        "pair = [dm.from_tensors({'x': (torch.ones(2, 5), torch.ones(4, 2))}) for _ in range(2)];"
        "dm.merge(pair, device='cpu');"
        "print(json.dumps([dm.__file__, examine.examine()]))"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("DOMERGE_TEST_CUDA", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    where, found = json.loads(done.stdout)
    assert where.startswith(str(tmp_path))
    assert re.match(r"off: (CUDA driver is missing|no CUDA)", found["backend cuda"])
    assert re.match(r"built for 80; (CUDA driver is missing|no CUDA)", found["CUDA kernels"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm on PATH")
def test_no_symbol_of_one_instruction_set_can_be_linked_into_another(built):
    """A shared inline function could run AVX-512 code on a machine that has none."""
    objects = list((built / "temp").rglob("kernels_*.o"))
    assert objects
    for path in objects:
        isa = path.stem.removeprefix("kernels_")
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", "--extern-only", str(path)],
            capture_output=True,
            text=True,
            check=True,
        )
        symbols = [line.split(maxsplit=2)[2] for line in listing.stdout.splitlines()]
        names = [s for s in symbols if not s.startswith("DW.ref.")]  # addresses, no code
        assert any(name.startswith(f"domerge::{isa}::kernels") for name in names)
        assert [name for name in names if f"domerge::{isa}::" not in name] == []
