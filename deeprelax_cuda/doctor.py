"""`deeprelax doctor`: what is installed here, which backend serves what, and whether each of them gives the right bits.

What a machine merely lacks (a GPU, Triton, a compiler) is a note. A problem is what is there and should work and does not.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deeprelax_cuda import backends, machine, native
from deeprelax_cuda.backends import cpu
from deeprelax_cuda.golden import selftest

#: Written by the kernel module of the NVIDIA driver while it is loaded.
DRIVER = Path("/proc/driver/nvidia/version")
#: Importing it imports Triton.
KERNELS = "deeprelax_cuda.triton_kernels.kernels"


@dataclass
class Findings:
    """What a probe found: for programs, for people (rows of a label and a text), and what should work and does not."""

    facts: Any
    rows: list[tuple[str, str]]
    problems: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Print what every probe found; return 1 where there is a problem, else 0."""
    found = {title: _examine(title, probe) for title, probe in PROBES.items()}
    problems = [problem for findings in found.values() for problem in findings.problems]
    if args.json:
        facts = {title.lower().replace(" ", "_").replace("-", "_"): findings.facts for title, findings in found.items()}
        print(json.dumps({**facts, "problems": problems}, indent=1, allow_nan=False))
    else:
        print(_text(found, problems))
    return 1 if problems else 0


