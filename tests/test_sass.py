"""What nvcc makes of the CUDA kernels for each architecture, read from the disassembly (tools/sass.py) and from the module."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from deeprelax_cuda import native

pytestmark = pytest.mark.slow

TOOL = Path(__file__).resolve().parents[1] / "tools" / "sass.py"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
PLAIN = "langevin_step<PlainLangevin<float, true, false>>"
#: Issued instructions an element of the plain float32 noise kernel; the memory of an H200 leaves time for about 187.
BUDGET = 85
STEPS = ("langevin_step", "gradient_average_step", "outer_step")

#: What each kind of kernel loads and stores where it has all its roles, in packets: (y or g) and those of the compute type.
LOADS = {
    "PlainLangevin": (2, 2),  # y g, x m; with momentum v
    "PlainGradientAverage": (2, 2),
    "langevin": (2, 6),  # y g, x m v w c master
    "gradient_average": (2, 5),
    "Outer": (0, 4),  # x m w c
}
STORES = {
    "PlainLangevin": (1, 1),
    "PlainGradientAverage": (1, 1),
    "langevin": (1, 5),
    "gradient_average": (1, 4),
    "Outer": (1, 4),
}


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sass", TOOL)
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    sys.modules["sass"] = tool  # where dataclasses look for their module
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list:
    tool = load_tool()
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc on PATH")
    if not tool.find("nvdisasm"):
        pytest.skip("no nvdisasm on PATH, beside nvcc or in the triton package")
    return tool.audit(tmp_path_factory.mktemp("cubins"), ARCHITECTURES)


def offenders(kernels: list, of: str) -> list[str]:
    return [f"{k.arch} {k.name}: {i}" for k in kernels for i in getattr(k, of)]


def test_all_kernels_are_there_under_the_names_of_their_operators(kernels):
    names = {arch: [k for k in kernels if k.arch == arch] for arch in ARCHITECTURES}
    for arch, found in names.items():
        steps = [k for k in found if k.name.startswith(STEPS)]
        assert len(steps) == 4 * 12, arch
        assert len({k.name for k in found}) == len(found) == len(steps) + 3, "and two clocks and the normals"
        assert all(k.name.split("<")[0] in k.symbol for k in steps)


def test_nothing_is_spilled(kernels):
    assert not offenders(kernels, "local")
    assert not [f"{k.arch} {k.name}: {k.stack} {k.spilled}" for k in kernels if k.stack or k.spilled]


def test_the_plain_noise_kernel_is_small(kernels):
    plain = [k for k in kernels if k.name == PLAIN]
    assert len(plain) == len(ARCHITECTURES)
    for k in plain:
        assert k.registers <= 40, k.arch
    assert {k.arch: len(k.hot) / 4 for k in plain if len(k.hot) / 4 > BUDGET} == {}


def lines(kernel, counts: tuple[int, int]) -> int:
    """How many accesses of 16 bytes that many packets take."""
    of_storage, of_state = {"float": (1, 1), "double": (2, 2)}.get(kernel.storage, (1, 2))
    return counts[0] * of_storage + counts[1] * of_state


def test_every_role_is_accessed_by_sixteen_bytes(kernels):
    for k in kernels:
        if not k.name.startswith(STEPS):
            continue
        kind, _, *options = re.findall(r"\w+", k.name)[1:]
        momentum = kind == "PlainLangevin" and options[1] == "true"
        kind = options[0] if kind == "General" else kind
        loads, stores = (lines(k, (a, b + momentum)) for a, b in (LOADS[kind], STORES[kind]))
        assert len(k.accesses("LD", wide=True)) >= loads, f"{k.arch} {k.name}"
        assert len(k.accesses("ST", wide=True)) >= stores, f"{k.arch} {k.name}"


def test_whole_packets_are_accessed_by_sixteen_bytes_alone(kernels):
    """Beside the numbers of a call, which lie on the device where found_inf, inv_scale or a clock is."""
    for k in kernels:
        if k.name.startswith(STEPS):
            narrow = [i for i in k.hot if i.accesses_global and not i.wide and not i.inside("skipped", "Call")]
            assert not [i for i in narrow if not i.predicate], f"{k.arch} {k.name}: {', '.join(map(str, narrow))}"
            assert "PlainLangevin<float" not in k.name or not narrow, f"{k.arch} {k.name}: {', '.join(map(str, narrow))}"


def test_nothing_is_contracted_but_the_root_and_the_division(kernels):
    assert not offenders(kernels, "contracted")
    noisy = [k for k in kernels if any(i.opcode == "MUFU.RSQ" for i in k.code)]
    assert len(noisy) == len(ARCHITECTURES) * (4 * 9 + 1), "the search for roots finds them"
    divided = {k.name.split("<")[0] for k in kernels if any(i.opcode.startswith("DFMA") for i in k.code)}
    assert divided == {"advance_clock"}


def test_nothing_is_flushed_to_zero(kernels):
    assert not offenders(kernels, "flushing")


# ---- The module --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def module() -> Path:
    if native.module is None or not native.module.build_info()["nvcc"]:
        pytest.skip("the native module was built without CUDA")
    return Path(native.module.__file__)


def output(*command: object) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def test_the_module_needs_no_cuda_library(module):
    if not (readelf := shutil.which("readelf")):
        pytest.skip("no readelf on PATH")
    needed = re.findall(r"NEEDED.*\[(.*)\]", output(readelf, "-d", module))
    assert any(name.startswith("libc.") for name in needed)
    assert not [name for name in needed if "cuda" in name]


def test_the_module_has_code_for_three_architectures_and_ptx_for_what_comes_after(module):
    if not (cuobjdump := load_tool().find("cuobjdump")):
        pytest.skip("no cuobjdump on PATH, beside nvcc or in the triton package")
    assert set(re.findall(r"\.(sm_\d+)\.cubin", output(cuobjdump, "-lelf", module))) == set(ARCHITECTURES)
    assert set(re.findall(r"\.(sm_\d+)\.ptx", output(cuobjdump, "-lptx", module))) == {"sm_100"}
