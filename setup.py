"""Builds `domerge_fast._C`, C++ for every instruction set, and `._cuda` where it is of use.

Environment:
    DOMERGE_CUDA        1: CUDA or fail; 0: no CUDA; unset: CUDA where nvcc is on PATH and the
                        driver shows a GPU, and then for that GPU: nvcc takes minutes.
    DOMERGE_CUDA_ARCHS  e.g. "80;90;100"; PTX is made for the newest.

Torch is neither needed nor asked.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).parent
CUDA_MODULE = "domerge_fast._cuda"
CPP_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
CPP_FLAGS += ["-ffp-contract=fast", "-fno-math-errno"]  # products fuse, square roots vectorise
NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# Host code that a kernel reaches is a mere warning otherwise.
NVCC_FLAGS += ["--diag-error", "20011,20013,20014"]
DEFAULT_ARCHS = ("80", "90", "100")
OLDEST_ARCH = 80  # those before it have less shared memory than the kernels use
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISA_FLAGS = {
    "amx": [*AVX512, "-mamx-tile", "-mamx-bf16"],
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "avx512": AVX512,
    "avx2": AVX2,
    "baseline": [],
}
NEWER = {"amx", "avx512_bf16"}  # than some compilers: GCC 11 knows both, Clang 12 too


class BuildError(SetupError):
    """The build cannot do what was asked; the message says what to change."""


@dataclass(frozen=True)
class Cuda:
    """A CUDA compiler: its path, the toolkit's root and the architectures to compile for."""

    nvcc: str
    root: Path
    archs: tuple[str, ...]

    def gencode(self) -> list[str]:
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        newest = max(self.archs, key=arch_number)
        return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]

    def library_dir(self) -> Path:
        for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
            if (self.root / name / "libcudart_static.a").exists():
                return self.root / name
        raise BuildError(
            f"libcudart_static.a is not under {self.root}: install the CUDA runtime's development "
            "package, or set DOMERGE_CUDA=0 to build without CUDA"
        )


def arch_number(arch: str) -> int:
    return int(arch.rstrip("af"))


def run(command: list[str]) -> str:
    """Standard output and error of a command that must succeed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stdout}")
    return done.stdout


def toolkit_root(nvcc: str) -> Path:
    """The toolkit's folder as nvcc itself sees it: the nvcc on PATH may be a wrapper script."""
    dry_run = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    for line in run(dry_run).splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    raise BuildError(f"{nvcc} --dryrun does not name its toolkit (TOP=)")


def choose_archs(nvcc: str, wanted: str | None) -> tuple[str, ...]:
    """The architectures asked for, or the default ones that this nvcc knows."""
    known = {line.removeprefix("compute_") for line in run([nvcc, "--list-gpu-arch"]).split()}
    if wanted:
        archs = tuple(a.strip() for a in wanted.replace(",", ";").split(";") if a.strip())
        for arch in archs:
            if arch.rstrip("af") not in known:
                raise BuildError(
                    f"DOMERGE_CUDA_ARCHS names {arch!r}, which {nvcc} does not know; "
                    f"it knows {', '.join(sorted(known, key=arch_number))}"
                )
            if arch_number(arch) < OLDEST_ARCH:
                raise BuildError(
                    f"DOMERGE_CUDA_ARCHS names {arch!r}: the kernels need {OLDEST_ARCH} or later"
                )
        if archs:
            return archs
    archs = tuple(a for a in DEFAULT_ARCHS if a in known)
    if not archs:
        raise BuildError(f"{nvcc} knows none of {DEFAULT_ARCHS}: set DOMERGE_CUDA_ARCHS")
    return archs


def gpu_archs() -> set[str]:
    """Architectures of the GPUs that the driver shows; none without a driver."""
    major, minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return set()
    count, number = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return set()

    def attribute(which: int, device: int) -> int:
        failed = driver.cuDeviceGetAttribute(ctypes.byref(number), which, device)
        return 0 if failed else number.value

    return {f"{attribute(major, k)}{attribute(minor, k)}" for k in range(count.value)}


def archs_for(nvcc: str, gpus: set[str]) -> tuple[str, ...]:
    """The architectures that code has to be made for to run on these GPUs: their own, or the newest
    before it where nvcc does not know it yet, whose PTX the driver compiles. None for old GPUs."""
    listed = run([nvcc, "--list-gpu-arch"]).split()
    known = {int(line.removeprefix("compute_")) for line in listed if line[-1].isdigit()}
    chosen = {
        max((arch for arch in known if OLDEST_ARCH <= arch <= int(gpu)), default=None)
        for gpu in gpus
    }
    return tuple(str(arch) for arch in sorted(chosen - {None}))


