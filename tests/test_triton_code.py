"""What Triton makes of its kernels for GPUs of NVIDIA and AMD, read from the machine code (tools/triton_code.py) without one.

The tool runs in processes of its own, as here the kernels are Triton's interpreter's (conftest.py). What must hold is said by
the functions `no_...`, each of which returns what does not hold; the last tests are that they find what is wrong where it is.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "triton_code.py"
NVIDIA = ("cuda:80", "cuda:90", "cuda:100")
AMD = "hip:gfx942"
#: Issued instructions an element of the plain float32 noise kernel on NVIDIA, as for the CUDA kernel (tests/test_sass.py).
BUDGET = 85
Rows = list[dict[str, Any]]


def audit(folder: Path, *arguments: object) -> Rows:
    """Run the tool."""
    out = folder / "rows.json"
    done = subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments), "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr[-3000:]
    rows: Rows = json.loads(out.read_text())["kernels"]
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return audit(tmp_path_factory.mktemp("rows"), "--brief")


def name(row: dict[str, Any]) -> str:
    return f"{row['target']} {row['dtype']} {row['way']} {row['kernel']}"


def bytes_of(roles: str, dtype: str) -> int:
    """Return how many bytes a thread moves for roles, by their letters."""
    elements, stored = (8, 2) if dtype in ("bfloat16", "float16") else (4, 8 if dtype == "float64" else 4)
    return sum(elements * (stored if role in ("y", "g") else max(stored, 4)) for role in roles.split())


# ---- What must hold ----------------------------------------------------------------------------------------------------------


def no_fused(rows: Rows) -> list[str]:
    """Beside those of roots; AMD's division and root of float64 have some too, and only the clock's kernel has these."""
    dividing = {(AMD, "advance_kernel")}
    return [f"{name(r)}: {i}" for r in rows for i in r["contracted"] if (r["target"], r["kernel"]) not in dividing]


def no_flushing(rows: Rows) -> list[str]:
    return [f"{name(r)}: {i}" for r in rows for i in r["flushing"]]


def no_spills(rows: Rows) -> list[str]:
    return [f"{name(r)}: {r['stack']} bytes, {r['spilled']}" for r in rows if r["stack"] or r["spilled"]]


def no_narrow_accesses(rows: Rows) -> list[str]:
    """On the wide way all roles move by 16 bytes, each once."""
    found = []
    for r in rows:
        for what, roles in (("loads", r.get("reads", "")), ("stores", r.get("writes", ""))):
            expected = {"16": bytes_of(roles, r["dtype"]) // 16} if roles else {}
            if r.get(what, {}) != expected:
                found.append(f"{name(r)}: {what} {r[what]}, expected {expected}")
    return found


def no_exchanges(rows: Rows) -> list[str]:
    """On the wide way all threads keep to themselves."""
    found = [f"{name(r)}: {i}" for r in rows for i in r.get("exchanges", [])]
    return found + [f"{name(r)}: {r['conversions']} layouts converted" for r in rows if r["conversions"]]


def no_loops(rows: Rows) -> list[str]:
    return [f"{name(r)}: {r['loops']} loops" for r in rows if r.get("loops")]


def no_large_plain_kernel(rows: Rows) -> list[str]:
    """The plain float32 noise kernel, on NVIDIA."""
    plain = [r for r in rows if (r["dtype"], r["way"]) == ("float32", "langevin") and r["target"] in NVIDIA]
    return [
        f"{name(r)}: {r['registers']} registers, {r['per_element']} instructions"
        for r in plain
        if r["registers"] > 40 or r["per_element"] > BUDGET
    ]


# ---- That it does ------------------------------------------------------------------------------------------------------------


def test_every_target_type_and_role_is_there(rows):
    assert {r["target"] for r in rows} == {*NVIDIA, AMD}
    for target in (*NVIDIA, AMD):
        found = [r for r in rows if r["target"] == target]
        assert {r["dtype"] for r in found} == {"float32", "float64", "bfloat16", "float16"}
        assert {r["kernel"] for r in found} == {"step_kernel", "advance_kernel", "gaussian_kernel"}
        assert {role for r in found for role in r.get("reads", "").split()} == {"y", "g", "x", "m", "v", "w", "c", "master"}
        assert {role for r in found for role in r.get("writes", "").split()} == {"y", "x", "m", "v", "w", "master"}


def test_nothing_is_contracted_but_the_root_and_the_division(rows):
    assert not no_fused(rows)
    noisy = [r for r in rows if r["kernel"] == "step_kernel" and "gaussian.py" in r["parts"]]
    assert len(noisy) > len(rows) / 2
    assert not [name(r) for r in noisy if not r["fused_of_roots"]], "the search for roots finds them"


def test_nothing_is_flushed_to_zero(rows):
    assert not no_flushing(rows)


def test_nothing_is_spilled(rows):
    assert not no_spills(rows)


def test_whole_packets_are_accessed_by_sixteen_bytes_alone(rows):
    assert not no_narrow_accesses(rows)


def test_threads_of_whole_packets_keep_to_themselves(rows):
    assert not no_exchanges(rows)


def test_whole_packets_are_worked_on_without_a_loop(rows):
    assert not no_loops(rows)


def test_the_plain_noise_kernel_is_small(rows):
    assert not no_large_plain_kernel(rows)


def test_waves_of_amd_have_64_threads(rows):
    assert {r["wave"] for r in rows if r["target"] == AMD} == {64}


# ---- That it would be noticed ------------------------------------------------------------------------------------------------

ONE = ("--target", "cuda:90", AMD, "--way", "langevin", "--dtype", "float32")


def targets(found: list[str]) -> set[str]:
    return {text.split()[0] for text in found}


def changed(folder: Path, changes: dict[str, tuple[str, str]]) -> Path:
    """Return a copy of the kernels in which texts of files are replaced."""
    package = importlib.util.find_spec("deeprelax_cuda.triton_kernels")
    assert package
    assert package.submodule_search_locations
    kernels = folder / "triton_kernels"
    shutil.copytree(package.submodule_search_locations[0], kernels)
    for file, (old, new) in changes.items():
        text = (kernels / file).read_text()
        assert old in text
        (kernels / file).write_text(text.replace(old, new))
    return kernels


@pytest.mark.mutant("the Triton kernels' code")
def test_fusing_and_flushing_are_noticed(tmp_path):
    loose = audit(tmp_path, *ONE, "--loose")
    assert targets(no_fused(loose)) == {"cuda:90", AMD}
    assert targets(no_flushing(loose)) == {AMD}


@pytest.mark.mutant("the Triton kernels' code")
def test_a_missing_hint_and_a_quick_root_are_noticed(tmp_path):
    """Without the hint accesses are narrow, so that threads have other elements than those they have noise for."""
    changes = {"packet.py": ("multiple_of(at, 16)", "multiple_of(at, 4)"), "gaussian.py": ("tl.sqrt_rn", "tl.sqrt")}
    found = audit(tmp_path, *ONE, "--kernels", changed(tmp_path, changes))
    assert targets(no_narrow_accesses(found)) == {"cuda:90", AMD}
    assert targets(no_exchanges(found)) == {"cuda:90", AMD}
    assert targets(no_flushing(found)) == {"cuda:90"}


@pytest.mark.mutant("the Triton kernels' code")
def test_too_much_for_a_thread_is_noticed(tmp_path):
    kernels = changed(tmp_path, {"sizes.py": ("4: Size(512, 4)", "4: Size(2048, 1)")})
    found = audit(tmp_path, *ONE[:2], *ONE[3:], "--kernels", kernels)
    assert no_spills(found)
    assert no_large_plain_kernel(found)
