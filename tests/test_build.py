"""The ways to install: with and without a compiler, with and without nvcc, without torch in the build environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), env={**os.environ, **(env or {})}, cwd=cwd, capture_output=True, text=True, check=False
    )


def python(code: str, **env: str) -> str:
    done = run(sys.executable, "-c", code, env=env, cwd=Path(os.sep))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what the build reads, so that builds do not meet in one folder."""
    names = (
        "CMakeLists.txt",
        "MANIFEST.in",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "csrc",
        "deeprelax_cuda",
        "bench",
        "triton_kernels",
    )
    target = tmp_path / "sources"
    target.mkdir()
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
        else:
            shutil.copy(ROOT / name, target / name)
    return target


def install(sources: Path, target: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run(
        sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--target", target, sources,
        env={"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **env},
    )  # fmt: skip


def path_without(command: str) -> str:
    """PATH without the folders that hold a command, Python's own folder apart."""
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / command).exists()]
    return os.pathsep.join([str(Path(sys.executable).parent), *folders])


@pytest.mark.slow
def test_import_needs_torch_alone_and_touches_no_device():
    loaded = python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import deeprelax_cuda\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(torch.cuda.is_initialized(), new, 'deeprelax_cuda.train' in sys.modules)"
    )
    assert loaded.split() == ["False", "{'deeprelax_cuda'}", "False"]


@pytest.mark.slow
def test_nothing_is_installed_under_a_name_of_somebody_else():
    where = python("import importlib.util as u; print(u.find_spec('bench'), u.find_spec('triton_kernels'))")
    assert where.split() == ["None", "None"]
    assert "deeprelax_cuda" in python("import deeprelax_cuda.bench.cpu_step as b; print(b.__name__)")


@pytest.mark.slow
def test_without_a_compiler_the_package_runs_on_eager(sources, tmp_path):
    done = install(sources, tmp_path / "site", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler was found; the native module is left out" in done.stdout + done.stderr
    assert not list((tmp_path / "site").rglob("*.so"))
    said = python(
        "import warnings, torch, deeprelax_cuda as dr\n"
        "p = torch.nn.Parameter(torch.ones(5)); p.grad = torch.ones(5)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    opt = dr.EntropySGD([p], seed=0)\n"
        "    opt.step(); opt.step()\n"
        "print(dr.__file__, dr.backends.available('cpu'), [str(w.message) for w in caught], p.tolist())",
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert str(tmp_path) in said
    assert "['eager']" in said
    assert said.count("was not built") == 1, "the fallback is said once, with its reason"


@pytest.mark.slow
def test_cuda_asked_for_and_missing_is_an_error_and_auto_says_so(sources, tmp_path):
    env = {"PATH": path_without("nvcc"), "CUDACXX": "", "CUDA_PATH": ""}
    if shutil.which("nvcc", path=env["PATH"]):
        pytest.skip("nvcc lies beside the Python that runs the tests")
    done = install(sources, tmp_path / "site", DEEPRELAX_BUILD_CUDA="1", **env)
    assert done.returncode != 0
    assert "DEEPRELAX_BUILD_CUDA=1, but no nvcc was found" in done.stdout + done.stderr
    done = install(sources, tmp_path / "site", DEEPRELAX_BUILD_CUDA="auto", **env)
    assert done.returncode == 0, done.stderr
    assert "no nvcc found; CUDA code is left out" in done.stdout + done.stderr
    assert list((tmp_path / "site" / "deeprelax_cuda").glob("_native*.so"))


@pytest.mark.slow
def test_flags_that_change_arithmetic_are_refused(sources, tmp_path):
    done = install(sources, tmp_path / "site", CXXFLAGS="-O2 -ffast-math", DEEPRELAX_BUILD_CUDA="0")
    assert done.returncode != 0
    assert "which the numeric contract forbids" in " ".join((done.stdout + done.stderr).split())


def test_a_wrong_switch_is_one_clear_line(sources, tmp_path):
    done = install(sources, tmp_path / "site", DEEPRELAX_BUILD_CUDA="yes")
    assert done.returncode != 0
    assert "DEEPRELAX_BUILD_CUDA: expected 0, 1 or auto, got 'yes'" in done.stdout + done.stderr


def test_an_sdist_has_all_that_a_build_needs(sources, tmp_path):
    done = run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=sources)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    needed = {str(path.relative_to(sources)) for path in (sources / "csrc").rglob("*.*")} | {"CMakeLists.txt", "setup.py"}
    assert needed <= packed


@pytest.mark.slow
def test_pip_install_in_an_environment_without_torch(sources, tmp_path):
    """Under build isolation, as a user's pip does it: the build must not need torch."""
    venv.create(tmp_path / "venv", with_pip=True)
    start = time.perf_counter()
    done = run(tmp_path / "venv/bin/python", "-m", "pip", "install", "--no-deps", sources)
    seconds = time.perf_counter() - start
    if done.returncode != 0 and "Could not find a version that satisfies the requirement" in done.stdout + done.stderr:
        pytest.skip("no package index to fetch the build requirements from")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "venv").rglob("deeprelax_cuda/_native*.so"))
    assert run(tmp_path / "venv/bin/python", "-c", "import torch").returncode != 0
    print(f"pip install took {seconds:.1f} s")


@pytest.mark.slow
@pytest.mark.parametrize(
    "cuda", ["0", pytest.param("1", marks=pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"))]
)
def test_the_cmake_package_serves_another_program(cuda, sources, tmp_path):
    build, prefix, example = tmp_path / "build", tmp_path / "prefix", tmp_path / "example"
    tools = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    steps = [
        ("cmake", "-S", sources, "-B", build, "-G", "Ninja", f"-DDEEPRELAX_BUILD_CUDA={cuda}", "-DDEEPRELAX_BUILD_TESTS=OFF"),
        ("cmake", "--build", build),
        ("cmake", "--install", build, "--prefix", prefix, "--component", "cpp"),
        ("cmake", "-S", ROOT / "examples/cpp", "-B", example, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}"),
        ("cmake", "--build", example),
        (example / "quadratic",),
    ]
    for command in steps:
        done = run(*command, env=tools)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "loss at the anchor" in done.stdout

    # What one instruction set's file leaves to the linker to share, another may get: instructions this processor lacks.
    kernels = [path for path in build.rglob("csrc/cpu/*.o") if path.name != "cpu.cpp.o"]
    assert kernels
    for path in kernels:
        symbols = run("nm", "--demangle", path).stdout.splitlines()
        assert symbols
        assert not [line for line in symbols if line[17:18] in ("W", "V", "u")], path


@pytest.mark.slow
def test_the_example_in_python_learns():
    code = f"import runpy; print(runpy.run_path({str(ROOT / 'examples/own_loop.py')!r})['main']())"
    assert float(python(code).split()[-1]) < 0.03
