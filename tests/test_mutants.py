"""Proof that the golden file has teeth: each small change of the C++ formula must disagree with it.

A mutant is the portable kernels, built from a copy of csrc with one piece of text changed (or one compiler flag), and asked for
everything that the golden file knows.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import POINTER, Structure, addressof, c_bool, c_double, c_float, c_int, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

import numpy as np
import oracle
import pytest

from deeprelax_cuda import golden

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
DTYPES = ("float32", "float64", "bfloat16", "float16")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER.split()[0]) is None, reason="there is no C++ compiler"),
]


# ---- The interface of csrc/include/deeprelax/deeprelax.h ---------------------------------------------------------------------


class Tensor(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("y", "g", "x", "m", "v", "w", "c", "master")),
        ("numel", c_int64),
        ("number", c_uint32),
        *((name, c_int64) for name in ("offset", "run", "pitch")),
    ]


class Step(Structure):
    _fields_ = [
        ("family", c_int),
        ("inner", c_bool),
        ("outer", c_bool),
        *((name, c_double) for name in ("eta", "k", "s", "a", "c", "wd", "mu", "damp1")),
        *((name, c_bool) for name in ("nesterov", "coupling_in_momentum", "maximize")),
        *((name, c_double) for name in ("lr", "mu_o", "wd_o", "kr")),
        ("nesterov_o", c_bool),
        ("seed", c_uint64),
        ("step", c_uint32),
        ("rounding", c_int),
        ("inv_scale", c_void_p),
        ("found_inf", POINTER(c_float)),
    ]


def disagreements(library: ctypes.CDLL) -> int:
    """Count the entries of the golden file that the library does not agree with."""
    known = golden.load()
    wrong = 0
    for entry in known["normals"] + known["pairs"]:
        want = np.array([float.fromhex(text) for text in entry["normals"]], np.float32)
        got = np.empty_like(want)
        place = (c_uint64(entry["seed"]), c_uint32(entry["step"]), c_uint32(entry["stream"]), c_int64(entry["offset"]))
        library.probe_gaussian(got.ctypes.data_as(c_void_p), c_int64(len(want)), *place)
        wrong += got.tobytes() != want.tobytes()
    for entry in known["updates"]:
        wrong += not agrees(library, entry, known["inputs"][entry["inputs"]])
    return wrong


def decode(text: str) -> np.ndarray:
    words = text.split()
    return np.array([int(word, 16) for word in words], f"u{len(words[0]) // 2}")


def agrees(library: ctypes.CDLL, entry: dict, inputs: dict[str, str]) -> bool:
    at = {name: decode(inputs[name]) for name in entry["tensors"]}
    names = {"p": "m", "consensus": "c"}
    pointers = {names.get(name, name): array.ctypes.data for name, array in at.items()}
    tensor = Tensor(
        **pointers, numel=17, number=entry["number"], **dict(zip(("offset", "run", "pitch"), entry["place"], strict=True))
    )
    step = Step(damp1=1.0, coupling_in_momentum=True)
    step.family, step.inner, step.outer = entry["family"] != "langevin", entry["inner"], entry["outer"]
    for name, value in entry["scalars"].items():
        setattr(step, name, value == "stochastic" if name == "rounding" else value)
    if entry.get("inv_scale") is not None:
        number = (c_double if entry["dtype"] == "float64" else c_float)(float(entry["inv_scale"]))
        step.inv_scale = addressof(number)
    if entry.get("found_inf") is not None:
        step.found_inf = ctypes.pointer(c_float(float(entry["found_inf"])))
    library.probe_step(c_int(DTYPES.index(entry["dtype"])), c_void_p(addressof(tensor)), c_void_p(addressof(step)))
    return all(same(at[name], decode(text), entry["dtype"] if name == "y" else "") for name, text in entry["out"].items())


def same(a: np.ndarray, b: np.ndarray, dtype: str) -> bool:
    """Whether two arrays of bits are equal, a NaN being a NaN."""
    exponent = {"bfloat16": 0x7F80, "float16": 0x7C00}.get(dtype) or {4: 0x7F800000, 8: 0x7FF0000000000000}[a.itemsize]
    magnitude = a.dtype.type(2 ** (8 * a.itemsize - 1) - 1)
    nan = [bits & magnitude > exponent for bits in (a, b)]
    return bool(((a == b) | (nan[0] & nan[1])).all())


# ---- The mutants -------------------------------------------------------------------------------------------------------------


def one_ulp(name: str, to: float) -> tuple[str, str, str]:
    """Return the change of one constant by one unit in the last place."""
    text = re.search(rf"\b{name} = (-?0x[0-9a-fp.+-]+)f", (ROOT / "csrc/core/gaussian.h").read_text())
    assert text, name
    value = np.nextafter(np.float32(float.fromhex(text[1])), np.float32(to))
    return "gaussian.h", text[0], f"{name} = {float(value).hex()}f"


MUTANTS: dict[str, tuple[str, str, str]] = {
    "coupling sign": (
        "update.h",
        "h.coupling_in_momentum) d = d + V(h.k) * (t.y - t.x)",
        "h.coupling_in_momentum) d = d + V(h.k) * (t.x - t.y)",
    ),
    "noise 1 % too strong": ("update.h", "y = y + V(h.s) * z", "y = y + V(h.s) * (V(T(1.01)) * z)"),
    "noise sqrt(2) too strong": ("update.h", "y = y + V(h.s) * z", "y = y + V(h.s) * (V(T(1.4142135)) * z)"),
    "averaging reversed": ("update.h", "t.m = t.m + V(h.a) * (t.y - t.m)", "t.m = t.m + V(T(1) - h.a) * (t.y - t.m)"),
    "gradient averaging reversed": ("update.h", "t.m = t.m + V(h.a) * (d - t.m)", "t.m = t.m + V(T(1) - h.a) * (d - t.m)"),
    "average before rounding": ("update.h", "t.m = t.m + V(h.a) * (t.y - t.m)", "t.m = t.m + V(h.a) * (y - t.m)"),
    "anchor not moved": ("update.h", "t.x = t.x - V(h.lr) * d;", ""),
    "average not reset": ("update.h", "t.m = t.x;", ""),
    "decay after the momentum": (
        "update.h",
        "  V y = t.y - V(h.eta) * d;",
        "  d = d + V(h.wd) * t.y; V y = t.y - V(h.eta) * d;",
    ),
    "dampening ignored": ("update.h", "V(h.damp1) * d", "d"),
    "outer step from y": ("update.h", "h.langevin() ? t.x - t.m : t.m", "h.langevin() ? t.x - t.y : t.m"),
    "replica term reversed": ("update.h", "V(h.kr) * (t.x - t.c)", "V(h.kr) * (t.c - t.x)"),
    "lanes swapped": (
        "gaussian.h",
        "lane0 = rho * first;\n  lane1 = rho * second;",
        "lane0 = rho * second;\n  lane1 = rho * first;",
    ),
    "words in another order": ("gaussian.h", "auto radius = merge(w.w0, w.w2)", "auto radius = merge(w.w2, w.w0)"),
    "half bit dropped": ("gaussian.h", "from_unsigned(w0) + F(0.5f)", "from_unsigned(w0)"),
    "nine rounds": ("philox.h", "round < 10", "round < 9"),
    "rounding noise reused": ("philox.h", "kDomainRounding = 1u << 28", "kDomainRounding = 0"),
    "half to odd": ("rounding.h", "U(0x7FFFu) + (shift_right<16>(b) & U(1u))", "U(0x8000u)"),
    "stochastic overflow": ("rounding.h", "(b & U(0x80000000u)) | U(0x7F7F0000u)", "rounded"),
    **{
        f"{name} one unit {'up' if to > 0 else 'down'}": one_ulp(name, to)
        for name in oracle.COEFFICIENTS
        for to in (float("inf"), float("-inf"))
    },
}


def build(folder: Path, change: tuple[str, str, str] | None = None, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Build the portable kernels from a copy of the sources with one text changed everywhere it stands in a file."""
    sources = shutil.copytree(ROOT / "csrc", folder / "csrc")
    if change:
        name, old, new = change
        path = sources / "core" / name
        text = path.read_text()
        assert old in text, f"{name} no longer has {old!r}: bring this mutant up to date"
        path.write_text(text.replace(old, new))
    library = folder / "probe.so"
    files = [sources / "cpu/cpu.cpp", sources / "cpu/portable.cpp", ROOT / "tests/cpp/probe.cpp"]
    command = [*COMPILER.split(), *FLAGS, *flags, "-I", sources / "include", *files, "-o", library]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(library))


def test_the_unchanged_sources_agree(tmp_path):
    # cpu.cpp without DEEPRELAX_X86 has the portable kernels alone.
    assert disagreements(build(tmp_path)) == 0


@pytest.fixture(scope="module")
def disagreements_of(request, tmp_path_factory) -> Iterator[dict[str, Future[int]]]:
    """Builds that run side by side, of the mutants that are asked for in this run."""

    folder = tmp_path_factory.mktemp("mutants")

    def of(name: str) -> int:
        return disagreements(build(folder / re.sub(r"\W+", "-", name), MUTANTS[name]))

    names = [item.callspec.params["name"] for item in request.session.items if "disagreements_of" in item.fixturenames]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(of, name) for name in names}


@pytest.mark.mutant("the C++ formula")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, disagreements_of):
    assert disagreements_of[name].result() > 0


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the flag for fused multiply-add is that of x86")
def test_contraction_is_caught(tmp_path):
    if " fma " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no fused multiply-add")
    assert disagreements(build(tmp_path, flags=("-mfma", "-ffp-contract=fast", "-O2"))) > 0
