"""What of the GPU's benchmarks needs no GPU: lists, byte counts, statistics, files, and that every contender takes the step."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from source_packages import bench

from deeprelax_cuda import backends

gpu_step, gpu_workloads, formulas, shapes, timing = map(bench, ("gpu_step", "gpu_workloads", "formulas", "shapes", "timing"))
ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = [(3, 50), (7,), (2, 5, 11), (4096,)]
TERMS = [formulas.Terms(noise, momentum) for noise in (False, True) for momentum in (False, True)]

#: Whose steps are taken here in the place of ours.
HERE = {"cuda": "eager", "triton": "triton"}
TRITON = gpu_workloads.TRITON

no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


# ---- Lists and bytes ----------------------------------------------------------------------------------------------------


def test_lists_of_known_networks():
    assert (len(shapes.resnet50()), shapes.elements(shapes.resnet50())) == (161, 25_557_032)
    assert (len(shapes.gpt2_small()), shapes.elements(shapes.gpt2_small())) == (148, 124_439_808)
    assert shapes.resnet50()[-5:] == [(2048, 512, 1, 1), (2048,), (2048,), (1000, 2048), (1000,)]


def test_bytes_are_those_of_the_contract():
    def cost(name: str, dtype: torch.dtype, momentum: bool) -> int:
        return gpu_workloads.bytes_per_element(name, dtype, formulas.Terms(momentum=momentum))

    ours = gpu_workloads.OURS
    assert [cost(ours, torch.float32, False), cost(ours, torch.float32, True), cost(ours, torch.bfloat16, False)] == [
        24,
        32,
        18,
    ]
    assert [cost("SGD, fused", torch.float32, momentum) for momentum in (False, True)] == [12, 20]
    assert cost(TRITON, torch.float32, True) == cost(gpu_workloads.OPTIMIZERS["triton"], torch.float32, True) == 32
    assert cost(gpu_workloads.COPY, torch.bfloat16, False) == 18


def test_what_is_measured():
    rows = gpu_workloads.workloads()
    assert len({(row.name, row.dtype, row.terms) for row in rows}) == len(rows)
    sizes = {row.elements for row in rows if len(row.shapes) == 1 and row.terms == formulas.PLAIN}
    assert sizes >= {2**20, 2**25, 2**25 + 1, 2**28}
    assert {(len(row.shapes), row.elements) for row in rows} >= {(10_000, 640_000), (1_000, 4_000), (161, 25_557_032)}
    assert (rows[0].name, rows[0].describe_shape()) == ("2^28", [2**28])
    assert gpu_workloads.single(2**25 + 1).name == "2^25+1"
    assert all(any("compile" in name for name in contenders_of(row)) == row.compile_too for row in rows[:8])


def contenders_of(workload: Any, served: Any = HERE) -> dict[str, Any]:
    small = gpu_workloads.replace(workload, shapes=[(8,)])
    return gpu_workloads.contenders(small, CPU, served)


def test_both_of_our_backends_are_measured_on_everything():
    for row in gpu_workloads.workloads():
        names = set(contenders_of(row))
        assert names >= {"fused cuda", "fused triton", gpu_workloads.COPY}
        assert ("EntropySGD.step()" in names, "EntropySGD.step(), triton" in names) == (row.optimizers, row.optimizers)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_does_not_serve_is_left_out(backend):
    for row in gpu_workloads.workloads():
        names = [name for name in contenders_of(row, {backend: HERE[backend]}) if gpu_workloads.is_ours(name)]
        assert names
        assert {"triton" in name for name in names} == {backend == "triton"}


def test_sizes_of_blocks_have_rows_of_their_own():
    rows = [row for row in gpu_workloads.workloads() if row.sizes]
    assert [(row.elements, row.dtype) for row in rows] == [(2**26, torch.float32), (2**26, torch.bfloat16)]
    for row in rows:
        named = [name for name in contenders_of(row) if name.startswith(TRITON)]
        sizes = gpu_workloads.SIZES[row.dtype.itemsize]
        assert named == [TRITON, *(f"{TRITON}, {n} x {warps} warps" for n, warps in sizes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_any_size_take_the_same_step(dtype, monkeypatch):
    """And they are of that size: as many of them as the elements need."""
    launched = []
    triton = backends.load("triton")
    start = triton.start
    monkeypatch.setattr(triton, "start", lambda launch, device: (launched.append(launch), start(launch, device)))
    work = gpu_workloads.Workload("small", [(5000,)], dtype=dtype, sizes=True)
    results = {}
    for name, make in gpu_workloads.contenders(work, CPU, HERE).items():
        if name != gpu_workloads.COPY:
            roles = gpu_workloads.make_roles(work, CPU, seed=3)
            make(roles)()
            results[name] = [*roles.y, *roles.m]
    want = results.pop("fused cuda")
    assert all(torch.equal(a, b) for got in results.values() for a, b in zip(got, want, strict=True))
    sizes = [int(name.split()[2]) for name in results if "x" in name]
    assert [one.blocks for one in launched[1:]] == [-(-5000 // size) for size in sizes]


# ---- Contenders ----------------------------------------------------------------------------------------------------


def workload(dtype: torch.dtype, terms: Any, **options: Any) -> Any:
    return gpu_workloads.Workload("small", SMALL, dtype=dtype, terms=terms, optimizers=True, **options)


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_contender_takes_the_step(dtype, terms):
    work = workload(dtype, terms)
    made = gpu_workloads.contenders(work, CPU, HERE)
    assert set(made) >= {*gpu_workloads.FUSED.values(), *gpu_workloads.OPTIMIZERS.values()}
    assert set(made) >= {"naive eager", "in-place eager", "torch._foreach_*"}
    if dtype == torch.bfloat16:
        del made["SGD, fused"]  # torch's defect on the CPU, tests/test_field_defects.py
    for name, make in made.items():
        roles = gpu_workloads.make_roles(work, CPU, seed=3)
        contender = gpu_step.Contender(name, [make(roles)])
        gpu_step.check(contender, roles, terms)
        assert contender.said is None, f"{name}: {contender.said}"
        assert contender.first_call > 0


@pytest.mark.parametrize("momentum", [False, True])
def test_contenders_without_noise_agree_with_the_contract(momentum):
    """Rounded a few times otherwise, as they contract products and sums."""
    terms = formulas.Terms(noise=False, momentum=momentum)
    work = workload(torch.float32, terms)
    results = {}
    for name, make in gpu_workloads.contenders(work, CPU, HERE).items():
        if name not in (gpu_workloads.COPY, *gpu_workloads.OPTIMIZERS.values(), *gpu_workloads.SGD):
            roles = gpu_workloads.make_roles(work, CPU, seed=3)
            step = make(roles)
            for _ in range(3):
                step()
            results[name] = [t for role in (roles.y, roles.m, roles.v) for t in role]
    want = results.pop(gpu_workloads.OURS)
    assert all(map(torch.equal, results.pop(TRITON), want)), "the same bits, not nearly"
    assert len(results) == 3
    for name, got in results.items():
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("of", ["y", "m"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_that_does_nothing_is_wrong(dtype, of):
    roles = gpu_workloads.make_roles(workload(dtype, formulas.PLAIN), CPU, seed=3)
    before = gpu_step.look(roles)
    formulas.one_by_one(formulas.naive_eager, formulas.PLAIN)(roles)
    y, _, _, m, _ = gpu_step.look(roles)
    assert formulas.wrong(before, [y, m], formulas.PLAIN) is None
    stale = [before[0], m] if of == "y" else [y, before[3]]
    assert formulas.wrong(before, stale, formulas.PLAIN).startswith(f"{of} is ")
    y[5] = math.nan
    assert formulas.wrong(before, [y, m], formulas.PLAIN).startswith("y is nan away")


def test_noise_of_the_wrong_size_is_wrong():
    roles = gpu_workloads.make_roles(workload(torch.float32, formulas.PLAIN), CPU, seed=3)
    before = gpu_step.look(roles)
    formulas.one_by_one(formulas.naive_eager, formulas.Terms(noise=False))(roles)
    y, _, _, m, _ = gpu_step.look(roles)
    assert "the noise has mean" in formulas.wrong(before, [y, m], formulas.PLAIN)


def test_programs_read_gradients_and_anchors_alone():
    work = workload(torch.float32, formulas.Terms(momentum=True))
    for name, make in gpu_workloads.contenders(work, CPU, HERE).items():
        roles = gpu_workloads.make_roles(work, CPU, seed=3)
        kept = [t.clone() for t in (*roles.g, *roles.x)]
        make(roles)()
        assert all(map(torch.equal, kept, (*roles.g, *roles.x))), name
        assert all(t.grad is None for t in roles.y), name


# ---- Samples and rows -------------------------------------------------------------------------------------------------------


def test_medians_and_rates():
    assert timing.summary([3.0, 1.0, 2.0]) == {"median_s": 2.0, "quartiles_s": [1.0, 2.0, 3.0]}
    assert timing.summary([5.0]) == {"median_s": 5.0, "quartiles_s": [5.0, 5.0, 5.0]}
    assert timing.rates(100, 24, 0.5) == {"elements_per_s": 200.0, "bytes_per_s": 4800.0}


def measured(**seconds: float) -> list[Any]:
    contenders = []
    for name, time in seconds.items():
        contender = gpu_step.Contender(name, [])
        contender.device_seconds, contender.host_seconds = [time] * 3, [1e-5] * 3
        contenders.append(contender)
    return contenders


def test_rows_say_fractions_and_ratios():
    times = {"fused cuda": 2.0, gpu_workloads.COPY: 1.0, "naive eager": 8.0, "in-place eager": 6.0, "SGD, fused": 0.5}
    facts = {"machine": {"name": "a GPU"}, "versions": {"torch": "2", "commit": "abc"}}
    rows = gpu_step.rows_of(gpu_workloads.single(2**20), measured(**times), facts)
    by_name = {row["contender"]: row for row in rows}
    ours = by_name[gpu_workloads.OURS]
    assert (ours["fraction_of_copy"], ours["fastest_contender_over_this"]) == (0.5, 3.0)
    assert by_name["SGD, fused"]["fraction_of_copy"] == 1.0, "of its own bytes"
    assert by_name[gpu_workloads.COPY]["fraction_of_copy"] == 1.0
    for row in rows:
        assert (row["machine"], row["versions"]) == (facts["machine"], facts["versions"])
        assert (row["shape"], row["dtype"], row["noise"], row["wrong"]) == ([2**20], "float32", True, None)
        assert len(gpu_step.line(row)) >= len(gpu_step.HEADER)


def reach_of(**seconds: float) -> dict[str, Any]:
    facts = {"machine": {}, "versions": {}}
    rows = gpu_step.rows_of(gpu_workloads.single(2**20), measured(**{gpu_workloads.COPY: 1.0, **seconds}), facts)
    return {row["contender"]: (row["over_cuda"], row["over_compile"], row["host_over_cuda"]) for row in rows}


def test_rows_say_how_triton_stands_beside_cuda_and_torch_compile():
    optimizers = {"EntropySGD.step()": 5.0, "EntropySGD.step(), triton": 6.0}
    compiled = {"torch.compile": 8.0, "torch.compile, ATen noise": 4.0}
    reach = reach_of(**{"fused cuda": 2.0, TRITON: 3.0, f"{TRITON}, 256 x 2 warps": 1.0, **compiled, **optimizers})
    assert reach[TRITON] == (1.5, 0.75, 1.0)
    assert reach[f"{TRITON}, 256 x 2 warps"] == (0.5, 0.25, 1.0)
    assert reach["EntropySGD.step(), triton"] == (1.2, 1.5, 1.0)
    assert reach_of(**{TRITON: 3.0})[TRITON] == (None, None, None)


def test_ours_are_no_rivals():
    ours = {"fused cuda": 2.0, TRITON: 3.0, f"{TRITON}, 256 x 2 warps": 0.5, "EntropySGD.step(), triton": 1.0}
    rows = gpu_step.rows_of(gpu_workloads.single(2**20), measured(**ours, **{gpu_workloads.COPY: 1.0, "naive eager": 8.0}), {})
    assert [row["fastest_contender_over_this"] for row in rows[:2]] == [4.0, 8.0 / 3.0]


def test_the_summary_has_both_backends_and_what_does_not_run(capsys):
    times = {"fused cuda": 2.0, TRITON: 3.0, gpu_workloads.COPY: 1.0, "naive eager": 8.0, "torch.compile": 4.0}
    gpu_step.print_summary(gpu_step.rows_of(gpu_workloads.single(2**20), measured(**times), {}), ["2^22: fused triton"])
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "ours", "bench/gpu.sh shows what comes after this line"
    assert [line[32:60].strip() for line in said[3:5]] == ["fused cuda", TRITON]
    assert said[-2].split()[-6:] == ["1.50", "cuda", "0.75", "compile", "1.00", "host"]
    assert said[-1] == "DOES NOT RUN 2^22: fused triton"


def test_a_backend_that_cannot_serve_is_said_once_and_the_others_are_measured(monkeypatch, capsys):
    """As far as the measuring, for which the device is needed."""
    reasons = {"cuda": None, "triton": "there is no Triton"}
    asked = []

    def measure(workload: Any, served: Any, *others: Any) -> Any:
        asked.append(served)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_step, "serving", lambda device: reasons)
    monkeypatch.setattr(gpu_step, "device_facts", lambda commit: {})
    monkeypatch.setattr(gpu_step, "measure", measure)
    monkeypatch.setattr(gpu_step.torch, "ones", lambda *a, **k: None)
    monkeypatch.setattr(gpu_step.torch, "empty", lambda *a, **k: None)
    with pytest.raises(KeyboardInterrupt):
        gpu_step.main([])
    assert asked == [{"cuda": "cuda"}]
    assert capsys.readouterr().out.splitlines()[0] == "fused triton is left out: there is no Triton"
    reasons["cuda"] = "there is no CUDA"
    assert gpu_step.main([]) == 1
    assert capsys.readouterr().err == "gpu_step: none of our backends can serve\n"


@no_device
def test_why_a_backend_is_left_out_is_what_it_says():
    why = gpu_step.serving(torch.device("cuda"))
    assert set(why) == {"cuda", "triton"}
    assert all(reason == backends.load(name).unavailable(torch.device("cuda"), torch.float32) for name, reason in why.items())
    assert None not in why.values()


def test_the_file_is_whole_at_any_time(tmp_path, monkeypatch):
    path = tmp_path / "results" / "gpu.json"
    timing.write_rows(path, {"a": {"b": 1}}, [{"c": [1, 2]}, {"c": None}])
    assert json.loads(path.read_text()) == {"a": {"b": 1}, "rows": [{"c": [1, 2]}, {"c": None}]}
    assert len(path.read_text().splitlines()) == 7, "a row a line"
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        timing.write_rows(path, {}, [])
    assert len(json.loads(path.read_text())["rows"]) == 2


def test_options():
    options = gpu_step.parse(["--out", "x.json", "--budget", "5", "--commit", "abc"])
    assert (options.out, options.budget, options.commit, options.rounds) == (Path("x.json"), 5.0, "abc", 51)


@no_device
def test_without_a_device_there_is_one_line(capsys, tmp_path):
    assert gpu_step.main(["--out", str(tmp_path / "x.json")]) == 1
    assert capsys.readouterr() == ("", "gpu_step: torch finds no CUDA device\n")
    assert not list(tmp_path.iterdir())


# ---- The script -------------------------------------------------------------------------------------------------------------

bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@bash
def test_the_script_is_one():
    subprocess.run(["bash", "-n", ROOT / "bench" / "gpu.sh"], check=True)


def test_the_script_builds_from_all_that_the_package_is_made_of():
    """A folder that it does not copy would be missing on the machine with the GPU alone."""
    script = (ROOT / "bench" / "gpu.sh").read_text()
    folders = re.search(r"package-dir = {(.*)}", (ROOT / "pyproject.toml").read_text())
    named = re.findall(r'= "(\w+)"', folders[1])
    assert named == ["bench", "triton_kernels"]
    copied = re.search(r'cp -R "\$ROOT"/{(.*)}', script)[1].split(",")
    assert set(copied) >= {"csrc", "deeprelax_cuda", "setup.py", "pyproject.toml", "CMakeLists.txt", *named}
    assert all((ROOT / name).exists() for name in copied)
    assert f"""cp -R {" ".join(f'"$ROOT/{name}"' for name in named)} "$SITE/deeprelax_cuda" &&""" in script, "without pip"


def test_what_triton_compiles_stays_in_the_folder_of_the_run():
    assert "\nexport TRITON_CACHE_DIR=$WORK/" in (ROOT / "bench" / "gpu.sh").read_text()


@bash
@no_device
@pytest.mark.parametrize("driver", [False, True])
def test_the_script_stops_with_one_line_before_it_builds(driver, tmp_path):
    """Also where the driver finds a device that torch does not."""
    env = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    if driver:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\necho GPU 0: a device\n")
        program.chmod(0o755)
        env["PATH"] = f"{program.parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", tmp_path / "out"], env=env, capture_output=True, text=True, check=False
    )
    said = f"the torch of {sys.executable} finds no CUDA device" if driver else "nvidia-smi finds no device"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"gpu.sh: {said}\n")
    assert [path.name for path in tmp_path.iterdir()] == (["bin"] if driver else [])


@bash
def test_the_script_says_how_it_is_called():
    done = subprocess.run(["bash", ROOT / "bench" / "gpu.sh"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: bench/gpu.sh OUT\n")