def _examine(title: str, probe: Callable[[], Findings]) -> Findings:
    """Call a probe; one that fails is a problem itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fallbacks and of torch's search for a GPU: the probes say the same in words
            return probe()
    except Exception as error:
        said = f"could not be examined: {_words(error)}"
        return Findings(None, [("", said)], [f"{title}: {said}"])


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _text(found: dict[str, Findings], problems: list[str]) -> str:
    width = max(len(label) for findings in found.values() for label, _ in findings.rows)
    lines = []
    for title, findings in found.items():
        lines += [title, *(f"  {label:{width}}  {text}" for label, text in findings.rows), ""]
    return "\n".join([*lines, "problems", *(f"  {problem}" for problem in problems or ["none"])])


# ---- What is installed -------------------------------------------------------------------------------------------------------


def _versions() -> Findings:
    facts = {**machine.versions(), "hip": torch.version.hip}
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else f"HIP {facts['hip']}" if facts["hip"] else "CPUs only"
    rows = [
        ("deeprelax_cuda", str(facts["deeprelax_cuda"])),
        ("commit", facts["commit"] or "unknown"),
        ("python", str(facts["python"])),
        ("torch", f"{facts['torch']}, built for {build}"),
    ]
    return Findings(facts, rows)


def _triton() -> Findings:
    if importlib.util.find_spec("triton") is None:
        advice = "to have the triton backend, install triton (torch for CUDA or ROCm brings it)"
        return Findings({"version": None, "error": None}, [("version", "none: not installed"), ("advice", advice)])
    version = machine.versions()["triton"]
    rows = [("version", version or "unknown")]
    if (said := _why_not_imported("triton", *sys.path)) is not None:
        problem = f"triton: {version} is installed but cannot be imported: {said}"
        return Findings({"version": version, "error": said}, [*rows, ("import", f"fails: {said}")], [problem])
    rows.append(("import", "works"))
    if (said := _why_not_imported(KERNELS, *sys.path)) is not None:
        problem = f"triton: the kernels cannot be loaded with {version}: {said}"
        return Findings({"version": version, "error": said}, [*rows, ("kernels", f"cannot be loaded: {said}")], [problem])
    return Findings({"version": version, "error": None}, [*rows, ("kernels", "can be loaded")])


@functools.lru_cache(maxsize=8)
def _why_not_imported(module: str, *path: str) -> str | None:
    """Import a module in a process of its own, and return what it says when it fails.

    Triton loads compilers and drivers, which may fail in ways that nobody can catch.
    """
    code = f"import sys; sys.path[:] = {list(path)!r}; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 0:
        return None
    return (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]


def _native() -> Findings:
    if native.missing is not None:
        return _no_native(native.missing)
    info = cpu.build_info()
    used = info["instruction_set"]
    usable = cpu.instruction_sets()
    rows = [
        ("compiler", info["compiler"]),
        ("flags", info["flags"]),
        ("OpenMP", "yes" if info["openmp"] else "no: one thread"),
        ("nvcc", f"{info['nvcc']} for {info['cuda_architectures']}" if info["nvcc"] else "none: built without CUDA code"),
        ("instruction sets", ", ".join(f"{name} (in use)" if name == used else name for name in usable)),
    ]
    return Findings({**info, "instruction_sets": usable, "missing": None}, rows)


def _no_native(reason: str) -> Findings:
    """Tell a module that was left out from one that is there and does not load."""
    files = sorted(
        path.name for pattern in ("_native*.so", "_native*.pyd") for path in Path(native.__file__).parent.glob(pattern)
    )
    problems = []
    if files:
        reason = f"{', '.join(files)} is there but cannot be imported by Python {platform.python_version()}: {reason}"
        problems = [f"native module: {reason}; install the package again with this Python"]
    advice = "install the package again where there is a C++ compiler; until then the eager backend serves"
    return Findings({"missing": reason}, [("missing", reason), ("to have it", advice)], problems)


# ---- Devices -----------------------------------------------------------------------------------------------------------------


def _processor() -> Findings:
    facts = {**machine.platform(), "cores": os.cpu_count()}
    rows = [
        ("system", str(facts["system"])),
        ("processor", f"{facts['processor'] or 'unknown'}, {facts['machine']}, {facts['cores']} logical cores"),
        ("threads", f"{facts['threads']} (torch's)"),
    ]
    return Findings(facts, rows)


def _gpus() -> Findings:
    driver = _driver()
    rows = [("NVIDIA driver", driver or "none")]
    if not torch.cuda.is_available():
        reason, problems = _why_no_gpu(driver)
        return Findings({"driver": driver, "devices": [], "reason": reason}, [*rows, ("GPUs", f"none: {reason}")], problems)
    devices = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = f"{found.major}.{found.minor}"
        devices.append({"name": found.name, "compute_capability": capability, "memory_bytes": found.total_memory})
        memory = f"{found.total_memory / 2**30:.1f} GiB"
        rows.append((f"cuda:{index}", f"{found.name}, compute capability {capability}, {memory}"))
    return Findings({"driver": driver, "devices": devices, "reason": None}, rows)


def _driver() -> str | None:
    """Return the version of the NVIDIA driver that is loaded, None where there is none."""
    if not DRIVER.exists():
        return None
    # Its first line is like "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 04:11:21 UTC 2025".
    version = re.search(r"\b\d{3,}\.\d[\d.]*", DRIVER.read_text(encoding="utf-8", errors="replace"))
    return version[0] if version else "of unknown version"


def _why_no_gpu(driver: str | None) -> tuple[str, list[str]]:
    """Return why torch has no GPU, and the problem that this is where there is a driver that it should use."""
    if torch.version.cuda is None:
        return ("torch finds no AMD GPU" if torch.version.hip else "this torch is built for CPUs only"), []
    if driver is None:
        return "there is no NVIDIA driver", []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return f"hidden by CUDA_VISIBLE_DEVICES={visible}", []
    try:
        torch.cuda.current_device()  # raises what is_available() keeps to itself
        reason = "no device was found"
    except Exception as error:
        reason = _words(error)
    problem = f"GPUs: the NVIDIA driver is {driver}, but torch for CUDA {torch.version.cuda} cannot use it: {reason}"
    return reason, [problem]


# ---- Backends ----------------------------------------------------------------------------------------------------------------


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _unavailable(name: str, device: str) -> str | None:
    if name == "triton" and device != "cpu" and (said := _why_not_imported(KERNELS, *sys.path)):
        return f"the triton kernels cannot be loaded: {said}"
    return backends.load(name).unavailable(torch.device(device), torch.float32)


def _triton_should_serve(reason: str) -> bool:
    """Whether it is a problem that Triton does not, for this reason: not that the device is too old, or that it interprets."""
    there = importlib.util.find_spec("triton") is not None and torch.cuda.is_available()
    return there and os.environ.get("TRITON_INTERPRET", "0") == "0" and not reason.startswith("triton compiles for")


def _backends() -> Findings:
    named = os.environ.get("DEEPRELAX_BACKEND") or None
    rows = [("DEEPRELAX_BACKEND", named)] if named else []
    devices: dict[str, Any] = {}
    problems, refusals = [], []
    for device in _devices():
        reasons: dict[str, str | None] = {}
        for name in backends.NAMES:
            try:
                reasons[name] = _unavailable(name, device)
            except Exception as error:
                reasons[name] = _words(error)
                problems.append(f"backends: {name} cannot be asked about {device} tensors: {reasons[name]}")
        if (reason := reasons.get("cuda")) and device == "cuda" and torch.version.cuda and cpu.build_info().get("nvcc"):
            problems.append(f"backends: this build has CUDA kernels, but cannot use them: {reason}")
        chosen = None
        try:
            chosen = backends.select(device, torch.float32).name
        except Exception as error:
            refusals.append(" ".join(str(error).split()))
        if (reason := reasons.get("triton")) and device == "cuda" and chosen != "cuda" and _triton_should_serve(reason):
            problems.append(f"backends: Triton is installed, but cannot serve {device} tensors: {reason}")
        devices[device] = {"auto": chosen, "unavailable": reasons}
        serves = {name: 'serves, and is what "auto" picks' if name == chosen else "serves" for name in reasons}
        rows += [(f"{device} tensors, {name}", f"cannot: {why}" if why else serves[name]) for name, why in reasons.items()]
    # A backend named for all tensors may be one that serves only some devices; it must serve somewhere.
    if refusals and (not named or len(refusals) == len(_devices())):
        problems.append(f"backends: {refusals[-1]}")
    rows += [("refused", refusal) for refusal in refusals]
    return Findings({"DEEPRELAX_BACKEND": named, "devices": devices}, rows, problems)


def _self_test() -> Findings:
    """Put the golden file to each backend that serves a device, and to the native module once per instruction set."""
    findings = Findings([], [])
    for device in _devices():
        for name in backends.NAMES:
            try:
                if _unavailable(name, device):
                    continue
                sets = cpu.instruction_sets() if name == cpu.NAME else [None]
            except Exception:  # the probe of the backends says it
                continue
            for instruction_set in sets:
                _test_backend(findings, device, name, instruction_set)
    return findings


def _test_backend(findings: Findings, device: str, name: str, instruction_set: str | None) -> None:
    label = f"{device} tensors, {name}{f' ({instruction_set})' if instruction_set else ''}"
    using: AbstractContextManager[None] = cpu.instruction_set(instruction_set) if instruction_set else nullcontext()
    start = time.perf_counter()
    entries = 0
    failures: list[str] = []
    try:
        with using:
            entries, failures = selftest.run(name, device)
        said = f"{len(failures)} of {entries} entries differ, first {failures[0]}" if failures else ""
    except Exception as error:
        said = f"failed: {_words(error)}"
        failures = [said]
    seconds = time.perf_counter() - start
    findings.facts.append(
        {
            "device": device,
            "backend": name,
            "instruction_set": instruction_set,
            "entries": entries,
            "failures": failures,
            "seconds": seconds,
        }
    )
    findings.rows.append((label, said or f"{entries} entries, all bits right, {seconds:.2f} s"))
    if said:
        findings.problems.append(f"self-test: {label}: {said}")


PROBES: dict[str, Callable[[], Findings]] = {
    "versions": _versions,
    "triton": _triton,
    "native module": _native,
    "platform": _processor,
    "GPUs": _gpus,
    "backends": _backends,
    "self-test": _self_test,
}
