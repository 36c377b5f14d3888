"""What of the GPU's benchmarks needs no GPU: lists, byte counts, statistics, files, and that every contender takes the step."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from source_packages import bench

gpu_step, gpu_workloads, formulas, shapes, timing = map(bench, ("gpu_step", "gpu_workloads", "formulas", "shapes", "timing"))
ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = [(3, 50), (7,), (2, 5, 11), (4096,)]
TERMS = [formulas.Terms(noise, momentum) for noise in (False, True) for momentum in (False, True)]

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


def contenders_of(workload: Any) -> dict[str, Any]:
    small = gpu_workloads.replace(workload, shapes=[(8,)])
    return gpu_workloads.contenders(small, CPU, backend="eager")


# ---- Contenders ----------------------------------------------------------------------------------------------------


def workload(dtype: torch.dtype, terms: Any, **options: Any) -> Any:
    return gpu_workloads.Workload("small", SMALL, dtype=dtype, terms=terms, optimizers=True, **options)


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_contender_takes_the_step(dtype, terms):
    work = workload(dtype, terms)
    made = gpu_workloads.contenders(work, CPU, backend="eager")
    assert set(made) >= {gpu_workloads.OURS, gpu_workloads.OPTIMIZER, "naive eager", "in-place eager", "torch._foreach_*"}
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
    for name, make in gpu_workloads.contenders(work, CPU, backend="eager").items():
        if name not in (gpu_workloads.COPY, gpu_workloads.OPTIMIZER, *gpu_workloads.SGD):
            roles = gpu_workloads.make_roles(work, CPU, seed=3)
            step = make(roles)
            for _ in range(3):
                step()
            results[name] = [t for role in (roles.y, roles.m, roles.v) for t in role]
    want = results.pop(gpu_workloads.OURS)
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
    for name, make in gpu_workloads.contenders(work, CPU, backend="eager").items():
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
