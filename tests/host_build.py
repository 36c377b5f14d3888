"""Builds the product's Python module with a host in the place of the GPU, and starts Python with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
COMPILER = os.environ.get("CXX", "c++").split()
CONTRACT = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w"]
SANITIZE = ["-g1", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# The bodies are forced inline for a GPU's sake. Left to itself a compiler takes a tenth of the time, the sanitizers' too.
BODIES = ["-Dalways_inline=noinline"]
BINDINGS = ["-O0", "-DDEEPRELAX_CUDA", "-DDEEPRELAX_OPENMP=0"]
BINDINGS += [f'-DDEEPRELAX_{name}="host"' for name in ("VERSION", "COMPILER", "FLAGS", "NVCC", "ARCHITECTURES")]


def library(name: str) -> str | None:
    """Return the path of a library that comes with the compiler, None where there is none of that name."""
    asked = subprocess.run([*COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = asked.stdout.strip()
    return path if os.path.isabs(path) and os.path.exists(path) else None


def missing(sanitized: bool) -> str | None:
    """Return why the module cannot be built and run here, None where it can."""
    if shutil.which(COMPILER[0]) is None:
        return "there is no C++ compiler"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "there are no headers of Python"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 is not installed"
    if sanitized and (sys.platform != "linux" or not library("libasan.so") or not library("libubsan.so")):
        return f"{' '.join(COMPILER)} has no libasan.so and libubsan.so"
    return None


def build(folder: Path, sanitized: bool) -> Path:
    """Return the module, built in a folder where objects may lie that an earlier build has made.

    Only what a GPU would run, and its launcher, are sanitized.
    """
    import pybind11

    headers = [sysconfig.get_paths()["include"], pybind11.get_include(), CSRC, CSRC / "include"]
    kind = "sanitized" if sanitized else "plain"
    cuda = SANITIZE if sanitized else ["-O0"]
    sources = {  # those that take longest first
        f"{kind}-host.o": (TESTS / "cpp/host_device.cpp", cuda + BODIES),
        "bindings.o": (CSRC / "python/bindings.cpp", BINDINGS),
        "portable.o": (CSRC / "cpu/portable.cpp", ["-O2"]),
        f"{kind}-plan.o": (CSRC / "cuda/plan.cpp", cuda + BODIES),
        "cpu.o": (CSRC / "cpu/cpu.cpp", ["-O2"]),
    }

    def compile_one(name: str) -> None:
        source, flags = sources[name]
        if not (folder / name).exists():
            run(*COMPILER, *CONTRACT, *flags, *(f"-I{path}" for path in headers), "-c", source, "-o", folder / name)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources))
    module = folder / f"{kind}.so"
    run(*COMPILER, "-shared", *(SANITIZE if sanitized else []), *(folder / name for name in sources), "-o", module)
    return module


def run(*command: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def sanitized_environment() -> dict[str, str]:
    """Return the environment in which a Python that knows nothing of sanitizers loads what is sanitized."""
    # The C++ library too: AddressSanitizer must find the function that throws when it starts.
    preload = " ".join(filter(None, map(library, ("libasan.so", "libubsan.so", "libstdc++.so"))))
    return {
        **os.environ,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves much to the end of the process
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