def find_cuda(env: dict[str, str]) -> Cuda | None:
    """The CUDA compiler to use, or None to build without one."""
    wish = env.get("DOMERGE_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"DOMERGE_CUDA={wish}: use 1 (CUDA or fail), 0 (none) or leave it unset")
    if wish == "0":
        return None
    nvcc = shutil.which("nvcc", path=env.get("PATH"))
    if nvcc is None:
        if wish == "1":
            raise BuildError(
                "DOMERGE_CUDA=1 but no nvcc is on PATH: install the CUDA toolkit and put its bin "
                "folder on PATH, or unset DOMERGE_CUDA to build without CUDA"
            )
        return None
    wanted = env.get("DOMERGE_CUDA_ARCHS")
    if wish != "1":
        archs = archs_for(nvcc, gpu_archs())
        if not archs:
            print("no CUDA part: no GPU is here that it runs on; DOMERGE_CUDA=1 builds it anyway")
            return None
        wanted = wanted or ";".join(archs)
    return Cuda(nvcc, toolkit_root(nvcc), choose_archs(nvcc, wanted))


def isas(machine: str) -> list[str]:
    """The instruction sets compiled on this kind of machine."""
    return list(ISA_FLAGS) if machine in ("x86_64", "AMD64") else ["baseline"]


def accepts(compiler: Any, flags: list[str], folder: Path) -> bool:
    """Whether the compiler knows these flags."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    try:
        compiler.compile([str(probe)], output_dir=str(folder), extra_postargs=flags)
    except CompileError:
        return False
    return True


def relative(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def cpp_sources(machine: str) -> dict[str, list[str]]:
    """C++ source -> its own compiler flags."""
    names = [*relative("csrc/*.cpp"), *relative("csrc/cpu/*.cpp")]
    sources: dict[str, list[str]] = {n: [] for n in names if "/kernels_" not in n}
    for isa in isas(machine):
        sources[f"csrc/cpu/kernels_{isa}.cpp"] = ISA_FLAGS[isa]
    return sources


def cuda_sources() -> list[str]:
    """Those for nvcc, the largest first, which takes longest; csrc/cuda/bindings.cpp is for the C++
    compiler."""
    found = relative("csrc/cuda/*.cu")
    return sorted(found, key=lambda source: (ROOT / source).stat().st_size, reverse=True)


def nvcc_command(cuda: Cuda, source: str, target: Path) -> list[str]:
    archs = ";".join(cuda.archs)
    flags = [*NVCC_FLAGS, *cuda.gencode(), f'-DDOMERGE_CUDA_ARCHS="{archs}"']
    return [cuda.nvcc, *flags, "-c", str(ROOT / source), "-o", str(target)]


def compile_cuda(cuda: Cuda, source: str, folder: Path) -> str:
    """Compiles one .cu and returns its object."""
    target = folder / (Path(source).stem + ".cuda.o")
    target.parent.mkdir(parents=True, exist_ok=True)
    run(nvcc_command(cuda, source, target))
    return str(target)


class BuildExtension(build_ext):
    """Compiles in parallel, each source with its own flags."""

    def finalize_options(self) -> None:
        self.cuda = find_cuda(dict(os.environ))
        if self.cuda is None:
            modules = self.distribution.ext_modules
            self.distribution.ext_modules = [m for m in modules if m.name != CUDA_MODULE]
        super().finalize_options()

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":
            raise BuildError("the kernels need GCC or Clang (vector extensions), not MSVC")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            if ext.name == CUDA_MODULE and self.cuda:
                self.link(ext, self.compile_cuda(ext, self.cuda, pool), self.cuda)
            else:
                self.link(ext, self.compile_cpu(ext, pool), None)

    def compile_cpu(self, ext: Extension, pool: ThreadPoolExecutor) -> list[str]:
        machine = platform.machine()
        sources = cpp_sources(machine)
        macros = [("DOMERGE_X86", "1")] if len(isas(machine)) > 1 else []
        for isa in sorted(NEWER & set(isas(machine))):
            if accepts(self.compiler, ISA_FLAGS[isa], Path(self.build_temp)):
                macros.append((f"DOMERGE_{isa.upper()}", "1"))
            else:
                del sources[f"csrc/cpu/kernels_{isa}.cpp"]
        jobs = [pool.submit(self.compile_cpp, ext, s, macros, f) for s, f in sources.items()]
        return [job.result() for job in jobs]

    def compile_cuda(self, ext: Extension, cuda: Cuda, pool: ThreadPoolExecutor) -> list[str]:
        folder = Path(self.build_temp)
        jobs = [pool.submit(compile_cuda, cuda, source, folder) for source in cuda_sources()]
        jobs += [pool.submit(self.compile_cpp, ext, source, [], []) for source in ext.sources]
        return [job.result() for job in jobs]

    def compile_cpp(
        self, ext: Extension, source: str, macros: list[tuple[str, str]], flags: list[str]
    ) -> str:
        """Compiles one C++ source and returns its object."""
        import pybind11

        (target,) = self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            macros=macros,
            depends=ext.depends,
            include_dirs=[*self.compiler.include_dirs, pybind11.get_include()],
            extra_postargs=[*CPP_FLAGS, *flags],
        )
        return target

    def link(self, ext: Extension, objects: list[str], cuda: Cuda | None) -> None:
        libraries = ["cudart_static", "dl", "rt"] if cuda else []
        threads = [] if platform.system() == "Darwin" else ["-pthread"]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=[*self.get_libraries(ext), *libraries],
            library_dirs=[*ext.library_dirs, *([str(cuda.library_dir())] if cuda else [])],
            extra_postargs=threads,
            build_temp=self.build_temp,
            target_lang="c++",
        )


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension("domerge_fast._C", sources=list(cpp_sources(platform.machine()))),
            Extension(CUDA_MODULE, sources=["csrc/cuda/bindings.cpp"]),
        ],
        cmdclass={"build_ext": BuildExtension},
    )
