"""Builds the native module by calling CMake; everything else about the package is in pyproject.toml.

Environment: DEEPRELAX_BUILD_CUDA=0|1|auto (default auto: CUDA code where nvcc is), DEEPRELAX_BUILD_NATIVE=0 to leave the native
module out. Without a C++ compiler the package installs all the same and runs on eager torch (and Triton where there is one).
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


def why_not_native() -> str | None:
    """Return why the native module is left out, or None where it is built."""
    if os.environ.get("DEEPRELAX_BUILD_NATIVE") == "0":
        return "DEEPRELAX_BUILD_NATIVE=0"
    named = os.environ.get("CXX", "").split()[:1]
    if not any(map(shutil.which, named or ["c++", "g++", "clang++"])):
        return "no C++ compiler was found"
    return None


class RecordCommit(build_py):
    """Leaves the commit of the sources in the built package, which has no repository to ask."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the package stays in the source tree
            return
        package = ROOT / "deeprelax_cuda"
        source = runpy.run_path(str(package / "commit.py"))
        record = Path(self.build_lib, package.name, source["RECORD"])
        record.unlink(missing_ok=True)  # a build folder may be used again
        if commit := source["commit_of"](package):
            record.write_text(commit + "\n", encoding="ascii")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("DEEPRELAX_BUILD_CUDA", "auto")
        if cuda not in ("0", "1", "auto"):
            raise SystemExit(f"deeprelax: DEEPRELAX_BUILD_CUDA: expected 0, 1 or auto, got {cuda!r}")
        if reason := why_not_native():
            if cuda == "1":
                raise SystemExit(f"deeprelax: DEEPRELAX_BUILD_CUDA=1 cannot be had: {reason}")
            print(f"deeprelax: {reason}; the native module is left out, the eager backend serves", file=sys.stderr)
            return
        import pybind11

        build = Path(self.build_temp).resolve() / "cmake"
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        cmake = shutil.which("cmake") or "cmake"
        configure = [
            "-G", "Ninja",
            "-DDEEPRELAX_BUILD_PYTHON=ON",
            "-DDEEPRELAX_BUILD_TESTS=OFF",
            f"-DDEEPRELAX_BUILD_CUDA={cuda}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *configure], check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(target), "--component", "python"], check=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


setup(
    ext_modules=[Extension("deeprelax_cuda._native", sources=[])], cmdclass={"build_py": RecordCommit, "build_ext": CMakeBuild}
)
