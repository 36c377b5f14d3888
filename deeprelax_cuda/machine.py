"""What results depend on beside their settings: versions and the computer, in the form in which they are kept as JSON."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform as python_platform
from pathlib import Path

import torch

from deeprelax_cuda import __version__
from deeprelax_cuda.backends import cpu
from deeprelax_cuda.commit import commit

__all__ = ["commit", "platform", "versions"]


def versions() -> dict[str, str | None]:
    """Return the versions of the package, of Python and of what computes; None for what there is not."""
    return {
        "deeprelax_cuda": __version__,
        "commit": commit(),
        "python": python_platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _triton(),
        "cuda": torch.version.cuda,
    }


def platform() -> dict[str, str | int | None]:
    """Return the system, the processor, the CPU threads that torch uses now, and the native module's instruction set."""
    return {
        "system": python_platform.platform(),
        "machine": python_platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": cpu.build_info().get("instruction_set"),
    }


def _triton() -> str | None:
    """Return Triton's version without importing it."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # some builds of torch bring it under another distribution's name
        names = importlib.metadata.packages_distributions().get("triton", [])
        return importlib.metadata.version(names[0]) if names else None


def _processor() -> str | None:
    """Return the processor's model name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, python_platform.processor()) or None
