"""What the figures of a benchmark depend on."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import deeprelax_cuda as dr
from deeprelax_cuda.backends import cpu


def machine() -> dict[str, Any]:
    """Return the processor, the versions, the build and the commit."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    info = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deeprelax_cuda": dr.__version__,
        "build": cpu.build_info(),
        "commit": commit.stdout.strip() or None,
    }
