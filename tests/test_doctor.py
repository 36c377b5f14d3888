"""`deeprelax doctor`: healthy machines, every cause of exit status 1; and what it and all results say of their origin."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import deeprelax_cuda
from deeprelax_cuda import backends, doctor, golden, machine
from deeprelax_cuda.backends import cpu
from deeprelax_cuda.cli import main

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ["versions", "triton", "native_module", "platform", "gpus", "backends", "self_test", "problems"]


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch):
    monkeypatch.delenv("DEEPRELAX_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # with it, the self-test takes Triton's kernels too, and its time


@pytest.fixture
def quick(monkeypatch):
    """Leave out the probes that take their time and have tests of their own."""
    for title in ("triton", "self-test"):
        monkeypatch.setitem(doctor.PROBES, title, lambda: doctor.Findings([], []))


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def examine(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Return the exit status and what --json says."""
    status = main(["doctor", "--json"])
    return status, json.loads(capsys.readouterr().out, parse_constant=refuse)


def problems_in_text(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines at the end of the text."""
    main(["doctor"])
    return [line.strip() for line in capsys.readouterr().out.split("\nproblems\n")[1].splitlines()]


# ---- A healthy machine -------------------------------------------------------------------------------------------------------


def test_text_of_a_healthy_machine(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line and line[0] != " "] == [*doctor.PROBES, "problems"]
    assert lines[-1] == "  none"
    column = lines[1].index(deeprelax_cuda.__version__)
    rows = [line for line in lines[:-1] if line.startswith("  ")]
    assert all(row[column - 2 : column] == "  " and row[column] != " " for row in rows), "the texts are aligned"
    text = " ".join(" ".join(lines).split())
    assert f"torch {torch.__version__}, built for " in text
    assert 'serves, and is what "auto" picks' in text
    for name in cpu.instruction_sets():
        assert f"cpu tensors, cpu ({name}) 319 entries, all bits right, " in text
    assert "cpu tensors, eager 319 entries, all bits right, " in text


def test_json_of_a_healthy_machine(capsys):
    before = cpu.build_info()
    status, said = examine(capsys)
    assert (status, said["problems"], list(said)) == (0, [], SECTIONS)
    assert said["versions"] == {**machine.versions(), "hip": torch.version.hip}
    assert said["platform"] == {**machine.platform(), "cores": os.cpu_count()}
    served = said["backends"]["devices"]["cpu"]
    assert served["auto"] == backends.select("cpu", torch.float32).name
    assert list(served["unavailable"]) == list(backends.NAMES)
    tested = {(row["device"], row["backend"], row["instruction_set"]): row for row in said["self_test"]}
    assert {("cpu", "eager", None), *(("cpu", "cpu", name) for name in cpu.instruction_sets())} <= set(tested)
    for row in tested.values():
        assert (row["entries"], row["failures"]) == (319, [])
    assert cpu.build_info() == before, "the instruction set in use is what it was"


@pytest.mark.skipif(not cpu.build_info(), reason="the native module is not built")
def test_the_build_is_told(capsys, quick):
    built = examine(capsys)[1]["native_module"]
    assert built == {**cpu.build_info(), "instruction_sets": cpu.instruction_sets(), "missing": None}
    assert "-ffp-contract=off" in built["flags"].split()
    assert built["instruction_set"] in built["instruction_sets"]
    assert built["instruction_sets"][-1] == "portable"


@pytest.mark.skipif(not cpu.build_info(), reason="the native module is not built")
def test_every_instruction_set_is_tested_and_the_one_in_use_stays(monkeypatch):
    asked, known = [], doctor.selftest.run

    def run(name: str, device: str) -> doctor.selftest.Result:
        asked.append((name, cpu.build_info()["instruction_set"]))
        return known(name, device)

    monkeypatch.setattr(doctor.selftest, "run", run)
    preferred, *others = cpu.instruction_sets()
    for used in (preferred, *others):
        with cpu.instruction_set(used):
            asked.clear()
            doctor.PROBES["self-test"]()
            assert [entry for entry in asked if entry[0] == "cpu"] == [("cpu", name) for name in (preferred, *others)]
            assert cpu.build_info()["instruction_set"] == used
            assert cpu.instruction_sets() == [preferred, *others]
            assert cpu.build_info()["instruction_set"] == used
    assert cpu.build_info()["instruction_set"] == preferred
    with (
        pytest.raises(ValueError, match=r"instruction set: expected one of .*portable, got abacus"),
        cpu.instruction_set("abacus"),
    ):
        pass


def test_what_a_machine_merely_lacks_is_no_problem(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    status, said = examine(capsys)
    assert status == 0
    assert said["triton"] == {"version": None, "error": None}
    assert said["gpus"] == {"driver": None, "devices": [], "reason": "there is no NVIDIA driver"}


def test_gpus_are_told(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC 12.2.0\n")
    monkeypatch.setattr(doctor, "DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    found = doctor.PROBES["GPUs"]()
    assert found.rows == [("NVIDIA driver", "570.86.15"), ("cuda:0", "NVIDIA H200, compute capability 9.0, 150.0 GiB")]
    devices = [{"name": "NVIDIA H200", "compute_capability": "9.0", "memory_bytes": 150 * 2**30}]
    assert found.facts == {"driver": "570.86.15", "devices": devices, "reason": None}
    assert found.problems == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_gpu_of_this_machine(capsys):
    status, said = examine(capsys)
    assert (status, said["problems"]) == (0, [])
    assert said["gpus"]["devices"][0]["name"] == torch.cuda.get_device_name(0)
    on_gpu = [row for row in said["self_test"] if row["device"] == "cuda"]
    assert on_gpu
    assert not any(row["failures"] for row in on_gpu)


@pytest.mark.slow
def test_it_needs_torch_alone(tmp_path):
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('numpy', 'sklearn', 'matplotlib', 'tqdm')))\n"
        "from deeprelax_cuda.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    # Elsewhere, so that it is the package that is installed, and not the sources that lie here.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- What should work and does not -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normals", "pairs", "updates"])
def test_one_wrong_bit_is_a_problem(kind, capsys, monkeypatch, quick):
    known = golden.load()
    entry = known[kind][3]
    if kind == "updates":
        others, last = entry["out"]["y"].rsplit(maxsplit=1)
        entry["out"]["y"] = f"{others} {int(last, 16) ^ 1:0{len(last)}x}"
    else:
        entry["normals"][1] = torch.tensor(float.fromhex(entry["normals"][1])).nextafter(torch.tensor(9.0)).item().hex()
    monkeypatch.setattr(golden, "load", lambda: known)
    monkeypatch.setitem(doctor.PROBES, "self-test", doctor._self_test)
    status, said = examine(capsys)
    assert status == 1
    assert len(said["problems"]) == len(said["self_test"]) == len(cpu.instruction_sets()) + 1
    for problem, row in zip(said["problems"], said["self_test"], strict=True):
        assert len(row["failures"]) == 1
        assert problem.startswith(f"self-test: cpu tensors, {row['backend']}")
        assert f"1 of 319 entries differ, first {row['failures'][0]}" in problem
        assert ": expected " in problem
    assert problems_in_text(capsys) == said["problems"]


def test_a_self_test_that_raises_is_a_problem(capsys, monkeypatch, quick):
    def broken(*_, **__):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(backends.load("eager"), "gaussian", broken)
    monkeypatch.setitem(doctor.PROBES, "self-test", doctor._self_test)
    status, said = examine(capsys)
    assert status == 1
    line = "self-test: cpu tensors, eager: failed: RuntimeError: no kernel image is available"
    assert said["problems"] == problems_in_text(capsys) == [line]


def test_a_backend_that_is_unknown_or_cannot_serve_is_a_problem(capsys, monkeypatch, quick):
    monkeypatch.setenv("DEEPRELAX_BACKEND", "abacus")
    wanted = f"backends: DEEPRELAX_BACKEND=abacus: expected one of {', '.join(('auto', *backends.NAMES))}"
    status, said = examine(capsys)
    assert (status, said["problems"]) == (1, [wanted])
    assert said["backends"]["devices"]["cpu"]["auto"] is None
    monkeypatch.setenv("DEEPRELAX_BACKEND", "cpu")
    monkeypatch.setattr(cpu, "unavailable", lambda device, dtype: "it was sawn off")
    wanted = "backends: DEEPRELAX_BACKEND=cpu cannot serve torch.float32 on cpu: it was sawn off"
    status, said = examine(capsys)
    assert (status, said["problems"]) == (1, [wanted])
    assert problems_in_text(capsys) == [wanted]


def test_a_backend_may_be_named_for_one_kind_of_device(monkeypatch):
    monkeypatch.setenv("DEEPRELAX_BACKEND", "cpu")
    monkeypatch.setattr(cpu, "unavailable", lambda device, dtype: None if device.type == "cpu" else "only CPU tensors")
    monkeypatch.setattr(doctor, "_devices", lambda: ["cpu", "cuda"])
    found = doctor.PROBES["backends"]()
    assert found.problems == []
    assert found.facts["devices"]["cpu"]["auto"] == "cpu"
    assert ("refused", "DEEPRELAX_BACKEND=cpu cannot serve torch.float32 on cuda: only CPU tensors") in found.rows


def test_a_backend_that_cannot_be_asked_is_a_problem(capsys, monkeypatch, quick):
    def broken(device, dtype):
        raise OSError("libabacus.so: cannot open")

    monkeypatch.setattr(cpu, "unavailable", broken)
    monkeypatch.setitem(doctor.PROBES, "self-test", doctor._self_test)
    status, said = examine(capsys)
    assert status == 1
    assert said["problems"][0] == "backends: cpu cannot be asked about cpu tensors: OSError: libabacus.so: cannot open"
    assert [row["backend"] for row in said["self_test"]] == ["eager"]


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A driver, a torch for CUDA, and no GPU that it finds."""
    path = tmp_path / "version"
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021\n")
    monkeypatch.setattr(doctor, "DRIVER", path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_driver_that_torch_cannot_use_is_a_problem(capsys, monkeypatch, quick, driver):
    def too_old() -> int:
        raise RuntimeError("The NVIDIA driver on your system\nis too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "current_device", too_old)
    status, said = examine(capsys)
    assert status == 1
    assert said["problems"] == [
        "GPUs: the NVIDIA driver is 470.57.02, but torch for CUDA 12.8 cannot use it: "
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040)."
    ]
    assert problems_in_text(capsys) == said["problems"]


def test_gpus_that_are_hidden_or_not_built_for_are_no_problem(capsys, monkeypatch, quick, driver):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    status, said = examine(capsys)
    assert (status, said["gpus"]["reason"]) == (0, "hidden by CUDA_VISIBLE_DEVICES=")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)
    status, said = examine(capsys)
    assert (status, said["gpus"]["driver"]) == (0, "470.57.02")
    assert said["gpus"]["reason"] == "this torch is built for CPUs only"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libodd.so: no such file')", "ImportError: libodd.so: no such file"),
        ("import os; os._exit(7)", "exit status 7"),
    ],
    ids=["raises", "ends the process"],
)
def test_a_triton_that_cannot_be_imported_is_a_problem(code, said, monkeypatch, tmp_path):
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text(code + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor.PROBES["triton"]()
    assert len(found.problems) == 1
    assert found.problems[0].startswith("triton: ")
    assert found.problems[0].endswith(f" is installed but cannot be imported: {said}")
    assert found.facts["error"] == said


def test_a_probe_that_raises_is_a_problem_and_the_others_go_on(capsys, monkeypatch, quick):
    def broken() -> doctor.Findings:
        raise PermissionError("not for you:\n/proc/cpuinfo")

    monkeypatch.setitem(doctor.PROBES, "platform", broken)
    status, said = examine(capsys)
    assert status == 1
    assert said["platform"] is None
    assert said["gpus"] is not None
    assert said["problems"] == ["platform: could not be examined: PermissionError: not for you: /proc/cpuinfo"]
    assert problems_in_text(capsys) == said["problems"]


@pytest.mark.parametrize("built", ["broken", "for another Python", "not at all"])
@pytest.mark.slow
def test_a_native_module_that_does_not_load(built, tmp_path):
    package = shutil.copytree(
        Path(deeprelax_cuda.__file__).parent, tmp_path / "deeprelax_cuda", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    name = {"broken": f"_native{sysconfig.get_config_var('EXT_SUFFIX')}", "for another Python": "_native.cpython-25-pdp11.so"}
    if built in name:
        (package / name[built]).write_bytes(b"no library")
    done = subprocess.run(
        [sys.executable, "-m", "deeprelax_cuda", "doctor", "--json"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = json.loads(done.stdout, parse_constant=refuse)
    assert [row["backend"] for row in said["self_test"] if row["device"] == "cpu"] == ["eager"]
    assert said["native_module"]["missing"]
    if built == "not at all":
        assert (done.returncode, said["problems"]) == (0, [])
        return
    assert done.returncode == 1
    (problem,) = said["problems"]
    assert problem.startswith(f"native module: {name[built]} is there but cannot be imported by Python 3.")
    assert problem.endswith("; install the package again with this Python")


# ---- What results say of their origin ----------------------------------------------------------------------------------------


def test_versions_and_platform_have_the_keys_that_results_are_read_by():
    versions, platform = machine.versions(), machine.platform()
    assert list(versions) == ["deeprelax_cuda", "commit", "python", "torch", "triton", "cuda"]
    assert list(platform) == ["system", "machine", "processor", "threads", "instruction_set"]
    assert json.loads(json.dumps([versions, platform])) == [versions, platform]
    assert versions["deeprelax_cuda"] == deeprelax_cuda.__version__
    assert versions["torch"] == torch.__version__
    assert platform["threads"] == torch.get_num_threads()
    assert platform["instruction_set"] == cpu.build_info().get("instruction_set")


@pytest.mark.slow
def test_versions_do_not_import_triton():
    code = "import sys; from deeprelax_cuda import machine; machine.versions(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_benchmarks_keep_versions_and_platform(tmp_path):
    script = ROOT / "bench" / "host_step.py"
    options = ["--count", "2", "--rounds", "1", "--out", tmp_path / "result.json"]
    subprocess.run([sys.executable, script, *options], check=True, capture_output=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["versions"] == machine.versions()
    assert result["platform"] == {**machine.platform(), "threads": 1}
    assert result["build"] == cpu.build_info()


def git(folder: Path, *arguments: str) -> str:
    author = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *author, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def commit_all(folder: Path) -> str:
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=all")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """What a build of the Python part reads."""
    folder = tmp_path / "sources"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for name in ("deeprelax_cuda", "bench", "triton_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def commit_in(folder: Path) -> str | None:
    """Return what the package that lies in a folder says its commit is."""
    commit: str | None = runpy.run_path(str(folder / "deeprelax_cuda" / "commit.py"))["commit"]()
    return commit


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")


@needs_git
def test_a_source_tree_says_its_commit_and_whether_it_was_changed(sources, monkeypatch, tmp_path):
    assert commit_in(sources) is None
    head = commit_all(sources)
    assert len(head) == 40
    git(sources, "tag", "--annotate", "--message=a tag is no commit", "v1")
    assert commit_in(sources) == head
    (sources / "new.txt").write_text("a file that git does not know is no change of the sources")
    assert commit_in(sources) == head
    (sources / "setup.py").write_text("changed")
    assert commit_in(sources) == f"{head}-dirty"
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert commit_in(sources) == f"{head}-dirty", "the repository of the hook that runs this is not asked"


@needs_git
def test_an_installed_package_does_not_say_the_commit_of_the_repository_it_lies_in(sources, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "train.py").write_text("import deeprelax_cuda")
    (project / ".gitignore").write_text("/.venv/")
    commit_all(project)
    for place in (".venv/site-packages", "vendored"):
        shutil.copytree(sources / "deeprelax_cuda", project / place / "deeprelax_cuda")
        assert commit_in(project / place) is None


def test_without_git_the_commit_is_unknown(sources, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_in(sources) is None


@needs_git
def test_a_build_records_the_commit_in_the_package_alone(sources, tmp_path):
    def build() -> None:
        command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path / "built"]
        subprocess.run(command, cwd=sources, check=True, capture_output=True)

    head = commit_all(sources)
    build()
    assert commit_in(tmp_path / "built") == head
    assert (tmp_path / "built/deeprelax_cuda/COMMIT").read_text() == f"{head}\n"
    assert not (sources / "deeprelax_cuda/COMMIT").exists()
    shutil.rmtree(sources / ".git")
    build()
    assert not (tmp_path / "built/deeprelax_cuda/COMMIT").exists(), "one that an earlier build left would be wrong"
    assert commit_in(tmp_path / "built") is None
